// Torch, through its stable ABI alone, as of version 2.10: what is compiled here runs with that version and later ones.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

namespace shira {

using torch::stable::Tensor;

// For the results of torch's C functions. (The macro for it is named differently from version to version.)
inline void check_status(AOTITorchError error, const char* call) {
  if (error != 0) throw std::runtime_error("torch's " + std::string(call) + " failed");
}

// [size] on the CPU, not initialised. torch::stable::new_empty finds its op by name at each call: 2 us more.
inline Tensor empty_vector(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  check_status(aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle),
               "empty_strided");
  return Tensor(handle);
}

}  // namespace shira
