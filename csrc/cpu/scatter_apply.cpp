// scatter_apply on the CPU: checks, the choice of a kernel, and the split over threads.
//
// Threads split the sorted list in equal parts, each border moved on to the first entry on another cache line of the
// weight, so no two threads write one line. Every entry is computed alone: the same bits at any number of threads.
#include "scatter_apply.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "split.h"

namespace shira {
namespace {

constexpr int64_t kEntriesPerThread = 16384;  // below this a thread costs more than it saves

// The sorted lists of a call, and the weights they belong to.
struct Lists {
  struct Part {
    char* weight;
    int64_t begin, end;
  };
  std::vector<Part> parts;
  const char* indices;
  const char* values;
  char* saved;
  int64_t nnz;
  int64_t index_size, element_size, value_size;

  int64_t index(int64_t i) const {
    return index_size == 8 ? reinterpret_cast<const int64_t*>(indices)[i]
                           : reinterpret_cast<const int32_t*>(indices)[i];
  }

  std::vector<Part>::const_iterator part_of(int64_t i) const {
    return std::upper_bound(parts.begin(), parts.end(), i, [](int64_t at, const Part& part) { return at < part.end; });
  }

  // Calls f(part, begin, end) for what each part has in [begin, end).
  template <class F>
  void for_each(int64_t begin, int64_t end, const F& f) const {
    for (auto part = part_of(begin); begin < end; ++part) {
      const int64_t stop = std::min(end, part->end);
      if (begin < stop) f(*part, begin, stop);
      begin = stop;
    }
  }

  // The border of the chunk that nominally begins at i.
  int64_t border(int64_t i) const {
    if (i <= 0 || i >= nnz) return std::clamp<int64_t>(i, 0, nnz);
    const auto part = part_of(i);
    return next_line(i, part->begin, part->end, reinterpret_cast<uintptr_t>(part->weight), element_size,
                     [this](int64_t at) { return index(at); });
  }
};

// f(chunk, chunks) on as many threads as the number of entries is worth.
template <class F>
void over_threads(int64_t nnz, const F& f) {
  const int64_t chunks =
      std::clamp<int64_t>(nnz / kEntriesPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (chunks == 1) return f(0, 1);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, chunks);
  });
}

void check_contents(const ScatterCall& call, const Lists& lists, const CpuKernels& kernels) {
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
  if (!rising) fail(call.op, "indices", "must be sorted and unique");
  for (const ScatterPart& part : call.parts) {
    if (part.begin == part.end) continue;
    const int64_t first = lists.index(part.begin), last = lists.index(part.end - 1), numel = part.weight.numel();
    if (first < 0 || last >= numel)
      fail(call.op, "indices",
           "must lie in [0, " + std::to_string(numel) + ") for " + part.name + ", got " +
               std::to_string(first < 0 ? first : last));
  }
}

}  // namespace

void scatter_apply_cpu(const ScatterCall& call) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t nnz = call.indices.numel();
  if (call.parts.empty()) return;
  Lists lists{{},
              static_cast<const char*>(call.indices.data_ptr()),
              static_cast<const char*>(call.values.data_ptr()),
              call.saved ? static_cast<char*>(call.saved->data_ptr()) : nullptr,
              nnz,
              call.form.wide_index ? 8 : 4,
              call.form.element_size,
              static_cast<int64_t>(call.values.element_size())};
  lists.parts.reserve(call.parts.size());
  for (const ScatterPart& part : call.parts)
    lists.parts.push_back({static_cast<char*>(part.weight.data_ptr()), part.begin, part.end});
  check_contents(call, lists, kernels);

  announce_writes(call);
  count_call(kernels);
  const ScatterApply apply = kernels.scatter_apply(call.form);
  over_threads(nnz, [&](int64_t chunk, int64_t chunks) {
    lists.for_each(
        lists.border(chunk * nnz / chunks), lists.border((chunk + 1) * nnz / chunks),
        [&](const Lists::Part& part, int64_t begin, int64_t end) {
          apply({part.weight, lists.indices + begin * lists.index_size, lists.values + begin * lists.value_size,
                 lists.saved ? lists.saved + begin * lists.element_size : nullptr, end - begin},
                call.alpha);
        });
  });
}

static void scatter_apply(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha,
                          bool additive, const std::optional<Tensor>& saved) {
  scatter_apply_cpu(check_scatter("scatter_apply", {{weight, "weight", 0, indices.numel()}}, nullptr, indices, values,
                                  alpha, additive, saved));
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("scatter_apply", TORCH_BOX(&shira::scatter_apply)); }
