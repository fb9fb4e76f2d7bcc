// scatter_apply on the CPU: checks, the choice of a kernel, and the split over threads (lists.h).
#include "scatter_apply.h"

namespace shira {

ScatterWriter::ScatterWriter(const ScatterCall& checked, const CpuKernels& kernels)
    : call(checked), lists(checked.parts, checked.indices), apply(kernels.scatter_apply(checked.form)) {
  check_contents(call.op, call.parts, lists, kernels, call.names.indices);
}

void ScatterWriter::write(const Lists::Part& part, int64_t begin, int64_t end, int64_t stop) const {
  const auto at = [begin](const Tensor& tensor) {
    return static_cast<char*>(tensor.data_ptr()) + begin * static_cast<int64_t>(tensor.element_size());
  };
  if (begin < end)
    apply({part.weight, at(call.indices), at(call.values), call.saved ? at(*call.saved) : nullptr, end - begin,
           stop - end},
          call.alpha);
}

void scatter_apply_cpu(const ScatterCall& call) {
  if (call.parts.empty()) return;
  const CpuKernels& kernels = cpu_kernels();
  const ScatterWriter writer(call, kernels);
  announce_writes(call);
  count_call(kernels);
  for_each_run(writer.lists,
               [&](const Lists::Part& part, int64_t begin, int64_t end) { writer.write(part, begin, end, end); });
}

static void scatter_apply(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha,
                          bool additive, const std::optional<Tensor>& saved) {
  scatter_apply_cpu(check_scatter("scatter_apply", {{weight, "weight", 0, indices.numel()}}, nullptr, indices, values,
                                  alpha, additive, saved));
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("scatter_apply", TORCH_BOX(&shira::scatter_apply)); }
