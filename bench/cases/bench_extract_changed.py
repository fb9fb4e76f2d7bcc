"""extract_changed against a comparison, `nonzero` and a gather.

Base and tuned are weights far larger than the cache; random entries differ. The baseline compares numbers, so its side
gives the same result only where no -0 and no NaN is: none is here. The copy of one tensor is there for scale: both must
be read once.
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

Pair = tuple[torch.Tensor, torch.Tensor]
NUMEL = 58_720_256  # one weight of 14336 x 4096
DTYPES = ["bfloat16", "float32"]


def ours(pair: Pair) -> Pair:
    return torch.ops.shira.extract_changed(*pair)  # type: ignore[no-any-return]


def by_nonzero(pair: Pair) -> Pair:
    base, tuned = pair
    indices = (base != tuned).nonzero().view(-1)
    return indices, tuned[indices]


def check(pair: Pair) -> None:
    for mine, theirs in zip(ours(pair), by_nonzero(pair), strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))


@pytest.mark.parametrize("density", [0.01, 0.05])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extract(compare: Callable[..., None], place: Place, dtype: str, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(NUMEL, generator=generator).add_(1).to(getattr(torch, dtype))
    differs = torch.rand(NUMEL, generator=generator) < density
    pair = (base.to(place.device), torch.where(differs, -base, base).to(place.device))
    nnz = int(differs.sum())
    slots = [pair] * math.ceil(1 + 2 * cache_bytes(place.device) / (2 * base.nbytes))
    target = torch.empty_like(pair[0])
    moved = 2 * base.nbytes + nnz * (4 + base.element_size())
    sides: dict[str, Side] = {
        "extract_changed": Side(ours, moved),
        "(a != b).nonzero() and a gather": Side(by_nonzero, moved + 2 * NUMEL + 12 * nnz),
        "(a != b).nonzero()": Side(lambda pair: (pair[0] != pair[1]).nonzero(), 2 * base.nbytes + 2 * NUMEL + 8 * nnz),
        "copy of one tensor": Side(lambda pair: target.copy_(pair[0]), 2 * base.nbytes),
    }
    if place.device == "cpu" and backends.extension is not None:
        for isa in ("base", "avx2"):
            if isa in backends.extension.runnable_isas():
                sides[f"extract_changed, {isa}"] = Side(ours, moved, partial(backends.use, "cpu", isa))
    compare(
        sides,
        ours="extract_changed",
        baselines=["(a != b).nonzero() and a gather", "(a != b).nonzero()"],
        slots=slots,
        check=lambda: check(pair),
        place=place,
        group=f"Entries that differ, of {NUMEL / 1e6:.1f} M",
        label=f"{place}, {dtype}, {density:.0%}",
        info=facts(dtype, density, nnz),
    )


def facts(dtype: str, density: float, nnz: int) -> dict[str, Any]:
    return {"dtype": dtype, "density": density, "nnz": nnz}
