"""A base on disk: the weights of a safetensors file, or of a folder of them, read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

INDEX = "model.safetensors.index.json"  # of Hugging Face models in several files
SINGLE = "model.safetensors"


class TensorFolder(Mapping[str, torch.Tensor]):
    """A folder of safetensors files as a read-only mapping: name -> tensor, read when it is asked for.

    The files are those that `model.safetensors.index.json` lists; without one `model.safetensors`; without that, all.

    Raises:
        ValueError: the folder has no such file, its index or a file is damaged, or two files have a name in common.
        OSError: something cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
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

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _indexed(path: Path) -> dict[str, Path]:
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        return {name: path.parent / file for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{path}: it must be JSON with "weight_map", a file of each tensor') from None
