"""scatter_apply_batched in plain PyTorch: one scatter_apply for each weight."""

from __future__ import annotations

import torch

from shira_kernels.reference.scatter_apply import scatter_apply


def scatter_apply_batched(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
) -> None:
    borders = offsets.tolist()
    for i, weight in enumerate(weights):
        part = slice(borders[i], borders[i + 1])
        scatter_apply(
            weight, indices[part], values[part], alpha, additive, saved=None if saved is None else saved[part]
        )
