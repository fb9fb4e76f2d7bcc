"""The modules of a model: who uses a weight, and what kind of layer that is."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

Users = Mapping[torch.Tensor, list[tuple[str, nn.Module, str]]]


def users_of(model: nn.Module) -> Users:
    """For each parameter the modules that have it, in the model's order: their names and what they call it."""
    users: dict[torch.Tensor, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for role, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append((name, module, role))
    return users


def is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear or transformers' Conv1D, or a subclass."""
    return _linear_kind_of(module) is not None


def is_transposed(module: nn.Module) -> bool | None:
    """Whether a linear layer's weight is [in, out]; None for another layer, or one with a forward of its own."""
    kind = _linear_kind_of(module)
    return None if kind is None or type(module).forward is not kind.forward else kind is not nn.Linear


def _linear_kind_of(module: nn.Module) -> type[nn.Module] | None:
    """nn.Linear, or transformers' Conv1D, or None."""
    for kind in (nn.Linear, transformers_conv1d()):
        if kind is not None and isinstance(module, kind):
            return kind
    return None


def is_bypassed(module: nn.Module) -> bool:
    """nn.MultiheadAttention reads the weight of its out_proj, and never calls it."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def bypassed(model: nn.Module) -> set[nn.Module]:
    """Layers whose weights their owners read without calling them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            found.update((module.linear1, module.linear2))
        elif is_bypassed(module):
            found.add(module)
    return found


def sharded(weight: torch.Tensor) -> str | None:
    """Gives what a parameter is that several processes share (a DTensor), None for a whole one."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if kind is None or not isinstance(weight, kind):
        return None
    return "it is a DTensor, of which each process holds a shard (fully_shard of FSDP2, or tensor parallelism)"


def transformers_conv1d() -> type[nn.Module] | None:
    """A module of that class can only be there if its file was imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
