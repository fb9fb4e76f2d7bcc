"""The base that an adapter was made for: its tensors by canonical name, and whether they are the right ones."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import AdapterTensor
from shira.files.checkpoint import Base, TensorFolder, open_tensors
from shira.files.errors import ArgumentError, Piece, warn
from shira.model.conversions import model_of
from shira.model.modules import sharded
from shira.model.names import HELD, canonical, canonical_in, state_buffers, state_names
from shira.model.placement import Layout
from shira_kernels.bits import as_bits, gathered


class BaseTensors(Mapping[str, torch.Tensor]):
    """A base's tensors by canonical name, in its order; those on disk are read when they are asked for.

    A tensor is found by other names too, which are not listed: those of the model that loads a checkpoint, if the
    config.json beside it says which, and those of its checkpoints, if the base is a model. It is then put together of
    the base's own, as merged experts are. One tensor of a model that was put together is kept until the next is.

    Args:
        base: a model whose weights hold it, its state dict, or the path of a safetensors file or of a folder of them.
        argument: what messages call it.

    Raises:
        ValueError: `base` is none of these, or no whole safetensors are there; later, if a tensor that is asked for is
            a DTensor.
        OSError: something cannot be read.
    """

    def __init__(self, base: Base, argument: str = "base") -> None:
        self._tensors, self._argument, self._base = open_tensors(base, argument), argument, base
        bare = canonical_in(base) if isinstance(base, nn.Module) else canonical
        self._own = {bare(own): own for own in self._tensors}
        self._aliases: dict[str, str] = {}  # of a file, which has such a tensor once
        if isinstance(self._tensors, TensorFolder):
            self._aliases = {canonical(name): canonical(kept) for name, kept in self._tensors.aliases.items()}
        self._first_uses: dict[str, str] | None = None
        if isinstance(base, nn.Module):
            first = state_names(base)
            state = itertools.chain(base.named_parameters(remove_duplicate=False), state_buffers(base))
            self._first_uses = {bare(own): first[tensor] for own, tensor in state}

    def __getitem__(self, name: str) -> torch.Tensor:
        name = self.kept_name(name)
        if name in self._own:
            tensor = self._tensors[self._own[name]].detach()
            if reason := sharded(tensor):
                raise ArgumentError(self._argument, f": {name}: {reason}: give the whole tensor")
            return tensor
        if self.layout is None:
            raise KeyError(name)
        return self.layout.assembled(name, self.__getitem__)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return isinstance(name, str) and bool(self.own_names(name))

    @functools.cached_property
    def layout(self) -> Layout | None:
        """Where names and positions of the model and of its checkpoints lie in the base; None if nothing tells."""
        if isinstance(self._base, nn.Module):
            return Layout(self._base)
        if isinstance(self._tensors, TensorFolder) and (model := model_of(self._tensors)) is not None:
            shapes = {name: self.shape_of(name) for name in self._own}
            return Layout(model, {name: shape for name, shape in shapes.items() if shape is not None})
        return None

    def as_loaded(self) -> BaseTensors:
        """The same base with the names and in the form of the model that loads it, of which tensors are put together
        when they are asked for; itself if it is no checkpoint, or nothing tells of which model."""
        if not isinstance(self._tensors, TensorFolder) or self.layout is None:
            return self
        loaded = BaseTensors(self.layout.loaded(self.__getitem__), self._argument)
        loaded.layout = Layout(self.layout.model)
        return loaded

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of one of the base's own tensors; None if a file lacks what its index says is in it."""
        if not isinstance(self._tensors, TensorFolder):
            return tuple(self[name].shape)
        try:
            return self._tensors.shape(self._own[name])
        except ValueError:
            return None

    def of_shape(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of this name that has this shape: a base and its other form may have one name for two, as of
        experts that are transposed at load. Without such a one, the base's own."""
        own = self[name]
        if tuple(own.shape) == shape or self.layout is None:
            return own
        found = self.layout.find(name, shape)
        if found is None or found.shape != shape:
            return own
        return self.layout.assembled(name, self.__getitem__, shape)

    def has(self, name: str) -> bool:
        """Whether it is the canonical name of a tensor that the base itself has."""
        return name in self._own

    def kept_name(self, name: str) -> str:
        """The base's own spelling of a canonical name: where a file notes it as another name of a tensor, that of the
        tensor; with or without the `module.` of DistributedDataParallel; of a name that it lacks the name itself."""
        for spelling in (name, self._aliases.get(name, name), f"{HELD}.{name}", name.removeprefix(f"{HELD}.")):
            if spelling in self._own:
                return spelling
        return name

    def own_names(self, name: str) -> list[str]:
        """The canonical names of the base's tensors that hold a part of the one of this name; none if it lacks any."""
        name = self.kept_name(name)
        if name in self._own:
            return [name]
        placed = None if self.layout is None else self.layout.find(name)
        if self.layout is None or placed is None:
            return []
        found = {inside: self.layout.own(inside) for inside, _ in placed.parts}
        return list(dict.fromkeys(own for parts in found.values() for own, _ in parts)) if all(found.values()) else []

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def own_name(self, name: str) -> str:
        """What the base itself calls the tensor of this canonical name."""
        return self._own[name]

    def find(self, name: str) -> str:
        """The canonical name of an adapter's tensor, given in any spelling; in a model that of the parameter's first
        use. Raises ValueError if the base lacks it."""
        wanted = canonical(name)
        if self._first_uses is not None:
            wanted = self._first_uses.get(wanted, "" if wanted in self._own else wanted)
            if wanted not in self:
                raise ValueError(f"the model has no parameter or buffer {name!r}")
        elif wanted not in self:
            raise ValueError(f"{name}: the base has no tensor of this name")
        kept = self.kept_name(wanted)
        copies = self.copies(kept) if kept in self._own else [kept]
        return copies[0] if len(copies) == 1 else min(copies, key=list(self._own).index)

    def check_names(self) -> None:
        """Refuses with ValueError a base that has two tensors of one canonical name."""
        if len(self._own) == len(self._tensors):
            return
        seen: dict[str, str] = {}
        for own in self._tensors:
            name = canonical(own)
            if name in seen:
                raise ValueError(f"{self._argument} has the tensor {name!r} twice: as {seen[name]!r} and as {own!r}")
            seen[name] = own

    def uses(self, name: str) -> list[str]:
        """All names that a tensor has in the model that holds or loads it, the given one first: a tied one has several.
        Those that a checkpoint has both are not tied if they differ."""
        if self.layout is None or not (uses := self.layout.uses(name)):
            aliases = self._known_aliases
            first = aliases.get(name, name)
            return [name, *(use for use in (first, *aliases) if use != name and aliases.get(use, use) == first)]
        if not isinstance(self._tensors, TensorFolder):
            return uses
        copies = self.copies(name)
        return [use for use in uses if use == uses[0] or self._tied_own.get(use) in (None, *copies)]

    @functools.cached_property
    def _known_aliases(self) -> dict[str, str]:
        return self.aliases()

    def copies(self, name: str) -> list[str]:
        """The base's own tensors that are the one of this name where it is loaded: more than one if a checkpoint has a
        tied tensor under several names, and the same in all."""
        own = self.own_names(name)
        if len(own) != 1 or not isinstance(self._tensors, TensorFolder) or not (alike := self.alike(own[0])):
            return own
        if self.layout is None or not (uses := self.layout.uses(own[0])):
            return own
        tied = {self._tied_own.get(use) for use in uses}
        return [*own, *(other for other in alike if other in tied and same_bits(self[own[0]], self[other]))]

    def alike(self, name: str) -> list[str]:
        """Other tensors of a checkpoint with the shape, dtype and first row of one that it has."""
        return [other for other in self._by_start.get(self._starts.get(name, ()), ()) if other != name]

    @functools.cached_property
    def _starts(self) -> dict[str, Hashable]:
        if not isinstance(self._tensors, TensorFolder):
            return {}
        files = self._tensors.files
        by_file = sorted(self._own.items(), key=lambda item: files[item[1]])  # each is opened once
        starts = {name: self._tensors.start(own) for name, own in by_file}
        return {name: start for name, start in starts.items() if start is not None}

    @functools.cached_property
    def _by_start(self) -> dict[Hashable, list[str]]:
        found: dict[Hashable, list[str]] = {}
        for name, start in self._starts.items():
            found.setdefault(start, []).append(name)
        return found

    @functools.cached_property
    def _tied_own(self) -> dict[str, str]:
        """By a name in the model, of tensors that it has under several, the base's own of that name."""
        assert self.layout is not None
        uses = {own: self.layout.uses(own) for own in self._own}
        return {names[0]: own for own, names in uses.items() if len(names) > 1}

    def aliases(self) -> dict[str, str]:
        """Names of tensors that are another one, and the name of that: of a base in memory those that share their
        memory with an earlier one, of files those that they note, and do not list, and those that are tied where they
        are loaded and the same."""
        if isinstance(self._tensors, TensorFolder):  # tensors there have memory of their own
            found = dict(self._aliases)
            for name in self._own:
                if name not in found:
                    found |= dict.fromkeys(self.copies(name)[1:], name)
            return found
        if not isinstance(self._tensors, dict):
            return {}  # which would have to be read
        first: dict[tuple[Any, ...], str] = {}
        aliases = {}
        for name, tensor in self.items():
            if tensor.numel() and not tensor.is_meta and tensor.layout == torch.strided:
                memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if first.setdefault(memory, name) != name:
                    aliases[name] = first[memory]
        return aliases


def check_fits(name: Piece, tensor: AdapterTensor, weight: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor of another shape or dtype than the model's, and a weight that cannot
    be written in place."""
    if tuple(weight.shape) != tensor.shape:
        raise ArgumentError(name, f": the adapter's shape is {tensor.shape}, the model's {tuple(weight.shape)}")
    if weight.dtype != tensor.dtype:
        raise ArgumentError(name, f": the adapter's dtype is {tensor.dtype}, the model's {weight.dtype}")
    if weight.is_meta:
        raise ArgumentError(name, ": the model's tensor is on the meta device and holds no data")
    if weight.layout != torch.strided:
        raise ArgumentError(name, f": the model's tensor must be dense, got {weight.layout}")
    if not weight.is_contiguous():
        raise ArgumentError(name, f": the model's tensor must be contiguous, got strides {weight.stride()}")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same in every bit."""
    return one.dtype == other.dtype and torch.equal(as_bits(one.contiguous()), as_bits(other.contiguous()))


def check_base(name: Piece, tensor: AdapterTensor, base: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor that was made for other base entries; warns if that is not known."""
    if tensor.checksum is None:
        warn(name, ": no checksum, so the adapter may belong to another base")
    elif tensor.checksum != checksum_of(base):
        raise ArgumentError(name, ": the adapter belongs to another base: the entries it changes have another checksum")


def entries_of(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The weight's entries at flat `indices`, on the device of those."""
    return gathered(weight.detach(), indices.to(weight.device)).to(indices.device)
