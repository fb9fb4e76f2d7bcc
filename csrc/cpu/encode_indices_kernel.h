// encode_indices over one block, for one instruction set.
//
//   gap[i] = index[i] - index[i - 1] - 1;   byte = gap, or of gaps from 248 on 248 + (gap - 248) % 8, and an escape:
//   (gap - 248) / 8 in groups of 7 bits, the lowest first, the highest bit of a byte set where more follow
//
// Shapes: indices, gaps [count]; the caller has measured the escapes. Blocks are independent: no race. Integers only.
#pragma once

#include "index_code.h"

namespace shira::SHIRA_ISA {

// f(i, gap) for each entry. Indices are known to rise from after `before`.
template <class Index, class F>
inline void each_gap(const Index* indices, int64_t count, int64_t before, const F& f) {
  if (!count) return;
  f(0, static_cast<uint64_t>(indices[0]) - static_cast<uint64_t>(before) - 1);
  for (int64_t i = 1; i < count; ++i) f(i, static_cast<uint64_t>(indices[i] - indices[i - 1]) - 1);
}

// An escape has a byte more from each of these gaps on: counted with no branch, which is vectorised.
template <class Index>
int64_t escape_bytes_of(const Index* indices, int64_t count, int64_t before) {
  constexpr int kMost = (8 * sizeof(Index) - 1 - kEscapeShift + 6) / 7;
  int64_t bytes = 0;
  for (int more = 0; more < kMost; ++more) {
    const auto from = static_cast<Index>(kFirstEscape + (more ? int64_t{1} << (7 * more + kEscapeShift) : 0));
    int32_t longer = 0;
    for (int64_t i = 1; i < count; ++i) longer += indices[i] - indices[i - 1] > from;
    longer += count && indices[0] - before > from;
    if (!longer) break;
    bytes += longer;
  }
  return bytes;
}

template <class Index>
void encode_block(const Index* indices, int64_t count, int64_t before, uint8_t* gaps, uint8_t* escapes) {
  uint8_t found[kIndexBlock * kMaxEscapeBytes];
  uint8_t* at = found;
  each_gap(indices, count, before, [&](int64_t i, uint64_t gap) {
    // The first byte of an escape is written in any case and kept where it is one: a branch would often be
    // mispredicted.
    const bool escaped = gap >= kFirstEscape;
    uint64_t rest = (gap - kFirstEscape) >> kEscapeShift;
    gaps[i] = static_cast<uint8_t>(escaped ? kFirstEscape | (gap & ((1 << kEscapeShift) - 1)) : gap);
    if (escaped && rest >= 128) {
      for (; rest >= 128; rest >>= 7) *at++ = static_cast<uint8_t>(rest | 128);
    }
    *at = static_cast<uint8_t>(rest);
    at += escaped;
  });
  memcpy(escapes, found, at - found);
}

inline int64_t escape_bytes(const void* indices, bool wide, int64_t count, int64_t before) {
  return wide ? escape_bytes_of(static_cast<const int64_t*>(indices), count, before)
              : escape_bytes_of(static_cast<const int32_t*>(indices), count, before);
}

inline void encode_indices(const void* indices, bool wide, int64_t count, int64_t before, uint8_t* gaps,
                           uint8_t* escapes) {
  wide ? encode_block(static_cast<const int64_t*>(indices), count, before, gaps, escapes)
       : encode_block(static_cast<const int32_t*>(indices), count, before, gaps, escapes);
}

}  // namespace shira::SHIRA_ISA
