"""topk_indices in plain PyTorch: the k-th largest score is the threshold, and of those at it the first are taken."""

from __future__ import annotations

import torch

from shira_kernels.dtypes import index_dtype


def topk_indices(score: torch.Tensor, k: int) -> torch.Tensor:
    dtype = index_dtype(score.numel())
    if k == 0:
        return torch.empty(0, dtype=dtype, device=score.device)
    score = score.resolve_neg().reshape(-1)
    threshold = score.topk(k, sorted=False).values.min()
    chosen = score > threshold
    ties = (score == threshold).nonzero().view(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().view(-1).to(dtype)
