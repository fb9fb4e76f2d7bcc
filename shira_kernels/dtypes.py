"""The dtypes that the ops and the library above them choose by the same rules."""

from __future__ import annotations

import torch

ARITHMETIC = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what ops compute with

# What they only copy, bit for bit. Complex numbers and types of less than a byte are left out.
COPIED = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
)  # fmt: skip


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of flat positions in a tensor of `numel` elements: int32 below 2^31, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic with entries of `dtype` is done in: the dtype itself, and float32 at least."""
    return torch.promote_types(dtype, torch.float32)
