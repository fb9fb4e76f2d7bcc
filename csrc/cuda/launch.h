// What the ops share on the host: errors, the call counter, launches over a whole model, checked mode.
#pragma once

#include <algorithm>

#include "../host/checks.h"
#include "batch.cuh"

namespace shira {

void check_cuda(cudaError_t error, const char* op);
cudaStream_t current_stream(int32_t device_index);
void count_cuda_call();

inline unsigned blocks_for(int64_t entries, int64_t per_block) {
  return static_cast<unsigned>((entries + per_block - 1) / per_block);
}

// The lists of a call. `offsets` is null for a single weight.
struct BatchCall {
  const char* op;
  const std::vector<WeightPart>& parts;
  const Tensor* offsets;
  const Tensor& indices;

  bool host_borders() const { return offsets == nullptr || offsets->is_cpu(); }
};

// Calls f(batch) for the weights of the call, as few batches as fit in kernel arguments; target(i, weight target) makes
// the target of weight i.
template <class Target, int kParts, class MakeTarget, class F>
void for_each_batch(const BatchCall& call, const MakeTarget& target, const F& f) {
  const auto weights = static_cast<int>(call.parts.size());
  const bool host_borders = call.host_borders();
  for (int first = 0; first < weights; first += kParts) {
    Batch<Target, kParts> batch;
    batch.first = first;
    batch.count = std::min(kParts, weights - first);
    batch.weights = weights;
    batch.offsets = host_borders ? nullptr : static_cast<const int64_t*>(call.offsets->data_ptr());
    batch.begin = host_borders ? call.parts[first].begin : 0;
    batch.end = host_borders ? call.parts[first + batch.count - 1].end : call.indices.numel();
    for (int i = 0; i < batch.count; ++i) {
      const WeightPart& part = call.parts[first + i];
      batch.targets[i] = target(first + i, WeightTarget{part.weight.data_ptr(), part.weight.numel(), part.begin});
    }
    if (batch.begin < batch.end) f(batch);
  }
}

// Whether checked mode is on.
bool checks_contents();

// Checked mode, which waits for the GPU: refuses offsets that do not rise and indices that are unsorted, repeated or
// outside. Returns the borders if they had to be read from the device.
std::vector<int64_t> check_contents(const BatchCall& call, cudaStream_t stream);

}  // namespace shira
