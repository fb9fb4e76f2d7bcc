"""fuse_adapters in Triton.

s = 0 + w_a v_a + w_b v_b + ...;   s | s / n | v of the last | mean of the w_k v_k of the sign of s

Shapes: indices, values: K lists, one after the other, [total] entries; offsets [K + 1] cuts them; order [total]; the
union, result [n]. No sort: an entry's rank among all entries is its place in its own list plus those that a search in
each other list finds; of equal positions the earlier list's is first. A program looks up ranks for BLOCK entries of one
list, within windows of the other lists that were cut before. order[rank] = entry, ~entry unless it is the first of its
position. Of each RANKS ranks the firsts are counted, the host reads their number, n, and each first adds up the
entries that follow it until the next one: these are its position's, in the order of the lists.

A rank has one entry, a result one writer: no atomics, no race, deterministic. Arithmetic in float32 (float64 for
float64), rounded once. Windows lie within their lists, and entries read from order are compared with total or the ends
of a list: nothing outside the lists is touched, whatever they hold.

Floor: 7 us for four lists of 450 k bfloat16 entries at 3.0 TB/s. Expected (an estimate): 60 to 70 us, of which searches
take 15, making lists one 10, the host's read 10, and eight launches most of the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.dtypes import index_dtype
from shira_kernels.triton._batch import on_device
from shira_kernels.triton._math import as_kernel_type, divide, narrow, widen

SUM, MEAN, LAST, TIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
POLICIES = {"sum": SUM, "mean": MEAN, "last": LAST, "ties": TIES}
BLOCK = 256  # entries of a program that ranks them
RANKS = 128  # ranks of a program that counts or writes; with 256, ties spill a register on sm_80


@triton.jit
def lower_bound(indices, low, high, size, position):
    """The first place of a sorted list in [low, high) that is not below position, else high; `size` is the largest
    high - low."""
    while size > 0:
        middle = (low + high) >> 1
        below = tl.load(indices + middle, mask=low < high, other=position) < position
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        size = size >> 1
    return low


@triton.jit
def list_of(firsts, number, i):
    """Which of `number` parts, where firsts tells the parts' beginnings, i is in."""
    k = tl.zeros(i.shape, tl.int32)
    for later in range(1, number):
        k += (i >= tl.load(firsts + later)).to(tl.int32)
    return k


