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

// As Python writes a tuple.
template <class F>
std::string tuple_of(int64_t count, const F& number) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(number(i));
  return text + (count == 1 ? ",)" : ")");
}

std::string strides_of(const Tensor& tensor) {
  return tuple_of(tensor.dim(), [&](int64_t i) { return tensor.stride(i); });
}

bool is_leaf(const Tensor& tensor) { return to<bool>(call<1>("aten::is_leaf", {from(tensor)})); }

// In grad mode. The stable ABI does not tell, but an alias is a leaf exactly if its source does not require grad.
bool requires_grad(const Tensor& tensor) { return !is_leaf(to<Tensor>(call<1>("aten::alias", {from(tensor)}))); }

}  // namespace

Name::operator std::string() const {
  return place < 0 ? std::string(text) : std::string(text) + "[" + std::to_string(place) + "]";
}

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
  return tuple_of(tensor.dim(), [&](int64_t i) { return tensor.size(i); });
}

Device device_of(const Tensor& tensor) {
  Device device;
  check_status(aoti_torch_get_device_type(tensor.get(), &device.type), "aoti_torch_get_device_type");
  check_status(aoti_torch_get_device_index(tensor.get(), &device.index), "aoti_torch_get_device_index");
  return device;
}

bool same_device(const Tensor& a, const Tensor& b) { return device_of(a) == device_of(b); }

std::string device_name(const Tensor& tensor) {
  const Device device = device_of(tensor);
  const std::string type = device.type == aoti_torch_device_type_cpu()    ? "cpu"
                           : device.type == aoti_torch_device_type_cuda() ? "cuda"
                           : device.type == aoti_torch_device_type_meta() ? "meta"
                           : device.type == aoti_torch_device_type_xpu()  ? "xpu"
                           : device.type == aoti_torch_device_type_mps() ? "mps"
                                                                         : "device type " + std::to_string(device.type);
  return device.index < 0 ? type : type + ":" + std::to_string(device.index);
}

void check_device(const char* op, const Name& argument, const Tensor& tensor, const Tensor& like) {
  if (!same_device(tensor, like))
    fail(op, argument, "must be on " + device_name(like) + " like the others, got " + device_name(tensor));
}

void check_storage(const char* op, const Name& argument, const Tensor& tensor) {
  int32_t layout;
  check_status(aoti_torch_get_layout(tensor.get(), &layout), "aoti_torch_get_layout");
  if (layout != aoti_torch_layout_strided()) fail(op, argument, "must be a strided tensor");
  if (tensor.numel() == 0) return;
  int64_t size, offset;
  check_status(aoti_torch_get_storage_size(tensor.get(), &size), "aoti_torch_get_storage_size");
  check_status(aoti_torch_get_storage_offset(tensor.get(), &offset), "aoti_torch_get_storage_offset");
  int64_t last = tensor.numel() - 1;
  if (!tensor.is_contiguous()) {
    last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  }
  const int64_t needed = (offset + last + 1) * static_cast<int64_t>(tensor.element_size());
  if (size < needed)
    fail(op, argument,
         "must have its elements in memory, got " + std::to_string(needed) + " bytes in storage that was resized");
}

void check_memory(const char* op, const Name& argument, const Tensor& tensor) {
  check_storage(op, argument, tensor);
  if (!tensor.is_contiguous()) fail(op, argument, "must be contiguous, got strides " + strides_of(tensor));
}

Tensor as_contiguous(const char* op, const Name& argument, const Tensor& tensor) {
  // torch::stable::contiguous finds its op by name at each call, also where there is nothing to do.
  if (tensor.is_contiguous()) return tensor;
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::runtime_error&) {  // which says nothing of why
    fail(op, argument, "must fit in memory once more unless it is contiguous, got shape " + shape_of(tensor));
  }
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
  check_memory(op, argument, tensor);
  check_device(op, argument, tensor, indices);
  if (tensor.numel() != indices.numel())
    fail(op, argument,
         "must have one entry per index (" + std::to_string(indices.numel()) + "), got " +
             std::to_string(tensor.numel()));
}

const int64_t* check_offsets(const char* op, const Tensor& offsets, int64_t weights, int64_t nnz, const Tensor* like,
                             const char* name) {
  if (dtype_of(offsets) != aoti_torch_dtype_int64())
    fail(op, name, "must be int64, got " + dtype_name(dtype_of(offsets)));
  check_storage(op, name, offsets);
  if (offsets.dim() != 1 || !offsets.is_contiguous())
    fail(op, name, "must be 1-D and contiguous, got shape " + shape_of(offsets));
  if (offsets.numel() != weights + 1)
    fail(op, name,
         "must have one entry more than weights (" + std::to_string(weights + 1) + "), got " +
             std::to_string(offsets.numel()));
  if (!offsets.is_cpu()) {
    if (like != nullptr && !same_device(offsets, *like))
      fail(op, name, "must be on the CPU or on " + device_name(*like) + ", got " + device_name(offsets));
    return nullptr;
  }
  const auto* borders = static_cast<const int64_t*>(offsets.data_ptr());
  check_borders(op, borders, weights, nnz, name);
  return borders;
}

