"""scatter_apply_batched in plain PyTorch: what scatter_apply does, for all weights before any is written."""

from __future__ import annotations

import torch

from shira_kernels.bits import as_bits
from shira_kernels.reference.scatter_apply import changes


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
    parts = [slice(borders[i], borders[i + 1]) for i in range(len(weights))]
    found = [
        changes(weight, indices[part], values[part], alpha, additive)
        for weight, part in zip(weights, parts, strict=True)
    ]
    for weight, part, (places, old, new) in zip(weights, parts, found, strict=True):
        if saved is not None:
            as_bits(saved[part]).copy_(old)
        as_bits(weight).index_copy_(0, places, new)
