#include "lists.h"

#include <atomic>

namespace shira {

Lists::Lists(const std::vector<WeightPart>& weights, const Tensor& index_tensor)
    : indices(static_cast<const char*>(index_tensor.data_ptr())),
      nnz(index_tensor.numel()),
      index_size(static_cast<int64_t>(index_tensor.element_size())),
      element_size(static_cast<int64_t>(weights[0].weight.element_size())) {
  parts.reserve(weights.size());
  for (const WeightPart& part : weights) parts.push_back({static_cast<char*>(part.data), part.begin, part.end});
}

void check_contents(const char* op, const std::vector<WeightPart>& weights, const Lists& lists,
                    const CpuKernels& kernels, const char* name) {
  std::atomic<bool> rising{true};
  over_threads(lists.nnz, [&](int64_t chunk, int64_t chunks) {
    lists.for_each(
        chunk * lists.nnz / chunks, (chunk + 1) * lists.nnz / chunks,
        [&](const Lists::Part& part, int64_t begin, int64_t end) {
          begin = std::max(begin - 1, part.begin);  // the pair across the chunk's border too
          if (!kernels.strictly_rising(lists.indices + begin * lists.index_size, end - begin, lists.index_size == 8))
            rising = false;
        });
  });
  if (!rising) fail(op, name, "must be sorted and unique");
  for (const WeightPart& part : weights) {
    if (part.begin == part.end) continue;
    const int64_t first = lists.index(part.begin), last = lists.index(part.end - 1), numel = part.numel;
    if (first < 0 || last >= numel)
      fail(op, name,
           "must lie in [0, " + std::to_string(numel) + ") for " + part.name + ", got " +
               std::to_string(first < 0 ? first : last));
  }
}

}  // namespace shira
