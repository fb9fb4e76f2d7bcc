// scatter_apply and scatter_apply_batched in CUDA C++: one kernel, a batch of one or of a whole model.
//
//   w = weight[indices[i]], v = values[i]; saved[i] = w if kept; w <- v | w + alpha (v - w) | w + alpha v
//
// Shapes: indices, values, saved [nnz] in one arena; part p of it belongs to weights[p]. Indices are unique within a
// part and weights do not overlap, so each thread owns its entries: no atomics, no race. float32 arithmetic (float64
// for float64), rounded once. Deterministic.
// An index outside its weight is skipped, so nothing outside is written whatever the arena holds.
//
// A thread handles kEntries entries, blockDim apart: loads of indices and values are coalesced at any alignment, and
// neighbours in a warp are neighbours in the sorted list, which often share a sector of the weight.
#pragma once

#define SHIRA_ISA cuda
#include "../shared/element.h"
#include "../shared/scatter_form.h"
#include "batch.cuh"

namespace shira {

template <Mode kMode, int kParts, class T, class V, class Index>
__global__ void __launch_bounds__(kThreads)
    scatter_apply_kernel(const __grid_constant__ Batch<WeightTarget, kParts> batch, const Index* __restrict__ indices,
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
      const WeightTarget* target = target_of(batch, i);
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

}  // namespace shira
