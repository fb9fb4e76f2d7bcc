"""Masks: exact counts, order, ties, and the documented random generator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import masks
from shira.attach import tensor_seed

GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z %= 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def hashes(seed: int, count: int) -> list[int]:
    key = mix(seed + GAMMA)
    return [mix(key + (i + 1) * GAMMA) for i in range(count)]


def by_rank(ranking: list[int], numel: int, k: int, skip: int, granularity: int) -> list[int]:
    """The mask that a ranking of runs means."""
    take, leave = max(1, round(k / granularity)), round(skip / granularity)
    runs = sorted(ranking[leave : leave + take])
    return [i for run in runs for i in range(run * granularity, min((run + 1) * granularity, numel))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_CHUNK", 64)


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(0, 300), st.sampled_from([1, 1, 2, 3, 8]))


@given(shapes, st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 2.0, -2.0, math.inf]), min_size=300, max_size=300))
@settings(deadline=None, max_examples=60)
def test_wm_is_the_ranking_by_magnitude_and_index(shape: tuple[int, int, int, int], numbers: list[float]) -> None:
    numel, k, skip, granularity = shape
    weight = torch.tensor(numbers[:numel])
    runs = math.ceil(numel / granularity)
    score = [sum(map(abs, numbers[:numel][r * granularity : (r + 1) * granularity])) for r in range(runs)]
    ranking = sorted(range(runs), key=lambda r: (-score[r], r))
    check(masks.wm, weight, k, skip, granularity, ranking, seed=0)


@given(shapes, st.integers(-(2**65), 2**65))
@settings(deadline=None, max_examples=60)
def test_rand_is_the_documented_ranking(shape: tuple[int, int, int, int], seed: int) -> None:
    numel, k, skip, granularity = shape
    runs = math.ceil(numel / granularity)
    ranking = sorted(range(runs), key=hashes(seed, runs).__getitem__)
    check(masks.rand, torch.empty(numel), k, skip, granularity, ranking, seed)


def check(mask: masks.Mask, weight: torch.Tensor, k: int, skip: int, granularity: int, ranking: list[int], seed: int):
    numel = weight.numel()
    runs = math.ceil(numel / granularity)
    fits = k <= numel and round(skip / granularity) + max(1, round(k / granularity)) <= runs
    if not fits:
        with pytest.raises(ValueError, match=r"^(k|skip) must"):
            mask(weight, 0.5, k=k, skip=skip, granularity=granularity, seed=seed)
        return
    indices = mask(weight, 0.5, k=k, skip=skip, granularity=granularity, seed=seed)
    assert indices.dtype == torch.int32
    assert indices.tolist() == by_rank(ranking, numel, k, skip, granularity)


def test_the_test_vector_of_the_document() -> None:
    assert [f"{h:x}" for h in hashes(0, 2)] == ["a706dd2f4d197e6f", "b382a305f4414f5e"]
    assert masks.rand(torch.empty(4, 8), 1.0, k=5).tolist() == [5, 11, 12, 19, 26]
    assert masks.rand(torch.empty(4, 8), 1.0, k=5, skip=5).tolist() == [7, 8, 15, 29, 31]
    assert tensor_seed(0, "lm_head.weight") == 204870285910561070


def test_rand_looks_further_when_too_few_hashes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = masks.rand(torch.empty(1000), 0.5).tolist()
    real, limits = masks._hashes_up_to, []

    def keep_few(limit: int, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        limits.append(limit)
        return real(limit // 8 if len(limits) < 3 else limit, *rest)

    monkeypatch.setattr(masks, "_hashes_up_to", keep_few)
    assert masks.rand(torch.empty(1000), 0.5).tolist() == expected
    assert len(limits) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", list(masks.MASKS.values()))
def test_count_and_skip_families(mask: masks.Mask, dtype: torch.dtype) -> None:
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = round(0.02 * weight.numel())
    family = [mask(weight, 0.02, skip=i * k) for i in range(3)]
    assert all(part.numel() == k for part in family)
    assert torch.cat(family).unique().numel() == 3 * k
    assert torch.equal(torch.cat(family).sort().values, mask(weight, 0.02, k=3 * k))


def test_masks_of_views_follow_the_shape() -> None:
    weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)).t()
    assert masks.wm(weight, 0.3).tolist() == masks.wm(weight.contiguous(), 0.3).tolist()


def test_seeds_and_names_give_other_masks() -> None:
    weight = torch.empty(64, 64)
    assert masks.rand(weight, 0.1, seed=0).tolist() != masks.rand(weight, 0.1, seed=1).tolist()
    assert tensor_seed(0, "a") != tensor_seed(0, "b")
    assert tensor_seed(0, "a") != tensor_seed(1, "a")


def test_at_least_one_entry() -> None:
    for mask in masks.MASKS.values():
        assert mask(torch.ones(3, 3), 0.001).numel() == 1


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(4), {"density": 0.0}, "density"),
        (torch.ones(4), {"density": 1.5}, "density"),
        (torch.ones(4), {"density": 0.5, "k": 5}, "k must"),
        (torch.ones(4), {"density": 0.5, "k": 0}, "k must"),
        (torch.ones(4), {"density": 0.5, "skip": 3}, "skip"),
        (torch.ones(4), {"density": 0.5, "skip": -1}, "skip"),
        (torch.ones(4), {"density": 0.5, "granularity": 0}, "granularity"),
        (torch.ones(0), {"density": 0.5}, "weight"),
        (torch.ones(4, dtype=torch.int32), {"density": 0.5}, "weight"),
        (torch.ones(4, device="meta"), {"density": 0.5}, "weight"),
    ],
)
def test_bad_arguments(weight: torch.Tensor, arguments: dict, message: str) -> None:
    for mask in masks.MASKS.values():
        with pytest.raises(ValueError, match=f"^{message}"):
            mask(weight, **arguments)


def test_wm_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        masks.wm(torch.tensor([1.0, math.nan, 2.0]), 0.5)


@pytest.mark.parametrize("mask", ["wm", "rand"])
@pytest.mark.parametrize(
    ("argument", "value"), [("k", 1.5), ("skip", 0.5), ("granularity", 2.0), ("seed", 1.5), ("density", "all")]
)
def test_numbers_of_the_wrong_kind_are_named(mask: str, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        masks.MASKS[mask](torch.randn(10), **{"density": 0.5, argument: value})
