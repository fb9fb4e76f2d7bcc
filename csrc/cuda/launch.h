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

// One sorted list of a call. `offsets` is null for a single weight without any.
struct BatchCall {
  const char* op;
  const std::vector<WeightPart>& parts;
  const Tensor* offsets;
  const Tensor& indices;
  ListNames names = {};

  bool host_borders() const { return offsets == nullptr || offsets->is_cpu(); }
};

// A kernel with blocks of kThreads; its arguments are copied.
template <class... Parameters, class... Arguments>
void launch_blocks(const char* op, void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op);
}

// Calls f(batch) for the weights of a call, kParts at a time; target(i, weight) makes the target of weight i of what
// every target holds. Without entries there is no batch.
template <class Target, int kParts, class MakeTarget, class F>
void for_each_batch(const BatchCall (&lists)[Target::kLists], const MakeTarget& target, const F& f) {
  const auto weights = static_cast<int>(lists[0].parts.size());
  for (int first = 0; first < weights; first += kParts) {
    Batch<Target, kParts> batch;
    batch.first = first;
    batch.count = std::min(kParts, weights - first);
    bool has_entries = false;
    for (int list = 0; list < Target::kLists; ++list) {
      const BatchCall& call = lists[list];
      const bool whole = weights == 1 || !call.host_borders();  // a single weight has the whole list
      batch.lists[list] = {
          whole ? 0 : call.parts[first].begin, whole ? call.indices.numel() : call.parts[first + batch.count - 1].end,
          call.host_borders() || weights == 1 ? nullptr : static_cast<const int64_t*>(call.offsets->data_ptr())};
      has_entries |= batch.lists[list].begin < batch.lists[list].end;
    }
    if (!has_entries) continue;
    for (int i = 0; i < batch.count; ++i) {
      const WeightPart& weight = lists[0].parts[first + i];
      WeightTarget<Target::kLists> common{weight.data, weight.numel, {}};
      for (int list = 0; list < Target::kLists; ++list) common.begin[list] = lists[list].parts[first + i].begin;
      batch.targets[i] = target(first + i, common);
    }
    for (int list = 0; list < Target::kLists; ++list) batch.targets[batch.count].begin[list] = batch.lists[list].end;
    f(batch);
  }
}

// Launches the instance with the fewest bytes that holds all weights, or the largest as few times as it takes.
template <class Target, class MakeTarget, class F>
void over_batches(const BatchCall (&lists)[Target::kLists], const MakeTarget& target, const F& f) {
  const auto weights = static_cast<int>(lists[0].parts.size());
  if (weights == 1 && Target::kLists == 1)
    for_each_batch<Target, 1>(lists, target, f);
  else if (weights <= kFewParts<Target>)
    for_each_batch<Target, kFewParts<Target>>(lists, target, f);
  else if (weights <= kManyParts<Target>)
    for_each_batch<Target, kManyParts<Target>>(lists, target, f);
  else
    for_each_batch<Target, kMaxParts<Target>>(lists, target, f);
}

// Where a target is just what every one holds.
template <int kLists>
WeightTarget<kLists> plain_target(int, const WeightTarget<kLists>& weight) {
  return weight;
}

// Whether checked mode is on.
bool checks_contents();

// Checked mode, which waits for the GPU: refuses offsets that do not rise and indices that are unsorted, repeated or
// outside. Returns the borders if they had to be read from the device.
std::vector<int64_t> check_contents(const BatchCall& call, cudaStream_t stream);

}  // namespace shira
