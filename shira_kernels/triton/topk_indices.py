"""topk_indices in Triton.

result = the positions of the k largest score[i], sorted; of equal ones the lower positions

Shapes: score flat [numel], result [k]. The key of a score is the bits of its magnitude with its sign, an integer that
rises as floats do, with -0 and +0 alike and NaN above all. Its digits of 8 bits are found from the top: a program
counts those of BLOCK scores whose higher digits are the threshold's, and adds them to a table of 256; a single program
then takes the threshold's digit. After the last digit a program counts what its BLOCK has above the threshold and at
it, sums over the programs before tell where its indices begin, and it writes them in order. The additions to the table
are of integers, so their order does not matter; indices have one writer each. Deterministic, and nothing is read back
by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits

BLOCK = 2048  # scores of a program; with more the int64 keys fill a thread's registers
DIGITS = 256


@triton.jit
def keys_of(score, i, inside, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr):
    """int64: the magnitude's bits with the sign of the score; of a NaN the largest that BITS signed bits hold."""
    bits = tl.load(score + i, mask=inside, other=0).to(tl.int64)
    magnitude = bits & ((1 << (BITS - 1)) - 1)
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > NAN_ABOVE, (1 << (BITS - 1)) - 1, key)


@triton.jit
def topk_count_kernel(
    score, numel, state, counts, SHIFT: tl.constexpr, FIRST: tl.constexpr, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    key = keys_of(score, i, inside, NAN_ABOVE, BITS)
    if not FIRST:
        # Arithmetic shifts: equal if and only if all bits above this digit are.
        inside = inside & ((key >> (SHIFT + 8)) == (tl.load(state) >> (SHIFT + 8)))
    digit = ((key >> SHIFT) & (DIGITS - 1)).to(tl.int32)
    if FIRST:
        digit = digit ^ (DIGITS // 2)  # signed
    # What is outside goes to a bin of its own, beyond those that are added.
    found = tl.histogram(tl.where(inside, digit, DIGITS), 2 * DIGITS)
    bins = tl.arange(0, 2 * DIGITS)
    tl.atomic_add(counts + bins, found.to(tl.int64), mask=(bins < DIGITS) & (found > 0))


@triton.jit
def topk_choose_kernel(state, counts, SHIFT: tl.constexpr, FIRST: tl.constexpr, DIGITS: tl.constexpr):
    """state: the threshold's key as far as it is known, and how many scores with those digits are wanted."""
    bins = tl.arange(0, DIGITS)
    here = tl.load(counts + bins)
    reach = tl.sum(here, 0) - tl.cumsum(here, 0) + here  # those with this digit or a higher one
    wanted = tl.load(state + 1)
    digit = tl.sum((reach >= wanted).to(tl.int64), 0) - 1
    above = tl.sum(tl.where(bins > digit, here, 0), 0)
    if FIRST:
        digit = digit - DIGITS // 2
    tl.store(state, tl.load(state) + (digit << SHIFT))
    tl.store(state + 1, wanted - above)


@triton.jit
def topk_share_kernel(
    score, numel, state, shares, programs, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """shares [2, programs]: how many scores of each program's block are above the threshold, and at it."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    key = keys_of(score, i, inside, NAN_ABOVE, BITS)
    threshold = tl.load(state)
    tl.store(shares + program, tl.sum((inside & (key > threshold)).to(tl.int64), 0))
    tl.store(shares + programs + program, tl.sum((inside & (key == threshold)).to(tl.int64), 0))


@triton.jit
def topk_emit_kernel(
    score, numel, state, shares, ends, programs, result, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ends [2, programs]: the sums of shares up to and with each program."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    key = keys_of(score, i, inside, NAN_ABOVE, BITS)
    threshold = tl.load(state)
    ties = tl.load(state + 1)
    above_before = tl.load(ends + program) - tl.load(shares + program)
    ties_before = tl.load(ends + programs + program) - tl.load(shares + programs + program)
    tie = (inside & (key == threshold)).to(tl.int32)
    rank = ties_before + tl.cumsum(tie, 0) - tie
    taken = (inside & (key > threshold)) | ((tie > 0) & (rank < ties))
    one = taken.to(tl.int32)
    place = above_before + tl.minimum(ties_before, ties) + tl.cumsum(one, 0) - one
    tl.store(result + place, i.to(result.dtype.element_ty), mask=taken)


def topk_indices(score: torch.Tensor, k: int) -> torch.Tensor:
    numel = score.numel()
    result = torch.empty(k, dtype=torch.int32 if numel < 2**31 else torch.int64, device=score.device)
    if k == 0:
        return result
    flat = as_bits(score.detach().resolve_neg().contiguous())
    bits = 8 * flat.element_size()
    infinity = torch.full((), torch.inf, dtype=score.dtype).view(flat.dtype)
    constants = {"NAN_ABOVE": int(infinity), "BITS": bits, "BLOCK": BLOCK}
    programs = triton.cdiv(numel, BLOCK)
    grid = (programs,)
    state = torch.tensor([0, k], dtype=torch.int64).to(score.device)
    counts = torch.zeros(bits // 8, DIGITS, dtype=torch.int64, device=score.device)
    for level, shift in enumerate(range(bits - 8, -1, -8)):
        digit = {"SHIFT": shift, "FIRST": level == 0, "DIGITS": DIGITS}
        topk_count_kernel[grid](flat, numel, state, counts[level], **digit, **constants)
        topk_choose_kernel[(1,)](state, counts[level], **digit)
    shares = torch.empty(2, programs, dtype=torch.int64, device=score.device)
    topk_share_kernel[grid](flat, numel, state, shares, programs, **constants)
    topk_emit_kernel[grid](flat, numel, state, shares, shares.cumsum(1), programs, result, **constants)
    return result
