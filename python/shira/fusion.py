"""Fusion: what adapters add to a base, and several adapters as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shira.adapter import Adapter, AdapterTensor
from shira.attach import check_base, check_fits
from shira.names import canonical, first_names, resolve

# A model whose weights hold the base, its state dict, or one safetensors file of it.
Base = Mapping[str, torch.Tensor] | nn.Module | str | os.PathLike[str]
_Read = Callable[[], torch.Tensor]
_Find = Callable[[str], tuple[str, _Read | None]]


@torch.no_grad()
def deltas(adapter: Adapter, base: Base | None, *, force: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What an adapter adds to the base.

    Args:
        adapter: of any kind; parts of kind "add" are deltas already, those of kind "replace" need the base.
        base: the tensors that the adapter was made for, with names in any spelling; None if there is none.
        force: use the base also where its entries do not have the adapter's checksum.

    Returns:
        canonical name of the tensor -> (indices as the adapter has them, [nnz] float32, of float64 tensors float64:
        the values of kind "add", value - base of kind "replace"), on the adapter's device.

    Raises:
        ValueError: naming the tensor: a part of kind "replace" and no base, a base that lacks the tensor, has it with
            another shape or dtype, or other entries than the adapter was made for; a tensor named twice.
        OSError: the base's file cannot be read.

    Warns:
        UserWarning: a part has no checksum, so that it cannot be told whether it was made for this base.
    """
    with _opened(base) as find:
        return {
            name: (tensor.indices, _delta(label, tensor, read and read(), force))
            for name, (label, tensor, read) in _parts(adapter, find).items()
        }


def _parts(adapter: Adapter, find: _Find) -> dict[str, tuple[str, AdapterTensor, _Read | None]]:
    """Canonical name -> the adapter's own name, its part, and how to read the base's tensor."""
    parts: dict[str, tuple[str, AdapterTensor, _Read | None]] = {}
    for label, tensor in adapter.items():
        name, read = find(label)
        if name in parts:
            raise ValueError(f"{label}: the adapter names the tensor {name!r} twice")
        parts[name] = (label, tensor, read)
    return parts


def _delta(label: str, tensor: AdapterTensor, weight: torch.Tensor | None, force: bool) -> torch.Tensor:
    """[nnz] in the type that deltas are computed in."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    values = tensor.values.to(dtype)
    if weight is None:
        if tensor.kind == "replace":
            raise ValueError(f"{label}: a part of kind 'replace' becomes a delta by subtracting the base: give `base`")
        return values
    check_fits(label, tensor, weight)
    entries = entries_of(weight, tensor.indices)
    if not force:
        check_base(label, tensor, entries)
    return values if tensor.kind == "add" else values - entries.to(dtype)


def entries_of(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The weight's entries at flat `indices`, on the device of those."""
    return weight.detach().view(-1)[indices.to(weight.device)].to(indices.device)


@contextmanager
def _opened(base: Base | None) -> Iterator[_Find]:
    """Gives a function from a tensor's name to its canonical one (in a model that of its first use) and how to read it:
    one tensor at a time, for a file may hold more than memory."""
    if base is None:
        yield lambda name: (canonical(name), None)
    elif isinstance(base, nn.Module):
        model, first = base, first_names(base)

        def in_model(name: str) -> tuple[str, _Read]:
            weight = resolve(model, name)
            return first[weight], lambda: weight

        yield in_model
    elif isinstance(base, Mapping):
        yield _finder(base, base.__getitem__)
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
        raise ValueError(f"base must be a model, its state dict or the path of a safetensors file, got {base!r}")


def _finder(names: Iterable[str], tensor_of: Callable[[str], torch.Tensor]) -> _Find:
    own_names = {canonical(own): own for own in names}

    def find(name: str) -> tuple[str, _Read]:
        wanted = canonical(name)
        if wanted not in own_names:
            raise ValueError(f"{name}: the base has no tensor of this name")
        return wanted, lambda: tensor_of(own_names[wanted])

    return find
