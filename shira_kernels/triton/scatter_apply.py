"""scatter_apply in Triton.

w = weight[indices[i]], v = values[i]; saved[i] = w if kept; w <- v | w + alpha (v - w) | w + alpha v

Shapes: weight flat [numel], indices, values, saved [nnz]. A program owns BLOCK neighbours of the sorted list; indices
are unique, so no two programs write one entry: no atomics. float32 arithmetic (float64 for float64), rounded once.
Deterministic. Entries whose index lies outside the weight are skipped: nothing outside is read or written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.triton._launch import blocks, launch
from shira_kernels.triton._math import ADD, INTERPOLATE, REPLACE, as_kernel_type, float_bits, update

BLOCK = 512  # entries of a program; 4 for each of its 128 threads, all in flight: 8 spill registers on triton 3.6


@triton.jit
def update_entries(weights, old, v, saved, inside, alpha_bits, MODE: tl.constexpr, KEEP: tl.constexpr):
    """Pointers to the entries, to what they held and to where that goes; their values; the same shape each."""
    if MODE == REPLACE and not KEEP:
        tl.store(weights, v, mask=inside)
    else:
        w = tl.load(old, mask=inside)
        if KEEP:
            tl.store(saved, w, mask=inside)
        tl.store(weights, update(w, v, alpha_bits, MODE), mask=inside)


@triton.jit(do_not_specialize=["nnz", "numel", "alpha_bits"])
def scatter_apply_kernel(
    weight,
    indices,
    values,
    saved,
    nnz: tl.int64,
    numel: tl.int64,
    alpha_bits: tl.int64,
    MODE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < nnz
    index = tl.load(indices + i, mask=inside, other=-1).to(tl.int64)
    v = tl.load(values + i, mask=inside)
    inside = inside & (index >= 0) & (index < numel)
    update_entries(weight + index, weight + index, v, saved + i, inside, alpha_bits, MODE, KEEP)


def mode_of(alpha: float, additive: bool) -> int:
    return (ADD if additive else REPLACE if alpha == 1.0 else INTERPOLATE).value


def scatter_apply(
    weight: torch.Tensor,
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
    flat = view(weight)
    launch(
        scatter_apply_kernel,
        blocks(nnz, BLOCK),
        (flat, indices, view(values), flat if saved is None else view(saved)),
        (nnz, weight.numel(), float_bits(alpha)),
        (mode, saved is not None, BLOCK),
    )
