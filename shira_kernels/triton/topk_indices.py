"""topk_indices in Triton.

result = the positions of the k largest score[i], sorted; of equal ones the lower positions

Shapes: score flat [numel], result [k]. The key of a score is the bits of its magnitude with its sign, an integer that
rises as floats do, with -0 and +0 alike and NaN above all. A sample tells between which two keys the k-th largest very
likely lies. One pass over all scores marks those above the two, and those between, of which it counts the top digit of
key - low key; later passes go by the marks: each leaves between what has the threshold's digit, until the threshold is
known. Should the sample have misled, the passes search above or below instead: slower, not wrong. The last pass counts
what each program has above the threshold and at it; sums over the programs before tell where its indices begin, and it
writes them in order.

A word of marks belongs to one program of a pass, as do the indices that come from it. Programs add to a table of counts
and take a ticket when done; the last one then chooses the digit. Additions are of integers, so their order does not
matter: deterministic. The host reads nothing back and copies nothing.

Floor: scores read once, 39 us for 58.7 M bfloat16 and 78 us for float32 at 3.0 TB/s. Expected (an estimate), k = 1 %:
90 and 150 us: also a sector for each score between the two keys, 1 % of all, and the ends of seven or eight launches.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits
from shira_kernels.dtypes import index_dtype
from shira_kernels.triton._marks import (
    WORDS,
    first_bits,
    load_marks,
    ones_in,
    pack,
    split_lowest,
    words_of_a_block,
    write_marked_kernel,
)

SAMPLE = 8192  # a power of 2, below 2^15
DEVIATIONS = 4  # from the sample's rank to those of the two keys: it misleads once in 10^4 times
DIGIT = 11  # bits
FEWEST_WORDS = 128  # of a program of the first pass: 16 scores for each of its 256 threads
COPIES = 8  # of the table of counts, so that programs seldom add to one number at once

# What state holds, in int64.
LOW, HIGH = tl.constexpr(0), tl.constexpr(1)  # the threshold's key is one of [low, high]
SHIFT = tl.constexpr(2)  # of the digit to be counted, in key - low
WANTED = tl.constexpr(3)  # how many of the scores with keys in [low, high]
ABOVE, BETWEEN = tl.constexpr(4), tl.constexpr(5)  # how many scores are marked so by the first pass
SIDE = tl.constexpr(6)  # where the threshold is, seen from the sample's two keys
STALE = tl.constexpr(7)  # whether more is marked as between than has keys in [low, high]
TICKET = tl.constexpr(8)
STATE = 9

OVER, INSIDE, UNDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def key_of(score, i, inside, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr):
    """The magnitude's bits with the sign of the score; of a NaN the largest that BITS signed bits hold."""
    bits = tl.load(score + i, mask=inside, other=0)
    if BITS < 32:
        bits = bits.to(tl.int32)
    magnitude = bits & ((1 << (BITS - 1)) - 1)
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > NAN_ABOVE, (1 << (BITS - 1)) - 1, key)


@triton.jit
def as_number(bits, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr):
    """The score of these bits, 16-bit ones in float32."""
    if BITS == 64:
        return bits.to(tl.float64, bitcast=True)
    elif BITS == 32:
        return bits.to(tl.float32, bitcast=True)
    elif NAN_ABOVE == 0x7C00:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def number_of_key(key, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr):
    """The score that has this key."""
    sign: tl.constexpr = -(1 << (BITS - 1))
    bits = tl.where(key < 0, sign - key, key)
    return as_number(bits.to(tl.int64 if BITS == 64 else tl.int32), NAN_ABOVE, BITS)


@triton.jit
def digit_shift(low, high, DIGIT: tl.constexpr):
    """By how much high - low, an int64 taken as unsigned, is shifted so that DIGIT bits remain."""
    length = tl.sum((((high - low).to(tl.uint64) >> tl.arange(0, 64).to(tl.uint64)) != 0).to(tl.int32), 0)
    return tl.maximum(length - DIGIT, 0)


