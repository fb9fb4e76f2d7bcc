// scatter_apply on the CPU: checks, the choice of a kernel, and the split over threads (lists.h).
#include "scatter_apply.h"

#include "lists.h"

namespace shira {

void scatter_apply_cpu(const ScatterCall& call) {
  if (call.parts.empty()) return;
  const CpuKernels& kernels = cpu_kernels();
  const Lists lists(call.parts, call.indices);
  check_contents(call.op, call.parts, lists, kernels);

  announce_writes(call);
  count_call(kernels);
  const ScatterApply apply = kernels.scatter_apply(call.form);
  const auto* values = static_cast<const char*>(call.values.data_ptr());
  auto* saved = call.saved ? static_cast<char*>(call.saved->data_ptr()) : nullptr;
  const auto value_size = static_cast<int64_t>(call.values.element_size());
  for_each_run(lists, [&](const Lists::Part& part, int64_t begin, int64_t end) {
    apply({part.weight, lists.indices + begin * lists.index_size, values + begin * value_size,
           saved ? saved + begin * lists.element_size : nullptr, end - begin},
          call.alpha);
  });
}

static void scatter_apply(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha,
                          bool additive, const std::optional<Tensor>& saved) {
  scatter_apply_cpu(check_scatter("scatter_apply", {{weight, "weight", 0, indices.numel()}}, nullptr, indices, values,
                                  alpha, additive, saved));
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("scatter_apply", TORCH_BOX(&shira::scatter_apply)); }
