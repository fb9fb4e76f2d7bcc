"""Kernels for sparse high-rank adapters, as torch.library ops in the namespace `shira`."""

from shira_kernels import backends
from shira_kernels.ops.add_sparse_delta_mm import add_sparse_delta_mm
from shira_kernels.ops.add_sparse_delta_mm_batched import add_sparse_delta_mm_batched
from shira_kernels.ops.decode_indices import decode_indices
from shira_kernels.ops.encode_indices import encode_indices
from shira_kernels.ops.extract_changed import extract_changed
from shira_kernels.ops.fuse_adapters import fuse_adapters
from shira_kernels.ops.masked_adamw import masked_adamw
from shira_kernels.ops.masked_grad import masked_grad
from shira_kernels.ops.scatter_apply import scatter_apply
from shira_kernels.ops.scatter_apply_batched import scatter_apply_batched
from shira_kernels.ops.scatter_switch_batched import scatter_switch_batched
from shira_kernels.ops.sparse_delta_mm import sparse_delta_mm
from shira_kernels.ops.sparse_delta_mm_batched import sparse_delta_mm_batched
from shira_kernels.ops.sparse_delta_mm_transposed import sparse_delta_mm_transposed
from shira_kernels.ops.topk_indices import topk_indices
from shira_kernels.optim import ShiraAdamW

__version__ = "0.2.0.dev0"
__all__ = [
    "ShiraAdamW",
    "__version__",
    "add_sparse_delta_mm",
    "add_sparse_delta_mm_batched",
    "backends",
    "decode_indices",
    "encode_indices",
    "extract_changed",
    "fuse_adapters",
    "masked_adamw",
    "masked_grad",
    "scatter_apply",
    "scatter_apply_batched",
    "scatter_switch_batched",
    "sparse_delta_mm",
    "sparse_delta_mm_batched",
    "sparse_delta_mm_transposed",
    "topk_indices",
]
