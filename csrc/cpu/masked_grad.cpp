// masked_grad on the CPU: checks, and the loop over blocks.
//
// For each block of tokens and each block of columns of x: all threads pack the panel of x, then each goes over its own
// rows of the weight, packing the same tokens of grad_output for a few rows at a time. So both operands are read where
// they lie, in their own layout, and what an entry needs is in cache. Threads share rows by their cost; an entry's sum
// does not depend on that.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../host/checks.h"
#include "lists.h"

namespace shira {
namespace {

constexpr const char* kOp = "masked_grad";
constexpr int64_t kCacheLineBytes = 64;
constexpr int64_t kProductsPerThread = 1 << 20;  // below this a thread costs more than it saves
constexpr int64_t kRowCost = 2;                  // packing a row costs as much as so many entries

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kCacheLineBytes}); }
};

std::unique_ptr<char, AlignedDelete> aligned_bytes(int64_t size) {
  return std::unique_ptr<char, AlignedDelete>(
      static_cast<char*>(::operator new(static_cast<size_t>(size), std::align_val_t{kCacheLineBytes})));
}

// The operands in CSR form, of any width of numbers.
struct Entries {
  const void* row_ptr;
  const void* col;
  bool wide_row_ptr, wide_col;
  int64_t rows, columns, nnz;

  int64_t border(int64_t row) const {
    return wide_row_ptr ? static_cast<const int64_t*>(row_ptr)[row] : static_cast<const int32_t*>(row_ptr)[row];
  }
};

template <class Col>
void check_columns(const Entries& entries, const Col* col) {
  // Where columns do not rise, counted twice: everywhere (a loop without branches), and where a row begins.
  int64_t falls = 0, falls_at_borders = 0;
  for (int64_t e = 1; e < entries.nnz; ++e) falls += col[e] <= col[e - 1];
  for (int64_t row = 0; row < entries.rows; ++row) {
    const int64_t begin = entries.border(row), end = entries.border(row + 1);
    if (begin == end) continue;
    falls_at_borders += begin > 0 && col[begin] <= col[begin - 1];
    const auto first = static_cast<int64_t>(col[begin]), last = static_cast<int64_t>(col[end - 1]);
    if (first < 0 || last >= entries.columns)
      fail(kOp, "col",
           "must lie in [0, " + std::to_string(entries.columns) + "), got " + std::to_string(first < 0 ? first : last));
  }
  if (falls != falls_at_borders) fail(kOp, "col", "must be sorted and unique within each row");
}

void check_contents(const Entries& entries) {
  const int64_t first = entries.border(0), last = entries.border(entries.rows);
  bool rises = first == 0 && last == entries.nnz;
  for (int64_t row = 0; row < entries.rows; ++row) rises &= entries.border(row) <= entries.border(row + 1);
  if (!rises)
    fail(kOp, "row_ptr",
         "must rise from 0 to the number of entries (" + std::to_string(entries.nnz) + "), got from " +
             std::to_string(first) + " to " + std::to_string(last));
  if (entries.wide_col)
    check_columns(entries, static_cast<const int32_t*>(entries.col));
  else
    check_columns(entries, static_cast<const uint16_t*>(entries.col));
}

// [blocks + 1][rows]: where the entries of each row begin that have their column in each block of kPanelColumns.
template <class Col>
std::vector<int64_t> block_borders(const Entries& entries, const Col* col, int64_t blocks) {
  std::vector<int64_t> borders(static_cast<size_t>((blocks + 1) * entries.rows));
  for (int64_t row = 0; row < entries.rows; ++row) {
    const Col *at = col + entries.border(row), *end = col + entries.border(row + 1);
    for (int64_t block = 0; block < blocks; ++block) {
      borders[block * entries.rows + row] = at - col;
      const int64_t first_beyond = (block + 1) * kPanelColumns;  // may be more than a Col holds
      at = std::partition_point(at, end, [&](Col column) { return static_cast<int64_t>(column) < first_beyond; });
    }
    borders[blocks * entries.rows + row] = end - col;
  }
  return borders;
}

