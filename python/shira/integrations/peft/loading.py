"""Adapters are loaded without the random mask, whose positions the file's take the place of at once."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.shira.mask_functions import random_mask

from shira.files.errors import ArgumentError

Method = Callable[..., Any]

_is_loading: ContextVar[bool] = ContextVar("_is_loading", default=False)


def create_and_replace(original: Method) -> Method:
    """ShiraModel's: while an adapter is loaded, the config's random mask is not drawn."""

    def _create_and_replace(self: Any, shira_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_loading.get() or shira_config.mask_fn is not random_mask:
            return original(self, shira_config, *args, **kwargs)
        shira_config.mask_fn = None
        try:
            return original(self, shira_config, *args, **kwargs)
        finally:
            shira_config.mask_fn = random_mask

    return _create_and_replace


def from_pretrained(original: Any) -> Any:
    """PeftModel's class method."""

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _loading():
            return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def load_adapter(original: Method) -> Method:
    """PeftModel's: layers that are left without positions are refused, and an adapter that is refused is not kept."""
    signature = inspect.signature(original)

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = signature.bind(self, *args, **kwargs).arguments["adapter_name"]
        is_new = adapter not in self.peft_config
        try:
            with _loading():
                result = original(self, *args, **kwargs)
            _check(self, adapter)
        except BaseException:
            if is_new and _is_shira(self, adapter):
                self.delete_adapter(adapter)
            raise
        return result

    return load_adapter


def _check(model: Any, adapter: str) -> None:
    if not _is_shira(model, adapter):
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, ShiraLayer) or adapter not in layer.shira_weight:
            continue
        check_positions(name, layer, adapter, layer.shira_indices.get(adapter))


def check_positions(name: str, layer: Any, adapter: str, source: torch.Tensor | None) -> None:
    """Raises ArgumentError, with the layer's name, if a file's positions for a layer are absent or do not fit."""
    count = layer.shira_weight[adapter].numel()
    if source is None:
        raise ArgumentError(
            f"{name}: the file of adapter {adapter!r} has no positions (shira_indices) for this layer: was it made "
            "for other target_modules?"
        )
    if source.shape != (2, count):
        raise ArgumentError(
            f"{name}: the file of adapter {adapter!r} has positions {list(source.shape)} for this layer, which "
            f"needs [2, {count}]"
        )
    low, high = torch.aminmax(source, dim=1)
    limits = torch.tensor([layer.out_features, layer.in_features], device=source.device)
    if bool((low < 0).any()) or bool((high >= limits).any()):
        raise ArgumentError(
            f"{name}: the file of adapter {adapter!r} has positions outside of this layer's weight "
            f"{limits.tolist()}: was it made for another model?"
        )


def _is_shira(model: Any, adapter: str) -> bool:
    config = model.peft_config.get(adapter)
    return config is not None and config.peft_type == "SHIRA"


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)
