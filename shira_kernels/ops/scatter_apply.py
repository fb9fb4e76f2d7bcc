"""scatter_apply: write listed entries of one weight in place, keeping the old ones if wanted.

    additive=False:  w <- w + alpha (v - w),  and exactly v at alpha = 1 (a copy of bits)
    additive=True:   w <- w + alpha v

for w = weight.view(-1)[indices] and v = values. Arithmetic is in float32 (float64 for float64 weights), each
operation rounded on its own, and the result is rounded once to the weight's dtype.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from shira_kernels.dtypes import ARITHMETIC
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import scatter_apply as reference

OP = "scatter_apply"


def check_entries(
    op: str,
    weight: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
    argument: str = "weight",
    names: _checks.ListNames = _checks.LIST_NAMES,
) -> None:
    """Checks the form of one weight and of its vectors."""
    _checks.check_memory(op, argument, weight)
    if weight.element_size() > 8:
        _checks.fail(op, argument, f"must have elements of 1, 2, 4 or 8 bytes, got {weight.dtype}")
    if (additive or alpha != 1.0) and weight.dtype not in ARITHMETIC:
        _checks.fail(op, argument, f"must be floating point unless entries are replaced at alpha 1, got {weight.dtype}")
    if values.dtype != weight.dtype and not (additive and values.dtype == torch.float32):
        allowed = f"{weight.dtype} or float32" if additive else f"{weight.dtype} like the weight"
        _checks.fail(op, names.values, f"must be {allowed}, got {values.dtype}")
    _checks.check_indices(op, indices, weight, names.indices)
    _checks.check_vector(op, names.values, values, weight, indices.shape[0])
    if saved is not None:
        if saved.dtype != weight.dtype:
            _checks.fail(op, "saved", f"must be {weight.dtype} like the weight, got {saved.dtype}")
        _checks.check_vector(op, "saved", saved, weight, indices.shape[0])


def contents(weight: torch.Tensor, indices: torch.Tensor, *_: Any) -> None:
    _checks.check_index_contents(OP, indices, weight.numel())


define(
    f"{OP}(Tensor(a!) weight, Tensor indices, Tensor values, float alpha=1.0, bool additive=False, "
    "Tensor(b!)? saved=None) -> ()",
    form=functools.partial(check_entries, OP),
    contents=contents,
    reference=reference.scatter_apply,
    host="()",
)


def scatter_apply(
    weight: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
) -> None:
    """Writes the listed entries of `weight` in place: the same as `torch.ops.shira.scatter_apply`.

    Args:
        weight: any shape, contiguous. Replacing at alpha 1 takes any dtype of 1, 2, 4 or 8 bytes; else float64,
            float32, bfloat16 or float16.
        indices: [nnz] int32 or int64, flat row-major positions in `weight`, sorted and unique.
        values: [nnz] in the weight's dtype; additive ones may also be float32.
        alpha: strength. `w + alpha (v - w)`, or exactly `v` at 1; additive `w + alpha v`.
        additive: whether `values` are deltas.
        saved: [nnz] in the weight's dtype, receives the old entries; `scatter_apply(weight, indices, saved)` reverts.

    Raises:
        RuntimeError: naming the argument, before anything is written: wrong dtype, shape or device, shared memory,
            an argument that requires grad outside `no_grad`, torch.func transforms; on the CPU, and on a GPU in checked
            mode, also indices that are unsorted, repeated or outside the weight. A GPU kernel otherwise skips indices
            outside.

    Tangents of forward-mode automatic differentiation are not updated.
    """
    torch.ops.shira.scatter_apply(weight, indices, values, alpha, additive, saved)
