// add_sparse_delta_mm_batched on the CPU: sparse_delta_mm of each adapter's tokens, added to an output.
#include "delta_product.h"

namespace shira {

static void add_sparse_delta_mm_batched(const Tensor& out, const Tensor& x, const Tensor& token_adapter,
                                        const Tensor& row_ptr, const Tensor& col, const Tensor& values,
                                        const std::optional<Tensor>& page_table) {
  constexpr const char* kOp = "add_sparse_delta_mm_batched";
  check_input(kOp, x);
  check_out(kOp, out, x);
  check_adapters(kOp, x, token_adapter, row_ptr, col, values, last_size(out), page_table);
  const Tensor inputs = as_contiguous(kOp, "x", x);
  std::vector<Argument> read = {{"token_adapter", token_adapter}, {"row_ptr", row_ptr}, {"col", col}};
  if (page_table) read.push_back({"page_table", *page_table});
  check_in_place(kOp, out, inputs, values, std::move(read));
  const TokenGroups groups = tokens_by_adapter(kOp, inputs, token_adapter, row_ptr, col, values, page_table);
  announce_write(kOp, {"out", out});
  multiply(groups, inputs, values, out, true);
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  m.impl("add_sparse_delta_mm_batched", TORCH_BOX(&shira::add_sparse_delta_mm_batched));
}
