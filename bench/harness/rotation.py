"""Inputs of the benchmarks: weights, sparse entries and LoRA factors in slots, enough slots that each is met cold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from harness.machine import cache_bytes, line_bytes

# A slot is met again only after this many times the cache has been touched.
CACHE_TURNS = 2


@dataclass(frozen=True)
class Entries:
    """One weight of a slot and its part of the arena: what calls for single weights take, sliced ahead of timing.

    `by_eight_bytes` are int32 positions of 8-byte elements, where the entries are aligned runs of them, else empty.
    """

    weight: torch.Tensor
    flat: torch.Tensor
    indices: torch.Tensor
    indices64: torch.Tensor
    values: torch.Tensor
    by_eight_bytes: torch.Tensor


@dataclass(frozen=True)
class Slot:
    """The weights of a model (or a single weight), with its own entries and, if asked for, LoRA factors.

    `indices` is int32 and `indices64` the same as int64, which torch's own ops need; `lora` is a (B, A) per weight.
    """

    weights: list[torch.Tensor]
    offsets: torch.Tensor
    indices: torch.Tensor
    indices64: torch.Tensor
    values: torch.Tensor
    saved: torch.Tensor
    lora: list[tuple[torch.Tensor, torch.Tensor]]
    parts: list[Entries]

    def copy(self, weights: list[torch.Tensor] | None = None) -> Slot:
        """Gives the slot again, with its own `saved`, and copies of the weights or the given ones."""
        weights = weights or [weight.clone() for weight in self.weights]
        parts = [
            replace(part, weight=weight, flat=weight.view(-1)) for part, weight in zip(self.parts, weights, strict=True)
        ]
        return replace(self, weights=weights, saved=torch.zeros_like(self.saved), parts=parts)


@dataclass(frozen=True)
class SharedSlot:
    """Several lists of entries of the same weights."""

    lists: tuple[Slot, ...]

    def copy(self) -> SharedSlot:
        first = self.lists[0].copy()
        return SharedSlot((first, *(slot.copy(first.weights) for slot in self.lists[1:])))


def make_rotation(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: str,
    *,
    density: float,
    rank: int = 0,
    slots: int | None = None,
    at_least: int = 1,
) -> list[Slot]:
    """Slots of weights of `shapes`, `density` of each weight listed: as many as given (1 is warm), or as cold needs,
    but no fewer than `at_least`."""
    generator = torch.Generator(device).manual_seed(0)

    def make() -> Slot:
        return _make_slot(_make_weights(shapes, dtype, device), density, generator, rank=rank)

    first = make()
    return [first] + [make() for _ in range((slots or max(at_least, _cold_slots([first]))) - 1)]


def make_shared_rotation(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: str,
    *,
    density: float,
    granularities: Sequence[int],
) -> list[SharedSlot]:
    """Makes as many slots as cold needs; each has one list for each granularity, of aligned runs of that length."""
    generator = torch.Generator(device).manual_seed(0)

    def make() -> SharedSlot:
        weights = _make_weights(shapes, dtype, device)
        return SharedSlot(tuple(_make_slot(weights, density, generator, granularity=g) for g in granularities))

    first = make()
    return [first] + [make() for _ in range(_cold_slots(first.lists) - 1)]


def cold_slots(device: str, touched: float) -> int:
    """How many slots make a rotation cold, where each call touches this number of bytes."""
    return 1 + math.ceil(CACHE_TURNS * cache_bytes(device) / touched)


def _cold_slots(lists: Sequence[Slot]) -> int:
    """How many slots make a rotation cold whose calls use one of these lists, all equally often."""
    # Counted in touched lines: what a sparse write leaves untouched evicts nothing.
    touched = sum(touched_bytes(slot) + slot.indices.nbytes + slot.values.nbytes for slot in lists) / len(lists)
    return cold_slots(lists[0].indices.device.type, touched)


def _make_weights(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return [torch.full(shape, 0.01, dtype=dtype, device=device) for shape in shapes]


def _make_slot(
    weights: list[torch.Tensor],
    density: float,
    generator: torch.Generator,
    *,
    rank: int = 0,
    granularity: int = 1,
) -> Slot:
    dtype, device = weights[0].dtype, weights[0].device

    def small_random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device).mul_(0.01).to(device, dtype)

    lists = [random_runs(w.numel(), round(density * w.numel()), granularity, generator) for w in weights]
    offsets = torch.tensor([0, *(len(part) for part in lists)]).cumsum(0)
    indices64 = torch.cat(lists)
    values = small_random(len(indices64))
    lora = [(small_random(n, rank), small_random(rank, m)) for n, m in (w.shape for w in weights)] if rank else []
    cuts = offsets.tolist()
    offsets, indices, indices64 = offsets.to(device), indices64.int().to(device), indices64.to(device)
    unit = 8 // dtype.itemsize
    runs = indices[::unit] // unit if granularity % unit == 0 else indices[:0]
    parts = [
        Entries(
            weight,
            weight.view(-1),
            indices[begin:end],
            indices64[begin:end],
            values[begin:end],
            runs[begin // unit : end // unit],
        )
        for weight, begin, end in zip(weights, cuts[:-1], cuts[1:], strict=True)
    ]
    return Slot(weights, offsets, indices, indices64, values, torch.zeros_like(values), lora, parts)


def random_indices(numel: int, nnz: int, generator: torch.Generator) -> torch.Tensor:
    """[nnz] int64, sorted, unique, uniform in [0, numel), on the generator's device."""
    device = generator.device
    indices = torch.empty(0, dtype=torch.int64, device=device)
    while len(indices) < nnz:
        more = torch.randint(numel, (nnz + nnz // 8 + 16 - len(indices),), generator=generator, device=device)
        indices = torch.cat([indices, more]).unique()
    keep = torch.randperm(len(indices), generator=generator, device=device)[:nnz]
    return indices[keep].sort().values


def random_runs(numel: int, nnz: int, granularity: int, generator: torch.Generator) -> torch.Tensor:
    """[nnz] int64, sorted, unique, in aligned runs of `granularity` neighbours, which divides nnz and numel."""
    assert nnz % granularity == numel % granularity == 0
    runs = random_indices(numel // granularity, nnz // granularity, generator) * granularity
    return (runs[:, None] + torch.arange(granularity, device=runs.device)).view(-1)


def touched_bytes(*lists: Slot) -> int:
    """Bytes in the memory lines that hold at least one entry of the lists, which have the same weights."""
    line = line_bytes(lists[0].indices.device.type)
    lines = 0
    for parts in zip(*(slot.parts for slot in lists), strict=True):
        weight = parts[0].weight
        addresses = weight.data_ptr() + torch.cat([part.indices64 for part in parts]) * weight.element_size()
        lines += torch.div(addresses, line, rounding_mode="floor").unique().numel()
    return lines * line


def expected_touched_bytes(slot: Slot) -> float:
    """What `touched_bytes` is expected to be for random entries: 1-(1-d)^n of the lines of n entries are touched."""
    entries = line_bytes(slot.indices.device.type) / slot.weights[0].element_size()
    densities = [len(part.indices) / part.weight.numel() for part in slot.parts]
    return sum(w.nbytes * (1.0 - (1.0 - d) ** entries) for w, d in zip(slot.weights, densities, strict=True))
