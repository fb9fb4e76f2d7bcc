"""One bit for each element of a tensor, 32 to a word: what a pass over a tensor leaves for those after it.

A mark costs 1/16 of a bfloat16 element. Passes that go by the marks read of the tensor what is marked alone, and the
marks themselves fit into the L2 where the tensor does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = 512  # words of a program that goes by marks: four for a thread, whose loads are in flight at once
ROWS = tl.constexpr(64)  # words that are written at once where many elements are marked


def words_of_a_block(element_size: int) -> int:
    """How many words a program marks that reads 16 KiB of a tensor; 8 KiB of single bytes."""
    return min(8192, 16384 // element_size) // 32


@triton.jit
def pack(flags):
    """flags [n, 32] -> uint32 words [n]; flag j is bit j."""
    bits = tl.full([1, 32], 1, tl.int32) << tl.arange(0, 32)[None, :]
    return tl.sum(tl.where(flags, bits, 0), 1).to(tl.uint32)


@triton.jit
def first_bits(number):
    """uint32 words whose lowest `number` bits are set: none from 0 down, all from 32 on."""
    number = tl.minimum(tl.maximum(number, 0), 32).to(tl.uint64)
    return (((number * 0 + 1) << number) - 1).to(tl.uint32)


@triton.jit
def ones_in(word):
    """How many bits of a uint32 are set, as int32. LLVM knows these lines: they become one instruction."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def split_lowest(word):
    """The lowest set bit of a uint32 (0 if there is none), its number, and the word without it."""
    rest = word & (word - 1)
    bit = word ^ rest
    return bit, ones_in(bit - 1), rest


@triton.jit
def lowest_ones(word, number):
    """The lowest `number` set bits of each uint32: none where the number is not above 0, all where it is large."""
    ones = ones_in(word)
    rest = tl.where(number >= ones, word ^ word, word)
    number = tl.where((number > 0) & (number < ones), number, 0).to(tl.int32)
    for _ in range(tl.max(number, 0)):
        rest = tl.where(number > 0, rest & (rest - 1), rest)
        number -= 1
    return word ^ rest


@triton.jit
def load_marks(marks, word, words):
    """Words of marks as uint32, 0 beyond the last."""
    return tl.load(marks + word, mask=word < words, other=0).to(tl.uint32)


@triton.jit
def load_taken(marks, word, words, ties_left, TIES: tl.constexpr):
    """The marks of plane 0, with TIES also the first `ties_left` of those of plane 1; and how many plane 1 has."""
    taken = load_marks(marks, word, words)
    number = 0
    if TIES:
        ties = load_marks(marks + words, word, words)
        own = ones_in(ties)
        taken |= lowest_ones(ties, ties_left - tl.cumsum(own, 0) + own)
        number = tl.sum(own, 0)
    return taken, number


@triton.jit
def write_marked_kernel(
    marks, words, counts, ends, blocks, ties_wanted, indices, source, values,
    TIES: tl.constexpr, VALUES: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """indices = what is marked, in order; with VALUES also values = source[indices].

    marks [1 or 2, words]. With TIES the marks of plane 1 count, too, from the lowest on, until ties_wanted[0] of them
    are taken. counts, ends [1 or 2, blocks]: how many each block of WORDS / PER words has of each plane, and the sums
    up to and with each block. A program owns WORDS words and the part of the result that belongs to them.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * PER
    last = tl.minimum(first + PER, blocks) - 1
    begin = tl.load(ends + first) - tl.load(counts + first)
    number = tl.load(ends + last) - begin
    ties_left = begin * 0
    if TIES:
        ties_before = tl.load(ends + blocks + first) - tl.load(counts + blocks + first)
        wanted = tl.load(ties_wanted)
        begin += tl.minimum(ties_before, wanted)
        ties_left = wanted - ties_before
        number += tl.minimum(tl.load(ends + blocks + last) - ties_before, tl.maximum(ties_left, 0))
    if number * 8 < WORDS * 32:
        # A bit of each word at a time.
        word = program * WORDS + tl.arange(0, WORDS)
        left, _ = load_taken(marks, word, words, ties_left, TIES)
        own = ones_in(left)
        place = begin + tl.cumsum(own, 0) - own
        for _ in range(tl.max(own, 0)):
            bit, number_of_bit, left = split_lowest(left)
            i = word * 32 + number_of_bit
            taken = bit != 0
            tl.store(indices + place, i.to(indices.dtype.element_ty), mask=taken)
            if VALUES:
                tl.store(values + place, tl.load(source + i, mask=taken, other=0), mask=taken)
            place += taken.to(tl.int64)
    else:
        # All bits of few words at a time: neighbours write to neighbouring places.
        bits = tl.arange(0, 32)[None, :]
        below = (tl.full([1, 32], 1, tl.uint32) << bits.to(tl.uint32)) - 1
        for done in range(0, tl.minimum(words - program * WORDS, WORDS).to(tl.int32), ROWS):
            word = program * WORDS + done + tl.arange(0, ROWS)
            marked, ties = load_taken(marks, word, words, ties_left, TIES)
            own = ones_in(marked)
            place = begin + (tl.cumsum(own, 0) - own)[:, None] + ones_in(marked[:, None] & below)
            i = word[:, None] * 32 + bits
            taken = ((marked[:, None] >> bits.to(tl.uint32)) & 1) != 0
            tl.store(indices + place, i.to(indices.dtype.element_ty), mask=taken)
            if VALUES:
                tl.store(values + place, tl.load(source + i, mask=taken, other=0), mask=taken)
            begin += tl.sum(own, 0)
            ties_left -= ties
