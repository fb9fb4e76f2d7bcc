// topk_indices on the CPU: the threshold by counting the digits of the keys, then one pass that emits the indices.
//
// Each pass counts 16 bits of the keys (8 of few scores), from the top: one pass is exact for elements of 2 bytes, and
// later ones count only keys that share all higher digits with the threshold. Chunks of the scores have their own
// tables, so a chunk knows how many indices the ones before it emit; ties are taken from the lowest chunks. The time is
// linear in the scores whatever they are, and the result the same at any number of threads.
//
// A sample gives a bound that the threshold is most likely above, so that the first pass skips most blocks of scores.
// What reaches it is kept, and is all that later passes read. If fewer than k scores do, the pass is repeated without a
// bound; the result is the same.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../host/checks.h"
#include "kernels.h"

namespace shira {
namespace {

constexpr const char* kOp = "topk_indices";
constexpr int64_t kScoresPerThread = 65536;   // below this a thread costs more than it saves
constexpr int64_t kChunk = int64_t{1} << 31;  // at most: what a table's counters hold
constexpr int64_t kSample = 1 << 15, kMinSampled = 1 << 20;
constexpr int kTables = 4;

struct Chunk {
  int64_t begin, end;
  const char* scores;  // what the next pass reads: the chunk, or what was kept of it
  int64_t count;
  std::vector<uint32_t> counts = {}, positions = {};
  std::vector<char> kept = {};
  int64_t above = 0, equal = 0;  // scores above the threshold, and at it
};

struct Search {
  const char* score;
  int64_t numel, element_size, k;
  TopkIndices kernels;
  std::vector<Chunk> chunks;

  const char* at(int64_t i) const { return score + i * element_size; }

  template <class F>
  void over_chunks(const F& f) {
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(chunks[i]);
    });
  }

  // Fills each chunk's first table, and keeps what it counts if that is at most `room` of each chunk's scores. Returns
  // whether there is a NaN.
  bool count(const TopkDigit& digit, double room = 0) {
    const int64_t stride = digit.mask + 1;
    std::vector<char> nan(chunks.size());
    over_chunks([&](Chunk& chunk) {
      chunk.counts.assign(kTables * stride, 0);
      uint32_t* counts = chunk.counts.data();
      TopkKept kept{nullptr, nullptr, static_cast<int64_t>(room * static_cast<double>(chunk.count)), -1};
      if (kept.room) {
        chunk.positions.resize(kept.room);
        chunk.kept.resize(kept.room * element_size);
        kept.positions = chunk.positions.data();
        kept.scores = chunk.kept.data();
      }
      nan[&chunk - chunks.data()] =
          kernels.count(chunk.scores, chunk.count, digit, counts, kept.room ? &kept : nullptr);
      if (kept.room) chunk.positions.resize(std::max<int64_t>(kept.count, 0));
      for (int table = 1; table < kTables; ++table)
        for (int64_t d = 0; d < stride; ++d) counts[d] += counts[table * stride + d];
    });
    return std::any_of(nan.begin(), nan.end(), [](char found) { return found != 0; });
  }

  // Where in a sorted sample the bound is: more than k scores reach it, unless the sample is off by six deviations.
  int64_t rank() const {
    const double expected = static_cast<double>(k) / static_cast<double>(numel) * kSample;
    return static_cast<int64_t>(expected + 6 * std::sqrt(expected) + 16);
  }

  // A key that about k scores or a few more reach; the smallest where that would not save much.
  int64_t likely_bound() const {
    const int64_t rank = this->rank();
    if (numel < kMinSampled || rank > kSample / 4) return std::numeric_limits<int64_t>::min();
    std::vector<int64_t> keys(kSample);
    const int64_t stride = numel / kSample;
    uint64_t random = 0;
    for (int64_t i = 0; i < kSample; ++i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      keys[i] = kernels.key(score, i * stride + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(stride)));
    }
    std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<int64_t>());
    return keys[rank];
  }

  // Later passes read what was kept, where there was room for all of it.
  void narrow() {
    for (Chunk& chunk : chunks) {
      if (chunk.positions.empty()) continue;
      chunk.scores = chunk.kept.data();
      chunk.count = static_cast<int64_t>(chunk.positions.size());
    }
  }

  // The largest digit that, with those above it, `wanted` scores have; less than `lowest` if there is none. `wanted`
  // loses the scores above it, which the chunks note.
  int64_t choose(int64_t digits, int64_t lowest, int64_t& wanted) {
    int64_t d = digits - 1, above = 0;
    for (; d >= lowest; --d) {
      int64_t here = 0;
      for (const Chunk& chunk : chunks) here += chunk.counts[d];
      if (above + here >= wanted) break;
      above += here;
    }
    if (d < lowest) return d;
    wanted -= above;
    for (Chunk& chunk : chunks) {
      for (int64_t other = d + 1; other < digits; ++other) chunk.above += chunk.counts[other];
      chunk.equal = chunk.counts[d];
    }
    return d;
  }
};

}  // namespace

