// sparse_delta_mm on the CPU: one group of all tokens.
#include "delta_product.h"

namespace shira {

static Tensor sparse_delta_mm(const Tensor& x, const Tensor& row_ptr, const Tensor& col, const Tensor& values,
                              int64_t out_features) {
  constexpr const char* kOp = "sparse_delta_mm";
  check_input(kOp, x);
  check_csr(kOp, row_ptr, col, x, out_features, "out_features");
  check_values(kOp, values, col, x);
  const Tensor inputs = as_contiguous(kOp, "x", x);
  Tensor out = new_output(kOp, x, out_features);  // before a list of its tokens is made
  const TokenGroups groups = all_tokens(kOp, inputs, row_ptr, col, values);
  multiply(groups, inputs, values, out, false);
  return out;
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("sparse_delta_mm", TORCH_BOX(&shira::sparse_delta_mm)); }
