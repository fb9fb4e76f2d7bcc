"""extract_changed: where two tensors differ, and what the second holds there.

    indices = the positions i at which the bits of base.view(-1)[i] and tuned.view(-1)[i] differ, sorted
    values  = tuned.view(-1)[indices]

Bits are compared, not numbers: -0 and +0 differ, equal NaNs do not, and writing the values at the indices of a copy of
`base` gives `tuned` bit for bit. Positions are row-major in the tensors' shape, whatever their strides.
"""

from __future__ import annotations

import torch

from shira_kernels.dtypes import index_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import extract_changed as reference

OP = "extract_changed"
Changed = tuple[torch.Tensor, torch.Tensor]


def form(base: torch.Tensor, tuned: torch.Tensor) -> None:
    if base.element_size() > 8:
        _checks.fail(OP, "base", f"must have elements of 1, 2, 4 or 8 bytes, got {base.dtype}")
    if tuned.dtype != base.dtype:
        _checks.fail(OP, "tuned", f"must be {base.dtype} like base, got {tuned.dtype}")
    if tuned.shape != base.shape:
        _checks.fail(OP, "tuned", f"must have the shape of base, {tuple(base.shape)}, got {tuple(tuned.shape)}")
    if tuned.device != base.device:
        _checks.fail(OP, "tuned", f"must be on {base.device} like base, got {tuned.device}")


def fake(base: torch.Tensor, tuned: torch.Tensor) -> Changed:
    changed = torch.library.get_ctx().new_dynamic_size()
    return base.new_empty(changed, dtype=index_dtype(base.numel())), tuned.new_empty(changed)


define(
    f"{OP}(Tensor base, Tensor tuned) -> (Tensor, Tensor)",
    form=form,
    fake=fake,
    reference=reference.extract_changed,
)


def extract_changed(base: torch.Tensor, tuned: torch.Tensor) -> Changed:
    """Where two tensors differ, and what the second holds there: the same as `torch.ops.shira.extract_changed`.

    Args:
        base: any shape and strides, elements of 1, 2, 4 or 8 bytes.
        tuned: of the same shape, dtype and device.

    Returns:
        [nnz] the row-major positions at which the bits differ, sorted; int32 for tensors below 2^31 elements, else
        int64. And [nnz], the entries of `tuned` there, bit for bit. So -0 differs from +0, and a NaN only from NaNs of
        other bits.

    Raises:
        RuntimeError: naming the argument: other shapes, dtypes or devices, or one that requires grad outside `no_grad`
            (the op is not differentiable).
    """
    result: Changed = torch.ops.shira.extract_changed(base, tuned)
    return result
