// The ops of the namespace shira_host, for kernels that are not C++: the checks and the bookkeeping of an op that
// writes entries of several weights, for tensors of any device, in one call. They take what the op of the same name
// takes, refuse what it refuses without reading what a device holds, tell autograd of the writes, and give back what a
// launch needs of the weights: int64 numbers in one vector on the CPU.
//
//   scatter_apply_batched, scatter_switch_batched: addresses [n], numbers of elements [n]
//   masked_adamw: addresses and numbers of elements of the weights, addresses of the gradients, their lengths (-1: it
//   has the weight's shape), [n] each
//
// and then those offsets that are on the CPU, [n + 1] each, in the order of the arguments (the new list's first), each
// on an even place, so that each is aligned to 16 bytes.
#include "adamw_call.h"
#include "scatter_call.h"

namespace shira {
namespace {

int64_t even(int64_t number) { return (number + 1) & ~int64_t{1}; }

// `rows` of one number for each weight, and the offsets; the rows are still to be written, where `row` points.
struct Table {
  Tensor numbers;
  int64_t* row;

  Table(const std::vector<WeightPart>& parts, int64_t rows, std::initializer_list<const Tensor*> offsets)
      : numbers(empty_vector(size(parts, rows, offsets), aoti_torch_dtype_int64())),
        row(static_cast<int64_t*>(numbers.data_ptr())) {
    int64_t at = rows * static_cast<int64_t>(parts.size());
    for (const Tensor* cuts : offsets) {
      if (!cuts->is_cpu()) continue;
      if (at != even(at)) row[at] = 0;
      const auto* from = static_cast<const int64_t*>(cuts->data_ptr());
      std::copy(from, from + parts.size() + 1, row + even(at));
      at = even(at) + static_cast<int64_t>(parts.size()) + 1;
    }
    for (const WeightPart& part : parts) *row++ = reinterpret_cast<int64_t>(part.data);
    for (const WeightPart& part : parts) *row++ = part.numel;
  }

  static int64_t size(const std::vector<WeightPart>& parts, int64_t rows,
                      std::initializer_list<const Tensor*> offsets) {
    const auto weights = static_cast<int64_t>(parts.size());
    int64_t end = rows * weights;
    for (const Tensor* cuts : offsets)
      if (cuts->is_cpu()) end = even(end) + weights + 1;
    return end;
  }
};

void scatter_apply(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha, bool additive,
                   const std::optional<Tensor>& saved) {
  announce_writes(check_scatter("scatter_apply", {{weight, "weight", 0, indices.numel()}}, nullptr, indices, values,
                                alpha, additive, saved));
}

Tensor scatter_apply_batched(const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                             const Tensor& values, double alpha, bool additive, const std::optional<Tensor>& saved) {
  const ScatterCall call =
      check_scatter_batched("scatter_apply_batched", weights, offsets, indices, values, alpha, additive, saved);
  announce_writes(call);
  return Table(call.parts, 2, {&offsets}).numbers;
}

Tensor scatter_switch_batched(const std::vector<Tensor>& weights, const Tensor& old_offsets, const Tensor& old_indices,
                              const Tensor& old_saved, const Tensor& offsets, const Tensor& indices,
                              const Tensor& values, const Tensor& saved, double alpha, bool additive) {
  const std::optional<Tensor> keep(saved);
  const SwitchCall call = check_switch("scatter_switch_batched", weights, old_offsets, old_indices, old_saved, offsets,
                                       indices, values, alpha, additive, keep);
  announce_writes(call.to);
  return Table(call.to.parts, 2, {&offsets, &old_offsets}).numbers;
}

Tensor masked_adamw(const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                    const std::vector<Tensor>& grads, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                    const std::optional<Tensor>& master, const Tensor& step, double lr, double beta1, double beta2,
                    double eps, double weight_decay) {
  const AdamWCall call = check_adamw("masked_adamw", weights, offsets, indices, grads, exp_avg, exp_avg_sq, master,
                                     step, {lr, beta1, beta2, eps, weight_decay});
  announce_writes(call);
  Table table(call.parts, 4, {&offsets});
  for (const Tensor& grad : grads) *table.row++ = reinterpret_cast<int64_t>(grad.data_ptr());
  for (size_t i = 0; i < grads.size(); ++i) *table.row++ = call.dense[i] ? -1 : grads[i].numel();
  return table.numbers;
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira_host, CompositeExplicitAutograd, m) {
  m.impl("scatter_apply", TORCH_BOX(&shira::scatter_apply));
  m.impl("scatter_apply_batched", TORCH_BOX(&shira::scatter_apply_batched));
  m.impl("scatter_switch_batched", TORCH_BOX(&shira::scatter_switch_batched));
  m.impl("masked_adamw", TORCH_BOX(&shira::masked_adamw));
}