static Tensor topk_indices(const Tensor& scores, int64_t k) {
  const Element element = element_of(dtype_of(scores));
  if (element == Element::Other)
    fail(kOp, "score", "must be float64, float32, bfloat16 or float16, got " + dtype_name(dtype_of(scores)));
  check_storage(kOp, "score", scores);
  const int64_t numel = scores.numel();
  if (k < 0 || k > numel)
    fail(kOp, "k", "must lie in [0, " + std::to_string(numel) + "], the number of scores, got " + std::to_string(k));
  const Tensor score = as_contiguous(kOp, "score", scores);
  const CpuKernels& kernels = cpu_kernels();
  const bool wide = numel >= (int64_t{1} << 31);
  Search search{
      static_cast<const char*>(score.data_ptr()), numel, static_cast<int64_t>(score.element_size()), k, {}, {}};
  search.kernels = kernels.topk_indices(search.element_size);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), numel / kScoresPerThread);
  const int64_t chunks = std::max<int64_t>({1, threads, (numel + kChunk - 1) / kChunk});
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = numel / chunks * i, end = i + 1 < chunks ? numel / chunks * (i + 1) : numel;
    search.chunks.push_back({begin, end, search.at(begin), end - begin});
  }

  const int bits = static_cast<int>(8 * search.element_size), width = numel < kScoresPerThread ? 8 : 16;
  const int64_t half = int64_t{1} << (width - 1);
  TopkDigit digit{};
  digit.mask = 2 * half - 1;
  digit.flip = half;  // the highest digit is signed: its table begins with the lowest negative one
  digit.shift = bits - width;
  digit.low = std::numeric_limits<int64_t>::min() >> (64 - bits);
  digit.high = ~digit.low;
  digit.infinity = element == Element::BFloat16  ? 0x7f80
                   : element == Element::Float16 ? 0x7c00
                   : element == Element::Float32 ? 0x7f800000
                                                 : 0x7ff0000000000000;
  const int64_t least = digit.low;
  if (k) digit.low = std::max(least, search.likely_bound()) & -(int64_t{1} << digit.shift);
  // Twice what the bound lets through if the sample is right.
  const double room = digit.low > least ? 2.0 * search.rank() / kSample : 0;
  if (search.count(digit, room)) fail(kOp, "score", "must not hold NaN: NaN scores are refused");
  Tensor indices = torch::stable::new_empty(
      score, {k}, wide ? torch::headeronly::ScalarType::Long : torch::headeronly::ScalarType::Int);
  count_call(kernels);
  if (k == 0) return indices;

  int64_t wanted = k;
  int64_t chosen = search.choose(2 * half, (digit.low >> digit.shift) + half, wanted);
  if (chosen < (digit.low >> digit.shift) + half) {
    digit.low = least;
    search.count(digit);
    chosen = search.choose(2 * half, 0, wanted);
  } else {
    search.narrow();
  }
  int64_t threshold = (chosen - half) * (int64_t{1} << digit.shift);
  digit.flip = 0;
  while (digit.shift > 0) {
    digit.low = threshold;
    digit.high = threshold + ((int64_t{1} << digit.shift) - 1);
    digit.shift -= width;
    search.count(digit);
    threshold += search.choose(2 * half, 0, wanted) * (int64_t{1} << digit.shift);
  }

  struct Share {
    int64_t ties, first;
  };
  std::vector<Share> shares;
  int64_t first = 0;
  for (const Chunk& chunk : search.chunks) {
    const int64_t ties = std::min(wanted, chunk.equal);
    shares.push_back({ties, first});
    wanted -= ties;
    first += chunk.above + ties;
  }
  char* out = static_cast<char*>(indices.data_ptr());
  search.over_chunks([&](Chunk& chunk) {
    const Share& share = shares[&chunk - search.chunks.data()];
    const bool narrowed = chunk.scores != search.at(chunk.begin);
    char* own = out + share.first * (wide ? 8 : 4);
    if (!narrowed) return search.kernels.emit(search.score, chunk.begin, chunk.end, threshold, share.ties, own, wide);
    search.kernels.emit(chunk.scores, 0, chunk.count, threshold, share.ties, own, wide);
    for (int64_t i = 0; i < chunk.above + share.ties; ++i) {
      if (wide) {
        int64_t& index = reinterpret_cast<int64_t*>(own)[i];
        index = chunk.begin + chunk.positions[index];
      } else {
        int32_t& index = reinterpret_cast<int32_t*>(own)[i];
        index = static_cast<int32_t>(chunk.begin + chunk.positions[index]);
      }
    }
  });
  return indices;
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("topk_indices", TORCH_BOX(&shira::topk_indices)); }
