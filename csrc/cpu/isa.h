// Compiles every kernel header for the instruction set that the including file chose, and makes its table.
// The including file has included the standard headers before it changed the target, so that no function of the
// standard library is compiled for it.
#include "csr_kernel.h"
#include "decode_indices_kernel.h"
#include "encode_indices_kernel.h"
#include "extract_changed_kernel.h"
#include "fuse_adapters_kernel.h"
#include "kernels.h"
#include "masked_adamw_kernel.h"
#include "masked_grad_kernel.h"
#include "scatter_apply_kernel.h"
#include "sparse_delta_mm_kernel.h"
#include "sparse_delta_token_kernel.h"
#include "topk_indices_kernel.h"

namespace shira {

#define SHIRA_CONCATENATE(a, b) a##b
#define SHIRA_TABLE(isa) SHIRA_CONCATENATE(isa, _kernels)
#define SHIRA_STRING(isa) #isa
#define SHIRA_NAME(isa) SHIRA_STRING(isa)

extern const CpuKernels SHIRA_TABLE(SHIRA_ISA);
const CpuKernels SHIRA_TABLE(SHIRA_ISA) = {
    SHIRA_NAME(SHIRA_ISA),
    SHIRA_ISA::choose_scatter_apply,
    SHIRA_ISA::choose_masked_grad,
    SHIRA_ISA::choose_masked_adamw,
    SHIRA_ISA::choose_topk_indices,
    SHIRA_ISA::choose_fuse_adapters,
    SHIRA_ISA::choose_extract_changed,
    SHIRA_ISA::strictly_rising,
    SHIRA_ISA::choose_sparse_delta_mm,
    SHIRA_ISA::choose_sparse_delta_token,
    SHIRA_ISA::row_ptr_rises,
    SHIRA_ISA::columns_fit,
    SHIRA_ISA::decode_indices,
    SHIRA_ISA::escape_bytes,
    SHIRA_ISA::encode_indices,
};

}  // namespace shira