// The row at which the share of a thread begins.
int64_t first_row(const Entries& entries, int64_t chunk, int64_t chunks) {
  const auto cost = [&](int64_t row) { return entries.border(row) + kRowCost * row; };
  const int64_t wanted = cost(entries.rows) / chunks * chunk;
  if (chunk == chunks) return entries.rows;
  int64_t low = 0, high = entries.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(middle) < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

void run(const MaskedGrad& kernel, const Entries& entries, const Tensor& grad_output, const Tensor& x, void* sums) {
  const int64_t tokens = x.numel() / entries.columns, width = entries.columns;
  const int64_t element_size = x.element_size();
  const auto* g = static_cast<const char*>(grad_output.data_ptr());
  const auto* inputs = static_cast<const char*>(x.data_ptr());
  const int64_t blocks = (width + kPanelColumns - 1) / kPanelColumns;
  const std::vector<int64_t> borders = entries.wide_col
                                           ? block_borders(entries, static_cast<const int32_t*>(entries.col), blocks)
                                           : block_borders(entries, static_cast<const uint16_t*>(entries.col), blocks);
  const int64_t products = (entries.nnz + kRowCost * entries.rows) * tokens;
  const int64_t chunks =
      std::clamp<int64_t>(products / kProductsPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  const auto x_panel = aligned_bytes(std::min(width + kPanelRows, kPanelColumns) * kPanelBytes);
  const auto g_panels = aligned_bytes(chunks * kPanelRows * kPanelBytes);

  for (int64_t t = 0; t < tokens; t += kernel.tokens) {
    const int64_t block_tokens = std::min(kernel.tokens, tokens - t);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t* begin = borders.data() + block * entries.rows;
      const int64_t* end = begin + entries.rows;
      if (std::equal(begin, end, end)) continue;  // no entries here
      const int64_t first_column = block * kPanelColumns;
      const int64_t columns = std::min(kPanelColumns, width - first_column);
      const int64_t share = ((columns + chunks - 1) / chunks + kPanelRows - 1) / kPanelRows * kPanelRows;
      over_chunks(chunks, [&](int64_t chunk) {
        const int64_t from = chunk * share;
        if (from < columns)
          kernel.pack({inputs + (t * width + first_column + from) * element_size, width, block_tokens,
                       std::min(share, columns - from), x_panel.get() + from * kPanelBytes});
      });
      over_chunks(chunks, [&](int64_t chunk) {
        char* g_panel = g_panels.get() + chunk * kPanelRows * kPanelBytes;
        const int64_t stop = first_row(entries, chunk + 1, chunks);
        for (int64_t row = first_row(entries, chunk, chunks); row < stop; row += kPanelRows) {
          const int64_t rows = std::min(kPanelRows, stop - row);
          if (std::equal(begin + row, begin + row + rows, end + row)) continue;
          kernel.pack({g + (t * entries.rows + row) * element_size, entries.rows, block_tokens, rows, g_panel});
          kernel.add_rows(
              {g_panel, x_panel.get(), entries.col, sums, begin + row, end + row, rows, block_tokens, first_column});
        }
      });
    }
  }
}

Entries check(const Tensor& grad_output, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  const int32_t dtype = dtype_of(x);
  if (element_of(dtype) == Element::Other)
    fail(kOp, "x", "must be float64, float32, bfloat16 or float16, got " + dtype_name(dtype));
  if (dtype_of(grad_output) != dtype)
    fail(kOp, "grad_output", "must be " + dtype_name(dtype) + " like x, got " + dtype_name(dtype_of(grad_output)));
  if (x.dim() == 0) fail(kOp, "x", "must have at least one dimension, [..., in]");
  bool same = grad_output.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = grad_output.size(i) == x.size(i);
  if (!same)
    fail(kOp, "grad_output", "must be [..., out] beside x [..., in] " + shape_of(x) + ", got " + shape_of(grad_output));
  Entries entries{};
  const int32_t row_dtype = dtype_of(row_ptr), col_dtype = dtype_of(col);
  entries.wide_row_ptr = row_dtype == aoti_torch_dtype_int64();
  if (!entries.wide_row_ptr && row_dtype != aoti_torch_dtype_int32())
    fail(kOp, "row_ptr", "must be int32 or int64, got " + dtype_name(row_dtype));
  entries.wide_col = col_dtype == aoti_torch_dtype_int32();
  if (!entries.wide_col && col_dtype != aoti_torch_dtype_uint16())
    fail(kOp, "col", "must be int32 or uint16, got " + dtype_name(col_dtype));
  for (const Argument& argument :
       {Argument{"grad_output", grad_output}, Argument{"row_ptr", row_ptr}, Argument{"col", col}})
    if (!same_device(argument.tensor, x)) fail(kOp, argument.name, "must be on the device of x");
  for (const Argument& argument : {Argument{"row_ptr", row_ptr}, Argument{"col", col}}) {
    if (argument.tensor.dim() != 1) fail(kOp, argument.name, "must be 1-D, got shape " + shape_of(argument.tensor));
    if (!argument.tensor.is_contiguous()) fail(kOp, argument.name, "must be contiguous");
  }
  entries.rows = grad_output.size(grad_output.dim() - 1);
  entries.columns = x.size(x.dim() - 1);
  entries.nnz = col.numel();
  if (row_ptr.numel() != entries.rows + 1)
    fail(kOp, "row_ptr",
         "must have one entry more than grad_output has columns (" + std::to_string(entries.rows + 1) + "), got " +
             std::to_string(row_ptr.numel()));
  entries.row_ptr = row_ptr.data_ptr();
  entries.col = col.data_ptr();
  refuse_grad(kOp, {"grad_output", grad_output});
  refuse_grad(kOp, {"x", x});
  check_contents(entries);
  return entries;
}

Tensor masked_grad(const Tensor& grad_output, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  const Entries entries = check(grad_output, x, row_ptr, col);
  const Element operand = element_of(dtype_of(x));
  using torch::headeronly::ScalarType;
  Tensor sums =
      torch::stable::new_zeros(x, {entries.nnz}, operand == Element::Float64 ? ScalarType::Double : ScalarType::Float);
  const CpuKernels& kernels = cpu_kernels();
  count_call(kernels);
  if (entries.nnz > 0 && x.numel() > 0)
    run(kernels.masked_grad(operand, entries.wide_col), entries, torch::stable::contiguous(grad_output),
        torch::stable::contiguous(x), sums.data_ptr());
  return sums;
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("masked_grad", TORCH_BOX(&shira::masked_grad)); }