@triton.jit(do_not_specialize=["longest"])  # it is halved in a loop, which a constant 1 could not be
def fuse_cut_kernel(indices, offsets, blocks, number, longest, cuts, cut_count, BLOCK: tl.constexpr):
    """cuts [blocks, K]: where the first position of each block of a list belongs in each list."""
    cut = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cut < cut_count
    block = tl.where(inside, cut // number, 0)
    k = cut % number
    own = list_of(blocks, number, block)
    begin = tl.load(offsets + own) + (block - tl.load(blocks + own)) * BLOCK
    position = tl.load(indices + begin, mask=inside, other=0)
    low, high = tl.load(offsets + k), tl.load(offsets + k + 1)
    place = lower_bound(indices, low, high, longest, position)
    tl.store(cuts + cut, place.to(cuts.dtype.element_ty), mask=inside)


@triton.jit
def fuse_rank_kernel(indices, offsets, blocks, number, cuts, order, BLOCK: tl.constexpr):
    kind: tl.constexpr = order.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    own = (block * 0).to(tl.int32)
    for k in range(1, number):
        own += (block >= tl.load(blocks + k)).to(tl.int32)
    begin, end = tl.load(offsets + own), tl.load(offsets + own + 1)
    last_block = block + 1 == tl.load(blocks + own + 1)
    i = begin + (block - tl.load(blocks + own)) * BLOCK + tl.arange(0, BLOCK)
    inside = i < end
    position = tl.load(indices + i, mask=inside, other=0)
    rank = i - begin
    first = inside
    for k in range(number):
        if k != own:
            begin_of_list, end_of_list = tl.load(offsets + k).to(kind), tl.load(offsets + k + 1).to(kind)
            low = tl.load(cuts + block * number + k)
            high = tl.load(cuts + (block + 1) * number + k, mask=~last_block, other=0)
            high = tl.where(last_block, end_of_list, high)
            all_low, all_high = low + tl.zeros([BLOCK], kind), high + tl.zeros([BLOCK], kind)
            place = lower_bound(indices, all_low, all_high, high - low, position)
            rank += (place - begin_of_list).to(tl.int64)
            if k < own:
                held = inside & (place < end_of_list)
                equal = held & (tl.load(indices + place, mask=held, other=0) == position)
                rank += equal.to(tl.int64)
                first = first & ~equal
    tl.store(order + rank, tl.where(first, i, ~i).to(kind), mask=inside)


@triton.jit
def fuse_count_kernel(order, total, counts, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    rank = block * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(order + rank, mask=rank < total, other=-1) >= 0
    tl.store(counts + block, tl.sum(first.to(tl.int32), 0))


@triton.jit
def entry_of(order, rank, total, taken, first, begin, end):
    """The entry that follows `taken` others of its position, and whether it is of the list [begin, end)."""
    held = first & (rank + taken < total)
    entry = tl.load(order + rank + taken, mask=held, other=-1)
    held = held & ((taken == 0) | (entry < 0))
    entry = tl.where(entry < 0, ~entry, entry)
    return entry, held & (entry >= begin) & (entry < end)


@triton.jit
def term_of(values, weights, k, place, found, compute: tl.constexpr):
    """weights[k] * values[place]; 0 where there is none."""
    value = widen(tl.load(values + place, mask=found, other=0)).to(compute)
    return tl.where(found, tl.load(weights + k).to(compute) * value, 0.0)


@triton.jit
def fuse_write_kernel(
    indices, values, weights, offsets, number, order, total, counts, ends, union, result,
    POLICY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts, ends [programs]: how many firsts each block of ranks has, and the sums up to and with it."""
    block = tl.program_id(0).to(tl.int64)
    rank = block * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(order + rank, mask=rank < total, other=-1)
    first = entry >= 0
    one = first.to(tl.int32)
    place = (tl.load(ends + block) - tl.load(counts + block)).to(entry.dtype) + tl.cumsum(one, 0) - one
    position = tl.load(indices + entry, mask=first & (entry < total), other=0)
    tl.store(union + place, position, mask=first)
    kind: tl.constexpr = result.dtype.element_ty
    taken = tl.zeros([BLOCK], tl.int32)
    if POLICY == LAST:
        last = tl.zeros([BLOCK], kind)
        for k in range(number):
            begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
            entry, found = entry_of(order, rank, total, taken, first, begin, end)
            last = tl.where(found, tl.load(values + entry, mask=found, other=0), last)
            taken += found.to(tl.int32)
        tl.store(result + place, last, mask=first)
    else:
        compute: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
        sums = tl.zeros([BLOCK], compute)
        for k in range(number):
            begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
            entry, found = entry_of(order, rank, total, taken, first, begin, end)
            sums += term_of(values, weights, k, entry, found, compute)
            taken += found.to(tl.int32)
        if POLICY == TIES:
            agreeing = tl.zeros([BLOCK], compute)
            numbers = tl.zeros([BLOCK], tl.int32)
            taken = tl.zeros([BLOCK], tl.int32)
            for k in range(number):
                begin, end = tl.load(offsets + k), tl.load(offsets + k + 1)
                entry, found = entry_of(order, rank, total, taken, first, begin, end)
                term = term_of(values, weights, k, entry, found, compute)
                agrees = ((term > 0) & (sums > 0)) | ((term < 0) & (sums < 0))
                agreeing += tl.where(agrees, term, 0.0)
                numbers += agrees.to(tl.int32)
                taken += found.to(tl.int32)
            sums = tl.where(numbers > 0, divide(agreeing, tl.maximum(numbers, 1).to(compute)), sums)
        elif POLICY == MEAN:
            sums = divide(sums, tl.maximum(taken, 1).to(compute))
        tl.store(result + place, narrow(sums, kind), mask=first)


def rank_entries(positions: torch.Tensor, sizes: list[int], order: torch.Tensor) -> torch.Tensor:
    """Writes order, and returns where the lists begin in positions, and where the last ends, on its device."""
    offsets, blocks = [0], [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
        blocks.append(blocks[-1] + triton.cdiv(size, BLOCK))
    number = len(sizes)
    (begins,) = on_device(positions.device, torch.tensor([*offsets, *blocks], device="cpu"), 1, 2 * (number + 1), ())
    lists, parts = begins[: number + 1], begins[number + 1 :]
    cuts = order.new_empty(blocks[-1] * number)
    fuse_cut_kernel[(triton.cdiv(cuts.numel(), BLOCK),)](
        positions, lists, parts, number, max(sizes), cuts, cuts.numel(), BLOCK=BLOCK
    )
    fuse_rank_kernel[(blocks[-1],)](positions, lists, parts, number, cuts, order, BLOCK=BLOCK)
    return lists


def fuse_adapters(
    indices: list[torch.Tensor], values: list[torch.Tensor], weights: torch.Tensor, policy: str = "sum"
) -> tuple[torch.Tensor, torch.Tensor]:
    positions, entries = torch.cat(indices), torch.cat(values)  # int64 where one list is
    total = positions.numel()
    if total == 0:
        return positions, entries
    order = positions.new_empty(total, dtype=index_dtype(total))
    offsets = rank_entries(positions, [part.numel() for part in indices], order)
    programs = triton.cdiv(total, RANKS)
    counts = order.new_empty(programs, dtype=torch.int32)
    fuse_count_kernel[(programs,)](order, total, counts, BLOCK=RANKS)
    ends = counts.cumsum(0)
    n = int(ends[-1])
    union, result = positions.new_empty(n), entries.new_empty(n)
    as_type = as_bits if policy == "last" else as_kernel_type
    fuse_write_kernel[(programs,)](
        positions, as_type(entries), weights, offsets, len(indices), order, total, counts, ends, union, as_type(result),
        POLICY=POLICIES[policy], BLOCK=RANKS, enable_fp_fusion=False,
    )  # fmt: skip
    return union, result
