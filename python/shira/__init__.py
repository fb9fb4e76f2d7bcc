"""Sparse high-rank adapters: train 1-2 % of a model's own weights, save them, switch them in place."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shira import masks
from shira.adapter.adapter import Adapter
from shira.adapter.difference import diff
from shira.adapter.fusion import fuse
from shira.adapter.tensor import AdapterTensor
from shira.files.errors import AdapterFormatError, ShiraWarning
from shira.masks.config import ShiraConfig
from shira.serving.bank import ResidentAdapters
from shira.training.attach import Handle, attach
from shira.training.hooks import mask_gradients
from shira_kernels import ShiraAdamW

if TYPE_CHECKING:
    from shira import convert
    from shira.adapter.metrics import awom, awor, overlap
    from shira.convert.merge import merge_checkpoint

__all__ = [
    "Adapter",
    "AdapterFormatError",
    "AdapterTensor",
    "Handle",
    "ResidentAdapters",
    "ShiraAdamW",
    "ShiraConfig",
    "ShiraWarning",
    "attach",
    "awom",
    "awor",
    "convert",
    "diff",
    "fuse",
    "mask_gradients",
    "masks",
    "merge_checkpoint",
    "overlap",
]

# What neither trains nor serves loads when it is first used, so that `import shira` takes no longer for it.
_LOADED_LATER = {
    "awom": "shira.adapter.metrics",
    "awor": "shira.adapter.metrics",
    "convert": "shira.convert",
    "merge_checkpoint": "shira.convert.merge",
    "overlap": "shira.adapter.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LOADED_LATER[name])
    return module if name == "convert" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
