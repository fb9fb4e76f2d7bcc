"""add_sparse_delta_mm: sparse_delta_mm added to the base product's output in place.

    out[t, r] <- out[t, r] + sum over entries e of row r of x[t, col[e]] * values[e]

The sum is in float32 (float64 for float64 operands); `out` is added to it there, and the result rounded once. A row
without entries keeps its bits.
"""

from __future__ import annotations

import torch

from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.ops.sparse_delta_mm import check_input, check_values
from shira_kernels.reference import add_sparse_delta_mm as reference

OP = "add_sparse_delta_mm"


def check_out(op: str, out: torch.Tensor, x: torch.Tensor) -> None:
    """Checks the form of what is added to."""
    if out.dtype != x.dtype:
        _checks.fail(op, "out", f"must be {x.dtype} like x, got {out.dtype}")
    if out.device != x.device:
        _checks.fail(op, "out", f"must be on {x.device} like x, got {out.device}")
    if out.dim() != x.dim() or out.shape[:-1] != x.shape[:-1]:
        _checks.fail(op, "out", f"must be [..., out] beside x [..., in] {tuple(x.shape)}, got {tuple(out.shape)}")
    _checks.check_memory(op, "out", out)


def form(out: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor) -> None:
    check_input(OP, x)
    check_out(OP, out, x)
    _checks.check_csr(OP, row_ptr, col, out.shape[-1], x, "out has columns")
    check_values(OP, values, col, x)


def contents(out: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, *_: torch.Tensor) -> None:
    _checks.check_csr_contents(OP, row_ptr, col, x.shape[-1])


define(
    f"{OP}(Tensor(a!) out, Tensor x, Tensor row_ptr, Tensor col, Tensor values) -> ()",
    form=form,
    contents=contents,
    reference=reference.add_sparse_delta_mm,
)


def add_sparse_delta_mm(
    out: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor
) -> None:
    """Adds `x` times the transpose of a sparse delta to `out`: the same as `torch.ops.shira.add_sparse_delta_mm`.

    Args:
        out: [..., out] in the dtype and with the leading shape of `x`, contiguous: the base product's output.
        x, row_ptr, col, values: as for `sparse_delta_mm`.

    Raises:
        RuntimeError: naming the argument, before anything is written: as for `sparse_delta_mm`; memory of `out` shared
            with another argument; an argument that requires grad outside `no_grad`; torch.func transforms.
    """
    torch.ops.shira.add_sparse_delta_mm(out, x, row_ptr, col, values)
