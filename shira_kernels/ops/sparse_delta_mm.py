"""sparse_delta_mm: a linear layer's input times the transpose of a sparse delta of its weight.

    result[t, r] = sum over entries e of row r of x[t, col[e]] * values[e],   row_ptr[r] <= e < row_ptr[r + 1]

The delta is a weight [out, in] in CSR form; `x @ weight.T + result` is the layer with the delta added to its weight.
Sums are in float32 (float64 for float64 operands) and rounded once to the dtype of x. Differentiable once in x, by
sparse_delta_mm_transposed, and in values, by masked_grad.
"""

from __future__ import annotations

from typing import Any

import torch

from shira_kernels.dtypes import ARITHMETIC, compute_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define, differentiable
from shira_kernels.reference import sparse_delta_mm as reference

OP = "sparse_delta_mm"


def check_input(op: str, x: torch.Tensor) -> None:
    """Checks the form of a layer's input."""
    if x.dtype not in ARITHMETIC:
        _checks.fail(op, "x", f"must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0:
        _checks.fail(op, "x", "must have at least one dimension, [..., in]")


def check_values(op: str, values: torch.Tensor, col: torch.Tensor, x: torch.Tensor) -> None:
    """Checks the form of values beside col, which was checked."""
    if values.dtype not in (x.dtype, compute_dtype(x.dtype)):
        _checks.fail(op, "values", f"must be {x.dtype} like x, or float32 beside fewer bits, got {values.dtype}")
    if values.device != x.device:
        _checks.fail(op, "values", f"must be on {x.device} like the others, got {values.device}")
    if values.shape != col.shape:
        _checks.fail(op, "values", f"must have the shape of col {tuple(col.shape)}, got {tuple(values.shape)}")
    if not values.is_contiguous():
        _checks.fail(op, "values", "must be contiguous")


def form(x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, out_features: int) -> None:
    check_input(OP, x)
    _checks.check_csr(OP, row_ptr, col, out_features, x, "out_features")
    check_values(OP, values, col, x)


def contents(x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, *_: Any) -> None:
    _checks.check_csr_contents(OP, row_ptr, col, x.shape[-1])


define(
    f"{OP}(Tensor x, Tensor row_ptr, Tensor col, Tensor values, SymInt out_features) -> Tensor",
    form=form,
    fake=lambda x, row_ptr, col, values, out_features: x.new_empty((*x.shape[:-1], out_features)),
    contents=contents,
    allows_grad=True,
    reference=reference.sparse_delta_mm,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, row_ptr, col, values, _ = inputs
    x_needed, values_needed = ctx.needs_input_grad[3], ctx.needs_input_grad[0]
    ctx.save_for_backward(x if x_needed else None, row_ptr, col, values if values_needed else None)
    ctx.in_features, ctx.value_dtype = x.shape[-1], values.dtype


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
    x, row_ptr, col, values = ctx.saved_tensors
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.shira.sparse_delta_mm_transposed(grad, row_ptr, col, values, ctx.in_features)
    if ctx.needs_input_grad[3]:
        grad_values = torch.ops.shira.masked_grad(grad, x, row_ptr, col).to(ctx.value_dtype)
    return grad_x, None, None, grad_values, None


differentiable(OP, setup_context=setup_context, backward=backward)


def sparse_delta_mm(
    x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, out_features: int
) -> torch.Tensor:
    """`x` times the transpose of a sparse delta: the same as `torch.ops.shira.sparse_delta_mm`.

    Args:
        x: [..., in], a linear layer's input; float64, float32, bfloat16 or float16.
        row_ptr: [out + 1] int32 or int64: the entries of row r are those from row_ptr[r] to row_ptr[r + 1].
        col: [nnz] int32 or uint16, the column of each entry, sorted and unique within a row.
        values: [nnz], the entries of the delta in the dtype of x; beside bfloat16 and float16 also float32.
        out_features: rows of the delta.

    Returns:
        [..., out] in the dtype of x: what the delta adds to the layer's output.

    Raises:
        RuntimeError: naming the argument: wrong dtype, shape or device; on the CPU, and on a GPU in checked mode, also
            a row_ptr that does not rise from 0 to nnz and columns that are unsorted, repeated or outside. A GPU kernel
            otherwise reads nothing outside its operands. Also where a gradient is to be differentiated again.
    """
    return torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, out_features)
