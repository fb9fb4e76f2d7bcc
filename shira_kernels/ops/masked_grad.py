"""masked_grad: the gradient of a linear layer's weight at listed entries only (a sampled dense-dense product).

    result[e] = sum over tokens t of grad_output[t, row(e)] * x[t, col[e]],   row_ptr[row(e)] <= e < row_ptr[row(e) + 1]

The entries are those of a weight [out, in] in CSR form: the gradient of `y = x @ weight.T`, of which the dense gradient
would be `grad_output.T @ x`. Sums are in float32 (float64 for float64 operands) and are not rounded further.
"""

from __future__ import annotations

import torch

from shira_kernels.dtypes import ARITHMETIC, compute_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import masked_grad as reference

OP = "masked_grad"


def form(grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> None:
    if x.dtype not in ARITHMETIC:
        _checks.fail(OP, "x", f"must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if grad_output.dtype != x.dtype:
        _checks.fail(OP, "grad_output", f"must be {x.dtype} like x, got {grad_output.dtype}")
    if x.dim() == 0:
        _checks.fail(OP, "x", "must have at least one dimension, [..., in]")
    if grad_output.dim() != x.dim() or grad_output.shape[:-1] != x.shape[:-1]:
        _checks.fail(
            OP, "grad_output", f"must be [..., out] beside x [..., in] {tuple(x.shape)}, got {tuple(grad_output.shape)}"
        )
    if grad_output.device != x.device:
        _checks.fail(OP, "grad_output", f"must be on {x.device} like x, got {grad_output.device}")
    _checks.check_csr(OP, row_ptr, col, grad_output.shape[-1], x, "grad_output has columns")


define(
    f"{OP}(Tensor grad_output, Tensor x, Tensor row_ptr, Tensor col) -> Tensor",
    form=form,
    fake=lambda grad_output, x, row_ptr, col: x.new_empty(col.shape[0], dtype=compute_dtype(x.dtype)),
    contents=lambda grad_output, x, row_ptr, col: _checks.check_csr_contents(OP, row_ptr, col, x.shape[-1]),
    reference=reference.masked_grad,
)


def masked_grad(grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """The gradient of a linear layer's weight at listed entries: the same as `torch.ops.shira.masked_grad`.

    Args:
        grad_output: [..., out], the gradient of the layer's output; float64, float32, bfloat16 or float16.
        x: [..., in], the layer's input, in the dtype and with the leading shape of `grad_output`.
        row_ptr: [out + 1] int32 or int64: the entries of row r are those from row_ptr[r] to row_ptr[r + 1].
        col: [nnz] int32 or uint16, the column of each entry, sorted and unique within a row.

    Returns:
        [nnz] float32 (float64 for float64 operands): the entries of `grad_output.T @ x` over the flattened leading
        dimensions, rounded nowhere but in the sum.

    Raises:
        RuntimeError: naming the argument: wrong dtype, shape or device, operands that require grad outside `no_grad`
            (the op is not differentiable); on the CPU, and on a GPU in checked mode, also a row_ptr that does not rise
            from 0 to nnz and columns that are unsorted, repeated or outside. A GPU kernel otherwise reads nothing
            outside its operands.
    """
    return torch.ops.shira.masked_grad(grad_output, x, row_ptr, col)
