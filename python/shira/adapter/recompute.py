"""Files without indices: those of some masks are what the config chooses in the base, so they need not be stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shira.adapter.base import BaseTensors, check_base, entries_of
from shira.adapter.header import TensorHeader, shown
from shira.adapter.tensor import AdapterTensor
from shira.files.checkpoint import Base
from shira.files.errors import Argument, ArgumentError
from shira.masks.choose import Selection
from shira.masks.config import ShiraConfig

RECOMPUTABLE = ("wm", "small", "struct", "rand")  # masks that the base and the config tell


def check_recomputable(tensors: Mapping[str, AdapterTensor], config: ShiraConfig | None, base: Base | None) -> None:
    """Refuses with ValueError tensors whose indices the base and the config do not give, or of another base."""
    for name, indices in recomputed(tensors, config, base).items():
        if not torch.equal(indices.long(), tensors[name].indices.cpu().long()):
            raise ValueError(f"{name!r}: its indices are not those that the config chooses in this base")
    assert base is not None
    weights = BaseTensors(base)
    for name, tensor in tensors.items():
        check_base(name, tensor, entries_of(weights.of_shape(weights.find(name), tensor.shape), tensor.indices))


def recomputed(
    tensors: Mapping[str, AdapterTensor | TensorHeader], config: ShiraConfig | None, base: Base | None
) -> dict[str, torch.Tensor]:
    """name -> the indices that the config chooses in the base, on the CPU. One tensor of the base is read at a time.

    Raises ValueError if the config's mask is not RECOMPUTABLE, there is no base, or it has other tensors.
    """
    if config is None or config.mask_name not in RECOMPUTABLE:
        raise ValueError(
            f"indices can be left out only for the masks {', '.join(RECOMPUTABLE)}, which can be recomputed, "
            f"got {'no config' if config is None else 'mask ' + repr(config.mask_name)}"
        )
    if base is None:
        raise ArgumentError("indices that are left out are recomputed from the base: give ", Argument("base"))
    if tensors and config.granularity > max(tensor.numel for tensor in tensors.values()):
        raise ValueError(f"config: granularity must not exceed the largest tensor, got {shown(config.granularity)}")
    one = torch.empty((), device="meta")
    try:
        selection = Selection(config, {name: one.expand(tensor.shape) for name, tensor in tensors.items()})
        weights = BaseTensors(base)
        for name, tensor in tensors.items():
            weight = weights.of_shape(weights.find(name), tensor.shape)
            if tuple(weight.shape) != tensor.shape or weight.dtype != tensor.dtype:
                found = f"{weight.dtype} {tuple(weight.shape)}"
                raise ValueError(f"{name}: the adapter's tensor is {tensor.dtype} {tensor.shape}, the base's {found}")
            selection.add(name, None, weight)
            del weight  # before the next is read
        return {name: indices.cpu() for name, indices in selection.result().items()}
    except (ValueError, OverflowError) as error:
        raise ValueError(f"the mask cannot be recomputed: {error}") from None
