// scatter_apply over one run of a sorted list, for one instruction set.
//
//   w = weight[indices[i]], v = values[i]; saved[i] = w if kept; w <- v | w + alpha (v - w) | w + alpha v
//
// Shapes: indices, values, saved [count]; weight is the whole tensor, flat. Indices are unique, so iterations are
// independent, and the caller gives each thread its own run: no race. Arithmetic in float32 (float64 for float64),
// rounded once. Deterministic: each entry is computed alone.
//
// Neighbours go as blocks: of 64 bytes, else of 8 entries. Indices are sorted and unique, so the first and the last of
// a block tell that its entries lie side by side, and the others stay unread. (Where two NaNs meet, the compiler
// chooses whose payload is kept, and may choose otherwise for blocks: the one thing that how threads split a list can
// change.)
//
// The cost is cache lines that wait, so lines are prefetched for writing; NOTES.md says what was measured.
#pragma once

#include "../shared/element.h"
#include "scatter_apply_types.h"

namespace shira::SHIRA_ISA {

constexpr int64_t kPrefetchDistance = 64;  // entries
constexpr int64_t kPrefetchBlocks = 24;    // of neighbours
constexpr int64_t kBlockBytes = 64;        // of the longer blocks of neighbours

template <class Update, bool kKeep, class T, class V>
inline void scatter_one(T& w, V v, T* saved, typename Compute<T>::type alpha) {
  using C = typename Compute<T>::type;
  const T old = w;
  if constexpr (kKeep) *saved = old;
  w = narrow<T>(Update::update(static_cast<C>(widen(old)), static_cast<C>(widen(v)), alpha));
}

struct Replace {};

template <class Update, bool kKeep, class T, class V, class Index>
void scatter_run(const ScatterRun& run, double alpha) {
  T* __restrict weight = static_cast<T*>(run.weight);
  const Index* __restrict indices = static_cast<const Index*>(run.indices);
  const V* __restrict values = static_cast<const V*>(run.values);
  T* __restrict saved = static_cast<T*>(run.saved);
  const auto update = [&](T& w, int64_t i) {
    if constexpr (std::is_same_v<Update, Replace>) {
      if constexpr (kKeep) saved[i] = w;
      w = values[i];
    } else {
      scatter_one<Update, kKeep>(w, values[i], saved + i, static_cast<typename Compute<T>::type>(alpha));
    }
  };
  const auto neighbours = [&](int64_t i, int64_t count) { return indices[i + count - 1] - indices[i] == count - 1; };
  const int64_t readable = run.count + run.ahead;
  // Entries i to i + kCount, which are neighbours in the weight.
  const auto block = [&](int64_t i, auto count) {
    constexpr int64_t kCount = count();
    const int64_t next = i + kPrefetchBlocks * kCount;
    if (next + kCount <= readable) {
      __builtin_prefetch(weight + indices[next], 1);
      __builtin_prefetch(weight + indices[next + kCount - 1], 1);
    }
    __builtin_prefetch(values + next);
    if constexpr (kKeep) __builtin_prefetch(saved + next, 1);
    T* __restrict w = weight + indices[i];
    if constexpr (std::is_same_v<Update, Replace>) {
      if constexpr (kKeep) memcpy(saved + i, w, kCount * sizeof(T));
      memcpy(w, values + i, kCount * sizeof(T));
    } else {
      for (int64_t k = 0; k < kCount; ++k) update(w[k], i + k);
    }
  };
  const auto one = [&](int64_t i) {
    __builtin_prefetch(weight + indices[i + kPrefetchDistance], 1);
    update(weight[indices[i]], i);
  };

  constexpr int64_t kShort = 8, kLong = kBlockBytes / sizeof(T);
  const int64_t ahead = run.count < readable - kPrefetchDistance ? run.count : readable - kPrefetchDistance;
  int64_t i = 0;
  while (i + 2 * kShort <= ahead) {
    if (neighbours(i, kShort)) {
      if (kLong > kShort && i + kLong <= run.count && neighbours(i, kLong)) {
        block(i, std::integral_constant<int64_t, kLong>());
        i += kLong;
      } else {
        block(i, std::integral_constant<int64_t, kShort>());
        i += kShort;
      }
      continue;
    }
    // Single entries, and on to the end of a run if the last of them is within one: the next may begin here.
    for (int64_t k = 0; k < kShort; ++k) one(i++);
    for (int64_t k = 1; k < kShort && indices[i] - indices[i - 1] == 1; ++k) one(i++);
  }
  while (i < ahead) one(i++);
  for (; i < run.count; ++i) update(weight[indices[i]], i);
}

template <class Update, class T, class V>
ScatterApply choose_index(const ScatterForm& form) {
  if (form.wide_index)
    return form.keep ? scatter_run<Update, true, T, V, int64_t> : scatter_run<Update, false, T, V, int64_t>;
  return form.keep ? scatter_run<Update, true, T, V, int32_t> : scatter_run<Update, false, T, V, int32_t>;
}

template <class T>
ScatterApply choose_update(const ScatterForm& form, Element own) {
  if (form.mode == Mode::Interpolate) return choose_index<Interpolate, T, T>(form);
  return form.value == own ? choose_index<Add, T, T>(form) : choose_index<Add, T, float>(form);
}

// Null where no kernel has this form.
inline ScatterApply choose_scatter_apply(const ScatterForm& form) {
  if (form.mode == Mode::Replace) {
    switch (form.element_size) {
      case 1: return choose_index<Replace, uint8_t, uint8_t>(form);
      case 2: return choose_index<Replace, uint16_t, uint16_t>(form);
      case 4: return choose_index<Replace, uint32_t, uint32_t>(form);
      case 8: return choose_index<Replace, uint64_t, uint64_t>(form);
      default: return nullptr;
    }
  }
  switch (form.weight) {
    case Element::Float64: return choose_update<double>(form, Element::Float64);
    case Element::Float32: return choose_update<float>(form, Element::Float32);
    case Element::BFloat16: return choose_update<BFloat16>(form, Element::BFloat16);
    case Element::Float16: return choose_update<Half>(form, Element::Float16);
    default: return nullptr;
  }
}

template <class Index>
bool rising(const Index* indices, int64_t count) {
  // Blocks with no branch inside are vectorised; one branch a block stops early.
  constexpr int64_t kBlock = 256, kAhead = 4 * kBlock, kLine = 64 / sizeof(Index);
  for (int64_t begin = 1; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    for (int64_t i = begin + kAhead; i < begin + kAhead + kBlock && i < count; i += kLine)
      __builtin_prefetch(indices + i);
    Index wrong = 0;
    for (int64_t i = begin; i < end; ++i) wrong |= indices[i] <= indices[i - 1];
    if (wrong) return false;
  }
  return true;
}

inline bool strictly_rising(const void* indices, int64_t count, bool wide) {
  return wide ? rising(static_cast<const int64_t*>(indices), count)
              : rising(static_cast<const int32_t*>(indices), count);
}

}  // namespace shira::SHIRA_ISA
