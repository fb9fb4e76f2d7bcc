"""topk_indices against torch.topk.

Scores are magnitudes of normal numbers, as of a weight; they are far larger than the cache. What torch.topk gives with
`sorted=False` is in no order of position and its ties are not the lowest, so its side does less. The copy of the scores
is there for scale: they must be read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness.compare import Place, Side
from harness.machine import cache_bytes

from shira_kernels import backends

topk_indices = torch.ops.shira.topk_indices
NUMEL = 58_720_256  # one weight of 14336 x 4096
DENSITY = 0.01
DTYPES = ["bfloat16", "float32"]


def check(score: torch.Tensor, k: int) -> None:
    """Asserts k sorted, unique indices with the values of torch.topk; of equals at the threshold the first win."""
    indices = topk_indices(score, k).long()
    assert indices.numel() == k
    assert bool((indices.diff() > 0).all())
    values = score.topk(k, sorted=False).values
    assert torch.equal(score[indices].sort().values, values.sort().values)
    threshold = values.min()
    ties = (score == threshold).nonzero().view(-1)
    taken = indices[score[indices] == threshold]
    assert torch.equal(taken, ties[: len(taken)])


def mask(score: torch.Tensor, k: int) -> torch.Tensor:
    """What mask wm does: the magnitudes first."""
    return topk_indices(score.abs(), k)


@pytest.mark.parametrize("density", [DENSITY, 0.05])
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk(compare: Callable[..., None], place: Place, dtype: str, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(NUMEL, generator=generator).to(getattr(torch, dtype)).abs_().to(place.device)
    slots = [scores] * math.ceil(1 + 2 * cache_bytes(place.device) / scores.nbytes)
    k = round(density * NUMEL)
    target = torch.empty_like(scores)
    ours = partial(topk_indices, k=k)
    read = scores.nbytes + 4 * k
    sides: dict[str, Side] = {
        "topk_indices": Side(ours, read),
        "abs, then topk_indices": Side(partial(mask, k=k), 3 * scores.nbytes + 4 * k),
        "torch.topk": Side(lambda score: score.topk(k, sorted=False), scores.nbytes + 10 * k),
        "copy of the scores": Side(target.copy_, 2 * scores.nbytes),
    }
    if place.device == "cpu" and backends.extension is not None:
        for isa in ("base", "avx2"):
            if isa in backends.extension.runnable_isas():
                sides[f"topk_indices, {isa}"] = Side(ours, read, partial(backends.use, "cpu", isa))
    compare(
        sides,
        ours="topk_indices",
        baselines=["torch.topk"],
        slots=slots,
        check=lambda: check(scores, k),
        place=place,
        group=f"Select the largest of {NUMEL / 1e6:.1f} M scores",
        label=f"{place}, {dtype}, {density:.0%}",
        info=facts(dtype, density, k),
    )


def facts(dtype: str, density: float, nnz: int) -> dict[str, Any]:
    return {"dtype": dtype, "density": density, "nnz": nnz}
