"""An adapter: for each tensor of a model, which entries it changes and to what."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shira.adapter import file as adapter_file
from shira.masks.config import ShiraConfig

if TYPE_CHECKING:
    from shira.files.checkpoint import Base

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class AdapterTensor:
    """The part of an adapter that belongs to one tensor of the model.

    Attributes:
        indices: [nnz] int32 or int64, flat row-major positions in the tensor, sorted and unique.
        values: [nnz]. Of kind "replace" the new entries, in the tensor's dtype; of kind "add" what is added to the old
            ones, in the tensor's dtype or float32.
        shape: of the model's tensor.
        dtype: of the model's tensor: float64, float32, bfloat16 or float16.
        kind: "replace" or "add".
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


class Adapter(Mapping[str, AdapterTensor]):
    """A checked, read-only mapping: state-dict name of a tensor -> AdapterTensor.

    Args:
        tensors: the parts, by name.
        config: what made it, if known.
        provenance: of which adapters it was made, if of others: a JSON object, see `shira.fuse`. It is copied.

    Raises:
        ValueError: naming the tensor and the field that is wrong.
    """

    def __init__(
        self,
        tensors: Mapping[str, AdapterTensor],
        config: ShiraConfig | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        for name, tensor in tensors.items():
            _check(name, tensor)
        self._tensors = dict(tensors)
        self.config = config
        self.provenance = None if provenance is None else _json_object(provenance)

    def __getitem__(self, name: str) -> AdapterTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nnz(self) -> int:
        """Number of entries of all tensors."""
        return sum(tensor.nnz for tensor in self.values())

    @property
    def density(self) -> float:
        """nnz over the elements of the tensors that it changes; 0 if there are none."""
        return self.nnz / max(1, sum(tensor.numel for tensor in self.values()))

    def __repr__(self) -> str:
        kinds = "+".join(sorted({tensor.kind for tensor in self.values()})) or "empty"
        return f"Adapter({len(self)} tensors, {self.nnz} entries, density {self.density:.4g}, {kinds})"

    def save(self, path: str | os.PathLike[str], *, indices: bool = True, base: Base | None = None) -> None:
        """Writes one safetensors file of format "shira/1". At every moment `path` holds its old content or all of
        the new.

        Equal adapters give equal bytes. Indices come back as int32 for tensors below 2^31 elements, else as int64.

        Args:
            path: the file.
            indices: False leaves the indices out, which takes a third off a bfloat16 adapter's size, where its config
                chooses them again in the base: masks wm, small, struct and rand. Loading then needs the base.
            base: what the adapter was made for, to see that this holds: a model whose weights hold it now, a state
                dict, or the path of a safetensors file or of a folder of them, read a tensor at a time. Not used with
                indices.

        Raises:
            ValueError: a name is no name of a state dict (printable parts between dots, without slashes, of at most 512
                characters); the indices cannot be recomputed, no base is given for it, or another one.
            OSError: the file cannot be written.
        """
        adapter_file.save(self, path, indices, base)

    @staticmethod
    def load(path: str | os.PathLike[str], *, base: Base | None = None) -> Adapter:
        """Reads a file that `save` wrote, on the CPU.

        Args:
            path: the file.
            base: as in `save`, for a file without indices; not used for others.

        Raises:
            AdapterFormatError: (a ValueError) the file is cut short, damaged, or anything else but a valid adapter; or
                it has no indices, and no base is given or the mask of the base is another one.
            OSError: it cannot be read.
        """
        return adapter_file.load(path, base)


def checksum_of(entries: torch.Tensor) -> str:
    """SHA-256, the first 16 bytes in hex, of the entries' little-endian bytes in order; equal only if every bit is.

    entries: [nnz], contiguous, any dtype of 1, 2, 4 or 8 bytes, any device.
    """
    return adapter_file.checksum(adapter_file.bytes_of(entries.detach().cpu()))


def _json_object(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, as it comes back from a file."""
    if not isinstance(provenance, Mapping):
        raise ValueError(f"provenance must be a JSON object or None, got {provenance!r}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must be a JSON object: {error}") from None
    return copy


def _check(name: str, tensor: AdapterTensor) -> None:
    def refuse(field: str, message: str) -> None:
        raise ValueError(f"{name}: {field} {message}")

    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a tensor must be a string that is not empty, got {name!r}")
    if not isinstance(tensor, AdapterTensor):
        raise ValueError(f"{name}: must be an AdapterTensor, got {type(tensor).__name__}")
    if not isinstance(tensor.shape, tuple) or not all(type(size) is int and size >= 0 for size in tensor.shape):
        refuse("shape", f"must be a tuple of sizes, got {tensor.shape!r}")
    if tensor.dtype not in DTYPES:
        refuse("dtype", f"must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.kind not in ("replace", "add"):
        refuse("kind", f"must be 'replace' or 'add', got {tensor.kind!r}")
    if tensor.checksum is not None and not (
        isinstance(tensor.checksum, str) and re.fullmatch("[0-9a-f]{32}", tensor.checksum)
    ):
        refuse("checksum", f"must be 32 hex digits or None, got {tensor.checksum!r}")
    indices, values = tensor.indices, tensor.values
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        refuse("indices", f"must be 1-D int32 or int64, got {indices.dtype} {tuple(indices.shape)}")
    if values.dtype != tensor.dtype and not (tensor.kind == "add" and values.dtype == torch.float32):
        or_more = " or torch.float32" if tensor.kind == "add" else ""
        refuse("values", f"must be {tensor.dtype}{or_more} in kind {tensor.kind!r}, got {values.dtype}")
    if values.shape != indices.shape:
        refuse("values", f"must be one per index, [{indices.numel()}], got {list(values.shape)}")
    if not indices.numel() or indices.is_meta:  # of a file's description, which has no entries
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        refuse("indices", "must be sorted and unique")
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= tensor.numel:
        refuse("indices", f"must lie in [0, {tensor.numel}), got {first if first < 0 else last}")
