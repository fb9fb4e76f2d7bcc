// The ops of csrc/cuda become kernels for CPU tensors in a namespace of their own.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(shira_on_host, CPU, m, C10_UID)
