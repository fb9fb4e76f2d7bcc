// Checks and autograd bookkeeping shared by the ops. A failed check throws std::runtime_error (RuntimeError in Python)
// naming the op and the argument, in the words of shira_kernels/ops/_checks.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../shared/scatter_form.h"
#include "torch_stable.h"

namespace shira {

struct Argument {
  std::string name;
  const Tensor& tensor;
};

// What an argument is called in errors: "values", or "weights[3]", which is put together only for an error.
struct Name {
  const char* text;
  int64_t place;  // in a list; -1 outside one

  Name(const char* argument, int64_t at = -1) : text(argument), place(at) {}
  operator std::string() const;
};
inline std::string operator+(const std::string& before, const Name& name) { return before + std::string(name); }

// One weight and its part [begin, end) of the sorted lists; both are 0 where the offsets are on a device, unread.
struct WeightPart {
  const Tensor& weight;
  Name name;
  int64_t begin, end;
  void* data = nullptr;  // of the weight, as is numel: check_weights sets both
  int64_t numel = 0;
};

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// The memory of an argument.
struct Span {
  uintptr_t begin, end;
  Name name;
  bool is_written;

  Span(const Name& argument, const Tensor& tensor, bool written);
  explicit Span(const WeightPart& part, int64_t element_size)
      : begin(reinterpret_cast<uintptr_t>(part.data)),
        end(begin + static_cast<uintptr_t>(part.numel * element_size)),
        name(part.name),
        is_written(true) {}
};

// What the vectors of a sorted list are called in errors.
struct ListNames {
  const char* offsets = "offsets";
  const char* indices = "indices";
  const char* values = "values";
};

[[noreturn]] void fail(const char* op, const std::string& argument, const std::string& message);

int32_t dtype_of(const Tensor& tensor);
Element element_of(int32_t dtype);
std::string dtype_name(int32_t dtype);

// "(2, 3)", as Python writes a shape.
std::string shape_of(const Tensor& tensor);

Device device_of(const Tensor& tensor);
bool same_device(const Tensor& a, const Tensor& b);

// "cuda:0", as Python writes a device.
std::string device_name(const Tensor& tensor);

// On the device of `like`.
void check_device(const char* op, const Name& argument, const Tensor& tensor, const Tensor& like);

// Strided, and its memory is as large as its shape says; libraries that shard models give it back meanwhile.
void check_storage(const char* op, const Name& argument, const Tensor& tensor);

// The same, and contiguous.
void check_memory(const char* op, const Name& argument, const Tensor& tensor);

// The tensor, or its elements side by side in a copy.
Tensor as_contiguous(const char* op, const Name& argument, const Tensor& tensor);

// int32 or int64, 1-D, contiguous. Returns whether it is int64.
bool check_indices(const char* op, const Tensor& indices, const char* name = "indices");

// 1-D, contiguous, on the device of `indices`, one entry per index.
void check_vector(const char* op, const char* argument, const Tensor& tensor, const Tensor& indices);

// int64, 1-D, contiguous, `weights` + 1 entries. On the CPU they must rise from 0 to nnz and are returned; on the
// device of `like` (if there is one) they stay unread and null is returned.
const int64_t* check_offsets(const char* op, const Tensor& offsets, int64_t weights, int64_t nnz, const Tensor* like,
                             const char* name = "offsets");
void check_borders(const char* op, const int64_t* borders, int64_t weights, int64_t nnz, const char* name = "offsets");

// The weights of a batch with their parts, the offsets checked.
std::vector<WeightPart> check_parts(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                    const Tensor& indices, const ListNames& names = {});

// All weights are contiguous and of the dtype and the device of the first. Sets where their data is.
void check_weights(const char* op, std::vector<WeightPart>& parts);

// No tensor of `written` shares memory with any other of either list. All are contiguous.
void check_overlap(const char* op, const std::vector<Argument>& written, const std::vector<Argument>& read);
void check_overlap(const char* op, std::vector<Span> spans);

// Outside no_grad, the tensor does not require grad.
void refuse_grad(const char* op, const Name& argument, const Tensor& tensor);
inline void refuse_grad(const char* op, const Argument& argument) {
  refuse_grad(op, argument.name.c_str(), argument.tensor);
}

// Tells autograd that the tensor's data is about to change: its version counter rises. Refuses it as refuse_grad does,
// at half the cost.
void announce_write(const char* op, const Name& argument, const Tensor& tensor);
inline void announce_write(const char* op, const Argument& argument) {
  announce_write(op, argument.name.c_str(), argument.tensor);
}

}  // namespace shira
