// A matrix in CSR form as kernels take it.
#pragma once

#include <cstdint>

namespace shira {

// Rows [begin, end) of a matrix in CSR form, whose entries lie side by side: entry e of row r, where
// border(r) <= e < border(r + 1), is at col[e + shift].
struct CsrRows {
  const void* row_ptr;
  const void* col;
  bool wide_row_ptr, wide_col;  // int64 rather than int32, int32 rather than uint16
  int64_t columns;
  int64_t begin, end;
  int64_t shift;

  int64_t border(int64_t row) const {
    return wide_row_ptr ? static_cast<const int64_t*>(row_ptr)[row] : static_cast<const int32_t*>(row_ptr)[row];
  }
  int64_t count() const { return border(end) - border(begin); }
};

}  // namespace shira
