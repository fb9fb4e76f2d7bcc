"""Where an entry of a checkpoint's tensor lies in a model, and an entry of a model's tensor in a checkpoint.

A checkpoint's tensor and what a process holds of it are two things: its name may have changed at load, and it may be a
slice of a larger tensor, as one expert of many. `Box` says where; see `shira.model.boxes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from shira.model.boxes import Box, localise
from shira.model.conversions import Loading, Placed, Shape
from shira.model.names import canonical
from shira.model.tracing import Sources

__all__ = ["Box", "Layout", "boxes_from_modules", "identity", "localise"]

Read = Callable[[str], torch.Tensor]


def identity(model: nn.Module) -> dict[str, list[tuple[torch.Tensor, Box]]]:
    """The placement of a checkpoint that has the model's own names and tensors; a tied one has its first name."""
    return {name: [(tensor, Box.whole(tensor.shape))] for name, tensor in Loading(model).tensors.items()}


def boxes_from_modules(model: nn.Module) -> dict[str, list[tuple[torch.Tensor, Box]]]:
    """The placement of a checkpoint as transformers saves the model: for each of its names the tensors of the model
    that hold it, and which piece of it lies where. Merged experts are slices of the model's tensors.

    Of a model of another kind this is `identity`. Tensors whose values change between checkpoint and model are left
    out.
    """
    loading = Loading(model)
    saved = loading.saved
    if not saved:
        return identity(model)
    return {name: [(loading.tensors[own], box) for own, box in placed.parts] for name, placed in saved.items()}


class Layout:
    """A base's tensors and a model's, each found from the other's names.

    Args:
        model: the base itself, or for a checkpoint a model of its class, which may be on the meta device.
        stored: the shapes of a checkpoint's tensors by name; None if the base is the model.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Shape] | None = None) -> None:
        self.model = model
        self._loading, self._stored = Loading(model), stored
        self._own: dict[str, Sources] | None = None  # of a tensor of the model, where it lies in the checkpoint
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the checkpoint's tensors, as the model needs them
        self._last: tuple[str, torch.Tensor] | None = None

    def find(self, name: str, shape: Shape | None = None) -> Placed | None:
        """Where a tensor lies in the model: it is one of the model's, or of a checkpoint in any form that can be
        loaded, preferably of this shape. None if there is none such. Raises ValueError if its values change at load."""
        return self._loading.find(name, shape)

    def uses(self, name: str) -> list[str]:
        """The model's names of a tensor, of which a tied one has several; the given one comes first. Empty if the model
        has no such tensor."""
        return self._loading.uses(canonical(name))

    def own(self, name: str) -> Sources:
        """Where a tensor of the model lies in the base: its names, and which piece of the tensor lies where.

        A checkpoint may have it under two names, if it is tied in the model.
        """
        if self._stored is None:
            return [(name, Box.whole(self._loading.tensors[name].shape))]
        if self._own is None:
            self._own = {}
            for stored, placed in self._loading.find_stored(self._stored):
                self._shapes[stored] = placed.shape
                for inside, box in placed.parts:
                    self._own.setdefault(inside, []).append((stored, box.reversed))
        return self._own.get(name, [])

    def loaded(self, read: Read) -> Mapping[str, torch.Tensor]:
        """The tensors of the model, by its names, of which the base has a part; each is put together when it is asked
        for, of the base's tensors, which `read` gives."""
        return _Loaded(self, [name for name in self._loading.tensors if self.own(name)], read)

    def assembled(self, name: str, read: Read, shape: Shape | None = None) -> torch.Tensor:
        """A tensor of any form's name, made of the base's tensors, which `read` gives by the base's own names.

        Raises ValueError if the base has not all of it.
        """
        placed = self.find(name, shape)
        if placed is None:
            raise ValueError(f"{name}: the base has no tensor of this name")
        return _gathered(name, placed.shape, placed.parts, lambda inside: self._in_model(inside, read))

    def _in_model(self, name: str, read: Read) -> torch.Tensor:
        if self._stored is None:
            return read(name)
        if self._last is None or self._last[0] != name:  # the next slice is mostly one of the same tensor
            shape = tuple(self._loading.tensors[name].shape)
            self._last = name, _gathered(name, shape, self.own(name), lambda stored: self._checked(stored, read))
        return self._last[1]

    def _checked(self, stored: str, read: Read) -> torch.Tensor:
        tensor, shape = read(stored), self._shapes[stored]
        if tuple(tensor.shape) != shape:
            reason = f"its shape is {tuple(tensor.shape)}, and a model of its config.json has {shape}"
            raise ValueError(f"{stored}: {reason}")
        return tensor


class _Loaded(Mapping[str, torch.Tensor]):
    def __init__(self, layout: Layout, names: list[str], read: Read) -> None:
        self._layout, self._names, self._read = layout, dict.fromkeys(names), read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._layout.assembled(name, self._read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _gathered(name: str, shape: tuple[int, ...], parts: Sources, read: Read) -> torch.Tensor:
    """A tensor put together of pieces of others."""
    result: torch.Tensor | None = None
    covered, numel = 0, math.prod(shape)
    for other, box in parts:
        source = read(other)
        if covered == numel:  # a second copy, of tensors that are tied
            break
        if source.numel() == numel and box.is_whole(shape):
            return source.detach().reshape(shape)
        if result is None:
            result = torch.empty(shape, dtype=source.dtype, device=source.device)
        box.reversed.copy(source.detach().contiguous(), result)
        covered += box.numel
    if result is None or covered != numel:
        raise ValueError(f"{name}: the base has {covered} of its {numel} entries")
    return result
