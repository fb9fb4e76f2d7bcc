"""scatter_apply_batched: scatter_apply for a whole model in one call, one launch on a GPU.

`offsets` cuts `indices`, `values` and `saved` into one part for each of `weights`; the meaning of each part is that of
scatter_apply. All weights share a dtype and a device.
"""

from __future__ import annotations

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
    """What can be checked of several weights and their lists without data."""
    _checks.check_offsets(op, offsets, len(weights), weights, names.offsets)
    for i, weight in enumerate(weights):
        if weight.dtype != weights[0].dtype:
            _checks.fail(op, f"weights[{i}]", f"must be {weights[0].dtype} like weights[0], got {weight.dtype}")
        if weight.device != weights[0].device:
            _checks.fail(op, f"weights[{i}]", f"must be on {weights[0].device} like weights[0], got {weight.device}")
        check_entries(op, weight, indices, values, alpha, additive, saved, f"weights[{i}]", names)


def check_list_contents(
    op: str,
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    contents: bool,
    names: _checks.ListNames = _checks.LIST_NAMES,
) -> None:
    """What offsets and indices hold. Without `contents` indices stay unread, and offsets on a GPU too."""
    if not contents and offsets.device.type != "cpu":
        return
    borders = _checks.check_offset_contents(op, offsets, indices.numel(), names.offsets)
    for i, weight in enumerate(weights if contents else ()):
        part = indices[borders[i] : borders[i + 1]]
        _checks.check_index_contents(f"{op}: weights[{i}]", part, weight.numel(), names.indices)


def fake(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
) -> None:
    check_lists(OP, weights, offsets, indices, values, alpha, additive, saved)


def check(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
    *,
    contents: bool = True,
) -> list[torch.Tensor]:
    """All that a kernel may rely on; returns what it writes. Without `contents` what a GPU holds stays unread."""
    fake(weights, offsets, indices, values, alpha, additive, saved)
    written = [(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if saved is not None:
        written.append(("saved", saved))
    _checks.check_autograd(OP, written, [("values", values)])
    _checks.check_overlap(OP, written, [("offsets", offsets), ("indices", indices), ("values", values)])
    check_list_contents(OP, weights, offsets, indices, contents)
    return [tensor for _, tensor in written]


default = define(
    f"{OP}(Tensor(a!)[] weights, Tensor offsets, Tensor indices, Tensor values, float alpha=1.0, bool additive=False, "
    "Tensor(b!)? saved=None) -> ()",
    fake=fake,
    check=check,
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
