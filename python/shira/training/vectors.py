"""The memory of trained values: the vectors of all weights lie side by side, and stay so when the model is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shira_kernels.dtypes import compute_dtype


class VectorArena:
    """One tensor that holds many vectors. It moves as one when each of their modules is moved."""

    def __init__(self, vectors: list[torch.Tensor]) -> None:
        self.data = torch.cat(vectors)
        self._moved_by: Any = None
        self._moved_from: int | None = None

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], keep_precision: bool) -> None:
        """Does what `module._apply(fn)` does, once for all modules; with `keep_precision` to float32 at least."""
        if fn is not self._moved_by:
            moved = fn(self.data)
            self._moved_by, self._moved_from = fn, self.data.data_ptr()
            self.data = precise(moved, self.data) if keep_precision else moved

    def begins(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> set[int | None]:
        """The addresses at which vectors begin that `fn` has still to move, or has moved."""
        return {self.data.data_ptr(), self._moved_from if fn is self._moved_by else None}

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "_moved_by": None, "_moved_from": None}


def precise(moved: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`before` on the device of `moved`, in its dtype or float32 if that is more: values are never rounded to less."""
    return before.to(moved.device, compute_dtype(moved.dtype))


class Slice:
    """Where a vector lies in an arena."""

    def __init__(self, arena: VectorArena, begin: int, end: int) -> None:
        self.arena, self._begin, self._end = arena, begin, end

    def vector(self) -> torch.Tensor:
        """The vector, as a view of the arena that counts its own versions."""
        return self.arena.data[self._begin : self._end].data

    def holds(self, tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether this is the tensor's memory, or was before `fn` moved the arena."""
        return tensor.data_ptr() - self._begin * tensor.element_size() in self.arena.begins(fn)


def in_arenas(vectors: list[torch.Tensor]) -> list[Slice]:
    """Copies vectors into one arena for each dtype and device, in the given order."""
    alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for vector in vectors:
        alike.setdefault((vector.dtype, vector.device), []).append(vector)
    arenas = {kind: (VectorArena(group), 0) for kind, group in alike.items()}
    slices = []
    for vector in vectors:
        kind = vector.dtype, vector.device
        arena, begin = arenas[kind]
        slices.append(Slice(arena, begin, begin + vector.numel()))
        arenas[kind] = arena, begin + vector.numel()
    return slices
