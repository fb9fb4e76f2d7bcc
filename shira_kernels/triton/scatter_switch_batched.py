"""scatter_switch_batched in Triton: one launch for both lists.

The formulas are those of scatter_apply, the table and the offsets those of scatter_apply_batched. The first programs
own BLOCK neighbours each of the new list, the others of the old one, and look each entry up in the other list by binary
search in its part. An entry of both lists belongs to the new list, which reads `old_saved` instead of the weight; the
old list's programs leave it alone. (They come last, so that programs that run one after another would show it if they
did not.) So every entry has one owner: no atomics, no race, deterministic. An index outside its weight is skipped;
lists that are not sorted find wrong places of the lists, offsets that do not rise wrong parts, never anything outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.triton._batch import offsets_on
from shira_kernels.triton._math import REPLACE, as_kernel_type, float_bits
from shira_kernels.triton.scatter_apply import mode_of, update_entries
from shira_kernels.triton.scatter_apply_batched import entries_of, table_of

BLOCK = 512  # entries of a program: with 1024 the searches spill registers


@triton.jit
def find(offsets, indices, nnz, part, index, inside, steps):
    """Where each index is in its part of a sorted list of nnz, and whether it is there."""
    low = tl.minimum(tl.maximum(tl.load(offsets + part), 0), nnz)
    end = tl.minimum(tl.maximum(tl.load(offsets + part + 1), 0), nnz)
    high = end
    for _ in range(steps):
        middle = (low + high) >> 1
        searching = inside & (low < high)
        before = tl.load(indices + middle, mask=searching, other=0).to(tl.int64) < index
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
    there = inside & (low < end)
    return low, there & (tl.load(indices + low, mask=there, other=-1).to(tl.int64) == index)


@triton.jit(do_not_specialize=["alpha_bits", "count", "programs", "old_steps", "steps"])
def scatter_switch_batched_kernel(
    table,
    old_offsets,
    old_indices,
    old_saved,
    offsets,
    indices,
    values,
    saved,
    element,  # any pointer of the weights' type: only its type is used
    count,
    old_nnz,
    nnz,
    programs,
    old_steps,
    steps,
    alpha_bits,
    STEPS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program < programs:
        i = program * BLOCK + tl.arange(0, BLOCK)
        weights, index, part, inside = entries_of(table, offsets, indices, element, i, i < nnz, count, STEPS)
        at, found = find(old_offsets, old_indices, old_nnz, part, index, inside, old_steps)
        old = tl.where(found, old_saved + at, weights)
        update_entries(weights, old, values + i, saved + i, inside, alpha_bits, MODE, True)
    else:
        i = (program - programs) * BLOCK + tl.arange(0, BLOCK)
        inside = i < old_nnz
        weights, index, part, inside = entries_of(table, old_offsets, old_indices, element, i, inside, count, STEPS)
        _, found = find(offsets, indices, nnz, part, index, inside, steps)
        alone = inside & (found == 0)
        update_entries(weights, weights, old_saved + i, old_saved + i, alone, alpha_bits, REPLACE, False)


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
) -> None:
    old_nnz, nnz = old_indices.numel(), indices.numel()
    if old_nnz + nnz == 0:
        return
    mode = mode_of(alpha, additive)
    view = as_bits if mode == REPLACE.value else as_kernel_type
    device = indices.device
    programs = triton.cdiv(nnz, BLOCK)
    scatter_switch_batched_kernel[(programs + triton.cdiv(old_nnz, BLOCK),)](
        table_of(weights),
        offsets_on(device, old_offsets),
        old_indices,
        view(old_saved),
        offsets_on(device, offsets),
        indices,
        view(values),
        view(saved),
        view(weights[0]),
        len(weights),
        old_nnz,
        nnz,
        programs,
        old_nnz.bit_length(),
        nnz.bit_length(),
        float_bits(alpha),
        STEPS=len(weights).bit_length(),
        MODE=mode,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
