"""A base: a model, its state dict, or on disk a safetensors file or a folder of them, read one tensor at a time."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shira.files.reading import check_inside, check_regular, read_inside

# A model whose weights hold the base, its state dict, a safetensors file of it, or a folder of such files.
Base = Mapping[str, torch.Tensor] | nn.Module | str | os.PathLike[str]

INDEX = "model.safetensors.index.json"  # that Hugging Face models in several files have
SINGLE = "model.safetensors"
_MOST_MAPPED = 2**26  # bytes
_SUBBYTE = ("F4", "F6_E2M3", "F6_E3M2")  # dtypes that cannot be cut
_START = 64  # how many elements of a tensor's first row are compared first


def open_tensors(base: Base, argument: str = "base") -> Mapping[str, torch.Tensor]:
    """The tensors of a base by their own names, those on disk read when they are asked for.

    Raises:
        ValueError: `base` is none of what a base may be, or no safetensors are there, naming the argument or the path.
        OSError: something cannot be read.
    """
    if isinstance(base, nn.Module):
        state = base.state_dict()  # which may hold more than tensors
        return {name: tensor.detach() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if isinstance(base, Mapping):
        return base
    if isinstance(base, (str, os.PathLike)):
        return TensorFolder(base)
    raise ValueError(f"{argument} must be a model, its state dict or the path of safetensors, got {base!r}")


def save_tensors(tensors: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file with the metadata of PyTorch's. Raises OSError also where safetensors has its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with open(path, "ab") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # by the umask, unlike safetensors' own
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
    os.chmod(path, mode)


class TensorFolder(Mapping[str, torch.Tensor]):
    """A folder of safetensors files, or one file, as a read-only mapping: name -> tensor, read when it is asked for.

    The files are those that `model.safetensors.index.json` lists; without one `model.safetensors`; without that, all.
    Of a folder no link is followed that leads out of it, but those of Hugging Face's cache.

    Raises:
        ValueError: the folder has no such file, or both of the first two; its index or a file is damaged, lies
            elsewhere, or is not a regular file; or two files have a name in common.
        OSError: something cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self.path = folder
        self._aliases: dict[str, str] = {}
        self._opened: tuple[Path, Any] | None = None  # the file that was read last
        self._read = 0  # bytes of its tensors
        if not folder.is_dir():
            self._files = dict.fromkeys(self._names(folder), folder)
            return
        if (folder / INDEX).exists() and (folder / SINGLE).exists():
            raise ValueError(f"{folder}: has both {SINGLE} and {INDEX}, which may hold different weights: remove one")
        if (folder / INDEX).exists():
            self._files, metadata = _indexed(folder)
            self._note_aliases(metadata, self._files)
            return
        paths = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder}: the folder has no safetensors file")
        self._files = {}
        for path in paths:
            check_inside(folder, path)
            for name in self._names(path):
                if name in self._files:
                    raise ValueError(f"{folder}: {name!r} is in {self._files[name].name} and in {path.name}")
                self._files[name] = path

    @property
    def files(self) -> Mapping[str, Path]:
        """The file that each tensor is in."""
        return self._files

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tensors that are there under one: name -> that of the tensor. They are not listed.
        `safetensors.torch.save_model` notes them in a file, `huggingface_hub.save_torch_model` in an index."""
        return self._aliases

    def __getitem__(self, name: str) -> torch.Tensor:
        with _as_value_errors(self._files[name], f"{name!r} cannot be read"):
            tensor: torch.Tensor = self._file_of(name).get_tensor(name)
        self._read += tensor.nbytes
        if self._read > _MOST_MAPPED:
            self._opened = None
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, of which nothing else is read. Errors as for the tensor itself."""
        with _as_value_errors(self._files[name], f"{name!r} cannot be read"):
            return tuple(self._file_of(name).get_slice(name).get_shape())

    def start(self, name: str) -> tuple[object, ...] | None:
        """A tensor's shape, dtype and the bytes that its first row begins with: what tells most tensors apart. None if
        it has no entries, a dtype that cannot be cut, or is not in its file. Errors as for the tensor itself."""
        from safetensors import SafetensorError

        with _as_value_errors(self._files[name], f"{name!r} cannot be read"):
            try:
                part = self._file_of(name).get_slice(name)
            except SafetensorError:
                return None
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if not shape or 0 in shape or dtype in _SUBBYTE:
                return None
            with torch.device("cpu"):  # safetensors makes a slice on the default device
                begin = part[(slice(1),) * (len(shape) - 1) + (slice(_START),)].contiguous()
            return shape, dtype, begin.view(-1).view(torch.uint8).numpy().tobytes()

    def _names(self, path: Path) -> list[str]:
        """The tensors of a file, whose aliases are noted."""
        from safetensors import safe_open

        check_regular(path)
        with open(path, "rb"):  # for the usual OSError, with errno and path
            pass
        with _as_value_errors(path, "not a whole safetensors file"), safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
        self._note_aliases(metadata, set(names))
        return names

    def _note_aliases(self, metadata: Mapping[str, object], inside: Container[object]) -> None:
        for name, kept in metadata.items():
            if isinstance(kept, str) and kept in inside and name not in inside:
                self._aliases[name] = kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _file_of(self, name: str) -> Any:
        """The file of a tensor. Opening it parses its whole header, so it stays open for many small tensors; what was
        read counts as the process's memory as long."""
        from safetensors import safe_open

        path = self._files[name]
        if self._opened is None or self._opened[0] != path:
            self._opened = path, safe_open(path, framework="pt")
            self._read = 0
        return self._opened[1]


@contextmanager
def _as_value_errors(path: Path, what: str) -> Iterator[None]:
    """What safetensors raises, and torch for a file that is too large for the machine: ValueErrors, of a line."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: {what}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _indexed(folder: Path) -> tuple[dict[str, Path], dict[str, object]]:
    """The file of each tensor, and the index's metadata."""
    path = folder / INDEX
    try:
        index = read_inside(folder, INDEX)
        files = {name: Path(file) for name, file in index["weight_map"].items()}
        metadata = index.get("metadata")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f'{path}: it must be JSON with "weight_map", a file of each tensor') from None
    for file in sorted(set(files.values())):
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{path}: it names {str(file)!r}, which does not lie in its folder")
        check_inside(folder, folder / file)
    return {name: folder / file for name, file in files.items()}, metadata if isinstance(metadata, dict) else {}
