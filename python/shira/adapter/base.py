"""The base that an adapter was made for: its tensors by canonical name, and whether they are the right ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shira.adapter.adapter import AdapterTensor, checksum_of
from shira.files.checkpoint import Base, TensorFolder
from shira.model.names import canonical, first_names, resolve

Read = Callable[[], torch.Tensor]
Find = Callable[[str], tuple[str, Read | None]]


def check_fits(name: str, tensor: AdapterTensor, weight: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor of another shape or dtype than the model's, and a weight that cannot
    be written in place."""
    if tuple(weight.shape) != tensor.shape:
        raise ValueError(f"{name}: the adapter's shape is {tensor.shape}, the model's {tuple(weight.shape)}")
    if weight.dtype != tensor.dtype:
        raise ValueError(f"{name}: the adapter's dtype is {tensor.dtype}, the model's {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name}: the model's tensor is on the meta device and holds no data")
    if not weight.is_contiguous():
        raise ValueError(f"{name}: the model's tensor must be contiguous, got strides {weight.stride()}")


def check_base(name: str, tensor: AdapterTensor, base: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor that was made for other base entries; warns if that is not known."""
    if tensor.checksum is None:
        warnings.warn(f"{name}: no checksum, so the adapter may belong to another base", stacklevel=3)
    elif tensor.checksum != checksum_of(base):
        raise ValueError(f"{name}: the adapter belongs to another base: the entries it changes have another checksum")


def entries_of(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The weight's entries at flat `indices`, on the device of those."""
    return weight.detach().view(-1).index_select(0, indices.to(weight.device)).to(indices.device)


@contextmanager
def opened(base: Base | None) -> Iterator[Find]:
    """Gives a function from a tensor's name to its canonical one (in a model that of its first use) and how to read it:
    one tensor at a time, for a file may hold more than memory."""
    if base is None:
        yield lambda name: (canonical(name), None)
    elif isinstance(base, nn.Module):
        model, first = base, first_names(base)

        def in_model(name: str) -> tuple[str, Read]:
            weight = resolve(model, name)
            return first[weight], lambda: weight

        yield in_model
    elif isinstance(base, Mapping):
        yield _finder(base, base.__getitem__)
    elif isinstance(base, (str, os.PathLike)) and os.path.isdir(base):
        folder = TensorFolder(base)
        yield _finder(folder, folder.__getitem__)
    elif isinstance(base, (str, os.PathLike)):
        from safetensors import SafetensorError, safe_open

        with open(base, "rb"):  # for the usual OSError, with errno and path
            pass
        try:
            file = safe_open(base, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(base)}: not a whole safetensors file: {error}") from None
        with file:
            yield _finder(file.keys(), file.get_tensor)
    else:
        raise ValueError(f"base must be a model, its state dict or the path of safetensors, got {base!r}")


def _finder(names: Iterable[str], tensor_of: Callable[[str], torch.Tensor]) -> Find:
    own_names = {canonical(own): own for own in names}

    def find(name: str) -> tuple[str, Read]:
        wanted = canonical(name)
        if wanted not in own_names:
            raise ValueError(f"{name}: the base has no tensor of this name")
        return wanted, lambda: tensor_of(own_names[wanted])

    return find
