"""What ops mean, in float64 from the already rounded inputs, and how far a kernel may be from it."""

from __future__ import annotations

import torch

# Units in the last place of the weight's dtype, at the largest magnitude that the formula meets (w, the term that is
# added, or the result).
# Kernels compute in float32, rounding each of three operations: at most 1.5 for float32; for bfloat16 and float16 that
# vanishes beside the last rounding, which may fall on the other side of a tie: 1. float64 is computed as the oracle is.
ULP = {torch.float64: 0.0, torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}

_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


def scatter(w: torch.Tensor, v: torch.Tensor, alpha: float, additive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The new entries, float64, not rounded, and the largest magnitude on the way to each.

    alpha is an input like the others: of float32 where the arithmetic is.
    """
    if w.dtype != torch.float64:
        alpha = float(torch.tensor(alpha, dtype=torch.float32))
    w, v = w.double(), v.double()
    term = v * alpha if additive else (v - w) * alpha
    return w + term, torch.stack([w.abs(), term.abs(), (w + term).abs()]).amax(0)


def ulp_distance(actual: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest |actual - exact rounded to actual's dtype| in units of the last place at `scale` (magnitudes)."""
    finite = torch.finfo(actual.dtype)
    exponent = torch.frexp(scale.double().clamp(min=finite.tiny)).exponent - 1
    unit = torch.ldexp(torch.ones_like(scale, dtype=torch.float64), exponent - _MANTISSA_BITS[actual.dtype])
    distance = (actual.double() - exact.to(actual.dtype).double()).abs() / unit
    return float(distance.max()) if distance.numel() else 0.0


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the bytes of a tensor, for comparisons to the last bit."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def sorted_indices(numel: int, nnz: int, dtype: torch.dtype = torch.int64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:nnz].sort().values.to(dtype)
