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
// Speed: bytes are index, moments and master (4 bytes each, moments and master read and written) and a sector of 32
// bytes of the weight and of a dense gradient for each one touched. Chain: indices -> gradient and weight -> stores,
// two trips to memory; moments and the search for the parts lie beside the first. What depends on the step is float64
// work: the host does it, or, where the step is on the device (so that a captured graph may be replayed with another),
// one thread of a block while the loads are in flight. Entries of a thread are blockDim apart, as in scatter_apply.
#pragma once

#define SHIRA_ISA cuda
#include "../shared/adamw.h"
#include "batch.cuh"

namespace shira {

struct AdamWTarget : WeightTarget<1> {
  const void* grad;
  int64_t compact;  // the number of entries of a compact gradient; -1 for one of the weight's shape
};

template <class C>
struct AdamWArena {
  C* exp_avg;
  C* exp_avg_sq;
  C* master;          // null where there is none
  const float* step;  // on the device; null where the host knew it
  AdamWNumbers numbers;
  cuda::AdamW<C> adamw;  // where the host knew the step
};

template <int kParts, class T, class G, class Index>
__global__ void __launch_bounds__(kThreads)
    masked_adamw_kernel(const __grid_constant__ Batch<AdamWTarget, kParts> batch, const Index* __restrict__ indices,
                        const __grid_constant__ AdamWArena<typename cuda::Compute<T>::type> arena) {
  using C = typename cuda::Compute<T>::type;
  __shared__ cuda::AdamW<C> shared;
  const int64_t begin = batch.lists[0].begin + static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = min(begin + kChunk, batch.lists[0].end), start = begin + threadIdx.x;
  const float step = arena.step != nullptr ? *arena.step : 0;
  Index index[kEntries];
  C w[kEntries], g[kEntries], m[kEntries], v[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    if (i >= end) continue;
    index[k] = indices[i];
    m[k] = arena.exp_avg[i];
    v[k] = arena.exp_avg_sq[i];
    if (arena.master != nullptr) w[k] = arena.master[i];
  }
  const Run run = run_of(batch, 0, begin, end);
  int parts[kEntries];
  parts_of(batch, 0, run, start, parts);
  T* entries[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    entries[k] = nullptr;
    if (i < run.begin || i >= run.end) continue;
    const AdamWTarget& target = batch.targets[parts[k]];
    const bool dense = target.compact < 0;
    const uint64_t at = dense ? static_cast<uint64_t>(index[k])  // borders may be anything: no overflow
                              : static_cast<uint64_t>(i) - static_cast<uint64_t>(border(batch, 0, parts[k]));
    if (!is_inside(index[k], target.numel) ||
        !is_inside(static_cast<int64_t>(at), dense ? target.numel : target.compact))
      continue;
    entries[k] = static_cast<T*>(target.weight) + index[k];
    g[k] = static_cast<C>(cuda::widen(static_cast<const G*>(target.grad)[at]));
    if (arena.master == nullptr) w[k] = static_cast<C>(cuda::widen(*entries[k]));
  }
  if (arena.step != nullptr) {
    if (threadIdx.x == 0) shared = cuda::AdamW<C>::of(arena.numbers, static_cast<int64_t>(step));
    __syncthreads();
  }
  const cuda::AdamW<C> adamw = arena.step != nullptr ? shared : arena.adamw;
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
