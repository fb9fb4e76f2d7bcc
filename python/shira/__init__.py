"""Sparse high-rank adapters: train 1-2 % of a model's own weights, save them, switch them in place."""

from shira import convert, masks
from shira.adapter import Adapter, AdapterTensor
from shira.attach import Handle, attach
from shira.config import ShiraConfig
from shira.difference import diff
from shira.fusion import fuse
from shira.hooks import mask_gradients
from shira.io import AdapterFormatError
from shira.merge import merge_checkpoint
from shira.metrics import awom, awor, overlap
from shira.resident import ResidentAdapters
from shira_kernels import ShiraAdamW

__all__ = [
    "Adapter",
    "AdapterFormatError",
    "AdapterTensor",
    "Handle",
    "ResidentAdapters",
    "ShiraAdamW",
    "ShiraConfig",
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
