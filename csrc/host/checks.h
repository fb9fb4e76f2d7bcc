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

// One weight and its part [begin, end) of the sorted lists; both are 0 where the offsets are on a device, unread.
struct WeightPart {
  const Tensor& weight;
  std::string name;
  int64_t begin, end;
};

[[noreturn]] void fail(const char* op, const std::string& argument, const std::string& message);

int32_t dtype_of(const Tensor& tensor);
Element element_of(int32_t dtype);
std::string dtype_name(int32_t dtype);

// "(2, 3)", as Python writes a shape.
std::string shape_of(const Tensor& tensor);

bool same_device(const Tensor& a, const Tensor& b);

// int32 or int64, 1-D, contiguous. Returns whether it is int64.
bool check_indices(const char* op, const Tensor& indices, const char* argument = "indices");

// 1-D, contiguous, on the device of `indices`, one entry per index.
void check_vector(const char* op, const char* argument, const Tensor& tensor, const Tensor& indices);

// int64, 1-D, contiguous, `weights` + 1 entries. On the CPU they must rise from 0 to nnz and are returned; on the
// device of `like` (if there is one) they stay unread and null is returned.
const int64_t* check_offsets(const char* op, const Tensor& offsets, int64_t weights, int64_t nnz, const Tensor* like);
void check_borders(const char* op, const int64_t* borders, int64_t weights, int64_t nnz);

// The weights of a batch with their parts, the offsets checked.
std::vector<WeightPart> check_parts(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                    const Tensor& indices);

// All weights are of the dtype of the first, on the device of `indices`, and contiguous.
void check_weights(const char* op, const std::vector<WeightPart>& parts, const Tensor& indices);

// No tensor of `written` shares memory with any other of either list. All are contiguous.
void check_overlap(const char* op, const std::vector<Argument>& written, const std::vector<Argument>& read);

// Outside no_grad, the tensor does not require grad.
void refuse_grad(const char* op, const Argument& argument);

// Tells autograd that the tensor's data is about to change: its version counter rises. Refuses it as refuse_grad does,
// at half the cost.
void announce_write(const char* op, const Argument& argument);

}  // namespace shira
