"""scatter_switch_batched: from one adapter to another in one pass over a whole model.

It leaves the bits that these two calls leave:

    scatter_apply_batched(weights, old_offsets, old_indices, old_saved)
    scatter_apply_batched(weights, offsets, indices, values, alpha, additive, saved)

but goes over the union of both lists once. An entry only in the old list gets `old_saved`; one only in the new list is
kept in `saved` and updated; of one in both, `old_saved` is what is kept and updated.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.ops.scatter_apply_batched import check_list_contents, check_lists
from shira_kernels.reference import scatter_switch_batched as reference

OP = "scatter_switch_batched"
OLD = _checks.ListNames("old_offsets", "old_indices", "old_saved")


def form(
    weights: list[torch.Tensor],
    old_offsets: torch.Tensor,
    old_indices: torch.Tensor,
    old_saved: torch.Tensor,
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    saved: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
) -> None:
    check_lists(OP, weights, offsets, indices, values, alpha, additive, saved)
    check_lists(OP, weights, old_offsets, old_indices, old_saved, names=OLD)


def check_contents(
    weights: list[torch.Tensor],
    old_offsets: torch.Tensor,
    old_indices: torch.Tensor,
    old_saved: torch.Tensor,
    offsets: torch.Tensor,
    indices: torch.Tensor,
    *_: Any,
    wait: bool,
) -> None:
    """Checks what both lists hold, as `check_list_contents`."""
    check_list_contents(OP, weights, old_offsets, old_indices, wait=wait, names=OLD)
    check_list_contents(OP, weights, offsets, indices, wait=wait)


define(
    f"{OP}(Tensor(a!)[] weights, Tensor old_offsets, Tensor old_indices, Tensor old_saved, Tensor offsets, "
    "Tensor indices, Tensor values, Tensor(b!) saved, float alpha=1.0, bool additive=False) -> ()",
    form=form,
    contents=functools.partial(check_contents, wait=True),
    host_contents=functools.partial(check_contents, wait=False),
    reference=reference.scatter_switch_batched,
    host="Tensor",
)


def scatter_switch_batched(
    weights: list[torch.Tensor],
    old_offsets: torch.Tensor,
    old_indices: torch.Tensor,
    old_saved: torch.Tensor,
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    saved: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
) -> None:
    """Takes one adapter out of several weights and puts another in: `torch.ops.shira.scatter_switch_batched`.

    Args:
        weights: n tensors as in `scatter_apply_batched`.
        old_offsets, old_indices: [n + 1] int64 and [old nnz] int32 or int64, the list of the adapter that
            is in the weights.
        old_saved: [old nnz] in the weights' dtype, the entries from before it.
        offsets, indices, values, alpha, additive: the new adapter, as in `scatter_apply_batched`. Its indices may be
            int64 where the old ones are int32, or the reverse.
        saved: [nnz] in the weights' dtype, receives the entries from before both adapters; it shares no memory with
            any other argument, `old_saved` too.

    Raises:
        RuntimeError: as in `scatter_apply_batched`, for both lists, before anything is written.
    """
    torch.ops.shira.scatter_switch_batched(
        weights, old_offsets, old_indices, old_saved, offsets, indices, values, saved, alpha, additive
    )
