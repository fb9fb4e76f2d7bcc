"""sparse_delta_mm_transposed: a tensor times a sparse delta, the gradient of sparse_delta_mm's x.

    result[t, c] = sum over entries e with col[e] = c of x[t, row(e)] * values[e]
    row_ptr[row(e)] <= e < row_ptr[row(e) + 1]

It is sparse_delta_mm of the transposed delta, on any backend, with its arithmetic. The transposed index is built at the
first call and kept for as long as the memory of `col` and `row_ptr` lives and torch sees no write to them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from shira_kernels.dtypes import index_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.ops.encode_indices import MAX_NUMEL
from shira_kernels.ops.sparse_delta_mm import check_input, check_values

OP = "sparse_delta_mm_transposed"
COMPOSED_OF = "sparse_delta_mm"  # the op whose kernels it runs; it has none of its own


def form(x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, in_features: int) -> None:
    if not 0 <= in_features <= MAX_NUMEL:
        _checks.fail(OP, "in_features", f"must lie in [0, 2^62], got {in_features}")
    check_input(OP, x)
    _checks.check_csr(OP, row_ptr, col, x.shape[-1], x, "x has columns")
    check_values(OP, values, col, x)


def contents(x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, in_features: int) -> None:
    _checks.check_csr_contents(OP, row_ptr, col, in_features)


class Index(NamedTuple):
    """A delta's entries by column: CSR of its transpose, and where each entry was."""

    row_ptr: torch.Tensor
    col: torch.Tensor
    order: torch.Tensor


class Kept(NamedTuple):
    rows: weakref.ref[torch.UntypedStorage]  # of row_ptr
    versions: tuple[int, int]
    transpose: Index


# By the memory of `col`, and then by what of it and of row_ptr is meant: views are often made anew for each call.
_kept: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[tuple[object, ...], Kept]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def transposed(row_ptr: torch.Tensor, col: torch.Tensor, in_features: int) -> Index:
    """The transposed index of a delta, kept from call to call where torch can tell that nothing changed."""
    if row_ptr.is_inference() or col.is_inference():  # these have no version
        return build(row_ptr, col, in_features)
    stream = torch.cuda.current_stream(col.device) if col.is_cuda else None
    meant = (*_part(row_ptr), *_part(col), in_features, stream)
    versions = (row_ptr._version, col._version)
    with _lock:
        lists = _kept.setdefault(col.untyped_storage(), {})
        known = lists.get(meant)
        if known and known.versions == versions and known.rows() is row_ptr.untyped_storage():
            return known.transpose
        index = build(row_ptr, col, in_features)
        if stream is None or not torch.cuda.is_current_stream_capturing():  # memory of a graph is the graph's
            for other in [key for key, kept in lists.items() if kept.rows() is None or kept.versions[1] != versions[1]]:
                del lists[other]
            lists[meant] = Kept(weakref.ref(row_ptr.untyped_storage()), versions, index)
    return index


def _part(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.storage_offset(), tensor.numel(), tensor.dtype


def build(row_ptr: torch.Tensor, col: torch.Tensor, in_features: int) -> Index:
    """Waits for no GPU. Wrong entries there give an index that is wrong too, which kernels must bear."""
    columns, order = col.to(torch.int32).sort(stable=True)
    entries = torch.arange(col.numel(), dtype=row_ptr.dtype, device=col.device)
    rows = torch.searchsorted(row_ptr, entries, right=True, out_int32=True) - 1
    ends = torch.searchsorted(columns, torch.arange(in_features + 1, dtype=torch.int32, device=col.device))
    small = index_dtype(col.numel())
    narrow = torch.uint16 if row_ptr.numel() <= 2**16 + 1 else torch.int32
    return Index(ends.to(small), rows[order].to(narrow), order.to(small))


def compose(
    product: Callable[..., torch.Tensor],
    x: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    in_features: int,
) -> torch.Tensor:
    """The op, by a kernel of sparse_delta_mm."""
    with torch.no_grad():
        index = transposed(row_ptr, col, in_features)
        return product(x, index.row_ptr, index.col, values.index_select(0, index.order), in_features)


define(
    f"{OP}(Tensor x, Tensor row_ptr, Tensor col, Tensor values, SymInt in_features) -> Tensor",
    form=form,
    fake=lambda x, row_ptr, col, values, in_features: x.new_empty((*x.shape[:-1], in_features)),
    contents=contents,
    composed_of=COMPOSED_OF,
    compose=compose,
)


def sparse_delta_mm_transposed(
    x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, in_features: int
) -> torch.Tensor:
    """`x` times a sparse delta: the same as `torch.ops.shira.sparse_delta_mm_transposed`.

    Args:
        x: [..., out], such as the gradient of a linear layer's output; float64, float32, bfloat16 or float16.
        row_ptr, col, values: the delta [out, in], as for `sparse_delta_mm`.
        in_features: columns of the delta.

    Returns:
        [..., in] in the dtype of x.

    Raises:
        RuntimeError: naming the argument: as for `sparse_delta_mm`; operands that require grad outside `no_grad` (the
            op is not differentiable).
    """
    return torch.ops.shira.sparse_delta_mm_transposed(x, row_ptr, col, values, in_features)
