"""Rankings of a weight's entries: how many to take, by which scores, and which those are."""

from __future__ import annotations

import math

import torch

from shira_kernels import topk_indices
from shira_kernels.dtypes import ARITHMETIC, compute_dtype, index_dtype


def budget(
    weight: torch.Tensor, density: float, k: int | None, seed: int, skip: int, granularity: int
) -> tuple[int, int]:
    """Returns how many runs to take, and how many of the ranking to leave out before them. Raises ValueError."""
    if weight.dtype not in ARITHMETIC or weight.is_meta or not weight.numel():
        raise ValueError(
            "weight must be float64, float32, bfloat16 or float16 and hold data, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    numel = weight.numel()
    for argument, value in (("k", 1 if k is None else k), ("skip", skip), ("granularity", granularity), ("seed", seed)):
        if type(value) is not int:
            raise ValueError(f"{argument} must be a whole number, got {value!r}")
    if k is None:
        if type(density) not in (int, float) or not 0.0 < density <= 1.0:
            raise ValueError(f"density must be above 0 and at most 1, got {density!r}")
        k = max(1, round(density * numel))
    if not 1 <= k <= numel:
        raise ValueError(f"k must lie in [1, {numel}], the number of elements, got {k}")
    if granularity < 1:
        raise ValueError(f"granularity must be at least 1, got {granularity}")
    count = math.ceil(numel / granularity)
    take, leave = max(1, round(k / granularity)), round(skip / granularity)
    if skip < 0 or leave + take > count:
        raise ValueError(f"skip must lie in [0, {(count - take) * granularity}], so that k entries follow, got {skip}")
    return take, leave


def needs_gradient(mask: object) -> bool:
    """Whether the mask of this name ranks by the gradient."""
    return isinstance(mask, str) and mask in ("grad", "snip")


def run_scores(mask: str, weight: torch.Tensor, grad: torch.Tensor | None, granularity: int) -> torch.Tensor:
    """Returns [runs]: the scores by which wm, grad, snip and small rank the runs of a weight, the largest first.

    A run's score is the sum of its entries' scores, in at least float32. Raises ValueError for a wrong `grad`.
    """
    weight = weight.detach()
    if needs_gradient(mask):
        if not isinstance(grad, torch.Tensor):
            raise ValueError(f"grad must be given: mask {mask!r} ranks by the gradient")
        if grad.shape != weight.shape or grad.device != weight.device or not grad.is_floating_point():
            raise ValueError(
                f"grad must be floating point {tuple(weight.shape)} on {weight.device} like the weight, "
                f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
            )
        grad = grad.detach()
    if mask == "grad":
        assert grad is not None
        score = grad.abs()
    elif mask == "snip":
        assert grad is not None
        compute = compute_dtype(torch.promote_types(weight.dtype, grad.dtype))
        score = torch.mul(weight.to(compute), grad).abs_()
    else:
        score = weight.abs()
        score = score.neg_() if mask == "small" else score
    score = score.reshape(-1)
    if granularity > 1:
        score = score.to(compute_dtype(score.dtype))
        score = torch.nn.functional.pad(score, (0, -score.numel() % granularity)).view(-1, granularity).sum(1)
    return score


def top_runs(score: torch.Tensor, leave: int, take: int) -> torch.Tensor:
    """Returns the numbers of the runs that follow the first `leave` of the ranking by score, `take` of them.

    Of equal scores the lower run's is first. The result is sorted, int64. Raises ValueError for NaN scores.
    """
    first = _top(score, leave + take)
    if not leave:
        return first
    kept = torch.ones(first.numel(), dtype=torch.bool, device=score.device)
    kept[torch.searchsorted(first, _top(score, leave))] = False
    return first[kept]


def _top(score: torch.Tensor, k: int) -> torch.Tensor:
    refused = False
    try:
        top = topk_indices(score, k).long()
        # NaN comes first where the op does not refuse it, on a GPU.
        refused = score.device.type != "cpu" and bool(score[top].isnan().any())
    except RuntimeError:
        if not bool(score.isnan().any()):
            raise
        refused = True
    if refused:
        raise ValueError("NaN scores are refused: neither weight nor grad may hold NaN (or infinity times 0)")
    return top


def first_runs(entries: torch.Tensor, granularity: int) -> torch.Tensor:
    """Ranks runs by their first entries: returns the run of each entry of a ranking, each run once."""
    if granularity == 1:
        return entries
    runs, position = (entries // granularity).unique(return_inverse=True)
    places = torch.arange(entries.numel(), device=entries.device)
    first = torch.full_like(runs, entries.numel()).scatter_reduce_(0, position, places, "amin")
    return runs[first.argsort()]


def entries_of(runs: torch.Tensor, granularity: int, weight: torch.Tensor) -> torch.Tensor:
    """Returns the flat positions of the entries of the given runs (int64, sorted)."""
    if granularity > 1:
        runs = (runs[:, None] * granularity + torch.arange(granularity, device=runs.device)).view(-1)
        runs = runs[runs < weight.numel()]
    return runs.to(index_dtype(weight.numel()))
