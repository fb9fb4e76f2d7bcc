// The two passes of topk_indices over one run of scores, for one instruction set.
//
//   count: how many scores have each digit of their key;   emit: the positions whose key is above the threshold
//
// The key of a float is its bits as a signed integer, those of a negative number with all but the sign flipped: keys
// rise as floats do, and -0 gets the key of +0. Shapes: score [count]; counts [4, digits]; the caller gives each
// thread its own run and tables: no race. Integers only, so the result is the same at any number of threads.
//
// Both passes go into those blocks of scores only that have a key of interest. What the first pass counts is kept, if
// it is little, and later passes read only that. NOTES.md says what limits them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "topk_indices_types.h"

namespace shira::SHIRA_ISA {

constexpr int kTopkBlock = 32;
using TopkBlock = std::integral_constant<int, kTopkBlock>;  // a length that the compiler knows

// Bits: the signed integer of the element's size.
template <class Bits>
constexpr Bits kMagnitude = static_cast<Bits>(~(std::make_unsigned_t<Bits>{1} << (8 * sizeof(Bits) - 1)));

// The key but for -0, which stays below +0.
template <class Bits>
inline Bits topk_order(Bits bits) {
  return static_cast<Bits>(bits ^ (static_cast<Bits>(bits >> (8 * sizeof(Bits) - 1)) & kMagnitude<Bits>));
}

template <class Bits>
inline Bits topk_key(Bits bits) {
  const Bits key = topk_order(bits);
  return key == Bits{-1} ? Bits{0} : key;
}

template <class Bits>
int64_t topk_key_at(const void* score, int64_t i) {
  return topk_key(static_cast<const Bits*>(score)[i]);
}

// Whether one of n scores has a key of at least `least`, or is a NaN.
template <class Bits, class Length>
inline bool topk_any(const Bits* x, Length n, Bits least, Bits infinity) {
  const Bits order = least == 0 ? Bits{-1} : least;
  Bits any = 0;
  for (int j = 0; j < n; ++j)
    any |= static_cast<Bits>(-static_cast<Bits>((topk_order(x[j]) >= order) | ((x[j] & kMagnitude<Bits>) > infinity)));
  return any != 0;
}

// Which of n scores have a key from low to high, as bits.
template <class Bits, class Length>
inline uint32_t topk_within(const Bits* x, Length n, Bits low, Bits high) {
  uint32_t within = 0;
  for (int j = 0; j < n; ++j) {
    const Bits key = topk_key(x[j]);
    within |= static_cast<uint32_t>((key >= low) & (key <= high)) << j;
  }
  return within;
}

template <class Bits>
bool topk_count(const void* score, int64_t count, const TopkDigit& digit, uint32_t* counts, TopkKept* kept) {
  const Bits* __restrict x = static_cast<const Bits*>(score);
  const Bits low = static_cast<Bits>(digit.low), high = static_cast<Bits>(digit.high);
  const Bits infinity = static_cast<Bits>(digit.infinity);
  const auto mask = static_cast<uint32_t>(digit.mask), flip = static_cast<uint32_t>(digit.flip);
  const int shift = digit.shift;
  uint32_t* __restrict positions = kept ? kept->positions : nullptr;
  Bits* __restrict scores = kept ? static_cast<Bits*>(kept->scores) : nullptr;
  int64_t room = kept ? kept->room : 0, filled = 0;
  bool nan = false, keeps = kept != nullptr;
  const auto place = [=](Bits bits) { return (static_cast<uint32_t>(topk_key(bits) >> shift) & mask) ^ flip; };
  const auto block = [&](int64_t first, auto n) {
    const Bits* in = x + first;
    if (!topk_any(in, n, low, infinity)) return;
    Bits strange = 0;
    for (int j = 0; j < n; ++j) strange |= static_cast<Bits>((in[j] & kMagnitude<Bits>) > infinity);
    nan |= strange != 0;
    uint32_t within = topk_within(in, n, low, high);
    keeps = keeps && filled + kTopkBlock <= room;
    if (!keeps && within == ~uint32_t{0}) {
      uint32_t places[kTopkBlock];
      for (int j = 0; j < kTopkBlock; ++j) places[j] = place(in[j]) + (j & 3) * (mask + 1);
      for (int j = 0; j < kTopkBlock; ++j) ++counts[places[j]];
      return;
    }
    for (; within; within &= within - 1) {
      const int j = __builtin_ctz(within);
      ++counts[place(in[j]) + (j & 3) * (mask + 1)];
      if (!keeps) continue;
      positions[filled] = static_cast<uint32_t>(first + j);
      scores[filled++] = in[j];
    }
  };
  int64_t i = 0;
  for (; i + kTopkBlock <= count; i += kTopkBlock) block(i, TopkBlock{});
  block(i, static_cast<int>(count - i));
  if (kept) kept->count = keeps ? filled : -1;
  return nan;
}

template <class Bits, class Index>
void topk_emit_run(const void* score, int64_t begin, int64_t end, int64_t threshold, int64_t ties, void* indices) {
  const Bits* __restrict x = static_cast<const Bits*>(score);
  Index* __restrict out = static_cast<Index*>(indices);
  const Bits least = static_cast<Bits>(threshold);
  const auto block = [&](int64_t first, auto n) {
    if (!topk_any(x + first, n, least, kMagnitude<Bits>)) return;
    for (uint32_t within = topk_within(x + first, n, least, kMagnitude<Bits>); within; within &= within - 1) {
      const int64_t i = first + __builtin_ctz(within);
      const bool tie = topk_key(x[i]) == least;
      if (tie && ties == 0) continue;
      ties -= tie;
      *out++ = static_cast<Index>(i);
    }
  };
  for (; begin + kTopkBlock <= end; begin += kTopkBlock) block(begin, TopkBlock{});
  block(begin, static_cast<int>(end - begin));
}

template <class Bits>
void topk_emit(const void* score, int64_t begin, int64_t end, int64_t threshold, int64_t ties, void* indices,
               bool wide) {
  wide ? topk_emit_run<Bits, int64_t>(score, begin, end, threshold, ties, indices)
       : topk_emit_run<Bits, int32_t>(score, begin, end, threshold, ties, indices);
}

inline TopkIndices choose_topk_indices(int64_t element_size) {
  switch (element_size) {
    case 2: return {topk_key_at<int16_t>, topk_count<int16_t>, topk_emit<int16_t>};
    case 4: return {topk_key_at<int32_t>, topk_count<int32_t>, topk_emit<int32_t>};
    default: return {topk_key_at<int64_t>, topk_count<int64_t>, topk_emit<int64_t>};
  }
}

}  // namespace shira::SHIRA_ISA
