"""Sorted lists made of runs of neighbours and single entries, as masks of rows, blocks and single weights have them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

# Around the lengths that a kernel may treat as one: 8 entries, and 64 bytes of elements of 8, 4, 2 and 1 bytes.
LENGTHS = (*range(1, 11), 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100)
# Each is (entries that are skipped, length of the run); skipping none makes one longer run of two.
PIECES = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(LENGTHS)), min_size=1, max_size=30)
SINGLES_AT_THE_END = 90  # so that all pieces come before the end of the list, which kernels treat on its own


def indices_of(pieces: list[tuple[int, int]], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[sum of lengths + SINGLES_AT_THE_END], the pieces and then single entries, from position 0 on."""
    parts, begin = [], 0
    for skipped, length in pieces:
        parts.append(torch.arange(begin + skipped, begin + skipped + length))
        begin += skipped + length
    parts.append(torch.arange(begin + 1, begin + 1 + 2 * SINGLES_AT_THE_END, 2))
    return torch.cat(parts).to(dtype)
