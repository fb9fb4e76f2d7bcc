"""scatter_apply_batched in Triton: one launch for all weights.

The formula is that of scatter_apply. A table [2, n] int64 holds each weight's address and number of elements; offsets
[n + 1] cut the arena. A program owns BLOCK neighbours of the arena and finds their weight by binary search in the
offsets, which stay in cache; only where they are of several weights, each one's. No two entries are the same place: no
atomics, no race, deterministic. An index outside its weight is skipped; offsets that do not rise choose a wrong weight
of the list, never anything outside.

Table and offsets stay on the device for the next calls, so a call that was just made can be captured in a graph, which
then keeps them alive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.triton import _batch
from shira_kernels.triton._batch import on_device, parts_of
from shira_kernels.triton._launch import blocks, launch
from shira_kernels.triton._math import REPLACE, as_kernel_type, float_bits
from shira_kernels.triton.scatter_apply import mode_of, update_entries

BLOCK = 512  # entries of a program: with 1024 the search for its part spills registers


@triton.jit
def entries_of(table, element, index, parts, count):
    """Gives pointers to the entries at indices of these parts, and which of them lie inside their weights."""
    address = tl.load(table + parts)
    numel = tl.load(table + count + parts)
    return address.to(element.dtype) + index, (index >= 0) & (index < numel)


@triton.jit(do_not_specialize=["count", "nnz", "alpha_bits"])
def scatter_apply_batched_kernel(
    table,
    offsets,
    indices,
    values,
    saved,  # of the weights' type; without KEEP only its type is used
    count: tl.int32,
    nnz: tl.int64,
    alpha_bits: tl.int64,
    MODE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    # Both come from memory while the search goes on.
    index = tl.load(indices + i, mask=i < nnz, other=-1).to(tl.int64)
    v = tl.load(values + i, mask=i < nnz)
    parts, _, _ = parts_of(offsets, i, first, tl.minimum(first + BLOCK, nnz) - 1, count, BLOCK)
    weights, inside = entries_of(table, saved, index, parts, count)
    update_entries(weights, weights, v, saved + i, inside, alpha_bits, MODE, KEEP)


def table_of(weights: list[torch.Tensor], *offsets: torch.Tensor) -> torch.Tensor:
    """On the CPU: addresses and numbers of elements, and offsets."""
    return _batch.table_of([[weight.data_ptr() for weight in weights], [w.numel() for w in weights]], offsets)


def scatter_apply_batched(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
    *,
    table: torch.Tensor | None = None,
) -> None:
    nnz = indices.numel()
    if nnz == 0:
        return
    table = table_of(weights, offsets) if table is None else table
    table, offsets = on_device(indices.device, table, 2, len(weights), (offsets,))
    mode = mode_of(alpha, additive)
    view = as_bits if mode == REPLACE.value else as_kernel_type
    launch(
        scatter_apply_batched_kernel,
        blocks(nnz, BLOCK),
        (table, offsets, indices, view(values), view(weights[0] if saved is None else saved)),
        (len(weights), nnz, float_bits(alpha)),
        (mode, saved is not None, BLOCK),
    )
