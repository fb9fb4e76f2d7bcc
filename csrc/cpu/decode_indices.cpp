// decode_indices on the CPU: checks of what the code claims, and the loop over its blocks, which threads share.
#include <atomic>

#include "../host/checks.h"
#include "index_code.h"
#include "lists.h"

namespace shira {
namespace {

constexpr const char* kOp = "decode_indices";

const char* reason_of(DecodeError error) {
  switch (error) {
    case DecodeError::EscapesEnd: return "has too few escape bytes";
    case DecodeError::EscapesLeft: return "has escape bytes left over";
    case DecodeError::LongEscape: return "has an escape that is longer than it need be";
    case DecodeError::Outside: return "has an index outside the tensor";
    default: return "does not end at the index that the table says";
  }
}

// The blocks of a code, whose parts are known to lie inside it.
struct Code {
  const uint8_t *table, *gaps, *escapes;
  int64_t escape_bytes, nnz, numel;

  int64_t last_before(int64_t block) const { return block ? load_int64(table + (block - 1) * kBorderBytes) : -1; }
  int64_t escapes_before(int64_t block) const { return block ? load_int64(table + (block - 1) * kBorderBytes + 8) : 0; }

  IndexBlock block(int64_t i) const {
    const int64_t begin = i * kIndexBlock, end = std::min(begin + kIndexBlock, nnz);
    const bool is_last = end == nnz;
    return {gaps + begin,
            escapes + escapes_before(i),
            escapes + (is_last ? escape_bytes : escapes_before(i + 1)),
            end - begin,
            last_before(i),
            is_last ? -1 : last_before(i + 1),
            numel};
  }
};

void check_table(const Code& code, int64_t blocks) {
  for (int64_t i = 1; i < blocks; ++i) {
    const std::string row = "row " + std::to_string(i - 1) + " of the table";
    if (code.last_before(i) <= code.last_before(i - 1) || code.last_before(i) >= code.numel)
      fail(kOp, "code", "is damaged: " + row + " has an index that does not rise, or is outside the tensor");
    if (code.escapes_before(i) < code.escapes_before(i - 1) || code.escapes_before(i) > code.escape_bytes)
      fail(kOp, "code", "is damaged: " + row + " has a place among the escapes that falls, or is outside");
  }
}

}  // namespace

Tensor decode_indices(const Tensor& code_tensor, int64_t nnz, int64_t numel) {
  if (dtype_of(code_tensor) != aoti_torch_dtype_uint8())
    fail(kOp, "code", "must be uint8, got " + dtype_name(dtype_of(code_tensor)));
  if (code_tensor.dim() != 1) fail(kOp, "code", "must be 1-D, got shape " + shape_of(code_tensor));
  check_memory(kOp, "code", code_tensor);
  if (numel < 0 || numel > kMaxNumel) fail(kOp, "numel", "must lie in [0, 2^62], got " + std::to_string(numel));
  if (nnz < 0 || nnz > numel)
    fail(kOp, "nnz", "must lie in [0, " + std::to_string(numel) + "], got " + std::to_string(nnz));
  const int64_t bytes = code_tensor.numel();
  // Each entry has a byte, so a result is at most 8 times as large as the code.
  if (nnz > bytes || table_bytes(nnz) + nnz > bytes || (nnz == 0 && bytes))
    fail(kOp, "code",
         "must hold the code of " + std::to_string(nnz) + " indices, got " + std::to_string(bytes) + " bytes");
  const auto* data = static_cast<const uint8_t*>(code_tensor.data_ptr());
  const int64_t table = table_bytes(nnz), blocks = index_blocks(nnz);
  const Code code{data, data + table, data + table + nnz, bytes - table - nnz, nnz, numel};
  check_table(code, blocks);

  const CpuKernels& kernels = cpu_kernels();
  const bool wide = numel >= (int64_t{1} << 31);
  Tensor indices = empty_vector(nnz, wide ? aoti_torch_dtype_int64() : aoti_torch_dtype_int32());
  count_call(kernels);
  auto* out = static_cast<char*>(indices.data_ptr());
  const auto decode = [&](int64_t block) {
    return kernels.decode_indices(code.block(block), out + block * kIndexBlock * (wide ? 8 : 4), wide);
  };
  std::atomic<int64_t> damaged{blocks};  // the first of them
  over_threads(nnz, [&](int64_t chunk, int64_t chunks) {
    for (int64_t i = chunk * blocks / chunks; i < (chunk + 1) * blocks / chunks; ++i) {
      if (decode(i) == DecodeError::None) continue;
      int64_t first = damaged;
      while (i < first && !damaged.compare_exchange_weak(first, i)) {
      }
      return;
    }
  });
  if (damaged < blocks)
    fail(kOp, "code", "is damaged: block " + std::to_string(damaged) + " " + reason_of(decode(damaged)));
  return indices;
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("decode_indices", TORCH_BOX(&shira::decode_indices)); }
