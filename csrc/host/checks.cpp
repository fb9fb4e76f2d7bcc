#include "checks.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace shira {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

template <size_t N>
StableIValue call(const char* op, std::array<StableIValue, N> stack) {
  check_status(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION), op);
  return stack[0];
}

bool is_leaf(const Tensor& tensor) { return to<bool>(call<1>("aten::is_leaf", {from(tensor)})); }

// In grad mode. The stable ABI does not tell, but an alias is a leaf exactly if its source does not require grad.
bool requires_grad(const Tensor& tensor) { return !is_leaf(to<Tensor>(call<1>("aten::alias", {from(tensor)}))); }

}  // namespace

void fail(const char* op, const std::string& argument, const std::string& message) {
  throw std::runtime_error("shira::" + std::string(op) + ": " + argument + " " + message);
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  check_status(aoti_torch_get_dtype(tensor.get(), &dtype), "aoti_torch_get_dtype");
  return dtype;
}

Element element_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Element::Float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Element::BFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Element::Float16;
  if (dtype == aoti_torch_dtype_float64()) return Element::Float64;
  return Element::Other;
}

std::string dtype_name(int32_t dtype) {
  static const std::vector<std::pair<int32_t, const char*>> names = {
      {aoti_torch_dtype_float64(), "torch.float64"},       {aoti_torch_dtype_float32(), "torch.float32"},
      {aoti_torch_dtype_bfloat16(), "torch.bfloat16"},     {aoti_torch_dtype_float16(), "torch.float16"},
      {aoti_torch_dtype_int64(), "torch.int64"},           {aoti_torch_dtype_int32(), "torch.int32"},
      {aoti_torch_dtype_int16(), "torch.int16"},           {aoti_torch_dtype_int8(), "torch.int8"},
      {aoti_torch_dtype_uint8(), "torch.uint8"},           {aoti_torch_dtype_bool(), "torch.bool"},
      {aoti_torch_dtype_uint16(), "torch.uint16"},         {aoti_torch_dtype_complex64(), "torch.complex64"},
      {aoti_torch_dtype_complex128(), "torch.complex128"},
  };
  for (const auto& [known, name] : names)
    if (known == dtype) return name;
  return "dtype " + std::to_string(dtype);
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

bool same_device(const Tensor& a, const Tensor& b) {
  int32_t type_a, type_b;
  check_status(aoti_torch_get_device_type(a.get(), &type_a), "aoti_torch_get_device_type");
  check_status(aoti_torch_get_device_type(b.get(), &type_b), "aoti_torch_get_device_type");
  return type_a == type_b && a.get_device_index() == b.get_device_index();
}

bool check_indices(const char* op, const Tensor& indices, const char* name) {
  const int32_t dtype = dtype_of(indices);
  const bool wide = dtype == aoti_torch_dtype_int64();
  if (!wide && dtype != aoti_torch_dtype_int32()) fail(op, name, "must be int32 or int64, got " + dtype_name(dtype));
  check_vector(op, name, indices, indices);
  return wide;
}

void check_vector(const char* op, const char* argument, const Tensor& tensor, const Tensor& indices) {
  if (tensor.dim() != 1) fail(op, argument, "must be 1-D, got shape " + shape_of(tensor));
  if (!tensor.is_contiguous()) fail(op, argument, "must be contiguous");
  if (!same_device(tensor, indices)) fail(op, argument, "must be on the device of indices");
  if (tensor.numel() != indices.numel())
    fail(op, argument,
         "must have one entry per index (" + std::to_string(indices.numel()) + "), got " +
             std::to_string(tensor.numel()));
}

const int64_t* check_offsets(const char* op, const Tensor& offsets, int64_t weights, int64_t nnz, const Tensor* like,
                             const char* name) {
  if (dtype_of(offsets) != aoti_torch_dtype_int64())
    fail(op, name, "must be int64, got " + dtype_name(dtype_of(offsets)));
  if (offsets.dim() != 1 || !offsets.is_contiguous())
    fail(op, name, "must be 1-D and contiguous, got shape " + shape_of(offsets));
  if (offsets.numel() != weights + 1)
    fail(op, name,
         "must have one entry more than weights (" + std::to_string(weights + 1) + "), got " +
             std::to_string(offsets.numel()));
  if (!offsets.is_cpu()) {
    if (like != nullptr && !same_device(offsets, *like))
      fail(op, name, "must be on the CPU or on the device of the weights");
    return nullptr;
  }
  const auto* borders = static_cast<const int64_t*>(offsets.data_ptr());
  check_borders(op, borders, weights, nnz, name);
  return borders;
}

void check_borders(const char* op, const int64_t* borders, int64_t weights, int64_t nnz, const char* name) {
  if (borders[0] != 0 || borders[weights] != nnz || !std::is_sorted(borders, borders + weights + 1))
    fail(op, name,
         "must rise from 0 to the number of indices (" + std::to_string(nnz) + "), got from " +
             std::to_string(borders[0]) + " to " + std::to_string(borders[weights]));
}

std::vector<WeightPart> check_parts(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                    const Tensor& indices, const ListNames& names) {
  const auto count = static_cast<int64_t>(weights.size());
  const int64_t* borders =
      check_offsets(op, offsets, count, indices.numel(), count ? &weights[0] : nullptr, names.offsets);
  std::vector<WeightPart> parts;
  parts.reserve(weights.size());
  for (int64_t i = 0; i < count; ++i)
    parts.push_back(
        {weights[i], "weights[" + std::to_string(i) + "]", borders ? borders[i] : 0, borders ? borders[i + 1] : 0});
  return parts;
}

void check_weights(const char* op, const std::vector<WeightPart>& parts, const Tensor& indices) {
  for (const WeightPart& part : parts) {
    const int32_t dtype = dtype_of(parts[0].weight);
    if (dtype_of(part.weight) != dtype)
      fail(op, part.name,
           "must be " + dtype_name(dtype) + " like weights[0], got " + dtype_name(dtype_of(part.weight)));
    if (!same_device(part.weight, indices)) fail(op, part.name, "must be on the device of indices");
    if (!part.weight.is_contiguous()) fail(op, part.name, "must be contiguous");
  }
}

void check_overlap(const char* op, const std::vector<Argument>& written, const std::vector<Argument>& read) {
  struct Span {
    uintptr_t begin, end;
    const std::string* name;
    bool is_written;
  };
  std::vector<Span> spans;
  spans.reserve(written.size() + read.size());
  for (const auto* group : {&written, &read})
    for (const Argument& argument : *group) {
      const auto bytes = static_cast<uintptr_t>(argument.tensor.numel()) * argument.tensor.element_size();
      const auto begin = reinterpret_cast<uintptr_t>(argument.tensor.data_ptr());
      if (bytes) spans.push_back({begin, begin + bytes, &argument.name, group == &written});
    }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  // The span that reaches furthest so far: of all, and of the written ones.
  const Span none{0, 0, nullptr, false};
  const Span *reach = &none, *reach_written = &none;
  for (const Span& span : spans) {
    const Span* other = span.is_written ? reach : reach_written;
    if (span.begin < other->end) {
      const bool saved_first = *other->name == "saved" || (*span.name != "saved" && *other->name < *span.name);
      const Span &first = saved_first ? *other : span, &second = saved_first ? span : *other;
      fail(op, *first.name, "must not share memory with " + *second.name);
    }
    if (span.end > reach->end) reach = &span;
    if (span.is_written && span.end > reach_written->end) reach_written = &span;
  }
}

void refuse_grad(const char* op, const Argument& argument) {
  if (aoti_torch_grad_mode_is_enabled() && requires_grad(argument.tensor))
    fail(op, argument.name, "requires grad: call this op under torch.no_grad()");
}

void announce_write(const char* op, const Argument& argument) {
  // Swapping dimension 0 with itself changes nothing; as an in-place op it does autograd's bookkeeping. In grad mode it
  // refuses a leaf that requires grad, and would make our write a part of the history of any other tensor that does.
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  if (grad_mode && !is_leaf(argument.tensor)) refuse_grad(op, argument);
  try {
    to<Tensor>(call<3>("aten::transpose_", {from(argument.tensor), from(int64_t{0}), from(int64_t{0})}));
  } catch (const std::exception&) {
    refuse_grad(op, argument);
    fail(op, argument.name, "must not be an inference tensor outside torch.inference_mode()");
  }
}

}  // namespace shira