void check_borders(const char* op, const int64_t* borders, int64_t weights, int64_t nnz, const char* name) {
  if (borders[0] == 0 && borders[weights] == nnz && std::is_sorted(borders, borders + weights + 1)) return;
  std::string numbers;
  for (int64_t i = 0; i <= weights; ++i) {
    if (weights > 7 && i == 4) numbers += ", ...", i = weights;
    numbers += (i ? ", " : "") + std::to_string(borders[i]);
  }
  fail(op, name, "must rise from 0 to the number of indices (" + std::to_string(nnz) + "), got [" + numbers + "]");
}

std::vector<WeightPart> check_parts(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                    const Tensor& indices, const ListNames& names) {
  const auto count = static_cast<int64_t>(weights.size());
  const int64_t* borders =
      check_offsets(op, offsets, count, indices.numel(), count ? &weights[0] : nullptr, names.offsets);
  std::vector<WeightPart> parts;
  parts.reserve(weights.size());
  for (int64_t i = 0; i < count; ++i)
    parts.push_back({weights[i], {"weights", i}, borders ? borders[i] : 0, borders ? borders[i + 1] : 0});
  return parts;
}

void check_weights(const char* op, std::vector<WeightPart>& parts) {
  if (parts.empty()) return;
  const int32_t dtype = dtype_of(parts[0].weight);
  const Device device = device_of(parts[0].weight);
  for (WeightPart& part : parts) {
    if (dtype_of(part.weight) != dtype)
      fail(op, part.name,
           "must be " + dtype_name(dtype) + " like weights[0], got " + dtype_name(dtype_of(part.weight)));
    if (device_of(part.weight) != device)
      fail(op, part.name,
           "must be on " + device_name(parts[0].weight) + " like weights[0], got " + device_name(part.weight));
    check_memory(op, part.name, part.weight);
    part.data = part.weight.data_ptr();
    part.numel = part.weight.numel();
  }
}

Span::Span(const Name& argument, const Tensor& tensor, bool written)
    : begin(reinterpret_cast<uintptr_t>(tensor.data_ptr())),
      end(begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size()),
      name(argument),
      is_written(written) {}

void check_overlap(const char* op, const std::vector<Argument>& written, const std::vector<Argument>& read) {
  std::vector<Span> spans;
  spans.reserve(written.size() + read.size());
  for (const auto* group : {&written, &read})
    for (const Argument& argument : *group)
      spans.emplace_back(argument.name.c_str(), argument.tensor, group == &written);
  check_overlap(op, std::move(spans));
}

void check_overlap(const char* op, std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  // The span that reaches furthest so far: of all, and of the written ones.
  const Span* reach = nullptr;
  const Span* reach_written = nullptr;
  for (const Span& span : spans) {
    if (span.begin == span.end) continue;
    const Span* other = span.is_written ? reach : reach_written;
    if (other != nullptr && span.begin < other->end) {
      const std::string name = span.name, other_name = other->name;
      const bool other_first = other_name == "saved" || (name != "saved" && other_name < name);
      fail(op, other_first ? other_name : name, "must not share memory with " + (other_first ? name : other_name));
    }
    if (reach == nullptr || span.end > reach->end) reach = &span;
    if (span.is_written && (reach_written == nullptr || span.end > reach_written->end)) reach_written = &span;
  }
}

void refuse_grad(const char* op, const Name& argument, const Tensor& tensor) {
  if (aoti_torch_grad_mode_is_enabled() && requires_grad(tensor))
    fail(op, argument, "requires grad: call this op under torch.no_grad()");
}

void announce_write(const char* op, const Name& argument, const Tensor& tensor) {
  // Copying a tensor to itself changes nothing; as an in-place op it does autograd's bookkeeping. In grad mode it
  // refuses a leaf that requires grad, and would make our write a part of the history of any other tensor that does.
  if (aoti_torch_grad_mode_is_enabled() && !is_leaf(tensor)) refuse_grad(op, argument, tensor);
  if (aoti_torch_copy_(tensor.get(), tensor.get(), 0) == 0) return;
  refuse_grad(op, argument, tensor);
  fail(op, argument, "must not be an inference tensor outside torch.inference_mode()");
}

}  // namespace shira
