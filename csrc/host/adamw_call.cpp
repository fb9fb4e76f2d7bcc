#include "adamw_call.h"

#include <cmath>

namespace shira {
namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

void check_numbers(const char* op, const AdamWNumbers& numbers) {
  const std::pair<const char*, double> sizes[] = {
      {"lr", numbers.lr}, {"eps", numbers.eps}, {"weight_decay", numbers.weight_decay}};
  for (const auto& [name, number] : sizes)
    if (!(std::isfinite(number) && number >= 0))
      fail(op, name, "must be finite and not negative, got " + std::to_string(number));
  const std::pair<const char*, double> betas[] = {{"beta1", numbers.beta1}, {"beta2", numbers.beta2}};
  for (const auto& [name, number] : betas)
    if (!(number >= 0 && number < 1)) fail(op, name, "must lie in [0, 1), got " + std::to_string(number));
}

// Returns, of each gradient, whether it has its weight's shape.
std::vector<bool> check_grads(const char* op, const std::vector<WeightPart>& parts, const std::vector<Tensor>& grads) {
  std::vector<bool> dense;
  if (grads.empty()) return dense;
  dense.reserve(grads.size());
  const int32_t weight_dtype = dtype_of(parts[0].weight), grad_dtype = dtype_of(grads[0]);
  const Device device = device_of(parts[0].weight);
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &grad = grads[i], &weight = parts[i].weight;
    const Name name{"grads", static_cast<int64_t>(i)};
    const int32_t dtype = dtype_of(grad);
    if (dtype != weight_dtype && dtype != aoti_torch_dtype_float32())
      fail(op, name, "must be " + dtype_name(weight_dtype) + " like the weights or float32, got " + dtype_name(dtype));
    if (dtype != grad_dtype)
      fail(op, name, "must be " + dtype_name(grad_dtype) + " like grads[0], got " + dtype_name(dtype));
    if (device_of(grad) != device)
      fail(op, name, "must be on " + device_name(weight) + " like the weight, got " + device_name(grad));
    dense.push_back(same_shape(grad, weight));
    if (!dense[i] && grad.dim() != 1)
      fail(op, name,
           "must have the weight's shape " + shape_of(weight) + " or be 1-D with one entry per index, got shape " +
               shape_of(grad));
    check_memory(op, name, grad);
  }
  return dense;
}

}  // namespace

int64_t check_step(const char* op, float step) {
  if (!(step >= 1 && step == std::floor(step) && std::isfinite(step)))
    fail(op, "step", "must be a whole number of at least 1, got " + std::to_string(step));
  if (step >= 0x1p63f) fail(op, "step", "must be below 2^63, got " + std::to_string(step));
  return static_cast<int64_t>(step);
}

void check_compact(const AdamWCall& call, const int64_t* borders) {
  for (size_t i = 0; i < call.grads.size(); ++i)
    if (!call.dense[i] && call.grads[i].numel() != borders[i + 1] - borders[i])
      fail(call.op, Name{"grads", static_cast<int64_t>(i)},
           "must have the weight's shape " + shape_of(call.parts[i].weight) + " or be 1-D with one entry per index (" +
               std::to_string(borders[i + 1] - borders[i]) + "), got shape " + shape_of(call.grads[i]));
}

AdamWCall check_adamw(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                      const std::vector<Tensor>& grads, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                      const std::optional<Tensor>& master, const Tensor& step, const AdamWNumbers& numbers) {
  check_numbers(op, numbers);
  AdamWForm form{};
  form.wide_index = check_indices(op, indices);
  form.master = master.has_value();
  std::vector<WeightPart> parts = check_parts(op, weights, offsets, indices);
  if (grads.size() != weights.size())
    fail(op, "grads",
         "must be as many as weights (" + std::to_string(weights.size()) + "), got " + std::to_string(grads.size()));
  std::vector<Argument> states = {{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
  if (master) states.push_back({"master", *master});
  if (!parts.empty()) {
    const int32_t dtype = dtype_of(parts[0].weight);
    form.weight = element_of(dtype);
    if (form.weight == Element::Other)
      fail(op, parts[0].name, "must be float64, float32, bfloat16 or float16, got " + dtype_name(dtype));
    check_device(op, "indices", indices, parts[0].weight);
    check_weights(op, parts);
    form.grad = element_of(dtype_of(grads[0]));
    const int32_t compute = form.weight == Element::Float64 ? dtype : aoti_torch_dtype_float32();
    for (const Argument& state : states)
      if (dtype_of(state.tensor) != compute)
        fail(op, state.name,
             "must be " + dtype_name(compute) + " for " + dtype_name(dtype) + " weights, got " +
                 dtype_name(dtype_of(state.tensor)));
  }
  std::vector<bool> dense = check_grads(op, parts, grads);
  for (const Argument& state : states) check_vector(op, state.name.c_str(), state.tensor, indices);
  if (dtype_of(step) != aoti_torch_dtype_float32() || step.dim() != 0)
    fail(op, "step", "must be a 0-d float32 tensor, got " + dtype_name(dtype_of(step)) + " of shape " + shape_of(step));
  check_storage(op, "step", step);
  if (!step.is_cpu() && !same_device(step, indices))
    fail(op, "step", "must be on the CPU or on " + device_name(indices) + ", got " + device_name(step));

  std::vector<Span> spans;
  spans.reserve(parts.size() + grads.size() + 8);  // and of the vectors
  for (const WeightPart& part : parts) spans.emplace_back(part, static_cast<int64_t>(part.weight.element_size()));
  for (const Argument& state : states) spans.emplace_back(state.name.c_str(), state.tensor, true);
  for (size_t i = 0; i < grads.size(); ++i) {
    const Name name{"grads", static_cast<int64_t>(i)};
    refuse_grad(op, name, grads[i]);
    spans.emplace_back(name, grads[i], false);
  }
  refuse_grad(op, "step", step);
  spans.emplace_back("offsets", offsets, false);
  spans.emplace_back("indices", indices, false);
  spans.emplace_back("step", step, false);
  check_overlap(op, std::move(spans));
  const int64_t step_count = step.is_cpu() ? check_step(op, *static_cast<const float*>(step.data_ptr())) : 0;
  AdamWCall call{op,   std::move(parts), offsets, indices, grads, std::move(dense), exp_avg, exp_avg_sq, master,
                 step, step_count,       numbers, form};
  if (offsets.is_cpu()) check_compact(call, static_cast<const int64_t*>(offsets.data_ptr()));
  return call;
}

void announce_writes(const AdamWCall& call) {
  for (const WeightPart& part : call.parts) announce_write(call.op, part.name, part.weight);
  announce_write(call.op, "exp_avg", call.exp_avg);
  announce_write(call.op, "exp_avg_sq", call.exp_avg_sq);
  if (call.master) announce_write(call.op, "master", *call.master);
}

}  // namespace shira
