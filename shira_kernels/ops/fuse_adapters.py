"""fuse_adapters: several sparse deltas of one tensor as one, over the union of their entries.

For each position that one list at least has, in rising order, with terms t_k = weights[k] * values[k] of the lists k
that have it, taken in the order of the lists:

    s    = 0 + t_a + t_b + ...
    sum    s
    mean   s / the number of lists that have it
    ties   the mean of the t_k that have the sign of s (both above 0, or both below), added as s is; s where there is
           none, which is where s is 0 or NaN. TIES-merging (Yadav et al., NeurIPS 2023) elects signs so
    last   the value of the last list that has it, bit for bit; weights do not count

Arithmetic is in float32 (float64 for float64 values), each operation rounded on its own, and the result rounded once.
"""

from __future__ import annotations

from typing import Any

import torch

from shira_kernels.dtypes import ARITHMETIC
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import fuse_adapters as reference

OP = "fuse_adapters"
POLICIES = ("sum", "mean", "last", "ties")
Fused = tuple[torch.Tensor, torch.Tensor]


def form(indices: list[torch.Tensor], values: list[torch.Tensor], weights: torch.Tensor, policy: str = "sum") -> None:
    if policy not in POLICIES:
        _checks.fail(OP, "policy", f"must be one of {', '.join(POLICIES)}, got {policy!r}")
    if not indices:
        _checks.fail(OP, "indices", "must hold at least one list, got none")
    if len(values) != len(indices):
        _checks.fail(OP, "values", f"must hold one tensor per list of indices ({len(indices)}), got {len(values)}")
    dtype = values[0].dtype
    if dtype not in ARITHMETIC:
        _checks.fail(OP, "values[0]", f"must be float64, float32, bfloat16 or float16, got {dtype}")
    for k, (positions, entries) in enumerate(zip(indices, values, strict=True)):
        if positions.dtype not in _checks.INDEX_DTYPES:
            _checks.fail(OP, f"indices[{k}]", f"must be int32 or int64, got {positions.dtype}")
        _checks.check_vector(OP, f"indices[{k}]", positions, indices[0])
        if entries.dtype != dtype:
            _checks.fail(OP, f"values[{k}]", f"must be {dtype} like values[0], got {entries.dtype}")
        _checks.check_vector(OP, f"values[{k}]", entries, indices[0], positions.shape[0])
    if weights.dtype != torch.float32:
        _checks.fail(OP, "weights", f"must be float32, got {weights.dtype}")
    _checks.check_vector(OP, "weights", weights, indices[0])
    if weights.shape[0] != len(indices):
        _checks.fail(OP, "weights", f"must have one number per list ({len(indices)}), got {weights.shape[0]}")


def contents(indices: list[torch.Tensor], *_: Any) -> None:
    for k, positions in enumerate(indices):
        if not bool((positions[1:] > positions[:-1]).all()):
            _checks.fail(OP, f"indices[{k}]", "must be sorted and unique")
        if positions.numel() and int(positions[0]) < 0:
            _checks.fail(OP, f"indices[{k}]", f"must not be negative, got {int(positions[0])}")


def fake(indices: list[torch.Tensor], values: list[torch.Tensor], *_: Any) -> Fused:
    union = torch.library.get_ctx().new_dynamic_size()
    wide = any(positions.dtype == torch.int64 for positions in indices)
    return indices[0].new_empty(union, dtype=torch.int64 if wide else torch.int32), values[0].new_empty(union)


define(
    f'{OP}(Tensor[] indices, Tensor[] values, Tensor weights, str policy="sum") -> (Tensor, Tensor)',
    form=form,
    fake=fake,
    contents=contents,
    reference=reference.fuse_adapters,
)


def fuse_adapters(
    indices: list[torch.Tensor], values: list[torch.Tensor], weights: torch.Tensor, policy: str = "sum"
) -> Fused:
    """Several sparse deltas of one tensor as one: the same as `torch.ops.shira.fuse_adapters`.

    Args:
        indices: K lists, at least one, each [nnz_k] int32 or int64: flat positions in the tensor, sorted and unique.
        values: K deltas, each [nnz_k], one per index; all float64, float32, bfloat16 or float16.
        weights: [K] float32, the strength of each.
        policy: "sum": the weighted sum of those that have the entry. "mean": that sum, divided by the number of
            adapters that have the entry (not by K, nor by their weights). "ties": the mean of the weighted deltas whose
            sign is that of the weighted sum, 0 where that is 0. "last": the value of the last adapter that has the
            entry, bit for bit; the weights do not count.

    Returns:
        [n] int64 if any list is, else int32: the positions that at least one list has, sorted; and [n] in the dtype of
        the values: computed in float32 (float64 for float64) in the order of the lists and rounded once. Always the
        same bits for the same input.

    Raises:
        RuntimeError: naming the argument: no list, wrong dtype, shape, device or policy, values or weights that require
            grad outside `no_grad` (the op is not differentiable); on the CPU, and on a GPU in checked mode, also
            indices that are negative, unsorted or repeated. The op does not know the tensor's size: indices beyond it
            are found where the result is applied.
    """
    result: Fused = torch.ops.shira.fuse_adapters(indices, values, weights, policy)
    return result
