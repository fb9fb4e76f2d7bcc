#include "scatter_call.h"

namespace shira {
namespace {

// The vectors of a list, for weights like `first`, of which there may be none.
ScatterForm check_list(const char* op, const WeightPart* first, const Tensor& indices, const Tensor& values,
                       double alpha, bool additive, const std::optional<Tensor>& saved, const ListNames& names) {
  ScatterForm form{};
  form.wide_index = check_indices(op, indices, names.indices);
  if (first != nullptr) check_device(op, names.indices, indices, first->weight);
  check_vector(op, names.values, values, indices);
  if (saved) check_vector(op, "saved", *saved, indices);
  form.mode = additive ? Mode::Add : alpha == 1.0 ? Mode::Replace : Mode::Interpolate;
  form.keep = saved.has_value();
  if (first == nullptr) return form;
  const int32_t dtype = dtype_of(first->weight), value_dtype = dtype_of(values);
  form.weight = element_of(dtype);
  form.value = element_of(value_dtype);
  if (first->weight.element_size() > 8)
    fail(op, first->name, "must have elements of 1, 2, 4 or 8 bytes, got " + dtype_name(dtype));
  form.element_size = static_cast<uint8_t>(first->weight.element_size());
  if (form.mode != Mode::Replace && form.weight == Element::Other)
    fail(op, first->name, "must be floating point unless entries are replaced at alpha 1, got " + dtype_name(dtype));
  if (value_dtype != dtype && !(additive && form.value == Element::Float32))
    fail(op, names.values,
         "must be " + dtype_name(dtype) + (additive ? " or float32" : " like the weight") + ", got " +
             dtype_name(value_dtype));
  if (saved && dtype_of(*saved) != dtype)
    fail(op, "saved", "must be " + dtype_name(dtype) + " like the weight, got " + dtype_name(dtype_of(*saved)));
  return form;
}

std::vector<Span> written_spans(const std::vector<WeightPart>& parts, int64_t element_size,
                                const std::optional<Tensor>& saved) {
  std::vector<Span> spans;
  spans.reserve(parts.size() + 8);  // and of the lists
  for (const WeightPart& part : parts) spans.emplace_back(part, element_size);
  if (saved) spans.emplace_back("saved", *saved, true);
  return spans;
}

void add_read(std::vector<Span>& spans, const Tensor* offsets, const Tensor& indices, const Tensor& values,
              const ListNames& names) {
  if (offsets != nullptr) spans.emplace_back(names.offsets, *offsets, false);
  spans.emplace_back(names.indices, indices, false);
  spans.emplace_back(names.values, values, false);
}

const WeightPart* first_of(const std::vector<WeightPart>& parts) { return parts.empty() ? nullptr : &parts[0]; }

}  // namespace

ScatterCall check_scatter(const char* op, std::vector<WeightPart> parts, const Tensor* offsets, const Tensor& indices,
                          const Tensor& values, double alpha, bool additive, const std::optional<Tensor>& saved,
                          const ListNames& names) {
  const ScatterForm form = check_list(op, first_of(parts), indices, values, alpha, additive, saved, names);
  check_weights(op, parts);
  refuse_grad(op, names.values, values);
  std::vector<Span> spans = written_spans(parts, form.element_size, saved);
  add_read(spans, offsets, indices, values, names);
  check_overlap(op, std::move(spans));
  return {op, std::move(parts), offsets, indices, values, alpha, saved, form, names};
}

ScatterCall check_scatter_batched(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                  const Tensor& indices, const Tensor& values, double alpha, bool additive,
                                  const std::optional<Tensor>& saved, const ListNames& names) {
  return check_scatter(op, check_parts(op, weights, offsets, indices, names), &offsets, indices, values, alpha,
                       additive, saved, names);
}

SwitchCall check_switch(const char* op, const std::vector<Tensor>& weights, const Tensor& old_offsets,
                        const Tensor& old_indices, const Tensor& old_saved, const Tensor& offsets,
                        const Tensor& indices, const Tensor& values, double alpha, bool additive,
                        const std::optional<Tensor>& saved) {
  static const std::optional<Tensor> none;
  const ListNames names, old_names{"old_offsets", "old_indices", "old_saved"};
  std::vector<WeightPart> parts = check_parts(op, weights, offsets, indices, names);
  const int64_t* old_borders = check_offsets(op, old_offsets, static_cast<int64_t>(weights.size()), old_indices.numel(),
                                             weights.empty() ? nullptr : &weights[0], old_names.offsets);
  const ScatterForm form = check_list(op, first_of(parts), indices, values, alpha, additive, saved, names);
  check_weights(op, parts);
  const ScatterForm old_form = check_list(op, first_of(parts), old_indices, old_saved, 1.0, false, none, old_names);
  refuse_grad(op, names.values, values);
  refuse_grad(op, old_names.values, old_saved);
  std::vector<Span> spans = written_spans(parts, form.element_size, saved);
  add_read(spans, &offsets, indices, values, names);
  add_read(spans, &old_offsets, old_indices, old_saved, old_names);
  check_overlap(op, std::move(spans));
  std::vector<WeightPart> old_parts = parts;
  for (size_t i = 0; i < old_parts.size(); ++i) {
    old_parts[i].begin = old_borders ? old_borders[i] : 0;
    old_parts[i].end = old_borders ? old_borders[i + 1] : 0;
  }
  return {{op, std::move(old_parts), &old_offsets, old_indices, old_saved, 1.0, none, old_form, old_names},
          {op, std::move(parts), &offsets, indices, values, alpha, saved, form, names}};
}

void announce_writes(const ScatterCall& call) {
  for (const WeightPart& part : call.parts) announce_write(call.op, part.name, part.weight);
  if (call.saved) announce_write(call.op, "saved", *call.saved);
}

}  // namespace shira
