// scatter_apply on NVIDIA GPUs: the choice of the kernel and its launches. The kernel is in scatter_apply.cuh.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "facts.h"
#include "scatter_apply.cuh"
#include "scatter_apply.h"

namespace shira {
namespace {

std::atomic<int64_t> calls{0};
std::atomic<bool> check_indices_first{false};

void check_cuda(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error("shira::" + std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

unsigned blocks_for(int64_t entries, int64_t per_block) {
  return static_cast<unsigned>((entries + per_block - 1) / per_block);
}

// Calls f(batch) for the weights of the call, as few batches as fit in kernel arguments.
template <int kParts, class F>
void for_each_batch(const ScatterCall& call, const F& f) {
  const auto weights = static_cast<int>(call.parts.size());
  const bool host_borders = call.offsets == nullptr || call.offsets->is_cpu();
  for (int first = 0; first < weights; first += kParts) {
    ScatterBatch<kParts> batch;
    batch.first = first;
    batch.count = std::min(kParts, weights - first);
    batch.weights = weights;
    batch.offsets = host_borders ? nullptr : static_cast<const int64_t*>(call.offsets->data_ptr());
    batch.begin = host_borders ? call.parts[first].begin : 0;
    batch.end = host_borders ? call.parts[first + batch.count - 1].end : call.indices.numel();
    for (int i = 0; i < batch.count; ++i) {
      const ScatterPart& part = call.parts[first + i];
      batch.targets[i] = {part.weight.data_ptr(), part.weight.numel(), part.begin};
    }
    if (batch.begin < batch.end) f(batch);
  }
}

template <Mode kMode, class T, class V, class Index>
void launch(const ScatterCall& call, cudaStream_t stream) {
  const auto over = [&](const auto& batch) {
    scatter_apply_kernel<kMode><<<blocks_for(batch.end - batch.begin, kThreads * kEntries), kThreads, 0, stream>>>(
        batch, static_cast<const Index*>(call.indices.data_ptr()), static_cast<const V*>(call.values.data_ptr()),
        call.saved ? static_cast<T*>(call.saved->data_ptr()) : nullptr, call.alpha);
    check_cuda(cudaGetLastError(), call.op);
  };
  if (call.offsets == nullptr)
    for_each_batch<1>(call, over);
  else
    for_each_batch<kMaxParts>(call, over);
}

template <Mode kMode, class T, class V>
void launch_index(const ScatterCall& call, cudaStream_t stream) {
  if (call.form.wide_index)
    launch<kMode, T, V, int64_t>(call, stream);
  else
    launch<kMode, T, V, int32_t>(call, stream);
}

template <class T>
void launch_update(const ScatterCall& call, cudaStream_t stream) {
  if (call.form.mode == Mode::Interpolate)
    launch_index<Mode::Interpolate, T, T>(call, stream);
  else if (call.form.value == call.form.weight)
    launch_index<Mode::Add, T, T>(call, stream);
  else
    launch_index<Mode::Add, T, float>(call, stream);
}

void launch_form(const ScatterCall& call, cudaStream_t stream) {
  if (call.form.mode == Mode::Replace) {
    switch (call.form.element_size) {
      case 1: return launch_index<Mode::Replace, uint8_t, uint8_t>(call, stream);
      case 2: return launch_index<Mode::Replace, uint16_t, uint16_t>(call, stream);
      case 4: return launch_index<Mode::Replace, uint32_t, uint32_t>(call, stream);
      default: return launch_index<Mode::Replace, uint64_t, uint64_t>(call, stream);
    }
  }
  switch (call.form.weight) {
    case Element::Float64: return launch_update<double>(call, stream);
    case Element::Float32: return launch_update<float>(call, stream);
    case Element::BFloat16: return launch_update<cuda::BFloat16>(call, stream);
    default: return launch_update<cuda::Half>(call, stream);
  }
}

// Checked mode: waits for the GPU.
void check_contents(const ScatterCall& call, cudaStream_t stream) {
  if (call.offsets != nullptr && !call.offsets->is_cpu()) {
    std::vector<int64_t> borders(call.parts.size() + 1);
    check_cuda(cudaMemcpyAsync(borders.data(), call.offsets->data_ptr(), borders.size() * sizeof(int64_t),
                               cudaMemcpyDeviceToHost, stream),
               call.op);
    check_cuda(cudaStreamSynchronize(stream), call.op);
    check_borders(call.op, borders.data(), static_cast<int64_t>(call.parts.size()), call.indices.numel());
  }
  int* wrong = nullptr;
  check_cuda(cudaMallocAsync(reinterpret_cast<void**>(&wrong), sizeof(int), stream), call.op);
  const auto free_later = [&](int* p) { cudaFreeAsync(p, stream); };
  const std::unique_ptr<int, decltype(free_later)> owner(wrong, free_later);
  check_cuda(cudaMemsetAsync(wrong, 0, sizeof(int), stream), call.op);
  const auto over = [&](const auto& batch) {
    const unsigned blocks = blocks_for(batch.end - batch.begin, kThreads);
    if (call.form.wide_index)
      check_indices_kernel<<<blocks, kThreads, 0, stream>>>(batch, static_cast<const int64_t*>(call.indices.data_ptr()),
                                                            wrong);
    else
      check_indices_kernel<<<blocks, kThreads, 0, stream>>>(batch, static_cast<const int32_t*>(call.indices.data_ptr()),
                                                            wrong);
    check_cuda(cudaGetLastError(), call.op);
  };
  if (call.offsets == nullptr)
    for_each_batch<1>(call, over);
  else
    for_each_batch<kMaxParts>(call, over);
  int found = 0;
  check_cuda(cudaMemcpyAsync(&found, wrong, sizeof(int), cudaMemcpyDeviceToHost, stream), call.op);
  check_cuda(cudaStreamSynchronize(stream), call.op);
  if (found) fail(call.op, "indices", "must be sorted, unique and inside the weight");
}

}  // namespace

std::vector<std::string> cuda_ops() { return {"scatter_apply", "scatter_apply_batched"}; }
int64_t cuda_calls() { return calls; }
void set_check_indices(bool enabled) { check_indices_first = enabled; }

void scatter_apply_cuda(const ScatterCall& call) {
  if (call.parts.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(call.indices.get_device_index());
  void* stream = nullptr;
  check_status(aoti_torch_get_current_cuda_stream(call.indices.get_device_index(), &stream),
               "aoti_torch_get_current_cuda_stream");
  if (check_indices_first) check_contents(call, static_cast<cudaStream_t>(stream));
  announce_writes(call);
  calls.fetch_add(1, std::memory_order_relaxed);
  launch_form(call, static_cast<cudaStream_t>(stream));
}

static void scatter_apply(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha,
                          bool additive, const std::optional<Tensor>& saved) {
  scatter_apply_cuda(check_scatter("scatter_apply", {{weight, "weight", 0, indices.numel()}}, nullptr, indices, values,
                                   alpha, additive, saved));
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CUDA, m) { m.impl("scatter_apply", TORCH_BOX(&shira::scatter_apply)); }
