"""The memory of trained values: the vectors of all weights lie side by side, and stay so when the model is moved.

Each vector has a storage of its own, a part of the arena's: what removes shared tensors when it saves (safetensors,
accelerate) goes by storages, and would keep one vector of an arena.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer

from shira_kernels.dtypes import compute_dtype


class Values(nn.Parameter):
    """Trained values [nnz]: a parameter whose writes through `.data` are noticed.

    torch's own `.data` counts versions of its own; this one shares the parameter's counter. A tensor that is assigned
    to it may be written by others later: then `shira_target.foreign` says so.
    """

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, memory: torch.Tensor) -> None:
        place(self, memory)
        target = getattr(self, "shira_target", None)
        if target is not None:
            target.given_memory()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Without `shira_target`, which would take the layer along.
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


# By this list torch's optimizers know whose steps they may take in a few kernels; torch adds its DTensor, too. A torch
# without it steps more slowly.
_few_kernels = getattr(optimizer, "_foreach_supported_types", [])
if Values not in _few_kernels:
    _few_kernels.append(Values)


def place(parameter: nn.Parameter, memory: torch.Tensor) -> None:
    """Makes `memory` that of a parameter."""
    torch.Tensor.data.__set__(parameter, memory)  # type: ignore[attr-defined]
    torch.autograd.graph.increment_version(parameter)  # other memory at an old address is noticed, too


class VectorArena:
    """One tensor that holds many vectors. It moves as one when each of their modules is moved.

    A copy has no memory before the vectors, which are copied by themselves, are taken in again.
    """

    def __init__(self, vectors: list[torch.Tensor]) -> None:
        empty = sum(not vector.numel() for vector in vectors)
        # An element for each empty vector: at one address they would look shared.
        self.memory: torch.Tensor | None = torch.cat([*vectors, vectors[0].new_zeros(empty)])
        self._size = self.memory.numel()
        self._moved_by: Any = None
        self._moved_from: int | None = None

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], keep_precision: bool) -> None:
        """Does what `module._apply(fn)` does, once for all modules; with `keep_precision` to float32 at least."""
        if fn is not self._moved_by:
            moved = fn(self.data)
            self._moved_by, self._moved_from = fn, self.data.data_ptr()
            self.data = precise(moved, self.data) if keep_precision else moved

    @property
    def data(self) -> torch.Tensor:
        """[size]."""
        assert self.memory is not None
        return self.memory

    @data.setter
    def data(self, moved: torch.Tensor) -> None:
        self.memory = moved

    def holds_like(self, vector: torch.Tensor) -> bool:
        """Whether a vector of this dtype and device can lie here; the first one gives an arena without memory its."""
        if self.memory is None:
            self.memory = vector.new_zeros(self._size)
        return (self.memory.dtype, self.memory.device) == (vector.dtype, vector.device)

    def begins(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> set[int | None]:
        """The addresses at which vectors begin that `fn` has still to move, or has moved."""
        now = None if self.memory is None else self.memory.data_ptr()
        return {now, self._moved_from if fn is self._moved_by else None}

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": None, "_size": self._size, "_moved_by": None, "_moved_from": None}


def precise(moved: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`before` on the device of `moved`, in its dtype or float32 if that is more: values are never rounded to less."""
    return before.to(moved.device, compute_dtype(moved.dtype))


class Slice:
    """Where a vector lies in an arena."""

    def __init__(self, arena: VectorArena, begin: int, end: int) -> None:
        self.arena, self._begin, self._end = arena, begin, end

    def vector(self) -> torch.Tensor:
        """The vector, in the arena's memory, with a storage and a version counter of its own."""
        data = self.arena.data
        if data.is_meta:
            return data[self._begin : self._end].data
        begin, end = (data.element_size() * (data.storage_offset() + at) for at in (self._begin, self._end))
        return data.new_empty(0).set_(data.untyped_storage()[begin:end])

    def taken_in(self, vector: torch.Tensor) -> torch.Tensor:
        """The copy of a vector, with its memory in the copy of the arena, if it can lie there."""
        if vector.device.type == "cpu" and vector.is_shared():  # with another process, which would see no more writes
            return vector
        if not self.arena.holds_like(vector):
            return vector
        mine = self.vector()
        return mine if mine.data_ptr() == vector.data_ptr() else mine.copy_(vector)

    def holds(self, tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether this is the tensor's memory, or was before `fn` moved the arena."""
        return tensor.data_ptr() - self._begin * tensor.element_size() in self.arena.begins(fn)


def in_arenas(vectors: list[torch.Tensor]) -> list[Slice]:
    """Copies vectors into one arena for each dtype and device, in the given order."""
    alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for vector in vectors:
        alike.setdefault((vector.dtype, vector.device), []).append(vector)
    arenas = {kind: (VectorArena(group), 0, sum(map(torch.Tensor.numel, group))) for kind, group in alike.items()}
    slices = []
    for vector in vectors:
        kind = vector.dtype, vector.device
        arena, begin, behind = arenas[kind]
        if vector.numel():
            end = begin + vector.numel()
            slices.append(Slice(arena, begin, end))
            arenas[kind] = arena, end, behind
        else:
            slices.append(Slice(arena, behind, behind))
            arenas[kind] = arena, begin, behind + 1
    return slices
