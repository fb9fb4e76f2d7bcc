"""Sparse high-rank adapters: train 1-2 % of a model's own weights, save them, switch them in place."""

from shira import convert, masks
from shira.adapter.adapter import Adapter
from shira.adapter.difference import diff
from shira.adapter.fusion import fuse
from shira.adapter.metrics import awom, awor, overlap
from shira.adapter.tensor import AdapterTensor
from shira.convert.merge import merge_checkpoint
from shira.files.errors import AdapterFormatError, ShiraWarning
from shira.masks.config import ShiraConfig
from shira.serving.bank import ResidentAdapters
from shira.training.attach import Handle, attach
from shira.training.hooks import mask_gradients
from shira_kernels import ShiraAdamW

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
