// masked_adamw on NVIDIA GPUs: the choice of the kernel and its launches. The kernel is in masked_adamw.cuh.
#include "../host/adamw_call.h"
#include "launch.h"
#include "masked_adamw.cuh"

namespace shira {
namespace {

template <class T, class G, class Index>
void launch(const AdamWCall& call, const BatchCall& lists, cudaStream_t stream) {
  using C = typename cuda::Compute<T>::type;
  const bool on_device = !call.step.is_cpu();
  const AdamWArena<C> arena{static_cast<C*>(call.exp_avg.data_ptr()),
                            static_cast<C*>(call.exp_avg_sq.data_ptr()),
                            call.master ? static_cast<C*>(call.master->data_ptr()) : nullptr,
                            on_device ? static_cast<const float*>(call.step.data_ptr()) : nullptr,
                            call.numbers,
                            on_device ? cuda::AdamW<C>{} : cuda::AdamW<C>::of(call.numbers, call.step_count)};
  const auto target = [&](int i, const WeightTarget<1>& weight) {
    return AdamWTarget{weight, call.grads[i].data_ptr(), call.dense[i] ? -1 : call.grads[i].numel()};
  };
  over_batches<AdamWTarget>({lists}, target, [&](const auto& batch) {
    launch_blocks(call.op, masked_adamw_kernel<std::decay_t<decltype(batch)>::kParts, T, G, Index>,
                  blocks_for(batch.lists[0].end - batch.lists[0].begin, kChunk), stream, batch,
                  static_cast<const Index*>(call.indices.data_ptr()), arena);
  });
}

template <class T, class G>
void launch_index(const AdamWCall& call, const BatchCall& lists, cudaStream_t stream) {
  if (call.form.wide_index)
    launch<T, G, int64_t>(call, lists, stream);
  else
    launch<T, G, int32_t>(call, lists, stream);
}

template <class T>
void launch_grad(const AdamWCall& call, const BatchCall& lists, cudaStream_t stream) {
  if (call.form.grad == call.form.weight)
    launch_index<T, T>(call, lists, stream);
  else
    launch_index<T, float>(call, lists, stream);
}

void launch_form(const AdamWCall& call, const BatchCall& lists, cudaStream_t stream) {
  switch (call.form.weight) {
    case Element::Float64: return launch_grad<double>(call, lists, stream);
    case Element::Float32: return launch_grad<float>(call, lists, stream);
    case Element::BFloat16: return launch_grad<cuda::BFloat16>(call, lists, stream);
    default: return launch_grad<cuda::Half>(call, lists, stream);
  }
}

// Checked mode: a step on the device is read too.
void check_step_on_gpu(const AdamWCall& call, cudaStream_t stream) {
  float step = 0;
  check_cuda(cudaMemcpyAsync(&step, call.step.data_ptr(), sizeof(step), cudaMemcpyDeviceToHost, stream), call.op);
  check_cuda(cudaStreamSynchronize(stream), call.op);
  check_step(call.op, step);
}

}  // namespace

static void masked_adamw(const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                         const std::vector<Tensor>& grads, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                         const std::optional<Tensor>& master, const Tensor& step, double lr, double beta1, double beta2,
                         double eps, double weight_decay) {
  const AdamWCall call = check_adamw("masked_adamw", weights, offsets, indices, grads, exp_avg, exp_avg_sq, master,
                                     step, {lr, beta1, beta2, eps, weight_decay});
  if (call.parts.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(indices.get_device_index());
  cudaStream_t stream = current_stream(indices.get_device_index());
  const BatchCall lists{call.op, call.parts, &offsets, indices};
  if (checks_contents()) {
    if (!step.is_cpu()) check_step_on_gpu(call, stream);
    const std::vector<int64_t> borders = check_contents(lists, stream);
    if (!borders.empty()) check_compact(call, borders.data());
  }
  announce_writes(call);
  count_cuda_call();
  launch_form(call, lists, stream);
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CUDA, m) { m.impl("masked_adamw", TORCH_BOX(&shira::masked_adamw)); }
