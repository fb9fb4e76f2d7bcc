// masked_adamw on the CPU: checks, the choice of a kernel, and the split over threads (lists.h).
#include "../host/adamw_call.h"
#include "lists.h"

namespace shira {

static void masked_adamw(const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                         const std::vector<Tensor>& grads, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                         const std::optional<Tensor>& master, const Tensor& step, double lr, double beta1, double beta2,
                         double eps, double weight_decay) {
  const AdamWCall call = check_adamw("masked_adamw", weights, offsets, indices, grads, exp_avg, exp_avg_sq, master,
                                     step, {lr, beta1, beta2, eps, weight_decay});
  if (call.parts.empty()) return;
  const CpuKernels& kernels = cpu_kernels();
  const Lists lists(call.parts, indices);
  check_contents(call.op, call.parts, lists, kernels);

  announce_writes(call);
  count_call(kernels);
  const MaskedAdamW update = kernels.masked_adamw(call.form);
  const auto at = [](const Tensor& tensor, int64_t i) {
    return static_cast<char*>(tensor.data_ptr()) + i * static_cast<int64_t>(tensor.element_size());
  };
  for_each_run(lists, [&](const Lists::Part& part, int64_t begin, int64_t end) {
    const auto i = static_cast<size_t>(&part - lists.parts.data());
    update(
        {part.weight, lists.indices + begin * lists.index_size, at(grads[i], call.dense[i] ? 0 : begin - part.begin),
         call.dense[i], at(exp_avg, begin), at(exp_avg_sq, begin), master ? at(*master, begin) : nullptr, end - begin},
        call.numbers, call.step_count);
  });
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("masked_adamw", TORCH_BOX(&shira::masked_adamw)); }
