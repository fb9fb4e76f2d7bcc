// scatter_apply and scatter_apply_batched in CUDA C++: one kernel, a batch of one or of a whole model.
//
//   w = weight[indices[i]], v = values[i]; saved[i] = w if kept; w <- v | w + alpha (v - w) | w + alpha v
//
// Shapes: indices, values, saved [nnz] in one arena; part p of it belongs to weights[p]. Indices are unique within a
// part and weights do not overlap, so each thread owns its entries: no atomics, no race. float32 arithmetic (float64
// for float64), rounded once. Deterministic.
// An index outside its weight is skipped, so nothing outside is written whatever the arena holds.
//
// Speed: bytes are those of the lists plus a sector of 32 bytes of the weight for each one touched, read (if kept or
// computed on) and written. Chain: indices -> old entries -> stores, two trips to memory, one without old entries; the
// search for the parts lies beside the first. A thread has kEntries entries, blockDim apart: loads of the lists are
// coalesced at any alignment, and neighbours in a warp are neighbours in the sorted list, which often share a sector.
#pragma once

#define SHIRA_ISA cuda
#include "../shared/element.h"
#include "../shared/scatter_form.h"
#include "batch.cuh"

namespace shira {

// What the formula of a mode makes of an entry w, rounded once.
template <Mode kMode, class T, class V>
__device__ inline T updated(T w, V v, double alpha) {
  if constexpr (kMode == Mode::Replace) {
    return v;
  } else {
    using C = typename cuda::Compute<T>::type;
    const C old = static_cast<C>(cuda::widen(w)), value = static_cast<C>(cuda::widen(v));
    const C strength = static_cast<C>(alpha);
    return cuda::narrow<T>(kMode == Mode::Interpolate ? cuda::Interpolate::update(old, value, strength)
                                                      : cuda::Add::update(old, value, strength));
  }
}

template <Mode kMode, int kParts, class T, class V, class Index>
__global__ void __launch_bounds__(kThreads)
    scatter_apply_kernel(const __grid_constant__ Batch<WeightTarget<1>, kParts> batch,
                         const Index* __restrict__ indices, const V* __restrict__ values, T* __restrict__ saved,
                         double alpha) {
  const int64_t begin = batch.lists[0].begin + static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = min(begin + kChunk, batch.lists[0].end), start = begin + threadIdx.x;
  Index index[kEntries];
  V v[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    if (i < end) {
      index[k] = indices[i];
      v[k] = values[i];
    }
  }
  const Run run = run_of(batch, 0, begin, end);
  int parts[kEntries];
  parts_of(batch, 0, run, start, parts);
  T* entries[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    entries[k] = nullptr;
    if (i >= run.begin && i < run.end) {
      const auto& target = batch.targets[parts[k]];
      if (is_inside(index[k], target.numel)) entries[k] = static_cast<T*>(target.weight) + index[k];
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
    *entries[k] = updated<kMode>(w[k], v[k], alpha);
  }
}

}  // namespace shira
