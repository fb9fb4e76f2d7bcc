// What csrc/cuda needs of CUDA, for g++: kernels run on the CPU, block after block. The threads of a block are fibers
// that take turns at barriers, in an order that changes from turn to turn, and so do the blocks from launch to launch:
// a kernel that needs an order that no barrier gives it computes something wrong here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx;  // of the fiber that runs

namespace cuda_on_host {

struct Counts {
  int64_t launches = 0, copies = 0, waits = 0, allocations = 0, argument_bytes = 0;
};
inline Counts counts;
inline bool launches_do_nothing = false;  // for host times

// Runs body as each thread of each block.
void run_blocks(unsigned blocks, unsigned threads, void (*body)(void*), void* state);

}  // namespace cuda_on_host

void __syncthreads();
int __syncthreads_count(int predicate);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto launch = [&](Parameters... copies) {  // CUDA copies them, too
    ++cuda_on_host::counts.launches;
    cuda_on_host::counts.argument_bytes += (sizeof(copies) + ...);
    if (config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
    if (cuda_on_host::launches_do_nothing) return cudaSuccess;
    auto body = [&] { kernel(copies...); };
    cuda_on_host::run_blocks(
        config->gridDim.x, config->blockDim.x, [](void* state) { (*static_cast<decltype(body)*>(state))(); }, &body);
    return cudaSuccess;
  };
  return launch(arguments...);
}

inline cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  ++cuda_on_host::counts.allocations;
  *pointer = std::malloc(bytes);
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  ++cuda_on_host::counts.copies;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++cuda_on_host::counts.waits;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "out of memory";
}
