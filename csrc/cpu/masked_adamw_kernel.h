// masked_adamw over one run of a sorted list, for one instruction set.
//
//   w = master[i] or weight[indices[i]], g = grad[indices[i]] or grad[i]; AdamW::update(w, g, exp_avg[i],
//   exp_avg_sq[i])
//
// Shapes: indices, exp_avg, exp_avg_sq, master and a compact grad [count]; weight and a dense grad are whole tensors,
// flat. Indices are unique, so iterations are independent, and the caller gives each thread its own run: no race.
// Arithmetic in float32 (float64 for float64), rounded once. Deterministic: each entry is computed alone.
//
// Entries go in blocks: gathered into arrays, updated by a loop over contiguous numbers, scattered with prefetches of
// later ones between; NOTES.md says why. With a master the weight is written only.
#pragma once

#include "../shared/adamw.h"
#include "masked_adamw_types.h"

namespace shira::SHIRA_ISA {

constexpr int64_t kAdamWBlock = 32;
constexpr int64_t kAdamWPrefetchDistance = 64;

template <class C>
inline void update_block(const AdamW<C>& adamw, C* __restrict w, const C* __restrict g, C* __restrict m,
                         C* __restrict v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) adamw.update(w[i], g[i], m[i], v[i]);
}

template <class T, class G, class Index, bool kMaster, bool kDense>
void masked_adamw_run(const AdamWRun& run, const AdamWNumbers& numbers, int64_t step) {
  using C = typename Compute<T>::type;
  const AdamW<C> adamw = AdamW<C>::of(numbers, step);
  T* __restrict weight = static_cast<T*>(run.weight);
  const Index* __restrict indices = static_cast<const Index*>(run.indices);
  const G* __restrict grad = static_cast<const G*>(run.grad);
  C* __restrict exp_avg = static_cast<C*>(run.exp_avg);
  C* __restrict exp_avg_sq = static_cast<C*>(run.exp_avg_sq);
  C* __restrict master = static_cast<C*>(run.master);
  for (int64_t begin = 0; begin < run.count; begin += kAdamWBlock) {
    const int64_t count = run.count - begin < kAdamWBlock ? run.count - begin : kAdamWBlock;
    const Index* index = indices + begin;
    C w_block[kAdamWBlock], g_block[kAdamWBlock];
    T rounded[kAdamWBlock];
    C* w = kMaster ? master + begin : w_block;
    if constexpr (!kMaster)
      for (int64_t i = 0; i < count; ++i) w[i] = static_cast<C>(widen(weight[index[i]]));
    if constexpr (kDense)
      for (int64_t i = 0; i < count; ++i) g_block[i] = static_cast<C>(widen(grad[index[i]]));
    else
      for (int64_t i = 0; i < count; ++i) g_block[i] = static_cast<C>(widen(grad[begin + i]));
    update_block(adamw, w, g_block, exp_avg + begin, exp_avg_sq + begin, count);
    for (int64_t i = 0; i < count; ++i) rounded[i] = narrow<T>(w[i]);
    const int64_t ahead = run.count - begin - kAdamWPrefetchDistance;
    for (int64_t i = 0; i < count; ++i) {
      if (i < ahead) {
        const Index next = index[i + kAdamWPrefetchDistance];
        __builtin_prefetch(weight + next, 1);
        if constexpr (kDense) __builtin_prefetch(grad + next);
      }
      weight[index[i]] = rounded[i];
    }
  }
}

template <class T, class G, class Index, bool kMaster>
void masked_adamw_any(const AdamWRun& run, const AdamWNumbers& numbers, int64_t step) {
  if (run.dense)
    masked_adamw_run<T, G, Index, kMaster, true>(run, numbers, step);
  else
    masked_adamw_run<T, G, Index, kMaster, false>(run, numbers, step);
}

template <class T, class G>
MaskedAdamW choose_master(const AdamWForm& form) {
  if (form.wide_index)
    return form.master ? masked_adamw_any<T, G, int64_t, true> : masked_adamw_any<T, G, int64_t, false>;
  return form.master ? masked_adamw_any<T, G, int32_t, true> : masked_adamw_any<T, G, int32_t, false>;
}

template <class T>
MaskedAdamW choose_grad(const AdamWForm& form) {
  return form.grad == form.weight ? choose_master<T, T>(form) : choose_master<T, float>(form);
}

// Null where no kernel has this form.
inline MaskedAdamW choose_masked_adamw(const AdamWForm& form) {
  switch (form.weight) {
    case Element::Float64: return choose_grad<double>(form);
    case Element::Float32: return choose_grad<float>(form);
    case Element::BFloat16: return choose_grad<BFloat16>(form);
    case Element::Float16: return choose_grad<Half>(form);
    default: return nullptr;
  }
}

}  // namespace shira::SHIRA_ISA
