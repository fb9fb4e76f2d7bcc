"""The base that an adapter was made for: its tensors by canonical name, and whether they are the right ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import AdapterTensor
from shira.files.checkpoint import Base, open_tensors
from shira.files.errors import ArgumentError, Piece, warn
from shira.model.names import canonical, state_buffers, state_names
from shira_kernels.bits import gathered


class BaseTensors(Mapping[str, torch.Tensor]):
    """A base's tensors by canonical name, in its order; those on disk are read when they are asked for.

    Nothing that was read is kept, so a base may hold more than memory does.

    Args:
        base: a model whose weights hold it, its state dict, or the path of a safetensors file or of a folder of them.
        argument: what messages call it.

    Raises:
        ValueError: `base` is none of these, or no whole safetensors are there.
        OSError: something cannot be read.
    """

    def __init__(self, base: Base, argument: str = "base") -> None:
        self._tensors, self._argument = open_tensors(base, argument), argument
        self._own = {canonical(own): own for own in self._tensors}
        self._first_uses: dict[str, str] | None = None
        if isinstance(base, nn.Module):
            first = state_names(base)
            state = itertools.chain(base.named_parameters(remove_duplicate=False), state_buffers(base))
            self._first_uses = {canonical(own): first[tensor] for own, tensor in state}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._own[name]].detach()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._own

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def own_name(self, name: str) -> str:
        """What the base itself calls the tensor of this canonical name."""
        return self._own[name]

    def find(self, name: str) -> str:
        """The canonical name of an adapter's tensor, given in any spelling; in a model that of the parameter's first
        use. Raises ValueError if the base lacks it."""
        wanted = canonical(name)
        if self._first_uses is not None:
            wanted = self._first_uses.get(wanted, "")
            if wanted not in self._own:
                raise ValueError(f"the model has no parameter or buffer {name!r}")
        elif wanted not in self._own:
            raise ValueError(f"{name}: the base has no tensor of this name")
        return wanted

    def check_names(self) -> None:
        """Refuses with ValueError a base that has two tensors of one canonical name."""
        if len(self._own) == len(self._tensors):
            return
        seen: dict[str, str] = {}
        for own in self._tensors:
            name = canonical(own)
            if name in seen:
                raise ValueError(f"{self._argument} has the tensor {name!r} twice: as {seen[name]!r} and as {own!r}")
            seen[name] = own

    def aliases(self) -> dict[str, str]:
        """Of tensors that share their memory with an earlier one, the name of the first; of a base in memory only."""
        if not isinstance(self._tensors, dict):  # of a file: tensors there have memory of their own
            return {}
        first: dict[tuple[Any, ...], str] = {}
        aliases = {}
        for name, tensor in self.items():
            if tensor.numel() and not tensor.is_meta and tensor.layout == torch.strided:
                memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if first.setdefault(memory, name) != name:
                    aliases[name] = first[memory]
        return aliases


def check_fits(name: Piece, tensor: AdapterTensor, weight: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor of another shape or dtype than the model's, and a weight that cannot
    be written in place."""
    if tuple(weight.shape) != tensor.shape:
        raise ArgumentError(name, f": the adapter's shape is {tensor.shape}, the model's {tuple(weight.shape)}")
    if weight.dtype != tensor.dtype:
        raise ArgumentError(name, f": the adapter's dtype is {tensor.dtype}, the model's {weight.dtype}")
    if weight.is_meta:
        raise ArgumentError(name, ": the model's tensor is on the meta device and holds no data")
    if weight.layout != torch.strided:
        raise ArgumentError(name, f": the model's tensor must be dense, got {weight.layout}")
    if not weight.is_contiguous():
        raise ArgumentError(name, f": the model's tensor must be contiguous, got strides {weight.stride()}")


def check_base(name: Piece, tensor: AdapterTensor, base: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor that was made for other base entries; warns if that is not known."""
    if tensor.checksum is None:
        warn(name, ": no checksum, so the adapter may belong to another base")
    elif tensor.checksum != checksum_of(base):
        raise ArgumentError(name, ": the adapter belongs to another base: the entries it changes have another checksum")


def entries_of(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The weight's entries at flat `indices`, on the device of those."""
    return gathered(weight.detach(), indices.to(weight.device)).to(indices.device)
