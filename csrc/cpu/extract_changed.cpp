// extract_changed on the CPU: checks, and the split over threads.
//
// Each thread takes a run of the elements and keeps what differs in buffers of its own, so that both tensors are read
// once; the runs one after the other are the result, the same at any number of threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "../host/checks.h"
#include "kernels.h"
#include "lists.h"

namespace shira {
namespace {

constexpr const char* kOp = "extract_changed";
constexpr int64_t kElementsPerThread = 65536;  // below this a thread costs more than it saves
constexpr int64_t kTile = 4096;                // elements between two looks at the room that is left

struct Free {
  void operator()(char* bytes) const { std::free(bytes); }
};

// Bytes that grow and are not cleared.
struct Buffer {
  std::unique_ptr<char, Free> bytes;

  void grow(int64_t size) {
    char* grown = static_cast<char*>(std::realloc(bytes.get(), static_cast<size_t>(size)));
    if (grown == nullptr) throw std::bad_alloc();
    (void)bytes.release();
    bytes.reset(grown);
  }
};

struct Run {
  int64_t begin, end;
  Buffer indices = {}, values = {};
  int64_t found = 0, first = 0;
};

std::tuple<Tensor, Tensor> extract_changed(const Tensor& base, const Tensor& tuned) {
  const int64_t element_size = static_cast<int64_t>(base.element_size());
  if (element_size > 8)
    fail(kOp, "base", "must have elements of 1, 2, 4 or 8 bytes, got " + dtype_name(dtype_of(base)));
  if (dtype_of(tuned) != dtype_of(base))
    fail(kOp, "tuned", "must be " + dtype_name(dtype_of(base)) + " like base, got " + dtype_name(dtype_of(tuned)));
  if (shape_of(tuned) != shape_of(base))
    fail(kOp, "tuned", "must have the shape of base, " + shape_of(base) + ", got " + shape_of(tuned));
  if (!same_device(tuned, base)) fail(kOp, "tuned", "must be on the device of base");
  check_storage(kOp, "base", base);
  check_storage(kOp, "tuned", tuned);
  refuse_grad(kOp, {"base", base});
  refuse_grad(kOp, {"tuned", tuned});

  const Tensor old_tensor = as_contiguous(kOp, "base", base), new_tensor = as_contiguous(kOp, "tuned", tuned);
  const void* old_elements = old_tensor.data_ptr();
  const void* new_elements = new_tensor.data_ptr();
  const int64_t numel = base.numel();
  const bool wide = numel >= (int64_t{1} << 31);
  const int64_t index_size = wide ? 8 : 4;
  const CpuKernels& kernels = cpu_kernels();
  count_call(kernels);
  const ExtractChanged kernel = kernels.extract_changed(element_size, wide);

  const int64_t chunks =
      std::clamp<int64_t>(numel / kElementsPerThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::vector<Run> runs;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    runs.push_back({numel / chunks * chunk, chunk + 1 < chunks ? numel / chunks * (chunk + 1) : numel});
  over_chunks(chunks, [&](int64_t chunk) {
    Run& run = runs[chunk];
    int64_t room = 0;
    for (int64_t begin = run.begin; begin < run.end; begin += kTile) {
      if (run.found + kTile > room) {
        room = std::min(std::max<int64_t>(2 * room, 4 * kTile), run.end - run.begin + kTile);
        run.indices.grow(room * index_size);
        run.values.grow(room * element_size);
      }
      run.found +=
          kernel(old_elements, new_elements, begin, std::min(begin + kTile, run.end),
                 run.indices.bytes.get() + run.found * index_size, run.values.bytes.get() + run.found * element_size);
    }
  });
  int64_t nnz = 0;
  for (Run& run : runs) {
    run.first = nnz;
    nnz += run.found;
  }

  using torch::headeronly::ScalarType;
  Tensor indices = torch::stable::new_empty(base, {nnz}, wide ? ScalarType::Long : ScalarType::Int);
  Tensor values = torch::stable::new_empty(tuned, {nnz});
  over_chunks(chunks, [&](int64_t chunk) {
    Run& run = runs[chunk];
    if (run.found == 0) return;
    std::memcpy(static_cast<char*>(indices.data_ptr()) + run.first * index_size, run.indices.bytes.get(),
                run.found * index_size);
    run.indices.bytes.reset();
    std::memcpy(static_cast<char*>(values.data_ptr()) + run.first * element_size, run.values.bytes.get(),
                run.found * element_size);
    run.values.bytes.reset();
  });
  return {indices, values};
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("extract_changed", TORCH_BOX(&shira::extract_changed)); }
