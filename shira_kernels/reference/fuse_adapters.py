"""fuse_adapters in plain PyTorch: the union by sorting, then each list is added where its entries are in the union."""

from __future__ import annotations

import torch

from shira_kernels.bits import as_bits
from shira_kernels.dtypes import compute_dtype


def fuse_adapters(
    indices: list[torch.Tensor], values: list[torch.Tensor], weights: torch.Tensor, policy: str = "sum"
) -> tuple[torch.Tensor, torch.Tensor]:
    index_dtype = torch.int64 if any(positions.dtype == torch.int64 for positions in indices) else torch.int32
    union = torch.cat([positions.long() for positions in indices]).unique()
    places = [torch.searchsorted(union, positions.long()) for positions in indices]
    if policy == "last":
        last = values[0].new_empty(union.numel())
        for place, entries in zip(places, values, strict=True):
            as_bits(last)[place] = as_bits(entries.resolve_neg())
        return union.to(index_dtype), last

    compute = compute_dtype(values[0].dtype)
    terms = [weight * entries.to(compute) for weight, entries in zip(weights.to(compute), values, strict=True)]
    result = torch.zeros(union.numel(), dtype=compute, device=union.device)
    for place, term in zip(places, terms, strict=True):
        result[place] += term
    if policy == "mean":
        result /= torch.cat(places).bincount(minlength=union.numel())
    if policy == "ties":
        result = _mean_of_agreeing(places, terms, result)
    return union.to(index_dtype), result.to(values[0].dtype)


def _mean_of_agreeing(places: list[torch.Tensor], terms: list[torch.Tensor], sums: torch.Tensor) -> torch.Tensor:
    """At each entry the mean of the terms whose sign is that of the sum; the sum, 0 or NaN, where there is none."""
    agreeing, number = torch.zeros_like(sums), torch.zeros_like(sums)
    for place, term in zip(places, terms, strict=True):
        agrees = ((term > 0) & (sums[place] > 0)) | ((term < 0) & (sums[place] < 0))
        agreeing[place] += torch.where(agrees, term, 0)
        number[place] += agrees
    return torch.where(number > 0, agreeing / number, sums)
