// Checks of what a matrix in CSR form holds, for one instruction set. They read every entry at each call, also where
// one token is multiplied with it, so they are loops without branches over blocks, which the compiler vectorises:
// counters of a block are as narrow as columns.
#pragma once

#include "csr_types.h"

namespace shira::SHIRA_ISA {

template <class Index>
bool never_falls(const Index* borders, int64_t count) {
  Index falls = 0;
  for (int64_t i = 1; i < count; ++i) falls |= borders[i] < borders[i - 1];
  return !falls;
}

inline bool row_ptr_rises(const void* row_ptr, int64_t count, bool wide) {
  return wide ? never_falls(static_cast<const int64_t*>(row_ptr), count)
              : never_falls(static_cast<const int32_t*>(row_ptr), count);
}

// Where columns do not rise, counted twice: everywhere, and where a row begins. A negative column is a large one here.
template <class Unsigned>
bool columns_fit_of(const CsrRows& rows) {
  constexpr int64_t kBlock = 1 << 15;  // what the counter of a block holds, whatever its type
  const auto* col = static_cast<const Unsigned*>(rows.col) + rows.shift;
  const int64_t first = rows.border(rows.begin), last = rows.border(rows.end);
  if (first == last) return true;
  int64_t falls = 0;
  Unsigned largest = col[first];
  for (int64_t begin = first + 1; begin < last; begin += kBlock) {
    const int64_t end = begin + kBlock < last ? begin + kBlock : last;
    Unsigned block_falls = 0;
    for (int64_t e = begin; e < end; ++e) {
      block_falls += col[e] <= col[e - 1];
      largest = col[e] > largest ? col[e] : largest;
    }
    falls += block_falls;
  }
  for (int64_t row = rows.begin + 1, begin = rows.border(row); row < rows.end; ++row) {
    const int64_t end = rows.border(row + 1);
    if (begin > first && begin < end) falls -= col[begin] <= col[begin - 1];
    begin = end;
  }
  // No int32 is larger, also of more columns: what is, was negative.
  const int64_t limit = int64_t{1} << 31;
  return falls == 0 && static_cast<int64_t>(largest) < (rows.columns < limit ? rows.columns : limit);
}

inline bool columns_fit(const CsrRows& rows) {
  return rows.wide_col ? columns_fit_of<uint32_t>(rows) : columns_fit_of<uint16_t>(rows);
}

}  // namespace shira::SHIRA_ISA
