"""An adapter's entries where a base has them: under its names, at its positions.

An adapter has the names and positions of a model in memory, or of a checkpoint, which may be another than the base's:
merged experts are one tensor in memory, and one for each expert on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.adapter.base import BaseTensors, check_base, entries_of
from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import AdapterTensor
from shira.files.errors import ArgumentError, Piece
from shira.model.boxes import Box, localise
from shira.model.names import canonical, canonical_in, state_buffers
from shira.model.placement import Layout
from shira.model.tracing import Sources
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import index_dtype

Entries = Callable[[str, torch.Tensor], torch.Tensor]  # the base's, of a tensor's own name and flat positions


def placed(
    adapter: Adapter,
    base: BaseTensors,
    *,
    entries: Entries | None = None,
    force: bool = False,
    argument: Piece = "",
) -> Adapter:
    """The same adapter with the base's names and positions. Tensors that the base has under their names stay as they
    are, and so do those that it has under no name.

    Args:
        adapter: of a model, or of a checkpoint in any form that the model can be loaded from.
        base: of the weights that the result is for.
        entries: gives the base's entries where `base` does not hold them now; None to read them from `base`.
        force: take the adapter also if it was made for other entries.
        argument: how messages begin.

    Returns:
        An adapter. Tensors that were split or joined are on the CPU, and have the checksums of the base's entries,
        which were compared with the adapter's before; None where the adapter has none.

    Raises:
        ValueError: naming the tensor: an entry lies nowhere in the base, or two names mean one entry and differ; the
            entries have another checksum; its shape is another; loading changes the tensor's values.
    """

    def is_own(name: str, tensor: AdapterTensor) -> bool:
        if not base.has(name) or base.shape_of(name) in (tensor.shape, None) or base.layout is None:
            return base.has(name)
        found = base.layout.find(name, tensor.shape)
        return found is None or found.shape != tensor.shape

    if all(is_own(canonical(label), tensor) for label, tensor in adapter.items()):
        return adapter
    tensors: dict[str, AdapterTensor] = {}
    moving: dict[str, AdapterTensor] = {}
    for label, tensor in adapter.items():
        name = base.kept_name(canonical(label))
        found = None if is_own(name, tensor) or base.layout is None else base.layout.find(name, tensor.shape)
        if found is None:
            own = label if name == canonical(label) else name
            if own in tensors or (own != label and own in adapter):
                raise ArgumentError(argument, f"{label}: the adapter names the tensor {own!r} twice")
            tensors[own] = tensor
            continue
        if found.shape != tensor.shape:
            raise ArgumentError(argument, f"{label}: the adapter's shape is {tensor.shape}, the model's {found.shape}")
        assert base.layout is not None
        renamed = _renamed(found.parts, tensor, base.layout)
        if renamed is None:
            moving[label] = tensor
        elif renamed in tensors or (renamed in adapter and renamed != label):
            raise ArgumentError(argument, f"{label}: the adapter names the tensor {renamed!r} twice")
        else:
            tensors[renamed] = tensor
    for name, moved in _moved(moving, base, entries, force, argument).items():
        if name in tensors or (name in adapter and name not in moving):
            raise ArgumentError(argument, f"{moved[0]}: the adapter names the tensor {name!r} twice")
        tensors[name] = moved[1]
    result = Adapter(tensors, adapter.config)
    result.provenance = adapter.provenance
    return result


def placed_in_model(
    adapter: Adapter, model: nn.Module, entries: Entries | None = None, *, force: bool = False
) -> Adapter:
    """As `placed`, for a live model; one whose names are all the model's comes back as it is."""
    bare = canonical_in(model)
    state = itertools.chain(model.named_parameters(remove_duplicate=False), state_buffers(model))
    shapes = {bare(name): tuple(tensor.shape) for name, tensor in state}
    if all(shapes.get(canonical(label)) == tensor.shape for label, tensor in adapter.items()):
        return adapter
    return placed(adapter, BaseTensors(model), entries=entries, force=force)


def _renamed(parts: Sources, tensor: AdapterTensor, layout: Layout) -> str | None:
    """The base's name of a tensor that is whole there, in its order, and once; None of others."""
    if len(parts) != 1 or not parts[0][1].is_whole(tensor.shape):
        return None
    own = layout.own(parts[0][0])
    return own[0][0] if len(own) == 1 and own[0][1].is_whole(tensor.shape) else None


@dataclass
class _Arrived:
    """Entries of several tensors of an adapter that lie in one of the base's."""

    indices: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    origins: list[tuple[str, torch.Tensor]] = field(default_factory=list)  # the tensor, and positions in its list


