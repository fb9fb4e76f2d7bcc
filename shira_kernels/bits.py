"""Tensors as raw bits."""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, flat, as integers of the element's size, so that copies keep every bit of every dtype.

    `tensor` is contiguous with elements of 1, 2, 4 or 8 bytes.
    """
    return tensor.view(-1).view(_INTEGERS[tensor.element_size()])
