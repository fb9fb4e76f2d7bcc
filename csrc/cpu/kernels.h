// The table of the kernels of one instruction set, as function pointers: what kernel headers offer to the rest of
// csrc/cpu.
#pragma once

#include <cstdint>

#include "csr_types.h"
#include "extract_changed_types.h"
#include "fuse_adapters_types.h"
#include "index_code.h"
#include "masked_adamw_types.h"
#include "masked_grad_types.h"
#include "scatter_apply_types.h"
#include "sparse_delta_types.h"
#include "topk_indices_types.h"

namespace shira {

struct CpuKernels {
  const char* name;
  ScatterApply (*scatter_apply)(const ScatterForm&);
  ChooseMaskedGrad masked_grad;  // wide_col: int32 rather than uint16
  MaskedAdamW (*masked_adamw)(const AdamWForm&);
  TopkIndices (*topk_indices)(int64_t element_size);
  FuseAdapters (*fuse_adapters)(Element value, FusePolicy policy);
  ExtractChanged (*extract_changed)(int64_t element_size, bool wide);  // wide: int64 rather than int32 indices
  // Whether count indices (int64 where wide, else int32) are strictly rising.
  bool (*strictly_rising)(const void* indices, int64_t count, bool wide);
  ChooseSparseDeltaMm sparse_delta_mm;
  ChooseSparseDeltaToken sparse_delta_token;
  // Whether borders (int64 where wide, else int32) never fall.
  bool (*row_ptr_rises)(const void* row_ptr, int64_t count, bool wide);
  // Whether columns are sorted and unique in each row, and lie in [0, columns).
  bool (*columns_fit)(const CsrRows&);
  // Writes block.count indices; on an error what they hold is undefined.
  DecodeError (*decode_indices)(const IndexBlock& block, void* indices, bool wide);
  // How many bytes the escapes of count indices take, and the code; `before` is the index before the first, or -1.
  int64_t (*escape_bytes)(const void* indices, bool wide, int64_t count, int64_t before);
  void (*encode_indices)(const void* indices, bool wide, int64_t count, int64_t before, uint8_t* gaps,
                         uint8_t* escapes);
};

extern const CpuKernels base_kernels;
#if defined(__x86_64__)
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
extern const ChooseMaskedGrad avx512_bf16_masked_grad;  // all else is as in avx512_kernels
#endif

// The kernels in use: the best that this processor runs, or what set_isa chose.
const CpuKernels& cpu_kernels();

// Counts one call of an op that ran these kernels: tests ask which kernel ran.
void count_call(const CpuKernels& kernels);

}  // namespace shira
