"""What an adapter has of one tensor of a model: which entries it changes and to what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from shira.adapter.checksum import DIGITS
from shira.files.errors import ArgumentError, Piece
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import ARITHMETIC, COPIED

DTYPES = (*ARITHMETIC, *COPIED)
"""The dtypes that a tensor which an adapter changes may have: float64, float32, bfloat16 and float16, which can also be
scaled, mixed and added to; and float8 (e4m3fn, e5m2 and e8m0fnu), integers of 8 to 64 bits and bool, whose entries can
only be replaced."""


@dataclass(frozen=True, eq=False)
class AdapterTensor:
    """What an adapter has of one tensor of the model.

    Attributes:
        indices: [nnz] int32 or int64, flat row-major positions in the tensor, sorted and unique.
        values: [nnz]. Of kind "replace" the new entries, in the tensor's dtype; of kind "add" what is added to the old
            ones, in the tensor's dtype or float32.
        shape: of the model's tensor.
        dtype: of the model's tensor: one of `DTYPES`.
        kind: "replace" or "add"; "add" is for float64, float32, bfloat16 and float16 alone.
        checksum: `checksum_of` the entries of the base that are changed, or None if they are not known.
    """

    indices: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "replace"
    checksum: str | None = None

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.indices.numel()

    @property
    def numel(self) -> int:
        """Number of elements of the model's tensor."""
        return math.prod(self.shape)


def check_tensor(name: str, tensor: AdapterTensor) -> None:
    """Refuses with ValueError what an adapter cannot hold, naming the tensor and the field that is wrong."""

    def refuse(field: str, message: str) -> None:
        raise ValueError(f"{name}: {field} {message}")

    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a tensor must be a string that is not empty, got {name!r}")
    if not isinstance(tensor, AdapterTensor):
        raise ValueError(f"{name}: must be an AdapterTensor, got {type(tensor).__name__}")
    if not isinstance(tensor.shape, tuple) or not all(type(size) is int and size >= 0 for size in tensor.shape):
        refuse("shape", f"must be a tuple of sizes, got {tensor.shape!r}")
    if tensor.dtype not in DTYPES:
        refuse("dtype", f"must be one of {names_of(DTYPES)}, got {tensor.dtype}")
    if tensor.kind not in ("replace", "add"):
        refuse("kind", f"must be 'replace' or 'add', got {tensor.kind!r}")
    if tensor.kind == "add" and tensor.dtype not in ARITHMETIC:
        refuse("kind", f"must be 'replace' for {tensor.dtype}, whose entries can only be replaced, got 'add'")
    if tensor.checksum is not None and not (
        isinstance(tensor.checksum, str) and re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", tensor.checksum)
    ):
        refuse("checksum", f"must be {DIGITS} hex digits or None, got {tensor.checksum!r}")
    indices, values = tensor.indices, tensor.values
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        refuse("indices", f"must be 1-D int32 or int64, got {indices.dtype} {tuple(indices.shape)}")
    if values.dtype != tensor.dtype and not (tensor.kind == "add" and values.dtype == torch.float32):
        or_more = " or torch.float32" if tensor.kind == "add" else ""
        refuse("values", f"must be {tensor.dtype}{or_more} in kind {tensor.kind!r}, got {values.dtype}")
    if values.shape != indices.shape:
        refuse("values", f"must be one per index, [{indices.numel()}], got {list(values.shape)}")
    if not indices.numel() or indices.is_meta:  # a file's description has no entries to look at
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        refuse("indices", "must be sorted and unique")
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= tensor.numel:
        refuse("indices", f"must lie in [0, {tensor.numel}), got {first if first < 0 else last}")
    check_bools(name, values)


def check_bools(name: str, values: torch.Tensor) -> None:
    """Refuses with ValueError bools of other bytes than 0 and 1, which no code reckons with."""
    if values.dtype == torch.bool and bool((as_bits(values.contiguous()) > 1).any()):
        raise ValueError(f"{name}: values must be False or True, bytes of 0 or 1")


def same_entries(one: AdapterTensor, other: AdapterTensor) -> bool:
    """Whether both make the same of a weight, bit for bit."""
    if one is other:
        return True
    return (
        (one.shape, one.dtype, one.kind, one.values.dtype) == (other.shape, other.dtype, other.kind, other.values.dtype)
        and torch.equal(one.indices, other.indices)
        and torch.equal(as_bits(one.values), as_bits(other.values))
    )


def check_strengths(name: str, dtype: torch.dtype, uses: Sequence[tuple[Piece, float]]) -> None:
    """Refuses with ValueError to scale or mix what can only be replaced.

    name, dtype: of a tensor. uses: the adapters that change it, as a message calls them, and their strengths.
    """
    if dtype in ARITHMETIC:
        return
    for adapter, strength in uses:
        if strength != 1.0:
            reason = (
                f" changes {name!r}, which is {dtype}: its entries can be replaced at strength 1 only, got {strength}"
            )
            raise ArgumentError(adapter, reason)
    if len(uses) > 1:
        reason = f" both change {name!r}, which is {dtype}: its entries can be replaced, not mixed"
        raise ArgumentError(uses[0][0], " and ", uses[1][0], reason)


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """Dtypes in a message."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
