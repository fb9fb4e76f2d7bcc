"""Masks: exact counts, order, ties, and the documented random generator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import masks
from shira.masks import functions, hashing
from shira.masks.choose import tensor_seed

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
    monkeypatch.setattr(hashing, "_CHUNK", 64)


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


def check(
    mask: masks.Mask,
    weight: torch.Tensor,
    k: int,
    skip: int,
    granularity: int,
    ranking: list[int],
    seed: int,
    grad=None,
):
    numel = weight.numel()
    runs = math.ceil(numel / granularity)
    fits = k <= numel and round(skip / granularity) + max(1, round(k / granularity)) <= runs
    if not fits:
        with pytest.raises(ValueError, match=r"^(k|skip) must"):
            mask(weight, 0.5, k=k, skip=skip, granularity=granularity, seed=seed, grad=grad)
        return
    indices = mask(weight, 0.5, k=k, skip=skip, granularity=granularity, seed=seed, grad=grad)
    assert indices.dtype == torch.int32
    assert indices.tolist() == by_rank(ranking, numel, k, skip, granularity)


def test_the_test_vector_of_the_document() -> None:
    assert [f"{h:x}" for h in hashes(0, 2)] == ["a706dd2f4d197e6f", "b382a305f4414f5e"]
    assert masks.rand(torch.empty(4, 8), 1.0, k=5).tolist() == [5, 11, 12, 19, 26]
    assert masks.rand(torch.empty(4, 8), 1.0, k=5, skip=5).tolist() == [7, 8, 15, 29, 31]
    assert tensor_seed(0, "lm_head.weight") == 204870285910561070


def test_rand_looks_further_when_too_few_hashes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = masks.rand(torch.empty(1000), 0.5).tolist()
    real, limits = functions.hashes_up_to, []

    def keep_few(limit: int, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        limits.append(limit)
        return real(limit // 8 if len(limits) < 3 else limit, *rest)

    monkeypatch.setattr(functions, "hashes_up_to", keep_few)
    assert masks.rand(torch.empty(1000), 0.5).tolist() == expected
    assert len(limits) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", list(masks.MASKS.values()))
def test_count_and_skip_families(mask: masks.Mask, dtype: torch.dtype) -> None:
    weight, grad = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = round(0.02 * weight.numel())
    family = [mask(weight, 0.02, grad=grad, skip=i * k) for i in range(3)]
    assert all(part.numel() == k for part in family)
    assert torch.cat(family).unique().numel() == 3 * k
    if mask is not masks.struct:  # the distance of its lines depends on k
        assert torch.equal(torch.cat(family).sort().values, mask(weight, 0.02, grad=grad, k=3 * k))


@given(shapes, st.integers(0, 1000), st.sampled_from(["grad", "snip", "small"]))
@settings(max_examples=60)
def test_scored_masks_are_their_rankings(shape: tuple[int, int, int, int], seed: int, mask: str) -> None:
    numel, k, skip, granularity = shape
    weight, grad = torch.randint(-9, 10, (2, numel), generator=torch.Generator().manual_seed(seed)).float()
    score = {"grad": grad.abs(), "snip": (weight * grad).abs(), "small": -weight.abs()}[mask].tolist()
    runs = math.ceil(numel / granularity)
    totals = [sum(score[r * granularity : (r + 1) * granularity]) for r in range(runs)]
    ranking = sorted(range(runs), key=lambda r: (-totals[r], r))
    check(masks.MASKS[mask], weight, k, skip, granularity, ranking, seed=0, grad=grad)


def struct_ranking(shape: tuple[int, int], k: int, axis: int, offset: int, diagonal: bool) -> tuple[list[int], int]:
    """Every entry, as the docstring orders them, and f."""
    rows, columns = shape
    lines, width = (rows, columns) if axis == 0 else (columns, rows)
    main = min(shape) if diagonal else 0
    f = max(1, lines // max(1, math.ceil((k - main) / max(1, width - diagonal))))
    ranking = [i * columns + i for i in range(main)]
    for line in sorted(range(lines), key=lambda line: ((line - offset) % f, line)):
        for other in range(width):
            row, column = (line, other) if axis == 0 else (other, line)
            if not (diagonal and row == column):
                ranking.append(row * columns + column)
    return ranking, f


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    share=st.floats(0, 1),
    family=st.integers(0, 3),
    axis=st.sampled_from([0, 1]),
    diagonal=st.booleans(),
    granularity=st.sampled_from([1, 1, 2, 3, 8]),
    data=st.data(),
)
def test_struct_is_the_documented_ranking(rows, columns, share, family, axis, diagonal, granularity, data) -> None:
    numel = rows * columns
    take = max(1, round(max(1, round(share * numel)) / granularity))
    k = min(take * granularity, numel)
    leave = family * take
    _, f = struct_ranking((rows, columns), take * granularity, axis, 0, diagonal)
    offset = data.draw(st.integers(0, f - 1))
    ranking, _ = struct_ranking((rows, columns), take * granularity, axis, offset, diagonal)
    runs = list(dict.fromkeys(entry // granularity for entry in ranking))
    if leave + max(1, round(k / granularity)) > len(runs):
        return
    indices = masks.struct(
        torch.empty(rows, columns),
        0.5,
        k=k,
        skip=leave * granularity,
        granularity=granularity,
        axis=axis,
        offset=offset,
        diagonal=diagonal,
    )
    assert indices.tolist() == by_rank(runs, numel, k, leave * granularity, granularity)


def test_struct_has_every_fth_row_and_the_diagonal() -> None:
    weight = torch.empty(64, 64)
    chosen = torch.zeros(64, 64, dtype=torch.bool)
    chosen.view(-1)[masks.struct(weight, 0.5, k=64 + 4 * 63).long()] = True
    assert chosen.all(1).nonzero().view(-1).tolist() == [0, 16, 32, 48]
    assert chosen.diagonal().all()
    columns = torch.zeros(64, 64, dtype=torch.bool)
    columns.view(-1)[masks.struct(weight, 0.5, k=4 * 64, axis=1, offset=3, diagonal=False).long()] = True
    assert columns.all(0).nonzero().view(-1).tolist() == [3, 19, 35, 51]
    assert columns.sum() == 4 * 64
    for argument, value in (("axis", 2), ("offset", 16), ("offset", -1), ("diagonal", 1)):
        with pytest.raises(ValueError, match=f"^{argument} must"):
            masks.struct(weight, 0.5, k=64 + 4 * 63, **{argument: value})


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.02, 0.3), st.sampled_from([0, 1]), st.data())
def test_struct_masks_of_two_offsets_share_the_diagonal_only(rows, columns, density, axis, data) -> None:
    weight = torch.empty(rows, columns)
    k = max(min(rows, columns), round(density * weight.numel()))
    _, f = struct_ranking((rows, columns), k, axis, 0, True)
    first, second = data.draw(st.integers(0, f - 1)), data.draw(st.integers(0, f - 1))
    if first != second:
        a, b = (set(masks.struct(weight, 0.1, k=k, axis=axis, offset=o).tolist()) for o in (first, second))
        assert a & b == {i * columns + i for i in range(min(rows, columns))}


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_masks_by_gradient_want_a_fitting_one(mask: str) -> None:
    weight = torch.ones(3, 4)
    for grad in (None, torch.ones(4, 3), torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, device="meta")):
        with pytest.raises(ValueError, match=r"^grad must be"):
            masks.MASKS[mask](weight, 0.5, grad=grad)
    with pytest.raises(ValueError, match="NaN"):
        masks.MASKS[mask](weight, 0.5, grad=torch.full((3, 4), math.nan))


def test_snip_does_not_overflow_in_float16() -> None:
    weight, grad = torch.tensor([[60000.0, 50000.0, 1.0], [60000.0, 70.0, 80.0]]).half()
    assert masks.snip(weight, 0.5, k=1, grad=grad).tolist() == [0]
    assert masks.snip(weight.flip(0), 0.5, k=1, grad=grad.flip(0)).tolist() == [2]


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
        assert mask(torch.ones(3, 3), 0.001, grad=torch.ones(3, 3)).numel() == 1


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


@pytest.mark.parametrize("mask", [masks.wm, masks.small])
@pytest.mark.parametrize("granularity", [1, 2])
def test_nan_is_refused(mask: masks.Mask, granularity: int) -> None:
    with pytest.raises(ValueError, match="NaN scores are refused"):
        mask(torch.tensor([1.0, math.nan, 2.0]), 0.5, granularity=granularity)


@pytest.mark.parametrize("mask", list(masks.MASKS))
@pytest.mark.parametrize(
    ("argument", "value"), [("k", 1.5), ("skip", 0.5), ("granularity", 2.0), ("seed", 1.5), ("density", "all")]
)
def test_numbers_of_the_wrong_kind_are_named(mask: str, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be"):
        masks.MASKS[mask](torch.randn(10), **{"density": 0.5, argument: value})
