"""The code of a sorted list of indices, number by number, as docs/format.md has it; and lists worth trying."""

from __future__ import annotations

import random
from itertools import accumulate


def encode(indices: list[int]) -> bytes:
    table, gaps, escapes, before = b"", bytearray(), bytearray(), -1
    for i, index in enumerate(indices):
        if i and i % 4096 == 0:
            table += before.to_bytes(8, "little") + len(escapes).to_bytes(8, "little")
        gap, before = index - before - 1, index
        if gap < 248:
            gaps.append(gap)
            continue
        gaps.append(248 + (gap - 248) % 8)
        rest = (gap - 248) // 8
        while rest >= 128:
            escapes.append(rest % 128 + 128)
            rest //= 128
        escapes.append(rest)
    return table + bytes(gaps) + bytes(escapes)


def rising(gaps: list[int]) -> list[int]:
    return list(accumulate((gap + 1 for gap in gaps), initial=-1))[1:]


def lists() -> dict[str, tuple[list[int], int]]:
    """name -> (indices, elements of the tensor)."""
    draw = random.Random(0)
    edges = [248 + (8 << 7 * i) + by for i in range(8) for by in (-9, -8, -1, 0, 1, 7, 8)]
    found = {
        "none": [],
        "the first": [0],
        "a gap of each size": rising([*range(300), *range(1240, 1300)]),
        "escapes of each length below 2^31": rising([gap for gap in edges if gap < 2**26]),
        "escapes of each length": rising([gap for gap in edges if gap < 2**58]),
        "one block": rising([0] * 4096),
        "one block and one": rising([0] * 4097),
        "two blocks of escapes": rising([1000] * 8192),
        "1 %": sorted(draw.sample(range(2_000_000), 20_000)),
        "0.01 %": sorted(draw.sample(range(2**31 - 1), 3000)),
        "beyond 2^31": sorted(draw.sample(range(2**33), 5000)),
        "beyond 2^61": [0, 2**61, 2**62 - 1],
    }
    return {name: (indices, indices[-1] + 1 if indices else 0) for name, indices in found.items()} | {
        "none of many": ([], 2**40),
        "the last of 2^31": ([2**31 - 1], 2**31),
        "the last below": ([2**31 - 2], 2**31 - 1),
    }
