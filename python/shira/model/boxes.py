"""Affine pieces of one tensor inside another, and the flat positions that they move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """An affine piece of a source tensor inside a destination tensor, both contiguous; all numbers count elements.

    The element at coordinates c of the box, 0 <= c < shape, is the source's at flat position src_offset + sum of
    c * src_stride, and the destination's at dst_offset + sum of c * dst_stride.

    Attributes:
        src_offset: where the piece begins in the source.
        shape: the sizes of the piece.
        src_stride: the steps in the source, one for each size.
        dst_offset: where it begins in the destination.
        dst_stride: the steps in the destination.
    """

    src_offset: int
    shape: tuple[int, ...]
    src_stride: tuple[int, ...]
    dst_offset: int
    dst_stride: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """A tensor of this shape in one of the same elements in the same order."""
        strides = strides_of(shape)
        return Box(0, tuple(shape), strides, 0, strides)

    @property
    def numel(self) -> int:
        """How many elements the piece has."""
        return math.prod(self.shape)

    @property
    def reversed(self) -> Box:
        """The same piece, seen from the destination."""
        return Box(self.dst_offset, self.shape, self.dst_stride, self.src_offset, self.src_stride)

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a tensor of this shape, in its order."""
        return self.numel == math.prod(shape) and self.src_offset == self.dst_offset == 0 and self._is_in_order()

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Writes the piece of `source` into `destination`; both are contiguous."""
        into = destination.as_strided(self.shape, self.dst_stride, destination.storage_offset() + self.dst_offset)
        into.copy_(source.as_strided(self.shape, self.src_stride, source.storage_offset() + self.src_offset))

    def _is_in_order(self) -> bool:
        """Whether neighbours of the source are neighbours in the destination, through the whole piece."""
        expected = 1
        for size, step, other in sorted(_moving(self), key=lambda dim: dim[1]):
            if step != expected or other != expected:
                return False
            expected *= size
        return True


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def localise(indices: torch.Tensor, boxes: Sequence[Box]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of a source tensor lie in boxes, and where in the destination.

    Args:
        indices: [nnz] flat positions in the source, sorted and unique.
        boxes: pieces of the source in one destination, which do not overlap there.

    Returns:
        (kept, local), int64 [number of entries inside]: positions in `indices`, and flat positions in the destination,
        which are sorted. An entry that lies in no box is in neither.

    Raises:
        ValueError: a box meets an element of the source twice.
    """
    wide = indices.long()
    kept, local = [wide.new_empty(0)], [wide.new_empty(0)]
    for box in boxes:
        if box.numel == 0:
            continue
        dims = sorted(_moving(box), key=lambda dim: -dim[1])
        for k, (_, step, _) in enumerate(dims):
            if step <= sum((size - 1) * inner for size, inner, _ in dims[k + 1 :]):
                raise ValueError(f"a box must have each element of its source once, got {box}")
        last = box.src_offset + sum((size - 1) * step for size, step, _ in dims)
        begin, end = torch.searchsorted(wide, wide.new_tensor([box.src_offset, last + 1])).tolist()
        rest = wide[begin:end] - box.src_offset
        place = torch.full_like(rest, box.dst_offset)
        inside = torch.ones_like(rest, dtype=torch.bool)
        for size, step, to in dims:  # the largest step first, so that the quotient is the coordinate
            coordinate = torch.div(rest, step, rounding_mode="floor")
            inside &= coordinate < size
            rest -= coordinate * step
            place += coordinate * to
        inside &= rest == 0
        kept.append(inside.nonzero().view(-1) + begin)
        local.append(place[inside])
    sorted_local, order = torch.cat(local).sort()
    return torch.cat(kept)[order], sorted_local


def _moving(box: Box) -> list[tuple[int, int, int]]:
    """The sizes and both steps of the dimensions that have more than one element."""
    return [dim for dim in zip(box.shape, box.src_stride, box.dst_stride, strict=True) if dim[0] > 1]