@triton.jit
def topk_sample_kernel(
    score, numel, wanted, high_rank, low_rank, state, table, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr,
    SAMPLE_BITS: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """Program 0: the state, with the keys of the sample's high_rank-th and low_rank-th largest; others: the table.

    Rank 0 and below are the largest key, a rank beyond the sample the smallest.
    """
    if tl.program_id(0) > 0:
        bins = tl.arange(0, 1 << DIGIT)
        tl.store(table + (tl.program_id(0) - 1) * (1 << DIGIT) + bins, tl.zeros([1 << DIGIT], tl.int32))
    else:
        # One score from each of equal stretches, at a place that 16 mixed bits of the stretch's number tell.
        j = tl.arange(0, 1 << SAMPLE_BITS)
        begin = (j.to(tl.int64) * numel) >> SAMPLE_BITS
        width = (((j + 1).to(tl.int64) * numel) >> SAMPLE_BITS) - begin
        mixed = j.to(tl.uint32) * 0x9E3779B1
        mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
        i = begin + (((mixed >> 16).to(tl.int64) * width) >> 16)
        key = key_of(score, i, i < numel, NAN_ABOVE, BITS)
        # Bit by bit the largest key that at least rank of the sample reach; the sign comes first.
        one = tl.full([], 1, key.dtype)
        counts = tl.sum((key >= 0).to(tl.int32), 0)
        high = tl.where(counts >= high_rank, one - one, -(1 << (BITS - 1)))
        low = tl.where(counts >= low_rank, one - one, -(1 << (BITS - 1)))
        bit = one << (BITS - 2)
        for _ in range(BITS - 1):
            reached = (key >= high + bit).to(tl.int32) + ((key >= low + bit).to(tl.int32) << 16)
            counts = tl.sum(reached, 0)
            high = tl.where((counts & 0xFFFF) >= high_rank, high + bit, high)
            low = tl.where((counts >> 16) >= low_rank, low + bit, low)
            bit = bit >> 1
        # The lower key is that of a number, so that the first pass compares with one.
        low = tl.minimum(tl.maximum(low.to(tl.int64), -NAN_ABOVE), NAN_ABOVE)
        high = high.to(tl.int64)
        zero = low - low
        tl.store(state + LOW, low)
        tl.store(state + HIGH, high)
        tl.store(state + SHIFT, digit_shift(low, high, DIGIT))
        tl.store(state + WANTED, zero + wanted)
        tl.store(state + ABOVE, zero)
        tl.store(state + BETWEEN, zero)
        tl.store(state + STALE, zero)
        tl.store(state + TICKET, zero)


@triton.jit
def count_digit(table, key, low, shift, counted, DIGIT: tl.constexpr, COPIES: tl.constexpr):
    """Adds what is counted to this program's copy of the table."""
    digit = (key.to(tl.int64) - low).to(tl.uint64) >> shift.to(tl.uint64)
    copy = table + (tl.program_id(0) % COPIES) * (1 << DIGIT)
    tl.atomic_add(copy + digit.to(tl.int32), 1, mask=counted, sem="relaxed")


@triton.jit
def choose_digit(
    state, table, numel, FIRST: tl.constexpr, BITS: tl.constexpr, DIGIT: tl.constexpr, COPIES: tl.constexpr
):
    """Called by each program when it is done. The last one takes the threshold's digit, and empties the table.

    Others have written what it reads, so it reads past the L1.
    """
    # No count exceeds numel; 64 bits where they are not needed would take registers from the whole kernel.
    kind: tl.constexpr = tl.int64 if numel.dtype == tl.int64 else tl.int32
    smallest: tl.constexpr = -(1 << (BITS - 1))
    tl.debug_barrier()
    if tl.atomic_add(state + TICKET, 1) == tl.num_programs(0) - 1:
        tl.store(state + TICKET, tl.zeros([], tl.int64))
        low, high, wanted = tl.load(state + LOW), tl.load(state + HIGH), tl.load(state + WANTED)
        side = 0 * wanted + INSIDE
        if FIRST:
            above = tl.load(state + ABOVE, cache_modifier=".cg")
            reaching = above + tl.load(state + BETWEEN, cache_modifier=".cg")
            side = tl.where(above >= wanted, OVER, tl.where(reaching >= wanted, INSIDE, UNDER)).to(tl.int64)
            tl.store(state + SIDE, side)
            wanted -= tl.where(side == OVER, 0, tl.where(side == INSIDE, above, reaching))
        bins = tl.arange(0, 1 << DIGIT)
        here = tl.zeros([1 << DIGIT], kind)
        if low < high:  # else nothing is in the table
            for copy in range(COPIES):
                one = table + copy * (1 << DIGIT) + bins
                here += tl.load(one, cache_modifier=".cg")
                tl.store(one, tl.zeros([1 << DIGIT], tl.int32))
        if side == OVER:
            low = high + 1
            high = 0 * low + ((1 << (BITS - 1)) - 1)
        elif side == UNDER:
            high = low - 1
            low = 0 * high + smallest
        elif low < high:
            reach = tl.sum(here, 0) - tl.cumsum(here, 0) + here  # those with this digit or a higher one
            digit = tl.sum((reach >= wanted.to(kind)).to(tl.int32), 0) - 1
            wanted -= tl.sum(tl.where(bins > digit, here, 0), 0)
            shift = tl.load(state + SHIFT)
            low += digit.to(tl.int64) << shift
            rest = (tl.full([], 1, tl.uint64) << shift.to(tl.uint64)) - 1
            high = low + tl.minimum(rest, (high - low).to(tl.uint64)).to(tl.int64)
            tl.store(state + STALE, 0 * wanted + 1)
        tl.store(state + LOW, low)
        tl.store(state + HIGH, high)
        tl.store(state + WANTED, wanted)
        tl.store(state + SHIFT, digit_shift(low, high, DIGIT))


@triton.jit
def topk_mark_kernel(
    score, numel, state, table, marks, words, NAN_ABOVE: tl.constexpr, BITS: tl.constexpr, DIGIT: tl.constexpr,
    COPIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """marks [2, words]: scores above the sample's two keys, and between them."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    i = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    number = as_number(tl.load(score + i, mask=i < numel, other=0), NAN_ABOVE, BITS)
    low, high = tl.load(state + LOW), tl.load(state + HIGH)
    # Numbers compare as keys do and take fewer instructions. NaN is not below anything; only where high is NaN's key is
    # nothing above.
    held = first_bits(numel - word * 32)
    above = pack(~(number <= number_of_key(high, NAN_ABOVE, BITS))) & held
    above = tl.where(high == (1 << (BITS - 1)) - 1, above ^ above, above)
    between = (pack(~(number < number_of_key(low, NAN_ABOVE, BITS))) & held) ^ above
    tl.store(marks + word, above.to(tl.int32))
    tl.store(marks + words + word, between.to(tl.int32))
    tl.atomic_add(state + ABOVE, tl.sum(ones_in(above), 0).to(tl.int64), sem="relaxed")
    ones = ones_in(between)
    tl.atomic_add(state + BETWEEN, tl.sum(ones, 0).to(tl.int64), sem="relaxed")
    shift = tl.load(state + SHIFT)
    left = between
    for _ in range(tl.where(low < high, tl.max(ones, 0), 0)):
        bit, number_of_bit, left = split_lowest(left)
        own = key_of(score, word * 32 + number_of_bit, bit != 0, NAN_ABOVE, BITS)
        count_digit(table, own, low, shift, bit != 0, DIGIT, COPIES)
    choose_digit(state, table, numel, True, BITS, DIGIT, COPIES)


@triton.jit
def topk_narrow_kernel(
    score, numel, state, table, marks, words, shares, FIRST: tl.constexpr, LAST: tl.constexpr, NAN_ABOVE: tl.constexpr,
    BITS: tl.constexpr, DIGIT: tl.constexpr, COPIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Leaves marked as between what has keys in [low, high], and counts the next digit; nothing if they are one key.

    LAST: low is high, the threshold. shares [2, programs]: how many scores of each program are above it, and at it.
    """
    low, high = tl.load(state + LOW), tl.load(state + HIGH)
    side = tl.load(state + SIDE)
    if not LAST:
        done = low == high
        if FIRST:
            done = done & (side == INSIDE)
        if done:
            return
    program = tl.program_id(0).to(tl.int64)
    word = program * WORDS + tl.arange(0, WORDS)
    above, between = load_marks(marks, word, words), load_marks(marks + words, word, words)
    if FIRST:
        either = above | between
        neither = first_bits(numel - word * 32) ^ either
        between = tl.where(side == OVER, above, tl.where(side == INSIDE, between, neither))
        above = tl.where(side == OVER, above ^ above, tl.where(side == INSIDE, above, either))
    shift = tl.load(state + SHIFT)
    left = between
    rounds = tl.max(ones_in(between), 0)
    if LAST:
        rounds = tl.where(tl.load(state + STALE) != 0, rounds, 0)
    for _ in range(rounds):
        bit, number_of_bit, left = split_lowest(left)
        held = bit != 0
        key = key_of(score, word * 32 + number_of_bit, held, NAN_ABOVE, BITS)
        over, under = key > high.to(key.dtype), key < low.to(key.dtype)
        above |= tl.where(over, bit, 0)
        between ^= tl.where(over | under, bit, 0)
        if not LAST:
            count_digit(table, key, low, shift, held & ~(over | under), DIGIT, COPIES)
    tl.store(marks + word, above.to(tl.int32), mask=word < words)
    tl.store(marks + words + word, between.to(tl.int32), mask=word < words)
    if LAST:
        tl.store(shares + program, tl.sum(ones_in(above), 0))
        tl.store(shares + tl.num_programs(0) + program, tl.sum(ones_in(between), 0))
    else:
        choose_digit(state, table, numel, False, BITS, DIGIT, COPIES)


@functools.cache
def infinity_bits(dtype: torch.dtype) -> int:
    infinity = torch.full((), torch.inf, dtype=dtype, device="cpu")
    return int(as_bits(infinity))


def sample_ranks(numel: int, k: int) -> tuple[int, int]:
    """Between which of the largest of the sample the k-th largest of all lies, but once in 10^4 times."""
    rank = k * SAMPLE / numel
    deviation = math.sqrt(rank * (1 - k / numel))
    return math.floor(rank - DEVIATIONS * deviation) - 1, math.ceil(rank + DEVIATIONS * deviation) + 1


def topk_indices(score: torch.Tensor, k: int) -> torch.Tensor:
    numel, device = score.numel(), score.device
    result = torch.empty(k, dtype=index_dtype(numel), device=device)
    if k == 0:
        return result
    if k == numel:  # one score among them, for whose number Triton would compile kernels of its own
        return torch.arange(k, dtype=result.dtype, device=device)
    flat = as_bits(score.detach().resolve_neg().contiguous())
    bits = 8 * flat.element_size()
    constants = {"NAN_ABOVE": infinity_bits(score.dtype), "BITS": bits, "DIGIT": DIGIT}
    block = max(words_of_a_block(flat.element_size()), FEWEST_WORDS)
    words = triton.cdiv(numel, block * 32) * block
    programs = triton.cdiv(words, WORDS)
    state = torch.empty(STATE, dtype=torch.int64, device=device)
    table = torch.empty(COPIES << DIGIT, dtype=torch.int32, device=device)
    marks = torch.empty(2 * words, dtype=torch.int32, device=device)
    shares = torch.empty(2, programs, dtype=torch.int32, device=device)
    topk_sample_kernel[(1 + COPIES,)](
        flat, numel, k, *sample_ranks(numel, k), state, table, **constants, SAMPLE_BITS=SAMPLE.bit_length() - 1,
        num_warps=16,
    )  # fmt: skip
    constants["COPIES"] = COPIES
    topk_mark_kernel[(words // block,)](flat, numel, state, table, marks, words, **constants, WORDS=block, num_warps=8)
    digits = triton.cdiv(bits, DIGIT)
    for number in range(digits + 1):
        form = {"FIRST": number == 0, "LAST": number == digits, "WORDS": WORDS}
        topk_narrow_kernel[(programs,)](flat, numel, state, table, marks, words, shares, **form, **constants)
    write_marked_kernel[(programs,)](
        marks, words, shares, shares.cumsum(1), programs, state[WANTED.value :], result, marks, marks,
        TIES=True, VALUES=False, PER=1, WORDS=WORDS,
    )  # fmt: skip
    return result
