"""sparse_delta_mm_batched: as sparse_delta_mm, and each row of x has an adapter of its own.

    result[t, r] = sum over entries e of row r of adapter a of x[t, col[e]] * values[e],   a = token_adapter[t]
    row_ptr[a, r] <= e < row_ptr[a, r + 1];   0 where token_adapter[t] is -1

The adapters' entries lie in one arena: `col` and `values` are [nnz], and e is a position in them. Or they lie in pages
of fixed size: `col` and `values` are [pages, page_size], e counts an adapter's own entries, and entry e of adapter a is
at [page_table[a, e // page_size], e % page_size]. Then an adapter may come and go without others being moved. Only what
the adapters of token_adapter list is read, so slots that no token names may hold anything.

All shapes can be fixed while adapters and tokens change, so that a captured graph goes on to be valid: spare rows of x
have adapter -1.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NoReturn

import torch

from shira_kernels.ops import _checks
from shira_kernels.ops._library import define, differentiable
from shira_kernels.ops.sparse_delta_mm import check_input, check_values
from shira_kernels.reference import sparse_delta_mm_batched as reference

OP = "sparse_delta_mm_batched"


def check_adapters(
    op: str,
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    rows: int,
    page_table: torch.Tensor | None = None,
) -> None:
    """Checks the form of stacked adapters and of their input."""
    check_input(op, x)
    if token_adapter.dtype != torch.int32:
        _checks.fail(op, "token_adapter", f"must be int32, got {token_adapter.dtype}")
    _checks.check_vector(op, "token_adapter", token_adapter, x)
    tokens = math.prod(x.shape[:-1])  # numel() would make a constant of a symbol
    if token_adapter.shape[0] != tokens:
        _checks.fail(op, "token_adapter", f"must have one entry per row of x ({tokens}), got {token_adapter.shape[0]}")
    if row_ptr.dtype not in _checks.INDEX_DTYPES:
        _checks.fail(op, "row_ptr", f"must be int32 or int64, got {row_ptr.dtype}")
    if col.dtype not in _checks.COLUMN_DTYPES:
        _checks.fail(op, "col", f"must be int32 or uint16, got {col.dtype}")
    for argument, tensor in (("row_ptr", row_ptr), ("col", col), ("page_table", page_table)):
        if tensor is not None and tensor.device != x.device:
            _checks.fail(op, argument, f"must be on {x.device} like the others, got {tensor.device}")
        if tensor is not None and not tensor.is_contiguous():
            _checks.fail(op, argument, "must be contiguous")
    if rows < 0:
        _checks.fail(op, "out_features", f"must not be negative, got {rows}")
    if row_ptr.dim() != 2 or row_ptr.shape[1] != rows + 1:
        _checks.fail(op, "row_ptr", f"must be [adapters, out + 1] with out {rows}, got {tuple(row_ptr.shape)}")
    if page_table is None:
        if col.dim() != 1:
            _checks.fail(op, "col", f"must be 1-D unless there is a page_table, got shape {tuple(col.shape)}")
        check_values(op, values, col, x)
        return
    if col.dim() != 2 or col.shape[1] == 0:
        _checks.fail(op, "col", f"must be [pages, page_size] beside a page_table, got shape {tuple(col.shape)}")
    check_values(op, values, col, x)
    if page_table.dtype != torch.int32:
        _checks.fail(op, "page_table", f"must be int32, got {page_table.dtype}")
    if page_table.dim() != 2 or page_table.shape[0] != row_ptr.shape[0]:
        _checks.fail(
            op,
            "page_table",
            f"must be [adapters, pages] with {row_ptr.shape[0]} adapters, got shape {tuple(page_table.shape)}",
        )


def check_adapter_contents(
    op: str,
    width: int,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    page_table: torch.Tensor | None,
) -> None:
    """Adapters of tokens exist, and each one's entries are where they may be. Reads the data, so it waits for a GPU."""
    for adapter in token_adapter.unique().tolist():
        if not -1 <= adapter < row_ptr.shape[0]:
            _checks.fail(op, "token_adapter", f"must lie in [-1, {row_ptr.shape[0]}), got {adapter}")
        if adapter == -1:
            continue
        borders = row_ptr[adapter].long()
        first, last = int(borders[0]), int(borders[-1])
        # Without a page there is no entry, however long its pages would be.
        room = col.shape[0] if page_table is None or not col.shape[0] else page_table.shape[1] * col.shape[1]
        if first < 0 or last > room or bool((borders.diff() < 0).any()):
            _checks.fail(
                op, "row_ptr", f"of adapter {adapter} must rise within [0, {room}], got from {first} to {last}"
            )
        columns = entries_of(adapter, first, last, col, page_table, op)
        _checks.check_csr_contents(op, borders - first, columns, width)


