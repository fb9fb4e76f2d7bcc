"""What it takes to read other tools' formats: the base's tensors, the adapter's as they are found, PEFT's config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shira.adapter.base import BaseTensors, entries_of
from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import DTYPES, AdapterTensor, names_of, same_entries
from shira.files.checkpoint import Base, TensorFolder
from shira.files.reading import check_inside, read_inside
from shira_kernels.bits import gathered
from shira_kernels.dtypes import ARITHMETIC, index_dtype

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"  # of PEFT
_MOST_CONFIG = 2**22  # bytes


class Weights:
    """The base's tensors as these formats need them, by canonical name.

    Args:
        base: what the adapter was made for.
        trusted: take its entries' checksums, since the formats have none.
    """

    def __init__(self, base: Base, *, trusted: bool = False) -> None:
        self._tensors, self._trusted = BaseTensors(base), trusted

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses with ValueError names that the base lacks, before tensors are read."""
        for name in names:
            if name not in self._tensors:
                raise ValueError(f"{name}: the base has no tensor of this name")

    def __getitem__(self, name: str) -> torch.Tensor:
        self.check_names([name])
        weight = self._tensors[name]
        if weight.dtype not in DTYPES:
            raise ValueError(f"{name}: the base's tensor is {weight.dtype}, which no adapter can hold")
        return weight

    def uses(self, name: str) -> list[str]:
        """All names of a tensor in the model, the given one first."""
        return self._tensors.uses(name)

    def arithmetic(self, name: str) -> torch.Tensor:
        """A tensor that changes are added to. Raises ValueError for one whose entries can only be replaced."""
        weight = self[name]
        if weight.dtype not in ARITHMETIC:
            raise ValueError(f"{name}: the base's tensor must be {names_of(ARITHMETIC)}, got {weight.dtype}")
        return weight

    def tensor(
        self, name: str, weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, kind: str
    ) -> AdapterTensor:
        """An adapter's tensor of positions in any order; that none is there twice is left to Adapter to check."""
        check_count(name, indices.numel(), weight)
        indices, order = whole(name, indices).reshape(-1).sort()
        if values.shape != order.shape:
            raise ValueError(f"{name}: there are {order.numel()} indices, but values of shape {list(values.shape)}")
        if indices.numel() and not 0 <= int(indices[0]) <= int(indices[-1]) < weight.numel():
            raise ValueError(f"{name}: indices must lie in [0, {weight.numel()})")
        checksum = checksum_of(entries_of(weight, indices)) if self._trusted else None
        indices = indices.to(index_dtype(weight.numel()))
        return AdapterTensor(
            indices, gathered(values.contiguous(), order), tuple(weight.shape), weight.dtype, kind, checksum
        )


class Found(Mapping[str, AdapterTensor]):
    """The tensors of an adapter as they are found in a file, which must not have one twice."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, dict[str, AdapterTensor]()

    def __setitem__(self, name: str, tensor: AdapterTensor) -> None:
        if name in self._tensors:
            raise ValueError(f"{self._path}: it has the tensor {name!r} twice")
        self._tensors[name] = tensor

    def __getitem__(self, name: str) -> AdapterTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def check_count(name: str, count: int, weight: torch.Tensor) -> None:
    """Refuses with ValueError more positions than a weight has entries, before they are read: of a file that says so,
    they might be more than memory holds."""
    if count > weight.numel():
        raise ValueError(f"{name}: there are {count} indices, but the weight has {weight.numel()} entries")


def tied_once(
    path: Path, tensors: Mapping[str, AdapterTensor], uses: Callable[[str], list[str]], *, each: bool = True
) -> dict[str, AdapterTensor]:
    """An adapter's tensors, of which each tied one is there once.

    Args:
        uses: gives all names of a tensor, the given one first.
        each: a name means that use of a tied tensor alone, so that all of them must change, and in the same way; else
            it means the tensor.

    Raises ValueError for changes that a tied tensor cannot have.
    """
    kept: dict[str, AdapterTensor] = {}
    done: set[str] = set()
    for name, tensor in tensors.items():
        names = uses(name)
        if name not in done:
            kept[name] = tensor
        done.update(names[1:])
        for use in names[1:]:
            if use not in tensors and not each:
                continue
            if use in tensors and same_entries(tensors[use], tensor):
                continue
            what = f"{name} and {use} differently" if use in tensors else f"{name} and not {use}"
            reason = "which are one tensor in the base: give a base that has two, with tie_word_embeddings false"
            raise ValueError(f"{path}: the adapter changes {what}, {reason}")
    return kept


def whole(name: str, positions: torch.Tensor) -> torch.Tensor:
    """Positions as int64. Refuses with ValueError what is not a whole number."""
    if not torch.equal(positions.long().to(positions.dtype), positions):
        raise ValueError(f"{name}: positions must be whole numbers")
    return positions.long()


def peft_config(folder: Path) -> dict[str, Any]:
    """The config of a folder of PEFT. Raises ValueError, and OSError if it cannot be read."""
    config = read_inside(folder, CONFIG, _MOST_CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(f'{folder / CONFIG}: it must have "peft_type", a string')
    return config


def peft_tensors(folder: Path) -> TensorFolder:
    """The tensors of a folder of PEFT. Raises ValueError, and OSError if they cannot be read."""
    check_inside(folder, folder / WEIGHTS)
    return TensorFolder(folder / WEIGHTS)
