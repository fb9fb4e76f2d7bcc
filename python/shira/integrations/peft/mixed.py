"""Batches whose rows have adapters of their own: the argument `adapter_names` of PEFT's forward and generate.

PEFT gives it to layers of LoRA; where a method has no hooks for it, the argument is dropped and all rows get the active
adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from shira.files.errors import Argument, ArgumentError
from shira.integrations.peft.entries import Kind

_BASE = "__base__"
_NAMES = Argument("adapter_names")


def enable_hooks(kind: Kind, layer_class: type[BaseTunerLayer]) -> Any:
    """A tuner's `_enable_peft_forward_hooks`: while it is open, each layer gets its rows' adapters as an argument."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        _check_names(kind, layer_class, self, names)
        # What `generate` makes of each row.
        beams = max(_option(kwargs, "num_beams"), _option(kwargs, "num_return_sequences"))
        takers = (layer_class, AuxiliaryTrainingWrapper)
        # The encoder's rows are those of the batch; beams come after it.
        encoder = _encoder_of(self.model)
        unrepeated = set(encoder.modules()) if encoder is not None else set()
        repeated = [name for name in names for _ in range(beams)]
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, takers):
                    hook = _giving(names if module in unrepeated else repeated)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    return _enable_peft_forward_hooks


def check_rows(layer: Any, x: torch.Tensor, names: Sequence[str]) -> None:
    """Raises ValueError if a layer cannot give each row of x its adapter."""
    if layer.merged:
        raise ArgumentError(_NAMES, ": an adapter is merged: call unmerge_adapter first")
    if x.shape[0] != len(names):
        raise ArgumentError(
            _NAMES,
            f": must have a name for each of the rows that a layer [{layer.out_features}, {layer.in_features}] gets, "
            f"{x.shape[0]}, got {len(names)}",
        )


def rows_by_adapter(names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Adapter -> its rows, without those of the base."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != _BASE:
            rows.setdefault(name, []).append(row)
    return {name: torch.tensor(found, device=device) for name, found in rows.items()}


def _check_names(kind: Kind, layer_class: type[BaseTunerLayer], model: nn.Module, names: Any) -> None:
    if not isinstance(names, (list, tuple)):
        raise ArgumentError(_NAMES, f": must be a list with a name for each row, got {type(names).__name__}")
    if model.training:
        raise ArgumentError(_NAMES, ": mixed batches are for evaluation: call model.eval() first")
    known = {_BASE}
    for layer in model.modules():
        if isinstance(layer, layer_class):
            known.update(kind.names(layer).keys())
    if unknown := sorted(set(names) - known):
        raise ArgumentError(_NAMES, f": no layer has the adapters {', '.join(map(repr, unknown))}")


def _option(kwargs: dict[str, Any], name: str) -> int:
    """An option of `generate`, 1 where it is not given."""
    return kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None) or 1


def _encoder_of(model: Any) -> nn.Module | None:
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # BERT as a decoder has one, too
    encoder = model.get_encoder() if is_pair and hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


def _giving(names: Sequence[str]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "adapter_names": names}

    return hook
