"""Tensors as raw bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Gives the tensor's memory, flat, as integers of the element's size, so that copies keep every bit of every dtype.

    `tensor` is contiguous with elements of 1, 2, 4 or 8 bytes.
    """
    return flat(tensor).view(_INTEGERS[tensor.element_size()])


def gathered(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gives the elements of a contiguous tensor at flat int32 or int64 `indices`, of any dtype: torch's own gathers
    lack some."""
    return as_bits(tensor).index_select(0, indices).view(tensor.dtype)


def joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Gives the elements of tensors of one dtype in one vector, of any dtype. There is at least one tensor."""
    tensors = list(tensors)
    return torch.cat([as_bits(tensor.contiguous()) for tensor in tensors]).view(tensors[0].dtype)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Gives the memory of a contiguous tensor in one dimension; a view of one that is flat costs more than this."""
    return tensor if tensor.dim() == 1 else tensor.view(-1)
