// What kernels over a whole model share: the weights of a launch, in its arguments, and which one an entry belongs to.
//
// Addresses, sizes and (if the host knows them) borders of the weights travel in the kernel's arguments: no copy to the
// device, so a call can be captured in a CUDA graph. A launch copies all of its arguments, used or not, so there are
// instances for several numbers of weights.
//
// A block has kChunk neighbours of a list. Its threads load their entries first; while those loads are in flight, all
// find the part of the first one, reading the same addresses, and walk on to that of the last. Most blocks lie in one
// part. Walking past each of a thousand parts of one entry takes some 25 us; a search by each entry would be faster
// there, and slower everywhere else.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace shira {

constexpr int kThreads = 256;
constexpr int kEntries = 4;  // of a thread: independent reads and writes in flight
constexpr int kChunk = kThreads * kEntries;
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif
// Targets of a launch: kernel arguments hold them and, in 256 bytes, everything else.
template <class Target>
constexpr int kMaxParts = (kArgumentBytes - 256) / sizeof(Target) - 1;
// Instances for fewer weights, where a launch has fewer bytes to copy.
template <class Target>
constexpr int kFewParts = kMaxParts<Target> < 32 ? kMaxParts<Target> : 32;
template <class Target>
constexpr int kManyParts = kMaxParts<Target> < 256 ? kMaxParts<Target> : 256;

template <int kLists_>
struct WeightTarget {
  static constexpr int kLists = kLists_;
  void* weight;
  int64_t numel;
  int64_t begin[kLists];  // of its part in the arena of each list, where the host knows it
};

// What a launch has of one sorted list: entries [begin, end) of the arena.
struct ListRange {
  int64_t begin, end;
  const int64_t* offsets;  // of the whole call, on the device; null where the targets hold the borders
};

// Weights [first, first + count) of a call; of one more target only the begins count, where the last parts end.
template <class Target, int kParts_>
struct Batch {
  static constexpr int kParts = kParts_;
  Target targets[kParts + 1];
  ListRange lists[Target::kLists];
  int first, count;
};

// Where the part of target `part` begins in the arena, for the batch's `count` where its last part ends.
template <class Target, int kParts>
__device__ inline int64_t border(const Batch<Target, kParts>& batch, int list, int part) {
  const int64_t* offsets = batch.lists[list].offsets;
  return offsets != nullptr ? offsets[batch.first + part] : batch.targets[part].begin[list];
}

// The last of `count` parts that begins at or before entry i, or the first; whatever the borders are, one of these. It
// reads several borders at once, so that few reads wait for each other; begin(count) may be read too.
template <class Begin>
__device__ inline int part_of(int64_t i, int count, const Begin& begin) {
  constexpr int kWays = 8;
  int low = 0, high = count;
#pragma unroll 1
  while (high - low > 1) {
    const int step = (high - low + kWays - 1) / kWays;
    int64_t begins[kWays];
#pragma unroll
    for (int way = 1; way < kWays; ++way) begins[way] = begin(min(low + way * step, count));
    int found = low;
#pragma unroll
    for (int way = 1; way < kWays; ++way)
      if (low + way * step < high && begins[way] <= i) found = low + way * step;
    high = min(found + step, high);
    low = found;
  }
  return low;
}

// Entries [begin, end) of a list that a block has, in the parts from `first_part` to `last_part`.
struct Run {
  int64_t begin, end;
  int first_part, last_part;
};

// What a block's entries [begin, end) have in the parts of the batch, which may be nothing. All threads get the same.
template <class Target, int kParts>
__device__ inline Run run_of(const Batch<Target, kParts>& batch, int list, int64_t begin, int64_t end) {
  Run run{begin, end, 0, 0};
  if constexpr (kParts > 1) {
    if (batch.lists[list].offsets != nullptr) {
      run.begin = max(run.begin, border(batch, list, 0));
      run.end = min(run.end, border(batch, list, batch.count));
    }
    if (run.begin >= run.end) return run;
    const int64_t* offsets = batch.lists[list].offsets;
    run.first_part = offsets != nullptr
                         ? part_of(run.begin, batch.count, [&](int part) { return offsets[batch.first + part]; })
                         : part_of(run.begin, batch.count, [&](int part) { return batch.targets[part].begin[list]; });
    run.last_part = run.first_part;
    while (run.last_part + 1 < batch.count && border(batch, list, run.last_part + 1) < run.end) ++run.last_part;
  }
  return run;
}

// The parts of the entries start + k * kThreads of a run.
template <class Target, int kParts, int kCount>
__device__ inline void parts_of(const Batch<Target, kParts>& batch, int list, const Run& run, int64_t start,
                                int (&parts)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) parts[k] = run.first_part;
#pragma unroll 1
  for (int part = run.first_part + 1; part <= run.last_part; ++part) {
    const int64_t begin = border(batch, list, part);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (start + k * kThreads >= begin) parts[k] = part;
  }
}

// An index is refused as wrong where it is not below the number of elements, taken as unsigned.
__device__ inline bool is_inside(int64_t index, int64_t numel) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(numel);
}

}  // namespace shira
