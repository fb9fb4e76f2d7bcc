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
    bits = as_bits(weight)
    indices = indices.long()
    old = bits[indices]
    if saved is not None:
        as_bits(saved).copy_(old)
    if not additive and alpha == 1.0:
        bits.index_copy_(0, indices, as_bits(values))
        return
    compute = compute_dtype(weight.dtype)
    w, v = old.view(weight.dtype).to(compute), values.to(compute)
    new = w + v * alpha if additive else w + (v - w) * alpha
    bits.index_copy_(0, indices, as_bits(new.to(weight.dtype)))
