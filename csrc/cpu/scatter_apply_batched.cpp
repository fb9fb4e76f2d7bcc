// scatter_apply_batched on the CPU: scatter_apply over the parts of one arena; threads split the whole arena.
#include "scatter_apply.h"

namespace shira {

static void scatter_apply_batched(const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                                  const Tensor& values, double alpha, bool additive,
                                  const std::optional<Tensor>& saved) {
  scatter_apply_cpu(
      check_scatter_batched("scatter_apply_batched", weights, offsets, indices, values, alpha, additive, saved));
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("scatter_apply_batched", TORCH_BOX(&shira::scatter_apply_batched)); }
