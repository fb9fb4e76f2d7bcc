"""The modules of a model: who uses a weight, and what kind of layer that is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType

import torch
from torch import nn

_FORWARDS = ("forward", "_call_impl")  # functions that run while a module is called

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
    return None if kind is None or not has_forward_of(module, kind) else kind is not nn.Linear


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's class has the forward that `kind` was written with: neither one of its own, nor one that was
    put in its place later."""
    forward = kind.forward
    written = forward.__module__ == kind.__module__ and not hasattr(forward, "__wrapped__")
    return written and type(module).forward is forward


def is_inside_a_forward() -> bool:
    """Whether a module's forward is running, here or again for a checkpoint in a backward."""
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _FORWARDS:
            return True
        frame = frame.f_back
    return torch._C._current_graph_task_id() != -1


def _linear_kind_of(module: nn.Module) -> type[nn.Module] | None:
    """nn.Linear, or transformers' Conv1D, or None."""
    for kind in (nn.Linear, transformers_conv1d()):
        if kind is not None and isinstance(module, kind):
            return kind
    return None


def bypassed(model: nn.Module) -> set[nn.Module]:
    """Layers of torch's own modules whose weights their owners read without calling them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            found.update((module.linear1, module.linear2))
        elif isinstance(module, nn.MultiheadAttention):
            found.add(module.out_proj)
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
