"""Entries of many weights in one place: what a bank of adapters holds, merges and writes.

All entries of an adapter, for the weights of one dtype and device, lie in one arena, in the model's order, so that one
op writes them. What is in the weights now is an arena too, with the base's entries beside it.

Where all entries come in aligned runs of 8 bytes or more, an arena lists units of 8 bytes, and ops copy these: for
bfloat16 a fourth of the positions to keep, to check and to read, for float32 half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shira_kernels import fuse_adapters, scatter_apply, scatter_apply_batched, scatter_switch_batched
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import ARITHMETIC, compute_dtype, index_dtype

Key = tuple[torch.dtype, torch.device]  # what weights of one arena have in common
Mix = tuple[tuple[str, float], ...]  # a target of `switch`: strengths by name; () is the base
Kept = dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]  # weight -> (indices, the base's entries there)


@dataclass(frozen=True)
class Arena:
    """Sorted entries of several weights: those of weights[i] are offsets[i] to offsets[i + 1].

    Values that belong to an arena are [nnz], whatever its unit.
    """

    ranks: tuple[int, ...]  # of the weights in the model, rising
    weights: list[torch.Tensor]
    offsets: torch.Tensor  # on the CPU
    indices: torch.Tensor
    unit: int = 1  # neighbouring elements that an index stands for; offsets count indices

    @property
    def targets(self) -> list[torch.Tensor]:
        """The weights as ops write them, which are views of where the weights are now."""
        return [self.in_units(weight.detach().view(-1)) for weight in self.weights] if self.unit > 1 else self.weights

    def in_units(self, entries: torch.Tensor) -> torch.Tensor:
        return entries.view(torch.int64) if self.unit > 1 else entries

    def single(self) -> Arena:
        """Gives the same entries with an index for each of them."""
        if self.unit == 1:
            return self
        neighbours = torch.arange(self.unit, dtype=self.indices.dtype, device=self.indices.device)
        indices = (self.indices[:, None] * self.unit + neighbours).view(-1)
        return Arena(self.ranks, self.weights, self.offsets * self.unit, indices)

    def in_runs(self) -> Arena:
        """Gives the same entries with an index for each aligned 8 bytes of them, if they can be listed so."""
        unit = 8 // self.weights[0].element_size()
        if unit == 1 or any(weight.numel() % unit or weight.data_ptr() % 8 for weight in self.weights):
            return self
        if bool((self.offsets % unit).any()):
            return self
        runs = self.indices.view(-1, unit)
        for some in (runs[:64], runs):  # the first ones mostly tell
            first = some[:, 0]
            # Sorted and unique: if the first and the last are that far apart, the others lie between.
            if bool((first % unit).any()) or bool((some[:, -1] != first + (unit - 1)).any()):
                return self
        return Arena(self.ranks, self.weights, self.offsets // unit, first // unit, unit)

    @property
    def parts(self) -> Iterator[tuple[torch.Tensor, slice]]:
        """Each weight, and the slice of `indices` that lists its entries."""
        borders = itertools.pairwise(self.offsets.tolist())
        return zip(self.weights, (slice(begin, end) for begin, end in borders), strict=True)


@dataclass(frozen=True)
class Piece:
    """An adapter's entries of weights that are alike in dtype and device, with values that are alike too."""

    names: list[str]  # the adapter's, for its tensors
    checksums: list[str]  # of the base entries when the adapter was added
    arena: Arena
    values: torch.Tensor
    additive: bool

    @property
    def nbytes(self) -> int:
        return self.arena.indices.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> Piece:
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Piece:
        return self._with(torch.Tensor.pin_memory)

    def _with(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Piece:
        return replace(self, arena=replace(self.arena, indices=move(self.arena.indices)), values=move(self.values))


Pieces = dict[Key, list[Piece]]


@dataclass(frozen=True)
class Written:
    """What is in the weights, and the base's entries there."""

    arena: Arena
    saved: torch.Tensor

    def take_out(self) -> None:
        arena = self.arena
        scatter_apply_batched(arena.targets, arena.offsets, arena.indices, arena.in_units(self.saved))


@dataclass(frozen=True)
class Write:
    """What is to be written over the base."""

    arena: Arena  # of single entries unless they are replaced at strength 1
    values: torch.Tensor
    strength: float = 1.0
    additive: bool = False

    def put_in(self, old: Written | None, after: Written) -> Written:
        """Writes it in place of `old`; each entry of either is written once. The base's entries go to `after.saved`.

        Gives `after`, in the step that writes: nothing may come between, for the weights would not be what is noted.
        """
        new, form = self.arena, (self.strength, self.additive)
        if old is None:
            alone = (new.targets, new.offsets, new.indices, new.in_units(self.values), *form, new.in_units(after.saved))
            return (scatter_apply_batched(*alone), after)[1]  # type: ignore[func-returns-value]
        before = old.arena
        if before.unit != new.unit:
            before, new = before.single(), new.single()
        targets, old_offsets, offsets = _aligned(before, new)
        both = (
            targets,
            old_offsets,
            before.indices,
            new.in_units(old.saved),
            offsets,
            new.indices,
            new.in_units(self.values),
            new.in_units(after.saved),
            *form,
        )
        return (scatter_switch_batched(*both), after)[1]  # type: ignore[func-returns-value]


@dataclass(frozen=True)
class Share:
    """An adapter's part in a merged arena: where each of its entries is."""

    adapter: str
    piece: Piece
    positions: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """The union of several adapters' entries, which does not depend on their strengths."""

    names: tuple[str, ...]
    arenas: dict[Key, Arena]
    shares: dict[Key, list[Share]]

    @property
    def nbytes(self) -> int:
        """Bytes that the plan takes beside the adapters."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the plan holds beside the adapters' tensors."""
        positions = [share.positions for shares in self.shares.values() for share in shares]
        return positions + [arena.indices for arena in self.arenas.values()]


def merge(adapters: dict[str, Pieces]) -> Plan:
    """Gives the plan of a mix of these adapters."""
    found: dict[Key, list[tuple[str, Piece]]] = {}
    for name, pieces in adapters.items():
        for key, group in pieces.items():
            found.setdefault(key, []).extend((name, piece) for piece in group)
    arenas, shares = {}, {}
    for key, owners in found.items():
        arenas[key], positions = _union([piece.arena.single() for _, piece in owners])
        shares[key] = [Share(name, piece, place) for (name, piece), place in zip(owners, positions, strict=True)]
    return Plan(tuple(adapters), arenas, shares)


def mixed(base: torch.Tensor, shares: list[Share], strengths: dict[str, float]) -> torch.Tensor:
    """Gives the values of a mix: base + the sum of strength (value - base), in float32 or more, rounded once.

    base: the base's entries of the merged arena. A single adapter's values at strength 1 are copied as they are.
    """
    if base.dtype not in ARITHMETIC:  # such entries are of one adapter, at strength 1
        bits = as_bits(base).clone()
        for share in shares:
            bits.index_copy_(0, share.positions.long(), as_bits(share.piece.values))
        return bits.view(base.dtype)
    old = base.to(compute_dtype(base.dtype))
    delta = mixed_delta(old, shares, strengths)
    result = (old + delta).to(base.dtype)
    for share in shares:
        if len(strengths) == 1 and strengths[share.adapter] == 1.0 and not share.piece.additive:
            result[share.positions] = share.piece.values
    return result


def mixed_delta(old: torch.Tensor, shares: list[Share], strengths: Mapping[str, float]) -> torch.Tensor:
    """Gives what a mix adds to the base's entries `old`, which are float32 or more; it is not rounded to the weight's
    dtype."""
    alone = len(strengths) == 1
    delta = torch.zeros_like(old)
    for share in shares:
        change = share.piece.values.to(old.dtype)
        if not share.piece.additive:
            change = change - old.index_select(0, share.positions)
        if alone:  # as one op would have it: not even a zero is added
            delta.index_copy_(0, share.positions.long(), change * strengths[share.adapter])
        else:
            scatter_apply(delta, share.positions, change, strengths[share.adapter], additive=True)
    return delta


def base_entries(weight: torch.Tensor, indices: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Gives the base's entries at `indices`, whatever the weight holds now."""
    entries = as_bits(weight.detach()).index_select(0, indices)  # twice as fast as [indices]
    if weight in kept and kept[weight][0].numel():
        changed, old = kept[weight]
        place = torch.searchsorted(changed, indices.to(changed.dtype)).clamp_(max=changed.numel() - 1)
        # Unlike a mask, `where` does not wait for a GPU.
        entries = torch.where(changed[place] == indices, as_bits(old)[place], entries)
    return entries.view(weight.dtype)


def offsets_of(counts: Sequence[int]) -> torch.Tensor:
    """Gives [n + 1] int64 on the CPU: where each of n lists of `counts` entries begins, and where the last one ends."""
    return torch.tensor([0, *itertools.accumulate(counts)], device="cpu")


def _union(arenas: list[Arena]) -> tuple[Arena, list[torch.Tensor]]:
    """Gives the union of arenas, and for each arena the positions of its entries in the union."""
    weights: dict[int, torch.Tensor] = {}
    lists: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for which, arena in enumerate(arenas):
        for rank, (weight, part) in zip(arena.ranks, arena.parts, strict=True):
            weights[rank] = weight
            lists.setdefault(rank, []).append((which, arena.indices[part]))
    ranks = sorted(weights)
    unions = [_sorted_union([indices for _, indices in lists[rank]]) for rank in ranks]
    offsets = offsets_of([union.numel() for union in unions])
    dtype = index_dtype(int(offsets[-1]))
    positions: list[list[torch.Tensor]] = [[] for _ in arenas]
    for rank, union, begin in zip(ranks, unions, offsets.tolist(), strict=False):
        for which, indices in lists[rank]:
            positions[which].append(_places(union, indices).to(dtype).add_(begin))
    merged = Arena(tuple(ranks), [weights[rank] for rank in ranks], offsets, torch.cat(unions))
    return merged, [torch.cat(places) for places in positions]


def _sorted_union(lists: list[torch.Tensor]) -> torch.Tensor:
    return _fuse(lists, [0] * len(lists))[0]


def _places(union: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gives the positions in the union of the entries of one of its lists."""
    return _fuse([union, indices], [0, 1])[1].nonzero().view(-1)


def _fuse(lists: list[torch.Tensor], marks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the union of sorted lists, and for each entry the mark of the last list that has it. Merging the lists is
    far faster than searching in them."""
    values = [
        indices.new_full(indices.shape, mark, dtype=torch.bfloat16) for indices, mark in zip(lists, marks, strict=True)
    ]
    return fuse_adapters(lists, values, torch.ones(len(lists), dtype=torch.float32, device=lists[0].device), "last")


def _aligned(old: Arena, new: Arena) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gives what ops write of both arenas' weights, and the offsets that each arena has among them."""
    if old.ranks == new.ranks:
        return new.targets, old.offsets, new.offsets
    weights: dict[int, torch.Tensor] = {}
    counts: list[dict[int, int]] = []
    for arena in (old, new):
        weights.update(zip(arena.ranks, arena.targets, strict=True))
        counts.append(dict(zip(arena.ranks, arena.offsets.diff().tolist(), strict=True)))
    ranks = sorted(weights)
    old_offsets, offsets = (offsets_of([count.get(rank, 0) for rank in ranks]) for count in counts)
    return [weights[rank] for rank in ranks], old_offsets, offsets