def _moved(
    moving: dict[str, AdapterTensor], base: BaseTensors, entries: Entries | None, force: bool, argument: Piece
) -> dict[str, tuple[str, AdapterTensor]]:
    """The base's name -> an adapter's tensor whose entries are there, and what all of them make."""
    arrived: dict[str, _Arrived] = {}
    for label, tensor in moving.items():
        reached = torch.zeros(tensor.nnz, dtype=torch.bool)
        for name, kept, indices in _places(label, tensor, base):
            place = arrived.setdefault(name, _Arrived())
            place.indices.append(indices)
            place.values.append(as_bits(tensor.values.cpu())[kept])
            place.origins.append((label, kept))
            reached[kept] = True
        if not bool(reached.all()):
            first = int(tensor.indices[int((~reached).nonzero()[0])])
            lost = int((~reached).sum())
            raise ArgumentError(argument, f"{label}: {lost} entries lie nowhere in the base, the first at {first}")
    found: dict[str, tuple[str, AdapterTensor]] = {}
    old = {label: _BaseEntries(tensor.nnz) for label, tensor in moving.items()}
    for name, place in arrived.items():
        weight = base[name]
        indices = torch.cat(place.indices)
        here = entries_of(weight, indices) if entries is None else entries(name, indices)
        begin = 0
        for label, kept in place.origins:
            old[label].put(argument, label, kept, here[begin : begin + kept.numel()])
            begin += kept.numel()
        if base.find(name) != canonical(name):  # a copy of a tied tensor, which gets what the first one gets
            continue
        known = all(moving[label].checksum is not None for label, _ in place.origins)
        found[name] = place.origins[0][0], _joined(name, place, moving, weight, here if known else None, argument)
    for label, tensor in moving.items():
        if not force and tensor.checksum is not None:
            check_base((argument, label), tensor, old[label].bits.view(tensor.dtype))
    return found


def _places(label: str, tensor: AdapterTensor, base: BaseTensors) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Where the entries of a tensor lie: the base's names, positions in the tensor's list, and positions there."""
    assert base.layout is not None
    found = base.layout.find(canonical(label), tensor.shape)
    assert found is not None
    places = []
    for inside, boxes in _by_name(found.parts).items():
        kept, in_model = localise(tensor.indices.cpu(), boxes)
        for name, own_boxes in _by_name(base.layout.own(inside)).items():
            again, indices = localise(in_model, own_boxes)
            if again.numel():
                places.append((name, kept[again], indices))
    return places


def _by_name(parts: Sources) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for name, box in parts:
        found.setdefault(name, []).append(box)
    return found


class _BaseEntries:
    """The base's entries in the order of an adapter's tensor."""

    def __init__(self, nnz: int) -> None:
        self._seen = torch.zeros(nnz, dtype=torch.bool)
        self.bits = torch.zeros(0, dtype=torch.uint8)

    def put(self, argument: Piece, label: str, at: torch.Tensor, entries: torch.Tensor) -> None:
        """Raises ValueError where the base has an entry under two names, and with different values."""
        bits = as_bits(entries.cpu())
        if not self._seen.any():
            self.bits = torch.zeros(self._seen.numel(), dtype=bits.dtype)
        again = self._seen[at]
        if not torch.equal(self.bits[at][again], bits[again]):
            raise ArgumentError(argument, f"{label}: the base has it under two names, with different values")
        self.bits[at] = bits
        self._seen[at] = True


def _joined(
    name: str,
    place: _Arrived,
    moving: dict[str, AdapterTensor],
    weight: torch.Tensor,
    base: torch.Tensor | None,
    argument: Piece,
) -> AdapterTensor:
    """What several tensors of an adapter make of one of the base's; `base` are its entries there, for the checksum."""
    labels = list(dict.fromkeys(label for label, _ in place.origins))
    for what in ("kind", "dtype"):
        if len({getattr(moving[label], what) for label in labels}) > 1:
            raise ArgumentError(argument, f"{labels[0]}: tensors that lie in {name!r} differ in {what}")
    if len({moving[label].values.dtype for label in labels}) > 1:
        raise ArgumentError(argument, f"{labels[0]}: tensors that lie in {name!r} differ in the dtype of their values")
    indices, order = torch.cat(place.indices).sort(stable=True)
    bits = torch.cat(place.values)[order]  # not every dtype can be indexed
    twice = indices[1:] == indices[:-1]
    if not torch.equal(bits[1:][twice], bits[:-1][twice]):
        raise ArgumentError(argument, f"{labels[0]}: two names mean the same entry of {name!r}, with different values")
    once = torch.cat([torch.ones(min(1, indices.numel()), dtype=torch.bool), ~twice])
    return AdapterTensor(
        indices[once].to(index_dtype(weight.numel())),
        bits[once].view(moving[labels[0]].values.dtype),
        tuple(weight.shape),
        moving[labels[0]].dtype,
        moving[labels[0]].kind,
        None if base is None else checksum_of(as_bits(base.cpu())[order][once]),
    )
