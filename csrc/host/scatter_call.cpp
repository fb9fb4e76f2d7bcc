#include "scatter_call.h"

namespace shira {

ScatterCall check_scatter(const char* op, std::vector<WeightPart> parts, const Tensor* offsets, const Tensor& indices,
                          const Tensor& values, double alpha, bool additive, const std::optional<Tensor>& saved,
                          const ListNames& names) {
  const bool wide = check_indices(op, indices, names.indices);
  check_vector(op, names.values, values, indices);
  if (saved) check_vector(op, "saved", *saved, indices);
  ScatterForm form{};
  form.mode = additive ? Mode::Add : alpha == 1.0 ? Mode::Replace : Mode::Interpolate;
  form.wide_index = wide;
  form.keep = saved.has_value();
  std::vector<Argument> written, read = {{names.indices, indices}, {names.values, values}};
  if (offsets != nullptr) read.push_back({names.offsets, *offsets});
  written.reserve(parts.size() + 1);
  if (!parts.empty()) {
    const Tensor& first = parts[0].weight;
    const int32_t dtype = dtype_of(first), value_dtype = dtype_of(values);
    form.weight = element_of(dtype);
    form.value = element_of(value_dtype);
    if (first.element_size() > 8)
      fail(op, parts[0].name, "must have elements of 1, 2, 4 or 8 bytes, got " + dtype_name(dtype));
    form.element_size = static_cast<uint8_t>(first.element_size());
    if (form.mode != Mode::Replace && form.weight == Element::Other)
      fail(op, parts[0].name,
           "must be floating point unless entries are replaced at alpha 1, got " + dtype_name(dtype));
    check_weights(op, parts, indices);
    for (const WeightPart& part : parts) written.push_back({part.name, part.weight});
    if (value_dtype != dtype && !(additive && form.value == Element::Float32))
      fail(op, names.values,
           "must be " + dtype_name(dtype) + (additive ? " or float32" : " like the weight") + ", got " +
               dtype_name(value_dtype));
    if (saved && dtype_of(*saved) != dtype)
      fail(op, "saved", "must be " + dtype_name(dtype) + " like the weight, got " + dtype_name(dtype_of(*saved)));
  }
  if (saved) written.push_back({"saved", *saved});
  refuse_grad(op, {names.values, values});
  check_overlap(op, written, read);
  return {op, std::move(parts), offsets, indices, values, alpha, saved, form, names};
}

ScatterCall check_scatter_batched(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                  const Tensor& indices, const Tensor& values, double alpha, bool additive,
                                  const std::optional<Tensor>& saved, const ListNames& names) {
  return check_scatter(op, check_parts(op, weights, offsets, indices, names), &offsets, indices, values, alpha,
                       additive, saved, names);
}

void announce_writes(const ScatterCall& call) {
  for (const WeightPart& part : call.parts) announce_write(call.op, {part.name, part.weight});
  if (call.saved) announce_write(call.op, {"saved", *call.saved});
}

}  // namespace shira
