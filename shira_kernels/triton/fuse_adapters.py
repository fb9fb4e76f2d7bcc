"""fuse_adapters in Triton.

s = 0 + w_a v_a + w_b v_b + ...;   s | s / n | v of the last | mean of the w_k v_k of the sign of s

Shapes: the union [n]; indices, values: K lists, one after the other; offsets [K + 1] cuts them. The union comes from a
sort by torch. A program owns BLOCK of its entries: it goes through the lists in order and looks for its entries in each
by binary search. An entry has one writer: no atomics, no race, deterministic. Arithmetic in float32 (float64 for
float64), rounded once. Places are clamped by masks: nothing outside the lists is read, whatever they hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.triton._math import as_kernel_type, divide, narrow, widen

SUM, MEAN, LAST, TIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
POLICIES = {"sum": SUM, "mean": MEAN, "last": LAST, "ties": TIES}
BLOCK = 256  # entries of a program; 512 spills registers on sm_80


@triton.jit
def place_of(indices, begin, end, position, inside, steps):
    """Where each position is in a sorted list [begin, end), and whether it is there."""
    low = begin + tl.zeros(position.shape, tl.int64)
    high = end + tl.zeros(position.shape, tl.int64)
    for _ in range(steps):
        middle = (low + high) >> 1
        below = tl.load(indices + middle, mask=inside & (low < high), other=0).to(tl.int64) < position
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low < high) & ~below, middle, high)
    found = tl.load(indices + low, mask=inside & (low < end), other=-1).to(tl.int64)
    return low, inside & (low < end) & (found == position)


@triton.jit
def term_of(values, weights, k, place, found, compute: tl.constexpr):
    """weights[k] * values[place]; 0 where there is none."""
    value = widen(tl.load(values + place, mask=found, other=0)).to(compute)
    return tl.where(found, tl.load(weights + k).to(compute) * value, 0.0)


@triton.jit
def fuse_adapters_kernel(
    union, indices, values, weights, offsets, result, n, number, steps, POLICY: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    position = tl.load(union + i, mask=inside, other=0).to(tl.int64)
    kind: tl.constexpr = result.dtype.element_ty
    if POLICY == LAST:
        last = tl.zeros([BLOCK], kind)
        for k in range(number):
            place, found = place_of(indices, tl.load(offsets + k), tl.load(offsets + k + 1), position, inside, steps)
            last = tl.where(found, tl.load(values + place, mask=found, other=0), last)
        tl.store(result + i, last, mask=inside)
    else:
        compute: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
        sums = tl.zeros([BLOCK], compute)
        numbers = tl.zeros([BLOCK], tl.int32)
        for k in range(number):
            place, found = place_of(indices, tl.load(offsets + k), tl.load(offsets + k + 1), position, inside, steps)
            sums += term_of(values, weights, k, place, found, compute)
            numbers += found.to(tl.int32)
        if POLICY == TIES:
            agreeing = tl.zeros([BLOCK], compute)
            numbers = tl.zeros([BLOCK], tl.int32)
            for k in range(number):
                place, found = place_of(
                    indices, tl.load(offsets + k), tl.load(offsets + k + 1), position, inside, steps
                )
                term = term_of(values, weights, k, place, found, compute)
                agrees = ((term > 0) & (sums > 0)) | ((term < 0) & (sums < 0))
                agreeing += tl.where(agrees, term, 0.0)
                numbers += agrees.to(tl.int32)
            sums = tl.where(numbers > 0, divide(agreeing, tl.maximum(numbers, 1).to(compute)), sums)
        elif POLICY == MEAN:
            sums = divide(sums, tl.maximum(numbers, 1).to(compute))
        tl.store(result + i, narrow(sums, kind), mask=inside)


def fuse_adapters(
    indices: list[torch.Tensor], values: list[torch.Tensor], weights: torch.Tensor, policy: str = "sum"
) -> tuple[torch.Tensor, torch.Tensor]:
    positions, entries = torch.cat(indices), torch.cat(values)  # int64 where one list is
    union = positions.unique()
    result = entries.new_empty(union.numel())
    if union.numel():
        sizes = [part.numel() for part in indices]
        fuse_adapters_kernel[(triton.cdiv(union.numel(), BLOCK),)](
            union,
            positions,
            as_bits(entries) if policy == "last" else as_kernel_type(entries),
            weights,
            torch.tensor([0, *sizes]).cumsum(0).to(weights.device),
            as_bits(result) if policy == "last" else as_kernel_type(result),
            union.numel(),
            len(sizes),
            max(sizes).bit_length(),
            POLICY=POLICIES[policy],
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return union, result
