"""What kernels over a whole model share: which weight an entry of the arena belongs to, and tables on the device."""

from __future__ import annotations

import ctypes
import functools
import itertools

import torch
import triton
import triton.language as tl


@triton.jit
def part_of_each(offsets, i, count):
    """Finds for each position the last of `count` parts that begins at or before it; always one of [0, count)."""
    low = tl.zeros(i.shape, tl.int32)
    high = low + count
    width = count
    while width > 0:
        middle = (low + high) >> 1
        before = tl.load(offsets + middle) <= i
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
        width = width >> 1
    return tl.minimum(low, count - 1)


@triton.jit
def part_of_one(offsets, at, count, BLOCK: tl.constexpr):
    """Finds as much for a single position: the program looks at BLOCK offsets at once."""
    begun = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < count:
        part = start + tl.arange(0, BLOCK)
        begins = tl.load(offsets + part, mask=part < count, other=0)
        begun += tl.sum(((part < count) & (begins <= at)).to(tl.int32), axis=0)
        start += BLOCK
    return tl.maximum(begun - 1, 0)


@triton.jit
def parts_of(offsets, i, first, last, count, BLOCK: tl.constexpr):
    """The parts of the BLOCK positions i, of which those from `first` to `last` are used; that of `first`; and whether
    all are that one. Most programs' are: then one search is enough."""
    part = part_of_one(offsets, first, count, BLOCK)
    alike = tl.load(offsets + part + 1) > last
    parts = tl.zeros(i.shape, tl.int32) + part
    if alike == 0:
        parts = part_of_each(offsets, i, count)
    return parts, part, alike


def _even(number: int) -> int:
    return number + number % 2


def table_of(rows: list[list[int]], offsets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the ops of csrc/host/tables.cpp give back, where there is no extension: rows of one number for each weight,
    then the offsets that are on the CPU, each on an even place."""
    numbers = list(itertools.chain(*rows))
    for cuts in offsets:
        if cuts.is_cpu:
            numbers += [*([0] * (len(numbers) % 2)), *cuts.tolist()]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


@functools.lru_cache(maxsize=256)
def _kept(device: torch.device, content: bytes, row_entries: int, weights: int) -> tuple[torch.Tensor, ...]:
    """A table on a device, and its offsets."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a graph cannot capture the copy of new addresses to the GPU: make the same call once before capturing"
        )
    whole = torch.frombuffer(bytearray(content), dtype=torch.int64).to(device)
    starts = range(_even(row_entries), len(whole), _even(weights + 1))
    return whole, *(whole[start : start + weights + 1] for start in starts)


_captured: dict[int, torch.Tensor] = {}  # what graphs read when they are replayed: kept for ever


def on_device(
    device: torch.device, table: torch.Tensor, rows: int, weights: int, offsets: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Keeps the table of `rows` rows, and all of the offsets, on the device, and gives the same tensors from call to
    call while the table holds the same. They live for as long as a kernel may read them."""
    content = ctypes.string_at(table.data_ptr(), table.numel() * 8)
    whole, *cuts = _kept(device, content, rows * weights, weights)
    if whole.is_cuda:
        whole.record_stream(torch.cuda.current_stream(device))
        if torch.cuda.is_current_stream_capturing():
            _captured[id(whole)] = whole
    made = iter(cuts)
    return whole, *(next(made) if given.is_cpu else given for given in offsets)
