"""scatter_apply in plain PyTorch: gather, compute, index_copy_. Deterministic, since indices are unique."""

from __future__ import annotations

import torch

from shira_kernels.bits import as_bits
from shira_kernels.dtypes import compute_dtype


def scatter_apply(
    weight: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    alpha: float = 1.0,
    additive: bool = False,
    saved: torch.Tensor | None = None,
) -> None:
    indices, old, new = changes(weight, indices, values, alpha, additive)
    if saved is not None:
        as_bits(saved).copy_(old)
    as_bits(weight).index_copy_(0, indices, new)


def changes(
    weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, alpha: float, additive: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives int64 indices, and the bits there now and then: all that takes memory, before anything is written."""
    indices = indices.long()
    old = as_bits(weight)[indices]
    if not additive and alpha == 1.0:
        return indices, old, as_bits(values)
    compute = compute_dtype(weight.dtype)
    w, v = old.view(weight.dtype).to(compute), values.to(compute)
    new = w + v * alpha if additive else w + (v - w) * alpha
    return indices, old, as_bits(new.to(weight.dtype))
