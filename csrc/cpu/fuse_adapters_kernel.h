// fuse_adapters over one run of positions, for one instruction set.
//
//   s = 0 + w_a v_a + w_b v_b + ...;   s | s / n | v of the last | mean of the w_k v_k of the sign of s
//
// Shapes: K lists of sorted indices and values; the result has one entry for each position that a list has. The caller
// gives each thread its own run of positions, and its own scratch: no race. Arithmetic in float32 (float64 for
// float64), rounded once. Deterministic: an entry is summed in the order of the lists, wherever runs and windows begin.
//
// The lists are taken window by window: each adds its entries to sums that stay in cache and sets their bits in a map,
// of which the set bits then are the union. A window begins at the first entry that is left, so gaps cost nothing.
// NOTES.md compares this with a merge of the lists.
#pragma once

#include "../shared/element.h"
#include "fuse_adapters_types.h"

namespace shira::SHIRA_ISA {

// Calls f(i, place) for the entries of a list that lie in the window from `first` on. Returns how many there are.
template <class Index, class F>
inline int64_t fuse_visit(const FuseList& list, int64_t first, const F& f) {
  const Index* __restrict indices = static_cast<const Index*>(list.indices);
  int64_t i = 0;
  for (; i < list.count; ++i) {
    const int64_t place = static_cast<int64_t>(indices[i]) - first;
    if (place >= kFuseWindow) break;
    f(i, static_cast<uint32_t>(place));
  }
  return i;
}

template <class F>
inline int64_t fuse_visit(const FuseList& list, int64_t first, const F& f) {
  return list.wide ? fuse_visit<int64_t>(list, first, f) : fuse_visit<int32_t>(list, first, f);
}

// Where the next window begins: the lowest position that a list has left. Returns whether there is one.
inline bool fuse_next(const FuseList* lists, int64_t number, int64_t& first) {
  bool any = false;
  for (int64_t k = 0; k < number; ++k) {
    if (lists[k].count == 0) continue;
    const int64_t head =
        lists[k].wide ? *static_cast<const int64_t*>(lists[k].indices) : *static_cast<const int32_t*>(lists[k].indices);
    if (!any || head < first) first = head;
    any = true;
  }
  return any;
}

// Leaves the first `taken` entries of a list behind.
inline void fuse_advance(FuseList& list, int64_t taken, int64_t value_size) {
  list.indices = static_cast<const char*>(list.indices) + taken * (list.wide ? 8 : 4);
  list.values = static_cast<const char*>(list.values) + taken * value_size;
  list.count -= taken;
}

inline void fuse_mark(uint64_t* map, uint32_t place) { map[place >> 6] |= uint64_t{1} << (place & 63); }

// Calls f(first place, bits) for the words of the map that have a bit, and for others near them; clears the map.
template <class F>
inline void fuse_words(uint64_t* map, const F& f) {
  constexpr int kGroup = 8;
  for (uint32_t group = 0; group < kFuseWindow / 64; group += kGroup) {
    uint64_t any = 0;
    for (int j = 0; j < kGroup; ++j) any |= map[group + j];
    if (any == 0) continue;
    for (uint32_t word = group; word < group + kGroup; ++word) {
      f(64 * word, map[word]);
      map[word] = 0;
    }
  }
}

// How many positions the lists have together. The lists are used up.
inline int64_t fuse_count(FuseList* lists, int64_t number, FuseScratch& scratch) {
  uint64_t* map = scratch.map;
  int64_t total = 0;
  for (int64_t first = 0; fuse_next(lists, number, first);) {
    for (int64_t k = 0; k < number; ++k)
      fuse_advance(lists[k], fuse_visit(lists[k], first, [&](int64_t, uint32_t place) { fuse_mark(map, place); }), 0);
    fuse_words(map, [&](uint32_t, uint64_t bits) { total += __builtin_popcountll(bits); });
  }
  return total;
}

// The places whose bits are set, in order; the map is cleared. Returns how many there are.
inline int64_t fuse_places(FuseScratch& scratch) {
  uint16_t* __restrict places = scratch.places;
  int64_t count = 0;
  fuse_words(scratch.map, [&](uint32_t first, uint64_t bits) {
    const int64_t end = count + __builtin_popcountll(bits);
    for (; count < end; count += 4)
      for (int j = 0; j < 4; ++j) {  // what is too much is overwritten
        places[count + j] = static_cast<uint16_t>(first + __builtin_ctzll(bits | uint64_t{1} << 63));
        bits &= bits - 1;
      }
    count = end;
  });
  return count;
}

template <class C>
inline bool fuse_agree(C term, C sum) {
  return (term > 0 && sum > 0) || (term < 0 && sum < 0);
}

// The sums of one window, in scratch that is zero before and after, whatever the dtype.
template <class T, FusePolicy kPolicy>
struct FuseWindow {
  using C = typename Compute<T>::type;
  C* __restrict sums;
  C* __restrict agreeing;
  uint32_t* __restrict numbers;
  T* __restrict last;

