"""Names of tensors: those of the model's state dict, whatever wrappers are around the model. How names are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

# Parts that wrappers put into names: PEFT's tuner layers, torch.compile, activation checkpointing, FSDP1.
_WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Wrappers whose part is a word that a model may have too, so that only a model itself tells: they hold it as `module`.
_HOLDERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
HELD = "module"


def canonical(name: str) -> str:
    """The name in the bare model, without what PEFT (prefix `base_model.model.`), torch.compile, activation
    checkpointing and FSDP add."""
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return bare.removeprefix("base_model.model.")


def canonical_in(model: nn.Module) -> Callable[[str], str]:
    """As `canonical`, for names of this model, also without the `module.` of DistributedDataParallel, DataParallel and
    AveragedModel."""
    held = [
        f"{path}.{HELD}" if path else HELD for path, module in model.named_modules() if isinstance(module, _HOLDERS)
    ]

    def bare(name: str) -> str:
        for path in reversed(held):  # the inner ones first, whose paths hold the outer ones' part
            if name == path or name.startswith(f"{path}."):
                name = (path[: -len(HELD)] + name[len(path) + 1 :]).removesuffix(".")
        return canonical(name)

    return bare if held else canonical


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside of all wrappers, or the model itself."""
    bare, found = canonical_in(model), model
    for path, module in model.named_modules():
        if path and bare(f"{path}.x") == "x":
            found = module
    return found


def first_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """The canonical name of each parameter; a tied one has its first."""
    bare = canonical_in(model)
    return {parameter: bare(name) for name, parameter in model.named_parameters()}


def resolve(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, in any of its spellings. Raises ValueError if the model has none."""
    wanted = canonical(name)
    for candidate in (name, wanted):
        try:
            return model.get_parameter(candidate)
        except AttributeError:
            pass
    bare = canonical_in(model)
    own = {bare(own): parameter for own, parameter in model.named_parameters(remove_duplicate=False)}
    # Saved from DistributedDataParallel, whose part is left out only where the model has no such name itself.
    for candidate in (wanted, bare(name), wanted.removeprefix(f"{HELD}.")):
        if candidate in own:
            return own[candidate]
    raise ValueError(f"the model has no parameter {name!r}")


def state_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of the model's state dict, each under all of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                yield f"{path}.{own}" if path else own, buffer


def state_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """The canonical name of each parameter, then of each buffer of the state dict; a tied one has its first."""
    names, bare = first_names(model), canonical_in(model)
    for own, buffer in state_buffers(model):
        names.setdefault(buffer, bare(own))
    return names


def resolve_state(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter, or buffer of the state dict, of that name in any of its spellings. Raises ValueError if the model
    has neither."""
    try:
        return resolve(model, name)
    except ValueError:
        bare = canonical_in(model)
        wanted = {canonical(name), bare(name)}
        for own, buffer in state_buffers(model):
            if bare(own) in wanted:
                return buffer
        raise ValueError(f"the model has no parameter or buffer {name!r}") from None


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def printable(text: str) -> str:
    """In one line, and with nothing that a terminal would obey: names may come from anybody's file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
