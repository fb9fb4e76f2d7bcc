// What kernels over a whole model share: the weights of a launch, in its arguments, and which one an entry belongs to.
//
// Addresses, sizes and (if the host knows them) borders of the weights travel in the kernel's arguments: no copy to the
// device, so a call can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace shira {

constexpr int kThreads = 256;
constexpr int kEntries = 4;  // of a thread: independent reads and writes in flight
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = 4096;
#endif
// Targets of a launch: kernel arguments hold them and, in 256 bytes, everything else.
template <class Target>
constexpr int kMaxParts = (kArgumentBytes - 256) / sizeof(Target);

struct WeightTarget {
  void* weight;
  int64_t numel;
  int64_t begin;  // of its part in the arena, where the host knows it
};

// Weights [first, first + count) of a call, whose parts are [begin, end) of the arena.
template <class Target, int kParts>
struct Batch {
  Target targets[kParts];
  int first, count;
  int64_t begin, end;
  const int64_t* offsets;  // of the whole call, on the device; null where the targets hold the borders
  int weights;             // of the whole call
};

// The last part that begins at or before i; always one of [0, parts).
template <class Begin>
__device__ inline int part_of(int64_t i, int parts, const Begin& begin) {
  int low = 0, high = parts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begin(middle) <= i)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Null where entry i of the arena belongs to none of the batch's weights.
template <class Target, int kParts>
__device__ inline const Target* target_of(const Batch<Target, kParts>& batch, int64_t i) {
  if constexpr (kParts == 1) return &batch.targets[0];
  if (batch.offsets == nullptr)
    return &batch.targets[part_of(i, batch.count, [&](int part) { return batch.targets[part].begin; })];
  const int part = part_of(i, batch.weights, [&](int at) { return batch.offsets[at]; }) - batch.first;
  return part >= 0 && part < batch.count ? &batch.targets[part] : nullptr;
}

}  // namespace shira
