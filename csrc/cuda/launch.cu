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
    check_indices_kernel(const __grid_constant__ Batch<WeightTarget<1>, kParts> batch,
                         const Index* __restrict__ indices, int* wrong) {
  const int64_t begin = batch.lists[0].begin + static_cast<int64_t>(blockIdx.x) * kThreads;
  const Run run = run_of(batch, 0, begin, min(begin + kThreads, batch.lists[0].end));
  const int64_t i = begin + threadIdx.x;
  if (i < run.begin || i >= run.end) return;
  int part[1];
  parts_of(batch, 0, run, i, part);
  const bool first = i == border(batch, 0, part[0]);
  if (!is_inside(indices[i], batch.targets[part[0]].numel) || (!first && indices[i - 1] >= indices[i])) *wrong = 1;
}

void check_indices_on_gpu(const BatchCall& call, cudaStream_t stream) {
  int* wrong = nullptr;
  check_cuda(cudaMallocAsync(reinterpret_cast<void**>(&wrong), sizeof(int), stream), call.op);
  const auto free_later = [&](int* p) { cudaFreeAsync(p, stream); };
  const std::unique_ptr<int, decltype(free_later)> owner(wrong, free_later);
  check_cuda(cudaMemsetAsync(wrong, 0, sizeof(int), stream), call.op);
  const void* indices = call.indices.data_ptr();
  const bool wide = call.indices.element_size() == sizeof(int64_t);
  over_batches<WeightTarget<1>>({call}, plain_target<1>, [&](const auto& batch) {
    const auto check = [&](const auto* list) {
      launch_blocks(call.op, check_indices_kernel<std::decay_t<decltype(batch)>::kParts, std::decay_t<decltype(*list)>>,
                    blocks_for(batch.lists[0].end - batch.lists[0].begin, kThreads), stream, batch, list, wrong);
    };
    if (wide)
      check(static_cast<const int64_t*>(indices));
    else
      check(static_cast<const int32_t*>(indices));
  });
  int found = 0;
  check_cuda(cudaMemcpyAsync(&found, wrong, sizeof(int), cudaMemcpyDeviceToHost, stream), call.op);
  check_cuda(cudaStreamSynchronize(stream), call.op);
  if (found) fail(call.op, call.names.indices, "must be sorted, unique and inside the weight");
}

}  // namespace

std::vector<std::string> cuda_ops() {
  return {"scatter_apply", "scatter_apply_batched", "scatter_switch_batched", "masked_adamw"};
}
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
    check_borders(call.op, borders.data(), static_cast<int64_t>(call.parts.size()), call.indices.numel(),
                  call.names.offsets);
  }
  check_indices_on_gpu(call, stream);
  return borders;
}

}  // namespace shira
