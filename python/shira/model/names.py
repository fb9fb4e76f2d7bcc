"""Names of tensors: those of the model's state dict, whatever wrappers are around the model. How names are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

_WRAPPERS = ("base_layer", "_orig_mod")  # PEFT's tuner layers, torch.compile


def canonical(name: str) -> str:
    """The name in the bare model, without what PEFT (prefix `base_model.model.`) and torch.compile add."""
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return bare.removeprefix("base_model.model.")


def first_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """The canonical name of each parameter; a tied one has its first."""
    return {parameter: canonical(name) for name, parameter in model.named_parameters()}


def resolve(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, in any of its spellings. Raises ValueError if the model has none."""
    wanted = canonical(name)
    for candidate in (name, wanted):
        try:
            return model.get_parameter(candidate)
        except AttributeError:
            pass
    for own, parameter in model.named_parameters(remove_duplicate=False):
        if canonical(own) == wanted:
            return parameter
    raise ValueError(f"the model has no parameter {name!r}")


def state_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of the model's state dict, each under all of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                yield f"{path}.{own}" if path else own, buffer


def state_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """The canonical name of each parameter, then of each buffer of the state dict; a tied one has its first."""
    names = first_names(model)
    for own, buffer in state_buffers(model):
        names.setdefault(buffer, canonical(own))
    return names


def resolve_state(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter, or buffer of the state dict, of that name in any of its spellings. Raises ValueError if the model
    has neither."""
    try:
        return resolve(model, name)
    except ValueError:
        wanted = canonical(name)
        for own, buffer in state_buffers(model):
            if canonical(own) == wanted:
                return buffer
        raise ValueError(f"the model has no parameter or buffer {name!r}") from None


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def printable(text: str) -> str:
    """In one line, and with nothing that a terminal would obey: names may come from anybody's file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
