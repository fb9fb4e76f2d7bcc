// masked_grad on the CPU: checks, and the loop over blocks.
//
// For each block of tokens and each block of columns of x: all threads pack the panel of x, then each goes over its own
// rows of the weight, packing the same tokens of grad_output for a few rows at a time. So both operands are read where
// they lie, in their own layout, and what an entry needs is in cache. Threads share rows by their cost; an entry's sum
// does not depend on that.
#include <algorithm>
#include <vector>

#include "../host/delta_checks.h"
#include "csr.h"
#include "lists.h"
#include "memory.h"

namespace shira {
namespace {

constexpr const char* kOp = "masked_grad";
constexpr int64_t kProductsPerThread = 1 << 20;  // below this a thread costs more than it saves

// [blocks + 1][rows]: where the entries of each row begin that have their column in each block of kPanelColumns.
template <class Col>
std::vector<int64_t> block_borders(const CsrRows& entries, const Col* col, int64_t blocks) {
  std::vector<int64_t> borders(static_cast<size_t>((blocks + 1) * entries.end));
  for (int64_t row = 0; row < entries.end; ++row) {
    const Col *at = col + entries.border(row), *end = col + entries.border(row + 1);
    for (int64_t block = 0; block < blocks; ++block) {
      borders[block * entries.end + row] = at - col;
      const int64_t first_beyond = (block + 1) * kPanelColumns;  // may be more than a Col holds
      at = std::partition_point(at, end, [&](Col column) { return static_cast<int64_t>(column) < first_beyond; });
    }
    borders[blocks * entries.end + row] = end - col;
  }
  return borders;
}

void run(const MaskedGrad& kernel, const CsrRows& entries, const Tensor& grad_output, const Tensor& x, void* sums) {
  const int64_t tokens = x.numel() / entries.columns, width = entries.columns;
  const int64_t element_size = x.element_size();
  const auto* g = static_cast<const char*>(grad_output.data_ptr());
  const auto* inputs = static_cast<const char*>(x.data_ptr());
  const int64_t blocks = (width + kPanelColumns - 1) / kPanelColumns;
  const std::vector<int64_t> borders = entries.wide_col
                                           ? block_borders(entries, static_cast<const int32_t*>(entries.col), blocks)
                                           : block_borders(entries, static_cast<const uint16_t*>(entries.col), blocks);
  const int64_t products = (entries.count() + kRowCost * entries.end) * tokens;
  const int64_t chunks =
      std::clamp<int64_t>(products / kProductsPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  const auto x_panel = aligned_bytes(std::min(width + kPanelRows, kPanelColumns) * kPanelBytes);
  const auto g_panels = aligned_bytes(chunks * kPanelRows * kPanelBytes);

  for (int64_t t = 0; t < tokens; t += kernel.tokens) {
    const int64_t block_tokens = std::min(kernel.tokens, tokens - t);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t* begin = borders.data() + block * entries.end;
      const int64_t* end = begin + entries.end;
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
          kernel.pack({g + (t * entries.end + row) * element_size, entries.end, block_tokens, rows, g_panel});
          kernel.add_rows(
              {g_panel, x_panel.get(), entries.col, sums, begin + row, end + row, rows, block_tokens, first_column});
        }
      });
    }
  }
}

CsrRows check(const Tensor& grad_output, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  check_input(kOp, x);
  if (dtype_of(grad_output) != dtype_of(x))
    fail(kOp, "grad_output",
         "must be " + dtype_name(dtype_of(x)) + " like x, got " + dtype_name(dtype_of(grad_output)));
  bool same = grad_output.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = grad_output.size(i) == x.size(i);
  if (!same)
    fail(kOp, "grad_output", "must be [..., out] beside x [..., in] " + shape_of(x) + ", got " + shape_of(grad_output));
  if (!same_device(grad_output, x)) fail(kOp, "grad_output", "must be on the device of x");
  check_storage(kOp, "grad_output", grad_output);
  check_csr(kOp, row_ptr, col, x, last_size(grad_output), "grad_output has columns");
  refuse_grad(kOp, {"grad_output", grad_output});
  refuse_grad(kOp, {"x", x});
  const CsrRows entries = rows_of(row_ptr, col, last_size(x));
  check_csr_contents(kOp, entries, col.numel(), cpu_kernels());
  return entries;
}

Tensor masked_grad(const Tensor& grad_output, const Tensor& x, const Tensor& row_ptr, const Tensor& col) {
  const CsrRows entries = check(grad_output, x, row_ptr, col);
  const Element operand = element_of(dtype_of(x));
  const int64_t nnz = entries.count();
  using torch::headeronly::ScalarType;
  Tensor sums =
      torch::stable::new_zeros(x, {nnz}, operand == Element::Float64 ? ScalarType::Double : ScalarType::Float);
  const CpuKernels& kernels = cpu_kernels();
  count_call(kernels);
  if (nnz > 0 && x.numel() > 0)
    run(kernels.masked_grad(operand, entries.wide_col), entries, as_contiguous(kOp, "grad_output", grad_output),
        as_contiguous(kOp, "x", x), sums.data_ptr());
  return sums;
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("masked_grad", TORCH_BOX(&shira::masked_grad)); }
