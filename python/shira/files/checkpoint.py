"""A base: a model, its state dict, or on disk a safetensors file or a folder of them, read one tensor at a time."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

# A model whose weights hold the base, its state dict, a safetensors file of it, or a folder of such files.
Base = Mapping[str, torch.Tensor] | nn.Module | str | os.PathLike[str]

INDEX = "model.safetensors.index.json"  # that Hugging Face models in several files have
SINGLE = "model.safetensors"


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

    Raises:
        ValueError: the folder has no such file, or both of the first two; its index or a file is damaged, or two files
            have a name in common.
        OSError: something cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            self._files = dict.fromkeys(_names(folder), folder)
            return
        if (folder / INDEX).exists() and (folder / SINGLE).exists():
            raise ValueError(f"{folder}: has both {SINGLE} and {INDEX}, which may hold different weights: remove one")
        if (folder / INDEX).exists():
            self._files = _indexed(folder / INDEX)
            return
        paths = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder}: the folder has no safetensors file")
        self._files = {}
        for path in paths:
            for name in _names(path):
                if name in self._files:
                    raise ValueError(f"{folder}: {name!r} is in {self._files[name].name} and in {path.name}")
                self._files[name] = path

    @property
    def files(self) -> Mapping[str, Path]:
        """The file that each tensor is in."""
        return self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: {name!r} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # for the usual OSError, with errno and path
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _indexed(path: Path) -> dict[str, Path]:
    try:
        files = {name: Path(file) for name, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{path}: it must be JSON with "weight_map", a file of each tensor') from None
    for file in files.values():
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{path}: it names {str(file)!r}, which does not lie in its folder")
    return {name: path.parent / file for name, file in files.items()}