def entries_of(
    adapter: int, first: int, last: int, arena: torch.Tensor, page_table: torch.Tensor | None, op: str = OP
) -> torch.Tensor:
    """The entries from `first` to `last` of an adapter, gathered from an arena of columns or values."""
    if page_table is None or first == last:
        return arena.view(-1)[first:last]
    size = arena.shape[1]
    begin, end = first // size, -(-last // size)
    pages = page_table[adapter, begin:end].long()
    if pages.numel() and (int(pages.min()) < 0 or int(pages.max()) >= arena.shape[0]):
        _checks.fail(op, "page_table", f"of adapter {adapter} must lie in [0, {arena.shape[0]}) where it has entries")
    # torch does not index uint16 on every device.
    whole = arena.view(torch.int16)[pages].view(torch.uint16) if arena.dtype == torch.uint16 else arena[pages]
    return whole.view(-1)[first - begin * size : last - begin * size]


def contents(
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    page_table: torch.Tensor | None = None,
) -> None:
    check_adapter_contents(OP, x.shape[-1], token_adapter, row_ptr, col, page_table)


define(
    f"{OP}(Tensor x, Tensor token_adapter, Tensor row_ptr, Tensor col, Tensor values, SymInt out_features, "
    "Tensor? page_table=None) -> Tensor",
    form=functools.partial(check_adapters, OP),
    fake=lambda x, token_adapter, row_ptr, col, values, out_features, page_table: x.new_empty(
        (*x.shape[:-1], out_features)
    ),
    contents=contents,
    allows_grad=True,
    reference=reference.sparse_delta_mm_batched,
)


def backward(ctx: Any, grad: torch.Tensor) -> NoReturn:
    raise RuntimeError(f"shira::{OP}: is not differentiable: train an adapter with shira.attach, or run under no_grad")


differentiable(OP, backward=backward)


def sparse_delta_mm_batched(
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` times the transposes of sparse deltas, one for each row: as `torch.ops.shira.sparse_delta_mm_batched`.

    Args:
        x: [..., in], a linear layer's input; float64, float32, bfloat16 or float16.
        token_adapter: [tokens] int32, the adapter of each row of x (its leading dimensions flattened), -1 for none.
        row_ptr: [adapters, out + 1] int32 or int64: entries of row r of adapter a are those from row_ptr[a, r] to
            row_ptr[a, r + 1].
        col: [nnz] int32 or uint16, or [pages, page_size]: the column of each entry, sorted and unique within a row.
        values: like `col`, the entries of the deltas in the dtype of x; beside bfloat16 and float16 also float32.
        out_features: rows of each delta.
        page_table: [adapters, pages of one adapter] int32, where entries lie in pages: entry e of adapter a is at
            [page_table[a, e // page_size], e % page_size].

    Returns:
        [..., out] in the dtype of x: what its delta adds to each row's output; 0 for none.

    Raises:
        RuntimeError: naming the argument: wrong dtype, shape or device; on the CPU, and on a GPU in checked mode, also
            an adapter that is not there, and of adapters that tokens have: a row_ptr that falls or leaves the arena,
            pages outside it, columns that are unsorted, repeated or outside. A GPU kernel otherwise reads nothing
            outside its operands. Not differentiable: its backward raises, under torch.compile already where it is
            compiled outside no_grad for operands that require grad.
    """
    return torch.ops.shira.sparse_delta_mm_batched(x, token_adapter, row_ptr, col, values, out_features, page_table)
