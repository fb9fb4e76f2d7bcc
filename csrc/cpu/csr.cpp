#include "csr.h"

#include <atomic>

#include "lists.h"

namespace shira {
namespace {

constexpr int64_t kChecksPerThread = 1 << 16;  // entries; below this a thread costs more than it saves

// Says what is wrong with columns that do not fit. If one entry lies outside, those that do not rise may too.
template <class Col>
[[noreturn]] void fail_columns(const char* op, const CsrRows& rows) {
  const Col* col = static_cast<const Col*>(rows.col) + rows.shift;
  int64_t smallest = 0, largest = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t e = rows.border(row); e < rows.border(row + 1); ++e) {
      if (e > rows.border(row) && col[e] <= col[e - 1]) fail(op, "col", "must be sorted and unique within each row");
      smallest = std::min<int64_t>(smallest, col[e]);
      largest = std::max<int64_t>(largest, col[e]);
    }
  fail(op, "col",
       "must lie in [0, " + std::to_string(rows.columns) + "), got " +
           std::to_string(smallest < 0 ? smallest : largest));
}

}  // namespace

CsrRows rows_of(const Tensor& row_ptr, const Tensor& col, int64_t columns) {
  return {row_ptr.data_ptr(),
          col.data_ptr(),
          dtype_of(row_ptr) == aoti_torch_dtype_int64(),
          dtype_of(col) == aoti_torch_dtype_int32(),
          columns,
          0,
          row_ptr.numel() - 1,
          0};
}

void check_borders(const char* op, const CsrRows& all, int64_t nnz, const CpuKernels& kernels) {
  const int64_t first = all.border(0), last = all.border(all.end);
  if (first != 0 || last != nnz || !kernels.row_ptr_rises(all.row_ptr, all.end + 1, all.wide_row_ptr))
    fail(op, "row_ptr",
         "must rise from 0 to the number of entries (" + std::to_string(nnz) + "), got from " + std::to_string(first) +
             " to " + std::to_string(last));
}

void check_csr_contents(const char* op, const CsrRows& all, int64_t nnz, const CpuKernels& kernels) {
  check_borders(op, all, nnz, kernels);
  check_columns(op, all, kernels);
}

void check_columns(const char* op, const CsrRows& rows, const CpuKernels& kernels) {
  std::atomic<bool> fit{true};
  const int64_t chunks =
      std::clamp<int64_t>(rows.count() / kChecksPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  over_chunks(chunks, [&](int64_t chunk) {
    CsrRows share = rows;
    share.begin = first_row(rows, chunk, chunks);
    share.end = first_row(rows, chunk + 1, chunks);
    if (!kernels.columns_fit(share)) fit = false;
  });
  if (fit) return;
  if (rows.wide_col)
    fail_columns<int32_t>(op, rows);
  else
    fail_columns<uint16_t>(op, rows);
}

int64_t cost_of(const CsrRows& rows) { return rows.count() + kRowCost * (rows.end - rows.begin); }

int64_t row_at(const CsrRows& rows, int64_t cost) {
  const int64_t first = rows.border(rows.begin);
  int64_t low = rows.begin, high = rows.end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows.border(middle) - first + kRowCost * (middle - rows.begin) < cost)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

int64_t first_row(const CsrRows& rows, int64_t chunk, int64_t chunks) {
  return row_at(rows, cost_of(rows) * chunk / chunks);
}

}  // namespace shira
