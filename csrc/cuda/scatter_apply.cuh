// scatter_apply and scatter_apply_batched in CUDA C++: one kernel, a batch of one or of a whole model.
//
//   w = weight[indices[i]], v = values[i]; saved[i] = w if kept; w <- v | w + alpha (v - w) | w + alpha v
//
// Shapes: indices, values, saved [nnz] in one arena; part p of it belongs to weights[p]. Indices are unique within a
// part and weights do not overlap, so each thread owns its entries: no atomics, no race. float32 arithmetic (float64
// for float64), rounded once. Deterministic.
// An index outside its weight is skipped, so nothing outside is written whatever the arena holds.
//
// Addresses, sizes and (if the host knows them) borders of the weights travel in the kernel's arguments: no copy to the
// device, so a call can be captured in a CUDA graph. A thread handles kEntries entries, blockDim apart: loads of
// indices and values are coalesced at any alignment, and neighbours in a warp are neighbours in the sorted list, which
// often share a sector of the weight.
#pragma once

#include <cuda_runtime.h>

#define SHIRA_ISA cuda
#include "../shared/element.h"
#include "../shared/scatter_form.h"

namespace shira {

constexpr int kThreads = 256;
constexpr int kEntries = 4;  // independent reads and writes in flight for each thread
#if CUDART_VERSION >= 12010
constexpr int kMaxParts = 1024;  // of 24 bytes: kernel arguments hold 32 764 bytes
#else
constexpr int kMaxParts = 160;  // of 24 bytes: kernel arguments hold 4096 bytes
#endif

struct ScatterTarget {
  void* weight;
  int64_t numel;
  int64_t begin;  // of its part in the arena, where the host knows it
};

// Weights [first, first + count) of a call, whose parts are [begin, end) of the arena.
template <int kParts>
struct ScatterBatch {
  ScatterTarget targets[kParts];
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
template <int kParts>
__device__ inline const ScatterTarget* target_of(const ScatterBatch<kParts>& batch, int64_t i) {
  if constexpr (kParts == 1) return &batch.targets[0];
  if (batch.offsets == nullptr)
    return &batch.targets[part_of(i, batch.count, [&](int part) { return batch.targets[part].begin; })];
  const int part = part_of(i, batch.weights, [&](int at) { return batch.offsets[at]; }) - batch.first;
  return part >= 0 && part < batch.count ? &batch.targets[part] : nullptr;
}

template <Mode kMode, int kParts, class T, class V, class Index>
__global__ void __launch_bounds__(kThreads)
    scatter_apply_kernel(const __grid_constant__ ScatterBatch<kParts> batch, const Index* __restrict__ indices,
                         const V* __restrict__ values, T* __restrict__ saved, double alpha) {
  using C = typename cuda::Compute<T>::type;
  const int64_t start = batch.begin + static_cast<int64_t>(blockIdx.x) * (kThreads * kEntries) + threadIdx.x;
  T* entries[kEntries];
  V v[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    entries[k] = nullptr;
    if (i < batch.end) {
      const ScatterTarget* target = target_of(batch, i);
      const auto index = static_cast<int64_t>(indices[i]);
      if (target != nullptr && index >= 0 && index < target->numel)
        entries[k] = static_cast<T*>(target->weight) + index;
      v[k] = values[i];
    }
  }
  T w[kEntries];
  if (kMode != Mode::Replace || saved != nullptr) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k)
      if (entries[k] != nullptr) w[k] = *entries[k];
  }
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    if (entries[k] == nullptr) continue;
    if (saved != nullptr) saved[start + k * kThreads] = w[k];
    if constexpr (kMode == Mode::Replace) {
      *entries[k] = v[k];
    } else {
      const C old = static_cast<C>(cuda::widen(w[k])), value = static_cast<C>(cuda::widen(v[k]));
      const C strength = static_cast<C>(alpha);
      *entries[k] = cuda::narrow<T>(kMode == Mode::Interpolate ? cuda::Interpolate::update(old, value, strength)
                                                               : cuda::Add::update(old, value, strength));
    }
  }
}

// Sets *wrong where indices of a part are outside its weight or do not rise.
template <int kParts, class Index>
__global__ void __launch_bounds__(kThreads) check_indices_kernel(const __grid_constant__ ScatterBatch<kParts> batch,
                                                                 const Index* __restrict__ indices, int* wrong) {
  const int64_t i = batch.begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch.end) return;
  const ScatterTarget* target = target_of(batch, i);
  if (target == nullptr) return;
  const bool first = i == batch.begin || target_of(batch, i - 1) != target;  // batches begin where a part begins
  if (indices[i] < 0 || indices[i] >= target->numel || (!first && indices[i - 1] >= indices[i])) *wrong = 1;
}

}  // namespace shira
