// scatter_apply on NVIDIA GPUs: the choice of the kernel and its launches. The kernel is in scatter_apply.cuh.
#include "launch.h"
#include "scatter_apply.cuh"
#include "scatter_apply.h"

namespace shira {
namespace {

BatchCall lists_of(const ScatterCall& call) { return {call.op, call.parts, call.offsets, call.indices, call.names}; }

template <Mode kMode, class T, class V, class Index>
void launch(const ScatterCall& call, cudaStream_t stream) {
  over_batches<WeightTarget<1>>({lists_of(call)}, plain_target<1>, [&](const auto& batch) {
    launch_blocks(call.op, scatter_apply_kernel<kMode, std::decay_t<decltype(batch)>::kParts, T, V, Index>,
                  blocks_for(batch.lists[0].end - batch.lists[0].begin, kChunk), stream, batch,
                  static_cast<const Index*>(call.indices.data_ptr()), static_cast<const V*>(call.values.data_ptr()),
                  call.saved ? static_cast<T*>(call.saved->data_ptr()) : nullptr, call.alpha);
  });
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

}  // namespace

void scatter_apply_cuda(const ScatterCall& call) {
  if (call.parts.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(call.indices.get_device_index());
  cudaStream_t stream = current_stream(call.indices.get_device_index());
  if (checks_contents()) check_contents(lists_of(call), stream);
  announce_writes(call);
  count_cuda_call();
  launch_form(call, stream);
}

static void scatter_apply(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha,
                          bool additive, const std::optional<Tensor>& saved) {
  scatter_apply_cuda(check_scatter("scatter_apply", {{weight, "weight", 0, indices.numel()}}, nullptr, indices, values,
                                   alpha, additive, saved));
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CUDA, m) { m.impl("scatter_apply", TORCH_BOX(&shira::scatter_apply)); }
