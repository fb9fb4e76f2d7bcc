"""scatter_switch_batched in Triton: one launch for both lists.

The formulas are those of scatter_apply, the table and the offsets those of scatter_apply_batched. The first programs
own BLOCK neighbours each of the new list, the others of the old one, and look each entry up in the other list by binary
search: in what lies between the program's first and last entry, where these are of one weight, else in its part. An
entry of both lists belongs to the new list, which reads `old_saved` instead of the weight; the old list's programs
leave it alone. (They come last, so that programs that run one after another would show it if they did not.) So every
entry has one owner: no atomics, no race, deterministic. An index outside its weight is skipped; lists that are not
sorted find wrong places of the lists, offsets that do not rise wrong parts, never anything outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.triton._batch import on_device, parts_of
from shira_kernels.triton._launch import blocks, launch
from shira_kernels.triton._math import REPLACE, as_kernel_type, float_bits
from shira_kernels.triton.scatter_apply import mode_of, update_entries
from shira_kernels.triton.scatter_apply_batched import entries_of, table_of

BLOCK = 256  # entries of a program: with 512 the searches spill registers on triton 3.6


@triton.jit
def ends_of(offsets, nnz, part):
    """Where a part of a list of nnz begins and ends; always in [0, nnz]."""
    begin, end = tl.load(offsets + part), tl.load(offsets + part + 1)
    return tl.minimum(tl.maximum(begin, 0), nnz), tl.minimum(tl.maximum(end, 0), nnz)


@triton.jit
def lower_bound(indices, low, high, index, BLOCK: tl.constexpr):
    """The first position of [low, high) of a sorted list whose index is not below `index`, else `high`. The program
    looks at BLOCK positions at once, so two or three steps are enough, where halving would wait for twenty loads."""
    while low < high:
        stride = (high - low) // BLOCK + 1
        at = low + tl.arange(0, BLOCK) * stride
        below = (at < high) & (tl.load(indices + at, mask=at < high, other=0).to(tl.int64) < index)
        passed = tl.sum(below.to(tl.int64), axis=0)
        high = tl.minimum(low + passed * stride, high)
        low = tl.where(passed > 0, low + (passed - 1) * stride + 1, low)
    return low


@triton.jit
def find(offsets, indices, nnz, parts, part, alike, index, inside, own, first, last, BLOCK: tl.constexpr):
    """Where each index is in its part of a sorted list of nnz, and whether it is there. `own` is the list that the
    indices are from, at positions `first` to `last`: if all are of one part, only what lies between the indices of
    those two is searched."""
    low, high = ends_of(offsets, nnz, parts)
    width = nnz
    if alike:
        begin, end = ends_of(offsets, nnz, part)
        begin = lower_bound(indices, begin, end, tl.load(own + first).to(tl.int64), BLOCK)
        end = tl.minimum(lower_bound(indices, begin, end, tl.load(own + last).to(tl.int64), BLOCK) + 1, end)
        low = tl.zeros_like(low) + begin
        high = tl.zeros_like(high) + end
        width = end - begin
    stop = high
    while width > 0:
        middle = (low + high) >> 1
        searching = inside & (low < high)
        before = tl.load(indices + middle, mask=searching, other=0).to(tl.int64) < index
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
        width = width >> 1
    there = inside & (low < stop)
    return low, there & (tl.load(indices + low, mask=there, other=-1).to(tl.int64) == index)


@triton.jit(do_not_specialize=["count", "old_nnz", "nnz", "alpha_bits"])
def scatter_switch_batched_kernel(
    table,
    old_offsets,
    old_indices,
    old_saved,
    offsets,
    indices,
    values,
    saved,
    count: tl.int32,
    old_nnz: tl.int64,
    nnz: tl.int64,
    alpha_bits: tl.int64,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.cdiv(nnz, BLOCK)
    if program < programs:
        first = program * BLOCK
        last = tl.minimum(first + BLOCK, nnz) - 1
        i = first + tl.arange(0, BLOCK)
        index = tl.load(indices + i, mask=i < nnz, other=-1).to(tl.int64)
        v = tl.load(values + i, mask=i < nnz)
        parts, part, alike = parts_of(offsets, i, first, last, count, BLOCK)
        weights, inside = entries_of(table, saved, index, parts, count)
        at, found = find(
            old_offsets, old_indices, old_nnz, parts, part, alike, index, inside, indices, first, last, BLOCK
        )
        old = tl.where(found, old_saved + at, weights)
        update_entries(weights, old, v, saved + i, inside, alpha_bits, MODE, True)
    else:
        first = (program - programs) * BLOCK
        last = tl.minimum(first + BLOCK, old_nnz) - 1
        i = first + tl.arange(0, BLOCK)
        index = tl.load(old_indices + i, mask=i < old_nnz, other=-1).to(tl.int64)
        base = tl.load(old_saved + i, mask=i < old_nnz)  # not `v`: one name has one type in both branches
        parts, part, alike = parts_of(old_offsets, i, first, last, count, BLOCK)
        weights, inside = entries_of(table, saved, index, parts, count)
        _, found = find(offsets, indices, nnz, parts, part, alike, index, inside, old_indices, first, last, BLOCK)
        tl.store(weights, base, mask=inside & (found == 0))


def scatter_switch_batched(
    weights: list[torch.Tensor],
    old_offsets: torch.Tensor,
    old_indices: torch.Tensor,
    old_saved: torch.Tensor,
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    saved: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    *,
    table: torch.Tensor | None = None,
) -> None:
    old_nnz, nnz = old_indices.numel(), indices.numel()
    if old_nnz + nnz == 0:
        return
    mode = mode_of(alpha, additive)
    view = as_bits if mode == REPLACE.value else as_kernel_type
    table = table_of(weights, offsets, old_offsets) if table is None else table
    table, offsets, old_offsets = on_device(indices.device, table, 2, len(weights), (offsets, old_offsets))
    launch(
        scatter_switch_batched_kernel,
        blocks(nnz, BLOCK) + blocks(old_nnz, BLOCK),
        (table, old_offsets, old_indices, view(old_saved), offsets, indices, view(values), view(saved)),
        (len(weights), old_nnz, nnz, float_bits(alpha)),
        (mode, BLOCK),
    )
