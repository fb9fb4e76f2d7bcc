"""splitmix64 on tensors: the counter-based generator of random masks (docs/format.md, "Random masks")."""

from __future__ import annotations

import torch

_CHUNK = 1 << 16  # entries hashed at a time: what fits a cache
GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def mix_of(z: int) -> int:
    """Returns the output of splitmix64 for a state z, which is taken modulo 2^64."""
    z %= 2**64
    for shift, multiplier in _MULTIPLIERS:
        z = ((z ^ (z >> shift)) * multiplier) % 2**64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    """Returns the int64 with the bits of z modulo 2^64."""
    return (z + 2**63) % 2**64 - 2**63


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns z >> bits without the copies of the sign that int64 shifts in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in _MULTIPLIERS:
        z = (z ^ _shift_right(z, shift)) * _signed(multiplier)
    return z ^ _shift_right(z, 31)


def hashes_up_to(limit: int, count: int, key: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the numbers below `count` whose hash is at most `limit`, in order, and their hashes less 2^63.

    torch has no arithmetic of uint64, so this is int64 that wraps around; less 2^63, signed order is unsigned order.
    """
    numbers, hashes = [], []
    for start in range(0, count, _CHUNK):
        number = torch.arange(start, min(start + _CHUNK, count), device=device)
        hashed = _mix(number * _signed(GAMMA) + _signed(key + GAMMA)) ^ _signed(2**63)
        low = hashed <= limit - 2**63
        numbers.append(number[low])
        hashes.append(hashed[low])
    return torch.cat(numbers), torch.cat(hashes)
