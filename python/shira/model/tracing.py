"""Tensors without data that remember where their elements come from, while another's code splits and joins them.

What loaders do to a checkpoint's tensors (stack experts, join gate and up, transpose, permute for rotary embeddings) is
a reordering, which boxes describe. Their own code is run on traced tensors, so nothing of it is written here again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from shira.model.boxes import Box, strides_of

Sources = list[tuple[str, Box]]  # where elements come from: a tensor's name, and its piece in this one
_META = torch.device("meta")
_MOST_PIECES = 1 << 16  # of one tensor; what needs more is not called affine


class Traced(torch.Tensor):
    """A tensor on the meta device that knows its elements' sources.

    Attributes:
        sources: pieces of named tensors in this one, in its row-major order; None if its elements were computed.
    """

    sources: Sources | None

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, sources: Sources | None) -> Traced:
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=_META)

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, sources: Sources | None) -> None:
        self.sources = sources

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        found = func(*tree_map(_without_sources, args), **tree_map(_without_sources, kwargs))
        handler = _HANDLERS.get(func.overloadpacket)
        try:
            sources = None if handler is None else handler(args, kwargs, found)
        except _NotAffine:
            sources = None
        if isinstance(found, (tuple, list)):
            each = sources if sources is not None else [None] * len(found)
            return type(found)(Traced(t.shape, t.dtype, one) for t, one in zip(found, each, strict=True))
        if not isinstance(found, torch.Tensor):
            return found
        same_type = all(t.dtype == found.dtype for t in tree_leaves(args) if isinstance(t, Traced))
        return Traced(found.shape, found.dtype, sources if same_type else None)


def traced(name: str, shape: Sequence[int], dtype: torch.dtype) -> Traced:
    """A tensor that comes whole from the one of this name."""
    return Traced(shape, dtype, [(name, Box.whole(shape))])


def _without_sources(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device=_META) if isinstance(value, Traced) else value


class _NotAffine(Exception):
    """Elements of which no few boxes tell the sources."""


@dataclass(frozen=True)
class _Piece:
    """A box whose steps in the destination are told dimension by dimension of that."""

    name: str
    src_offset: int
    start: tuple[int, ...]
    dims: tuple[tuple[int, int, int, int], ...]  # size, step in the source, dimension of the destination, step there

    def box(self, shape: Sequence[int]) -> tuple[str, Box]:
        strides = strides_of(shape)
        return self.name, Box(
            self.src_offset,
            tuple(size for size, _, _, _ in self.dims),
            tuple(source for _, source, _, _ in self.dims),
            sum(at * stride for at, stride in zip(self.start, strides, strict=True)),
            tuple(step * strides[k] for _, _, k, step in self.dims),
        )


def _pieces(tensor: Any) -> list[_Piece]:
    """The pieces of a tensor by its dimensions; a tensor that is not traced has no sources."""
    if not isinstance(tensor, Traced):
        return []
    if tensor.sources is None:
        raise _NotAffine
    shape = tuple(tensor.shape)
    return [piece for name, box in tensor.sources if box.numel for piece in _by_dimension(name, box, shape)]


def _by_dimension(name: str, box: Box, shape: tuple[int, ...]) -> list[_Piece]:
    strides = strides_of(shape)
    rest, start = box.dst_offset, []
    for stride in strides:
        start.append(rest // stride if stride else 0)
        rest = rest % stride if stride else 0
    dims: list[tuple[int, int, int, int]] = []
    for size, source, to in zip(box.shape, box.src_stride, box.dst_stride, strict=True):
        if size > 1:
            k = next(k for k, stride in enumerate(strides) if shape[k] > 1 and stride <= to)
            if to % strides[k]:
                return _one_by_one(name, box, (size, source, to), shape)
            dims.append((size, source, k, to // strides[k]))
    for k, length in enumerate(shape):
        inside = [dim for dim in dims if dim[2] == k]
        if start[k] + sum((size - 1) * step for size, _, _, step in inside) < length:
            continue
        # The longest runs over the end of its dimension, into the one outside: cut it there.
        size, source, _, step = max(inside, key=lambda dim: dim[0] * dim[3])
        to, inner = step * strides[k], length // step
        if length % step or size % inner or size == inner:
            return _one_by_one(name, box, (size, source, to), shape)
        cut = _without(box, (size, source, to))
        return _by_dimension(
            name,
            replace(
                cut,
                shape=(*cut.shape, size // inner, inner),
                src_stride=(*cut.src_stride, source * inner, source),
                dst_stride=(*cut.dst_stride, to * inner, to),
            ),
            shape,
        )
    return [_Piece(name, box.src_offset, tuple(start), tuple(dims))]


def _without(box: Box, dim: tuple[int, int, int]) -> Box:
    dims = list(zip(box.shape, box.src_stride, box.dst_stride, strict=True))
    dims.remove(dim)
    shape, source, to = zip(*dims, strict=True) if dims else ((), (), ())
    return Box(box.src_offset, tuple(shape), tuple(source), box.dst_offset, tuple(to))


def _one_by_one(name: str, box: Box, dim: tuple[int, int, int], shape: tuple[int, ...]) -> list[_Piece]:
    """The box cut along one of its dimensions into as many as that has elements."""
    size, source, to = dim
    if size > _MOST_PIECES:
        raise _NotAffine
    rest = _without(box, dim)
    return [
        piece
        for i in range(size)
        for piece in _by_dimension(
            name,
            replace(rest, src_offset=rest.src_offset + i * source, dst_offset=rest.dst_offset + i * to),
            shape,
        )
    ]


def _cut(pieces: Sequence[_Piece], k: int, begin: int, end: int) -> list[_Piece]:
    """What lies in [begin, end) of dimension k, counted from `begin`."""
    found = []
    todo = list(pieces)
    while todo:
        piece = todo.pop()
        inside = [dim for dim in piece.dims if dim[2] == k]
        others = tuple(dim for dim in piece.dims if dim[2] != k)
        at = piece.start[k]
        if len(inside) > 1:  # only one may move along k: cut the piece along the others
            size, source, _, step = max(inside, key=lambda dim: dim[3])
            if size > _MOST_PIECES:
                raise _NotAffine
            kept = list(piece.dims)
            kept.remove((size, source, k, step))
            todo += [
                replace(
                    piece,
                    src_offset=piece.src_offset + i * source,
                    start=(*piece.start[:k], at + i * step, *piece.start[k + 1 :]),
                    dims=tuple(kept),
                )
                for i in range(size)
            ]
            continue
        size, source, _, step = inside[0] if inside else (1, 0, k, 1)
        first = max(0, -(-(begin - at) // step))
        last = min(size, -(-(end - at) // step))
        if first < last:
            start = (*piece.start[:k], at + first * step - begin, *piece.start[k + 1 :])
            dims = (*others, (last - first, source, k, step)) if last - first > 1 else others
            found.append(_Piece(piece.name, piece.src_offset + first * source, start, dims))
    return found


def _boxes(pieces: Sequence[_Piece], shape: Sequence[int]) -> Sources:
    if len(pieces) > _MOST_PIECES:
        raise _NotAffine
    return [piece.box(shape) for piece in pieces]


def _same_order(args: Any, kwargs: Any, found: Any) -> Sources | None:
    return args[0].sources  # type: ignore[no-any-return]


def _permuted(tensor: Traced, order: Sequence[int], found: torch.Tensor) -> Sources:
    to = {old % tensor.dim(): new for new, old in enumerate(order)}
    pieces = [
        replace(
            piece,
            start=tuple(piece.start[old % tensor.dim()] for old in order),
            dims=tuple((size, source, to[k], step) for size, source, k, step in piece.dims),
        )
        for piece in _pieces(tensor)
    ]
    return _boxes(pieces, found.shape)


def _permute(args: Any, kwargs: Any, found: Any) -> Sources:
    return _permuted(args[0], args[1], found)


def _transpose(args: Any, kwargs: Any, found: Any) -> Sources:
    tensor, *dims = args
    order = list(range(tensor.dim()))
    if order:
        one, other = dims or (0, -1)
        order[one], order[other] = order[other], order[one]
    return _permuted(tensor, order, found)


def _sliced(args: Any, kwargs: Any, found: Any) -> Sources:
    tensor, k, begin, _, step = [*args, None, None, None, None][:5]
    k = (k or 0) % tensor.dim()
    if step not in (None, 1):
        raise _NotAffine
    length = tensor.shape[k]
    begin = 0 if begin is None else min(max(begin + (length if begin < 0 else 0), 0), length)
    return _boxes(_cut(_pieces(tensor), k, begin, begin + found.shape[k]), found.shape)


def _parts(args: Any, kwargs: Any, found: Any) -> list[Sources]:
    tensor, k = args[0], (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    pieces, begin, each = _pieces(tensor), 0, []
    for part in found:
        each.append(_boxes(_cut(pieces, k, begin, begin + part.shape[k]), part.shape))
        begin += part.shape[k]
    return each


def _taken(tensor: Traced, k: int, at: int) -> Sources:
    """The boxes of one index of a dimension, which is gone then: that of size 1 changes no strides."""
    k %= tensor.dim()
    at = at % tensor.shape[k]
    return _boxes(_cut(_pieces(tensor), k, at, at + 1), [*tensor.shape[:k], 1, *tensor.shape[k + 1 :]])


def _select(args: Any, kwargs: Any, found: Any) -> Sources:
    return _taken(*args)


def _unbind(args: Any, kwargs: Any, found: Any) -> list[Sources]:
    k = args[1] if len(args) > 1 else 0
    return [_taken(args[0], k, at) for at in range(args[0].shape[k])]


def _joined(tensors: Sequence[torch.Tensor], k: int, shape: Sequence[int]) -> Sources:
    """The boxes of tensors one after the other along a dimension."""
    pieces, begin = [], 0
    for tensor in tensors:
        for piece in _pieces(tensor):
            start = (*piece.start[:k], piece.start[k] + begin, *piece.start[k + 1 :])
            pieces.append(replace(piece, start=start))
        begin += tensor.shape[k]
    return _boxes(pieces, shape)


def _cat(args: Any, kwargs: Any, found: Any) -> Sources:
    k = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % found.dim()
    return _joined(args[0], k, found.shape)


def _stack(args: Any, kwargs: Any, found: Any) -> Sources:
    k = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % found.dim()
    return _joined([tensor.unsqueeze(k) for tensor in args[0]], k, found.shape)


_aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(
        (
            _aten.view, _aten.reshape, _aten._unsafe_view, _aten.squeeze, _aten.unsqueeze, _aten.clone,
            _aten.contiguous, _aten.detach, _aten.alias, _aten._to_copy, _aten._reshape_alias,
        ),
        _same_order,
    ),
    _aten.permute: _permute,
    _aten.transpose: _transpose,
    _aten.t: _transpose,
    _aten.slice: _sliced,
    _aten.split: _parts,
    _aten.split_with_sizes: _parts,
    _aten.select: _select,
    _aten.unbind: _unbind,
    _aten.cat: _cat,
    _aten.stack: _stack,
}  # fmt: skip
