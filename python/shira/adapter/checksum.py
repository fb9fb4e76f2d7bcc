"""Checksums of an adapter's file and of a base's entries, over their bytes as a file has them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from shira_kernels.bits import as_bits

DIGITS = 32  # of a checksum: 16 bytes in hex
_PARALLEL_BYTES = 2**20  # below this threads cost more than they save


def checksum(*data: bytes | memoryview) -> str:
    """SHA-256 of the pieces one after the other, its first 16 bytes in hex."""
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()[:DIGITS]


def checksums(contents: Sequence[tuple[memoryview, memoryview]]) -> list[str]:
    """`checksum` of each, on torch's number of threads where it is worth it."""
    if sum(len(piece) for data in contents for piece in data) < _PARALLEL_BYTES or torch.get_num_threads() == 1:
        return [checksum(*data) for data in contents]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda data: checksum(*data), contents))


def checksum_of(entries: torch.Tensor) -> str:
    """SHA-256, the first 16 bytes in hex, of the entries' little-endian bytes in order; equal only if every bit is.

    entries: [nnz], contiguous, any dtype of 1, 2, 4 or 8 bytes, any device.
    """
    return checksum(bytes_of(entries.detach().cpu()))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements in order, little-endian, of a contiguous CPU tensor. No copy, but on big-endian machines."""
    return little_endian(as_bits(tensor.detach())).view(torch.uint8).numpy().data


def little_endian(bits: torch.Tensor) -> torch.Tensor:
    """The integers of a tensor with their bytes in file order, or back."""
    if sys.byteorder == "little" or bits.element_size() == 1:
        return bits
    return bits.view(torch.uint8).view(-1, bits.element_size()).flip(1).reshape(-1).view(bits.dtype)
