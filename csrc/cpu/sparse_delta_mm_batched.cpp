// sparse_delta_mm_batched on the CPU: sparse_delta_mm of each adapter's tokens.
#include <cstring>

#include "delta_product.h"

namespace shira {

static Tensor sparse_delta_mm_batched(const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                                      const Tensor& col, const Tensor& values, int64_t out_features,
                                      const std::optional<Tensor>& page_table) {
  constexpr const char* kOp = "sparse_delta_mm_batched";
  check_adapters(kOp, x, token_adapter, row_ptr, col, values, out_features, page_table);
  const Tensor inputs = as_contiguous(kOp, "x", x);
  const TokenGroups groups = tokens_by_adapter(kOp, inputs, token_adapter, row_ptr, col, values, page_table);
  Tensor out = new_output(kOp, x, out_features);
  const auto* adapter_of = static_cast<const int32_t*>(token_adapter.data_ptr());
  const int64_t tokens = out.numel() > 0 ? token_adapter.numel() : 0;  // without any, a row may be of any length
  const int64_t row_bytes = tokens > 0 ? out_features * static_cast<int64_t>(out.element_size()) : 0;
  for (int64_t t = 0; t < tokens; ++t)
    if (adapter_of[t] < 0) std::memset(static_cast<char*>(out.data_ptr()) + t * row_bytes, 0, row_bytes);
  multiply(groups, inputs, values, out, false);
  return out;
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  m.impl("sparse_delta_mm_batched", TORCH_BOX(&shira::sparse_delta_mm_batched));
}
