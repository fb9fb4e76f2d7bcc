"""What kernels over a whole model share: which weight an entry of the arena belongs to, and tables on the device."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def part_of(offsets, i, count, STEPS: tl.constexpr):
    """The last of `count` parts that begins at or before i, for each of the positions i; always one of [0, count)."""
    low = tl.zeros(i.shape, tl.int32)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) >> 1
        before = tl.load(offsets + middle) <= i
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return tl.minimum(low, count - 1)


@functools.lru_cache(maxsize=256)
def _made(device: torch.device, numbers: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


_captured: dict[int, torch.Tensor] = {}  # what graphs read when they are replayed: kept for ever


def on_device(device: torch.device, numbers: tuple[int, ...]) -> torch.Tensor:
    """[len(numbers)] int64, the same tensor from call to call, alive for as long as a kernel may read it."""
    tensor = _made(device, numbers)
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(device))
        if torch.cuda.is_current_stream_capturing():
            _captured[id(tensor)] = tensor
    return tensor


def offsets_on(device: torch.device, offsets: torch.Tensor) -> torch.Tensor:
    """The offsets of an arena; where they are on the CPU, a copy that `on_device` keeps."""
    return offsets if offsets.device == device else on_device(device, tuple(offsets.tolist()))
