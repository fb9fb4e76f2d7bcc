"""The dtypes that the ops and the library above them choose by the same rules."""

from __future__ import annotations

import torch

ARITHMETIC = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what ops compute with


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of flat positions in a tensor of `numel` elements: int32 below 2^31, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic with entries of `dtype` is done in: the dtype itself, and float32 at least."""
    return torch.promote_types(dtype, torch.float32)
