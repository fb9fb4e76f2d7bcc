// How threads share the sorted lists of a call, and the checks of what the lists hold; for every op that writes
// entries.
//
// Threads split the sorted list in equal parts, each border moved on to the first entry on another cache line of the
// weight, so no two threads write one line. Every entry is computed alone: the same bits at any number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../host/checks.h"
#include "kernels.h"
#include "split.h"

namespace shira {

constexpr int64_t kEntriesPerThread = 16384;  // below this a thread costs more than it saves

// The sorted lists of a call, and the weights they belong to.
struct Lists {
  struct Part {
    char* weight;
    int64_t begin, end;
  };
  std::vector<Part> parts;
  const char* indices;
  int64_t nnz;
  int64_t index_size, element_size;  // bytes

  // The weights are not empty.
  Lists(const std::vector<WeightPart>& weights, const Tensor& index_tensor);

  int64_t index(int64_t i) const {
    return index_size == 8 ? reinterpret_cast<const int64_t*>(indices)[i]
                           : reinterpret_cast<const int32_t*>(indices)[i];
  }

  std::vector<Part>::const_iterator part_of(int64_t i) const {
    return std::upper_bound(parts.begin(), parts.end(), i, [](int64_t at, const Part& part) { return at < part.end; });
  }

  // The first entry of the part at or after a position of its weight.
  int64_t find(const Part& part, int64_t position) const {
    int64_t low = part.begin, high = part.end;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index(middle) < position)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // Calls f(part, begin, end) for what each part has in [begin, end).
  template <class F>
  void for_each(int64_t begin, int64_t end, const F& f) const {
    for (auto part = part_of(begin); begin < end; ++part) {
      const int64_t stop = std::min(end, part->end);
      if (begin < stop) f(*part, begin, stop);
      begin = stop;
    }
  }

  // The border of the chunk that nominally begins at i.
  int64_t border(int64_t i) const {
    if (i <= 0 || i >= nnz) return std::clamp<int64_t>(i, 0, nnz);
    const auto part = part_of(i);
    return next_line(i, part->begin, part->end, reinterpret_cast<uintptr_t>(part->weight), element_size,
                     [this](int64_t at) { return index(at); });
  }
};

// As many threads as a number of entries is worth.
inline int64_t chunks_of(int64_t nnz) {
  return std::clamp<int64_t>(nnz / kEntriesPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
}

// f(chunk) for each of them.
template <class F>
void over_chunks(int64_t chunks, const F& f) {
  if (chunks == 1) return f(0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
  });
}

// f(chunk, chunks) on as many threads as the number of entries is worth.
template <class F>
void over_threads(int64_t nnz, const F& f) {
  const int64_t chunks = chunks_of(nnz);
  over_chunks(chunks, [&](int64_t chunk) { f(chunk, chunks); });
}

// Over all entries, on several threads: f(part, begin, end) for runs of the parts.
template <class F>
void for_each_run(const Lists& lists, const F& f) {
  over_threads(lists.nnz, [&](int64_t chunk, int64_t chunks) {
    lists.for_each(lists.border(chunk * lists.nnz / chunks), lists.border((chunk + 1) * lists.nnz / chunks), f);
  });
}

// Indices are sorted, unique and inside their weights.
void check_contents(const char* op, const std::vector<WeightPart>& weights, const Lists& lists,
                    const CpuKernels& kernels, const char* name = "indices");

}  // namespace shira
