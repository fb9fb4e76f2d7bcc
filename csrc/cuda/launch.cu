// Checked mode of all ops on NVIDIA GPUs, and what the module tells of its CUDA kernels.
#include <atomic>
#include <memory>
#include <stdexcept>

#include "facts.h"
#include "launch.h"

namespace shira {
namespace {

std::atomic<int64_t> calls{0};
std::atomic<bool> check_indices_first{false};

// Sets *wrong where indices of a part are outside its weight or do not rise.
template <int kParts, class Index>
__global__ void __launch_bounds__(kThreads)
    check_indices_kernel(const __grid_constant__ Batch<WeightTarget, kParts> batch, const Index* __restrict__ indices,
                         int* wrong) {
  const int64_t i = batch.begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch.end) return;
  const WeightTarget* target = target_of(batch, i);
  if (target == nullptr) return;
  const bool first = i == batch.begin || target_of(batch, i - 1) != target;  // batches begin where a part begins
  if (indices[i] < 0 || indices[i] >= target->numel || (!first && indices[i - 1] >= indices[i])) *wrong = 1;
}

void check_indices_on_gpu(const BatchCall& call, cudaStream_t stream) {
  int* wrong = nullptr;
  check_cuda(cudaMallocAsync(reinterpret_cast<void**>(&wrong), sizeof(int), stream), call.op);
  const auto free_later = [&](int* p) { cudaFreeAsync(p, stream); };
  const std::unique_ptr<int, decltype(free_later)> owner(wrong, free_later);
  check_cuda(cudaMemsetAsync(wrong, 0, sizeof(int), stream), call.op);
  const auto over = [&](const auto& batch) {
    const unsigned blocks = blocks_for(batch.end - batch.begin, kThreads);
    if (call.indices.element_size() == sizeof(int64_t))
      check_indices_kernel<<<blocks, kThreads, 0, stream>>>(batch, static_cast<const int64_t*>(call.indices.data_ptr()),
                                                            wrong);
    else
      check_indices_kernel<<<blocks, kThreads, 0, stream>>>(batch, static_cast<const int32_t*>(call.indices.data_ptr()),
                                                            wrong);
    check_cuda(cudaGetLastError(), call.op);
  };
  const auto target = [](int, const WeightTarget& weight) { return weight; };
  if (call.offsets == nullptr)
    for_each_batch<WeightTarget, 1>(call, target, over);
  else
    for_each_batch<WeightTarget, kMaxParts<WeightTarget>>(call, target, over);
  int found = 0;
  check_cuda(cudaMemcpyAsync(&found, wrong, sizeof(int), cudaMemcpyDeviceToHost, stream), call.op);
  check_cuda(cudaStreamSynchronize(stream), call.op);
  if (found) fail(call.op, "indices", "must be sorted, unique and inside the weight");
}

}  // namespace

std::vector<std::string> cuda_ops() { return {"scatter_apply", "scatter_apply_batched", "masked_adamw"}; }
int64_t cuda_calls() { return calls; }
void set_check_indices(bool enabled) { check_indices_first = enabled; }
void count_cuda_call() { calls.fetch_add(1, std::memory_order_relaxed); }

void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error("shira::" + std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  check_status(aoti_torch_get_current_cuda_stream(device_index, &stream), "aoti_torch_get_current_cuda_stream");
  return static_cast<cudaStream_t>(stream);
}

bool checks_contents() { return check_indices_first; }

std::vector<int64_t> check_contents(const BatchCall& call, cudaStream_t stream) {
  std::vector<int64_t> borders;
  if (!call.host_borders()) {
    borders.resize(call.parts.size() + 1);
    check_cuda(cudaMemcpyAsync(borders.data(), call.offsets->data_ptr(), borders.size() * sizeof(int64_t),
                               cudaMemcpyDeviceToHost, stream),
               call.op);
    check_cuda(cudaStreamSynchronize(stream), call.op);
    check_borders(call.op, borders.data(), static_cast<int64_t>(call.parts.size()), call.indices.numel());
  }
  check_indices_on_gpu(call, stream);
  return borders;
}

}  // namespace shira
