// add_sparse_delta_mm on the CPU: sparse_delta_mm, added to an output.
#include "delta_product.h"

namespace shira {

static void add_sparse_delta_mm(const Tensor& out, const Tensor& x, const Tensor& row_ptr, const Tensor& col,
                                const Tensor& values) {
  constexpr const char* kOp = "add_sparse_delta_mm";
  check_input(kOp, x);
  check_out(kOp, out, x);
  check_csr(kOp, row_ptr, col, x, last_size(out), "out has columns");
  check_values(kOp, values, col, x);
  const Tensor inputs = as_contiguous(kOp, "x", x);
  check_in_place(kOp, out, inputs, values, {{"row_ptr", row_ptr}, {"col", col}});
  const TokenGroups groups = all_tokens(kOp, inputs, row_ptr, col, values);
  announce_write(kOp, {"out", out});
  multiply(groups, inputs, values, out, true);
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("add_sparse_delta_mm", TORCH_BOX(&shira::add_sparse_delta_mm)); }
