// scatter_switch_batched on NVIDIA GPUs: the choice of the kernel and its launches. The kernel is in
// scatter_switch_batched.cuh.
#include "../host/scatter_call.h"
#include "launch.h"
#include "scatter_switch_batched.cuh"

namespace shira {
namespace {

BatchCall lists_of(const ScatterCall& call) { return {call.op, call.parts, call.offsets, call.indices, call.names}; }

template <Mode kMode, class T, class V, bool kWide>
void launch(const SwitchCall& call, cudaStream_t stream) {
  const auto indices = [](const ScatterCall& list) {
    return IndexList<kWide>{list.indices.data_ptr(), list.form.wide_index};
  };
  const SwitchLists<kWide, T, V> lists{{indices(call.to), indices(call.from)},
                                       static_cast<const V*>(call.to.values.data_ptr()),
                                       static_cast<const T*>(call.from.values.data_ptr()),
                                       static_cast<T*>(call.to.saved->data_ptr())};
  const BatchCall both[] = {lists_of(call.to), lists_of(call.from)};
  over_batches<WeightTarget<2>>(both, plain_target<2>, [&](const auto& batch) {
    const auto blocks = [&](int list) { return blocks_for(batch.lists[list].end - batch.lists[list].begin, kChunk); };
    launch_blocks(call.to.op, scatter_switch_kernel<kMode, std::decay_t<decltype(batch)>::kParts, kWide, T, V>,
                  blocks(kNew) + blocks(kOld), stream, batch, lists, blocks(kNew), call.to.alpha);
  });
}

// Two lists of int32 have an instance of their own only where values are copied: that is what a switch mostly is, and
// each instance takes a second to compile.
template <Mode kMode, class T, class V>
void launch_index(const SwitchCall& call, cudaStream_t stream) {
  if constexpr (kMode == Mode::Replace)
    if (!call.from.form.wide_index && !call.to.form.wide_index) return launch<kMode, T, V, false>(call, stream);
  launch<kMode, T, V, true>(call, stream);
}

template <class T>
void launch_update(const SwitchCall& call, cudaStream_t stream) {
  if (call.to.form.mode == Mode::Interpolate)
    launch_index<Mode::Interpolate, T, T>(call, stream);
  else if (call.to.form.value == call.to.form.weight)
    launch_index<Mode::Add, T, T>(call, stream);
  else
    launch_index<Mode::Add, T, float>(call, stream);
}

void launch_form(const SwitchCall& call, cudaStream_t stream) {
  const ScatterForm& form = call.to.form;
  if (form.mode == Mode::Replace) {
    switch (form.element_size) {
      case 1: return launch_index<Mode::Replace, uint8_t, uint8_t>(call, stream);
      case 2: return launch_index<Mode::Replace, uint16_t, uint16_t>(call, stream);
      case 4: return launch_index<Mode::Replace, uint32_t, uint32_t>(call, stream);
      default: return launch_index<Mode::Replace, uint64_t, uint64_t>(call, stream);
    }
  }
  switch (form.weight) {
    case Element::Float64: return launch_update<double>(call, stream);
    case Element::Float32: return launch_update<float>(call, stream);
    case Element::BFloat16: return launch_update<cuda::BFloat16>(call, stream);
    default: return launch_update<cuda::Half>(call, stream);
  }
}

void scatter_switch_batched(const std::vector<Tensor>& weights, const Tensor& old_offsets, const Tensor& old_indices,
                            const Tensor& old_saved, const Tensor& offsets, const Tensor& indices, const Tensor& values,
                            const Tensor& saved, double alpha, bool additive) {
  const char* op = "scatter_switch_batched";
  const std::optional<Tensor> keep(saved);
  const SwitchCall call =
      check_switch(op, weights, old_offsets, old_indices, old_saved, offsets, indices, values, alpha, additive, keep);
  if (weights.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(indices.get_device_index());
  cudaStream_t stream = current_stream(indices.get_device_index());
  if (checks_contents()) {
    check_contents(lists_of(call.from), stream);
    check_contents(lists_of(call.to), stream);
  }
  announce_writes(call.to);
  count_cuda_call();
  launch_form(call, stream);
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CUDA, m) {
  m.impl("scatter_switch_batched", TORCH_BOX(&shira::scatter_switch_batched));
}
