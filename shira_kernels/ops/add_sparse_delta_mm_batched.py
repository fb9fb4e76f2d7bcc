"""add_sparse_delta_mm_batched: sparse_delta_mm_batched added to the base product's output in place.

    out[t, r] <- out[t, r] + sum over entries e of row r of adapter a of x[t, col[e]] * values[e]
    a = token_adapter[t]

Sums and rounding are those of add_sparse_delta_mm, entries and pages those of sparse_delta_mm_batched. Rows of `out`
with adapter -1 keep their bits.
"""

from __future__ import annotations

import torch

from shira_kernels.ops._library import define
from shira_kernels.ops.add_sparse_delta_mm import check_out
from shira_kernels.ops.sparse_delta_mm import check_input
from shira_kernels.ops.sparse_delta_mm_batched import check_adapter_contents, check_adapters
from shira_kernels.reference import add_sparse_delta_mm_batched as reference

OP = "add_sparse_delta_mm_batched"


def form(
    out: torch.Tensor,
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> None:
    check_input(OP, x)
    check_out(OP, out, x)
    check_adapters(OP, x, token_adapter, row_ptr, col, values, out.shape[-1], page_table)


def contents(
    out: torch.Tensor,
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> None:
    check_adapter_contents(OP, x.shape[-1], token_adapter, row_ptr, col, page_table)


define(
    f"{OP}(Tensor(a!) out, Tensor x, Tensor token_adapter, Tensor row_ptr, Tensor col, Tensor values, "
    "Tensor? page_table=None) -> ()",
    form=form,
    contents=contents,
    reference=reference.add_sparse_delta_mm_batched,
)


def add_sparse_delta_mm_batched(
    out: torch.Tensor,
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> None:
    """Adds each row's own sparse delta to `out`: the same as `torch.ops.shira.add_sparse_delta_mm_batched`.

    Args:
        out: [..., out] in the dtype and with the leading shape of `x`, contiguous: the base product's output.
        x, token_adapter, row_ptr, col, values, page_table: as for `sparse_delta_mm_batched`.

    Raises:
        RuntimeError: naming the argument, before anything is written: as for `sparse_delta_mm_batched`; memory of `out`
            shared with another argument; an argument that requires grad outside `no_grad`; torch.func transforms.
    """
    torch.ops.shira.add_sparse_delta_mm_batched(out, x, token_adapter, row_ptr, col, values, page_table)
