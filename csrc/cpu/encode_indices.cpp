// encode_indices on the CPU: checks, the size of each block's escapes, and the loop over blocks, which threads share.
#include <atomic>
#include <vector>

#include "../host/checks.h"
#include "index_code.h"
#include "lists.h"

namespace shira {
namespace {

constexpr const char* kOp = "encode_indices";

// Calls f(block) for all blocks of nnz entries.
template <class F>
void over_blocks(int64_t nnz, const F& f) {
  const int64_t blocks = index_blocks(nnz);
  over_threads(nnz, [&](int64_t chunk, int64_t chunks) {
    for (int64_t i = chunk * blocks / chunks; i < (chunk + 1) * blocks / chunks; ++i) f(i);
  });
}

}  // namespace

Tensor encode_indices(const Tensor& indices, int64_t numel) {
  const bool wide = check_indices(kOp, indices);
  if (numel < 0 || numel > kMaxNumel) fail(kOp, "numel", "must lie in [0, 2^62], got " + std::to_string(numel));
  const int64_t nnz = indices.numel(), blocks = index_blocks(nnz), size = wide ? 8 : 4;
  const auto* data = static_cast<const char*>(indices.data_ptr());
  const auto index_at = [&](int64_t i) -> int64_t {
    if (i < 0) return -1;
    return wide ? reinterpret_cast<const int64_t*>(data)[i] : reinterpret_cast<const int32_t*>(data)[i];
  };
  const CpuKernels& kernels = cpu_kernels();
  const auto count_of = [&](int64_t block) { return std::min(kIndexBlock, nnz - block * kIndexBlock); };
  std::atomic<bool> rising{true};
  over_blocks(nnz, [&](int64_t block) {
    const int64_t begin = block * kIndexBlock,
                  from = std::max<int64_t>(begin - 1, 0);  // the pair across the border too
    if (!kernels.strictly_rising(data + from * size, begin + count_of(block) - from, wide)) rising = false;
  });
  if (!rising) fail(kOp, "indices", "must be sorted and unique");
  if (nnz && (index_at(0) < 0 || index_at(nnz - 1) >= numel))
    fail(kOp, "indices",
         "must lie in [0, " + std::to_string(numel) + "), got " +
             std::to_string(index_at(0) < 0 ? index_at(0) : index_at(nnz - 1)));

  std::vector<int64_t> escapes(blocks + 1);  // where each block's begin
  over_blocks(nnz, [&](int64_t block) {
    const int64_t begin = block * kIndexBlock;
    escapes[block + 1] = kernels.escape_bytes(data + begin * size, wide, count_of(block), index_at(begin - 1));
  });
  for (int64_t block = 0; block < blocks; ++block) escapes[block + 1] += escapes[block];

  const int64_t table = table_bytes(nnz);
  Tensor code = empty_vector(table + nnz + escapes[blocks], aoti_torch_dtype_uint8());
  count_call(kernels);
  auto* out = static_cast<uint8_t*>(code.data_ptr());
  over_blocks(nnz, [&](int64_t block) {
    const int64_t begin = block * kIndexBlock;
    if (block) {
      store_int64(out + (block - 1) * kBorderBytes, index_at(begin - 1));
      store_int64(out + (block - 1) * kBorderBytes + 8, escapes[block]);
    }
    kernels.encode_indices(data + begin * size, wide, count_of(block), index_at(begin - 1), out + table + begin,
                           out + table + nnz + escapes[block]);
  });
  return code;
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("encode_indices", TORCH_BOX(&shira::encode_indices)); }
