"""An adapter: for each tensor of a model, which entries it changes and to what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from shira.adapter import file
from shira.adapter.tensor import AdapterTensor, check_tensor
from shira.files.checkpoint import Base
from shira.masks.config import ShiraConfig


class Adapter(Mapping[str, AdapterTensor]):
    """A checked, read-only mapping: state-dict name of a tensor -> AdapterTensor.

    Args:
        tensors: what the adapter has of each tensor, by name.
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
            check_tensor(name, tensor)
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
        """Writes one safetensors file of format "shira/1", or "shira/1.1" if it has tensors of float8, integers or
        bool. At every moment `path` holds its old content or all of the new. A file that is replaced keeps its
        permissions.

        Equal adapters give equal bytes. Indices come back as int32 for tensors below 2^31 elements, else as int64.

        Args:
            path: the file.
            indices: False leaves the indices out, which takes a third off a bfloat16 adapter's size, where its config
                chooses them again in the base: masks wm, small, struct and rand. Loading then needs the base.
            base: what the adapter was made for, to see that this holds: a model whose weights hold it now, a state
                dict, or the path of a safetensors file or of a folder of them, read a tensor at a time. Not used with
                indices.

        Raises:
            ValueError: a name is not one of a state dict (printable parts between dots, without slashes, of at most 512
                characters); the indices cannot be recomputed, no base is given for it, or another one; at `path` is a
                folder, a FIFO, a device or a socket.
            OSError: the file cannot be written.
        """
        file.write(path, file.Content(self, self.config, self.provenance, has_indices=indices), base)

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
        content = file.read(path, base)
        adapter = Adapter(content.tensors, content.config)
        adapter.provenance = content.provenance  # which was just parsed, so it need not be copied and checked again
        return adapter


def describe(path: str | os.PathLike[str]) -> tuple[Adapter, bool]:
    """What a file's header says, as an adapter of tensors on the meta device, and whether the file has indices.

    Only the header is read and checked. Raises AdapterFormatError or OSError.
    """
    content = file.describe(path)
    return Adapter(content.tensors, content.config, content.provenance), content.has_indices


def _json_object(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, as it comes back from a file."""
    if not isinstance(provenance, Mapping):
        raise ValueError(f"provenance must be a JSON object or None, got {provenance!r}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must be a JSON object: {error}") from None
    return copy
