"""scatter_switch_batched in plain PyTorch: one scatter_apply_batched for each list."""

from __future__ import annotations

import torch

from shira_kernels.reference.scatter_apply_batched import scatter_apply_batched


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
    scatter_apply_batched(weights, old_offsets, old_indices, old_saved)
    scatter_apply_batched(weights, offsets, indices, values, alpha, additive, saved)
