"""scatter_apply_batched in Triton: one launch for all weights.

The formula is that of scatter_apply. A table [2, n] int64 holds each weight's address and number of elements; offsets
[n + 1] cut the arena. A program owns BLOCK neighbours of the arena and finds each one's weight by binary search in the
offsets, which stay in cache. No two entries are the same place: no atomics, no race, deterministic. An index outside
its weight is skipped; offsets that do not rise choose a wrong weight of the list, never anything outside.

Table and offsets stay on the device for the next calls, so a call that was just made can be captured in a graph, which
then keeps them alive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.triton._batch import offsets_on, on_device, part_of
from shira_kernels.triton._math import REPLACE, as_kernel_type, float_bits
from shira_kernels.triton.scatter_apply import mode_of, update_entries

BLOCK = 512  # entries of a program: with 1024 the search for its part spills registers


@triton.jit
def entries_of(table, offsets, indices, element, i, inside, count, STEPS: tl.constexpr):
    """Of the positions i of an arena: pointers to the entries, their indices and parts, and which can be written."""
    part = part_of(offsets, i, count, STEPS)
    address = tl.load(table + part)
    numel = tl.load(table + count + part)
    index = tl.load(indices + i, mask=inside, other=-1).to(tl.int64)
    return address.to(element.dtype) + index, index, part, inside & (index >= 0) & (index < numel)


@triton.jit(do_not_specialize=["alpha_bits", "count"])
def scatter_apply_batched_kernel(
    table,
    offsets,
    indices,
    values,
    saved,
    element,  # any pointer of the weights' type: only its type is used
    count,
    nnz,
    alpha_bits,
    STEPS: tl.constexpr,
    MODE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weights, _, _, inside = entries_of(table, offsets, indices, element, i, i < nnz, count, STEPS)
    update_entries(weights, weights, values + i, saved + i, inside, alpha_bits, MODE, KEEP)


def table_of(weights: list[torch.Tensor]) -> torch.Tensor:
    """[2, n] int64 on the weights' device: addresses and numbers of elements."""
    addresses = (weight.data_ptr() for weight in weights)
    return on_device(weights[0].device, (*addresses, *(weight.numel() for weight in weights)))


def scatter_apply_batched(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
) -> None:
    nnz = indices.numel()
    if nnz == 0:
        return
    mode = mode_of(alpha, additive)
    view = as_bits if mode == REPLACE.value else as_kernel_type
    element = view(weights[0])
    scatter_apply_batched_kernel[(triton.cdiv(nnz, BLOCK),)](
        table_of(weights),
        offsets_on(indices.device, offsets),
        indices,
        view(values),
        element if saved is None else view(saved),
        element,
        len(weights),
        nnz,
        float_bits(alpha),
        STEPS=len(weights).bit_length(),
        MODE=mode,
        KEEP=saved is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
