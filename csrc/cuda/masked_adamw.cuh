// masked_adamw in CUDA C++: one launch for a whole model.
//
//   w = master[i] or weight[indices[i]], g = grad[indices[i]] or grad[i - begin of its part];
//   AdamW::update(w, g, exp_avg[i], exp_avg_sq[i])
//
// Shapes: indices, exp_avg, exp_avg_sq, master [nnz] in one arena; part p of it belongs to weights[p]. Indices are
// unique within a part and weights do not overlap, so each thread owns its entries: no atomics, no race. float32
// arithmetic (float64 for float64), rounded once. Deterministic. An index outside its weight, or an entry beyond a
// compact gradient, is skipped.
//
// A step on the device is read there, so a captured graph may be replayed with another; what depends on it is float64
// work, done by one thread of a block. Entries of a thread are blockDim apart, as in scatter_apply.
#pragma once

#define SHIRA_ISA cuda
#include "../shared/adamw.h"
#include "batch.cuh"

namespace shira {

struct AdamWTarget : WeightTarget {
  const void* grad;
  int64_t compact;  // the number of entries of a compact gradient; -1 for one of the weight's shape
};

template <class C>
struct AdamWArena {
  C* exp_avg;
  C* exp_avg_sq;
  C* master;           // null where there is none
  const float* step;   // null where the host knows it
  int64_t step_count;  // where the host knows it
  AdamWNumbers numbers;
};

__device__ inline int64_t begin_of(const WeightTarget& weight, const int64_t* offsets, int part) {
  return offsets == nullptr ? weight.begin : offsets[part];
}

template <int kParts, class T, class G, class Index>
__global__ void __launch_bounds__(kThreads)
    masked_adamw_kernel(const __grid_constant__ Batch<AdamWTarget, kParts> batch, const Index* __restrict__ indices,
                        const AdamWArena<typename cuda::Compute<T>::type> arena) {
  using C = typename cuda::Compute<T>::type;
  __shared__ cuda::AdamW<C> shared;
  if (threadIdx.x == 0)
    shared =
        cuda::AdamW<C>::of(arena.numbers, arena.step == nullptr ? arena.step_count : static_cast<int64_t>(*arena.step));
  __syncthreads();
  const cuda::AdamW<C> adamw = shared;
  const int64_t start = batch.begin + static_cast<int64_t>(blockIdx.x) * (kThreads * kEntries) + threadIdx.x;
  T* entries[kEntries];
  C w[kEntries], g[kEntries], m[kEntries], v[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    entries[k] = nullptr;
    if (i >= batch.end) continue;
    const AdamWTarget* target = target_of(batch, i);
    const auto index = static_cast<int64_t>(indices[i]);
    if (target == nullptr || index < 0 || index >= target->numel) continue;
    const bool dense = target->compact < 0;
    const auto part = static_cast<int>(target - batch.targets) + batch.first;
    const int64_t at = dense ? index : i - begin_of(*target, batch.offsets, part);
    if (at < 0 || (!dense && at >= target->compact)) continue;
    entries[k] = static_cast<T*>(target->weight) + index;
    g[k] = static_cast<C>(cuda::widen(static_cast<const G*>(target->grad)[at]));
    m[k] = arena.exp_avg[i];
    v[k] = arena.exp_avg_sq[i];
    w[k] = arena.master != nullptr ? arena.master[i] : static_cast<C>(cuda::widen(*entries[k]));
  }
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    if (entries[k] == nullptr) continue;
    const int64_t i = start + k * kThreads;
    adamw.update(w[k], g[k], m[k], v[k]);
    arena.exp_avg[i] = m[k];
    arena.exp_avg_sq[i] = v[k];
    if (arena.master != nullptr) arena.master[i] = w[k];
    *entries[k] = cuda::narrow<T>(w[k]);
  }
}

}  // namespace shira
