// fuse_adapters on the CPU: checks, and the split over threads.
//
// Each thread takes a run of positions with as many entries as those of the others: it counts the union of its run,
// which tells where it begins in a result of exactly the right size, and then writes it.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../host/checks.h"
#include "lists.h"

namespace shira {
namespace {

constexpr const char* kOp = "fuse_adapters";

struct Free {
  void operator()(FuseScratch* scratch) const { std::free(scratch); }
};

std::unique_ptr<FuseScratch, Free> zeroed_scratch() {
  auto* scratch = static_cast<FuseScratch*>(std::calloc(1, sizeof(FuseScratch)));
  if (scratch == nullptr) throw std::bad_alloc();
  return std::unique_ptr<FuseScratch, Free>(scratch);
}

std::string item(const char* argument, size_t k) { return std::string(argument) + "[" + std::to_string(k) + "]"; }

FusePolicy policy_of(const std::string& name) {
  static constexpr std::array<const char*, 4> names = {"sum", "mean", "last", "ties"};  // as in FusePolicy
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) fail(kOp, "policy", "must be one of sum, mean, last, ties, got '" + name + "'");
  return static_cast<FusePolicy>(found - names.begin());
}

void check_form(const std::vector<Tensor>& indices, const std::vector<Tensor>& values, const Tensor& weights) {
  if (indices.empty()) fail(kOp, "indices", "must hold at least one list, got none");
  if (values.size() != indices.size())
    fail(kOp, "values",
         "must hold one tensor per list of indices (" + std::to_string(indices.size()) + "), got " +
             std::to_string(values.size()));
  const int32_t dtype = dtype_of(values[0]);
  if (element_of(dtype) == Element::Other)
    fail(kOp, "values[0]", "must be float64, float32, bfloat16 or float16, got " + dtype_name(dtype));
  for (size_t k = 0; k < indices.size(); ++k) {
    check_indices(kOp, indices[k], item("indices", k).c_str());
    if (!same_device(indices[k], indices[0])) fail(kOp, item("indices", k), "must be on the device of indices[0]");
    if (dtype_of(values[k]) != dtype)
      fail(kOp, item("values", k),
           "must be " + dtype_name(dtype) + " like values[0], got " + dtype_name(dtype_of(values[k])));
    check_vector(kOp, item("values", k).c_str(), values[k], indices[k]);
  }
  if (dtype_of(weights) != aoti_torch_dtype_float32())
    fail(kOp, "weights", "must be torch.float32, got " + dtype_name(dtype_of(weights)));
  if (weights.dim() != 1) fail(kOp, "weights", "must be 1-D, got shape " + shape_of(weights));
  check_memory(kOp, "weights", weights);
  if (!same_device(weights, indices[0])) fail(kOp, "weights", "must be on the device of indices");
  if (weights.numel() != static_cast<int64_t>(indices.size()))
    fail(kOp, "weights",
         "must have one number per list (" + std::to_string(indices.size()) + "), got " +
             std::to_string(weights.numel()));
  for (size_t k = 0; k < values.size(); ++k) refuse_grad(kOp, {item("values", k), values[k]});
  refuse_grad(kOp, {"weights", weights});
}

int64_t index_at(const FuseList& list, int64_t i) {
  return list.wide ? static_cast<const int64_t*>(list.indices)[i] : static_cast<const int32_t*>(list.indices)[i];
}

void check_contents(const std::vector<FuseList>& lists, const CpuKernels& kernels) {
  for (size_t k = 0; k < lists.size(); ++k) {
    const FuseList& list = lists[k];
    std::atomic<bool> rising{true};
    over_threads(list.count, [&](int64_t chunk, int64_t chunks) {
      const int64_t begin = std::max<int64_t>(chunk * list.count / chunks - 1, 0);  // the pair across the border too
      const int64_t end = (chunk + 1) * list.count / chunks;
      const char* from = static_cast<const char*>(list.indices) + begin * (list.wide ? 8 : 4);
      if (!kernels.strictly_rising(from, end - begin, list.wide)) rising = false;
    });
    if (!rising) fail(kOp, item("indices", k), "must be sorted and unique");
    if (list.count && index_at(list, 0) < 0)
      fail(kOp, item("indices", k), "must not be negative, got " + std::to_string(index_at(list, 0)));
  }
}

// How many entries of a list come before a position.
int64_t entries_before(const FuseList& list, int64_t position) {
  if (list.wide) {
    const auto* begin = static_cast<const int64_t*>(list.indices);
    return std::lower_bound(begin, begin + list.count, position) - begin;
  }
  const auto* begin = static_cast<const int32_t*>(list.indices);
  return std::lower_bound(begin, begin + list.count, position) - begin;
}

// Where each list is cut so that `wanted` entries, or a few more, come before: all at one position.
std::vector<int64_t> cut(const std::vector<FuseList>& lists, int64_t wanted) {
  std::vector<int64_t> before(lists.size());
  const auto count_before = [&](int64_t position) {
    int64_t sum = 0;
    for (size_t k = 0; k < lists.size(); ++k) sum += before[k] = entries_before(lists[k], position);
    return sum;
  };
  int64_t low = 0, high = 0;
  for (const FuseList& list : lists)
    if (list.count) high = std::max(high, index_at(list, list.count - 1));
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (count_before(middle) < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  count_before(low);
  return before;
}

// The runs of the threads, each with the part of every list that lies in it.
std::vector<std::vector<FuseList>> split(const std::vector<FuseList>& lists, const std::vector<Tensor>& values,
                                         int64_t total, int64_t chunks) {
  std::vector<std::vector<FuseList>> runs(chunks, lists);
  std::vector<int64_t> begin(lists.size());
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    std::vector<int64_t> end(lists.size());
    if (chunk + 1 < chunks)
      end = cut(lists, total / chunks * (chunk + 1));
    else
      std::transform(lists.begin(), lists.end(), end.begin(), [](const FuseList& list) { return list.count; });
    for (size_t k = 0; k < lists.size(); ++k) {
      FuseList& list = runs[chunk][k];
      list.indices = static_cast<const char*>(list.indices) + begin[k] * (list.wide ? 8 : 4);
      list.values = static_cast<const char*>(list.values) + begin[k] * static_cast<int64_t>(values[k].element_size());
      list.count = end[k] - begin[k];
    }
    begin = end;
  }
  return runs;
}

std::tuple<Tensor, Tensor> fuse_adapters(const std::vector<Tensor>& indices, const std::vector<Tensor>& values,
                                         const Tensor& weights, const std::string& policy_name) {
  const FusePolicy policy = policy_of(policy_name);
  check_form(indices, values, weights);
  const CpuKernels& kernels = cpu_kernels();
  std::vector<FuseList> lists;
  int64_t total = 0;
  bool wide = false;
  for (size_t k = 0; k < indices.size(); ++k) {
    const bool own_wide = dtype_of(indices[k]) == aoti_torch_dtype_int64();
    lists.push_back({indices[k].data_ptr(), values[k].data_ptr(), indices[k].numel(), own_wide,
                     static_cast<const float*>(weights.data_ptr())[k]});
    total += indices[k].numel();
    wide |= own_wide;
  }
  check_contents(lists, kernels);

  count_call(kernels);
  const FuseAdapters kernel = kernels.fuse_adapters(element_of(dtype_of(values[0])), policy);
  const int64_t chunks = chunks_of(total);
  const std::vector<std::vector<FuseList>> runs = split(lists, values, total, chunks);
  std::vector<std::unique_ptr<FuseScratch, Free>> scratch;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) scratch.push_back(zeroed_scratch());
  std::vector<int64_t> first(chunks + 1);
  const auto number = static_cast<int64_t>(lists.size());
  over_chunks(chunks, [&](int64_t chunk) {
    std::vector<FuseList> run = runs[chunk];
    first[chunk + 1] = kernel.count(run.data(), number, *scratch[chunk]);
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) first[chunk + 1] += first[chunk];

  using torch::headeronly::ScalarType;
  Tensor union_indices =
      torch::stable::new_empty(indices[0], {first[chunks]}, wide ? ScalarType::Long : ScalarType::Int);
  Tensor fused = torch::stable::new_empty(values[0], {first[chunks]});
  const auto at = [](const Tensor& tensor, int64_t i) {
    return static_cast<char*>(tensor.data_ptr()) + i * static_cast<int64_t>(tensor.element_size());
  };
  over_chunks(chunks, [&](int64_t chunk) {
    std::vector<FuseList> run = runs[chunk];
    kernel.write(run.data(), number, *scratch[chunk], at(union_indices, first[chunk]), wide, at(fused, first[chunk]));
  });
  return {union_indices, fused};
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("fuse_adapters", TORCH_BOX(&shira::fuse_adapters)); }
