"""scatter_apply_batched: scatter_apply for a whole model in one call, one launch on a GPU.

`offsets` cuts `indices`, `values` and `saved` into one part for each of `weights`; the meaning of each part is that of
scatter_apply. All weights share a dtype and a device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.ops.scatter_apply import check_entries
from shira_kernels.reference import scatter_apply_batched as reference

OP = "scatter_apply_batched"


def check_lists(
    op: str,
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
    names: _checks.ListNames = _checks.LIST_NAMES,
) -> None:
    """Checks the form of several weights and of their lists."""
    _checks.check_offsets(op, offsets, len(weights), weights, names.offsets)
    for i, weight in enumerate(weights):
        if weight.dtype != weights[0].dtype:
            _checks.fail(op, f"weights[{i}]", f"must be {weights[0].dtype} like weights[0], got {weight.dtype}")
        if weight.device != weights[0].device:
            _checks.fail(op, f"weights[{i}]", f"must be on {weights[0].device} like weights[0], got {weight.device}")
        check_entries(op, weight, indices, values, alpha, additive, saved, f"weights[{i}]", names)
    if not weights:
        _checks.check_indices(op, indices, indices, names.indices)
        for argument, tensor in ((names.values, values), ("saved", saved)):
            if tensor is not None:
                _checks.check_vector(op, argument, tensor, indices, indices.shape[0])


def check_list_contents(
    op: str,
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    *_: Any,
    wait: bool,
    names: _checks.ListNames = _checks.LIST_NAMES,
) -> None:
    """Checks what offsets and indices hold. Without `wait` indices stay unread, and offsets on a GPU too."""
    if not (wait or offsets.is_cpu):
        return
    borders = _checks.check_offset_contents(op, offsets, indices.numel(), names.offsets)
    for i, weight in enumerate(weights if wait else ()):
        part = indices[borders[i] : borders[i + 1]]
        _checks.check_index_contents(f"{op}: weights[{i}]", part, weight.numel(), names.indices)


define(
    f"{OP}(Tensor(a!)[] weights, Tensor offsets, Tensor indices, Tensor values, float alpha=1.0, bool additive=False, "
    "Tensor(b!)? saved=None) -> ()",
    form=functools.partial(check_lists, OP),
    contents=functools.partial(check_list_contents, OP, wait=True),
    host_contents=functools.partial(check_list_contents, OP, wait=False),
    reference=reference.scatter_apply_batched,
    host="Tensor",
)


def scatter_apply_batched(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
) -> None:
    """Writes the listed entries of several weights in place: the same as `torch.ops.shira.scatter_apply_batched`.

    Args:
        weights: n tensors of any shapes, contiguous, of one dtype and on one device, sharing no memory.
        offsets: [n + 1] int64, on the CPU or on the weights' device, rising from 0 to nnz.
        indices: [nnz] int32 or int64; entries offsets[i] to offsets[i+1] are flat positions in weights[i], sorted and
            unique there.
        values: [nnz] in the weights' dtype; additive ones may also be float32.
        alpha, additive, saved: as in `scatter_apply`; `saved` is [nnz].

    Raises:
        RuntimeError: as in `scatter_apply`, before any of the weights is written.
    """
    torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values, alpha, additive, saved)