  explicit FuseWindow(FuseScratch& scratch)
      : sums(reinterpret_cast<C*>(scratch.sums)),
        agreeing(reinterpret_cast<C*>(scratch.agreeing)),
        numbers(scratch.numbers),
        last(reinterpret_cast<T*>(scratch.last)) {}

  void add(T value, C weight, uint32_t place) const {
    if constexpr (kPolicy == FusePolicy::Last) {
      last[place] = value;
    } else {
      sums[place] += weight * static_cast<C>(widen(value));
      if constexpr (kPolicy == FusePolicy::Mean) ++numbers[place];
    }
  }

  void add_agreeing(T value, C weight, uint32_t place) const {
    const C term = weight * static_cast<C>(widen(value));
    const bool agrees = fuse_agree(term, sums[place]);
    agreeing[place] += agrees ? term : C{0};
    numbers[place] += agrees;
  }

  T take(uint32_t place) const {
    if constexpr (kPolicy == FusePolicy::Last) return last[place];
    C result = sums[place];
    sums[place] = 0;
    if constexpr (kPolicy == FusePolicy::Mean) result = result / static_cast<C>(numbers[place]);
    if constexpr (kPolicy == FusePolicy::Ties) {
      if (numbers[place]) result = agreeing[place] / static_cast<C>(numbers[place]);
      agreeing[place] = 0;
    }
    if constexpr (kPolicy != FusePolicy::Sum) numbers[place] = 0;
    return narrow<T>(result);
  }
};

// Writes the union and its values. The lists are used up.
template <class T, FusePolicy kPolicy>
void fuse_write(FuseList* lists, int64_t number, FuseScratch& scratch, void* out_indices, bool wide, void* out_values) {
  using C = typename Compute<T>::type;
  const FuseWindow<T, kPolicy> window(scratch);
  uint64_t* __restrict map = scratch.map;
  T* __restrict values = static_cast<T*>(out_values);
  int64_t written = 0;
  for (int64_t first = 0; fuse_next(lists, number, first);) {
    for (int64_t k = 0; k < number; ++k) {
      const T* __restrict in = static_cast<const T*>(lists[k].values);
      const C weight = static_cast<C>(lists[k].weight);
      const int64_t taken = fuse_visit(lists[k], first, [&](int64_t i, uint32_t place) {
        window.add(in[i], weight, place);
        fuse_mark(map, place);
      });
      if constexpr (kPolicy != FusePolicy::Ties) fuse_advance(lists[k], taken, sizeof(T));
    }
    if constexpr (kPolicy == FusePolicy::Ties) {
      for (int64_t k = 0; k < number; ++k) {
        const T* __restrict in = static_cast<const T*>(lists[k].values);
        const C weight = static_cast<C>(lists[k].weight);
        const int64_t taken =
            fuse_visit(lists[k], first, [&](int64_t i, uint32_t place) { window.add_agreeing(in[i], weight, place); });
        fuse_advance(lists[k], taken, sizeof(T));
      }
    }
    const int64_t count = fuse_places(scratch);
    const uint16_t* __restrict places = scratch.places;
    for (int64_t i = 0; i < count; ++i) values[written + i] = window.take(places[i]);
    if (wide) {
      int64_t* __restrict indices = static_cast<int64_t*>(out_indices) + written;
      for (int64_t i = 0; i < count; ++i) indices[i] = first + places[i];
    } else {
      int32_t* __restrict indices = static_cast<int32_t*>(out_indices) + written;
      for (int64_t i = 0; i < count; ++i) indices[i] = static_cast<int32_t>(first + places[i]);
    }
    written += count;
  }
}

template <class T>
FuseWrite choose_fuse_policy(FusePolicy policy) {
  switch (policy) {
    case FusePolicy::Sum: return fuse_write<T, FusePolicy::Sum>;
    case FusePolicy::Mean: return fuse_write<T, FusePolicy::Mean>;
    case FusePolicy::Last: return fuse_write<T, FusePolicy::Last>;
    default: return fuse_write<T, FusePolicy::Ties>;
  }
}

inline FuseAdapters choose_fuse_adapters(Element value, FusePolicy policy) {
  switch (value) {
    case Element::Float64: return {fuse_count, choose_fuse_policy<double>(policy)};
    case Element::Float32: return {fuse_count, choose_fuse_policy<float>(policy)};
    case Element::BFloat16: return {fuse_count, choose_fuse_policy<BFloat16>(policy)};
    default: return {fuse_count, choose_fuse_policy<Half>(policy)};
  }
}

}  // namespace shira::SHIRA_ISA
