"""What a config means for the weights of a model: budgets, seeds, families, users' functions."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from shira import masks
from shira.masks.choose import Selection, choose_entries, tensor_seed

SCORES = {
    "wm": lambda w, g: w.abs(),
    "grad": lambda w, g: g.abs(),
    "snip": lambda w, g: (w * g).abs(),
    "small": lambda w, g: -w.abs(),
}


def make_weights(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Few different numbers, so that scores are often equal.
    return {f"layers.{i}": torch.randint(-6, 7, shape, generator=generator).float() for i, shape in enumerate(shapes)}


WEIGHTS = make_weights((30, 20), (10, 50), (8, 4, 3, 3))
GRADS = make_weights((30, 20), (10, 50), (8, 4, 3, 3), seed=1)


def config(**fields) -> shira.ShiraConfig:
    return shira.ShiraConfig("all-linear", **fields)


def counts(chosen: dict[str, torch.Tensor]) -> list[int]:
    return [indices.numel() for indices in chosen.values()]


@pytest.mark.parametrize("mask", list(masks.MASKS))
def test_budgets_of_each_weight(mask: str) -> None:
    assert counts(choose_entries(config(mask=mask, density=0.1), WEIGHTS, GRADS)) == [60, 50, 29]
    assert counts(choose_entries(config(mask=mask, k=7), WEIGHTS, GRADS)) == [7, 7, 7]
    # PEFT's rule; a convolution's columns are its input channels and both dimensions of the kernel.
    assert counts(choose_entries(config(mask=mask, r=2), WEIGHTS, GRADS)) == [100, 120, 88]


@pytest.mark.parametrize("mask", list(masks.MASKS))
def test_budgets_of_the_model(mask: str) -> None:
    for budget, total in (({"density": 0.1}, 139), ({"k": 77}, 77), ({"r": 2}, 308)):
        chosen = choose_entries(config(mask=mask, budget="model", **budget), WEIGHTS, GRADS)
        assert sum(counts(chosen)) == total
        assert list(chosen) == list(WEIGHTS)
        if mask in ("rand", "struct"):
            shares = [total * weight.numel() / 1388 for weight in WEIGHTS.values()]
            assert all(abs(count - share) <= 1 for count, share in zip(counts(chosen), shares, strict=True))


@given(
    mask=st.sampled_from(list(SCORES)),
    seed=st.integers(0, 99),
    k=st.integers(1, 60),
    skip=st.integers(0, 20),
    family=st.integers(0, 2),
    granularity=st.sampled_from([1, 2, 5]),
    order=st.permutations(range(4)),
)
def test_the_models_ranking(mask, seed, k, skip, family, granularity, order) -> None:
    """All runs of all weights, sorted at once; whatever the order in which weights come."""
    shapes = ((6, 5), (3, 7), (40,), (1, 1))
    weights, grads = make_weights(*shapes, seed=seed), make_weights(*shapes, seed=seed + 1000)
    fields = config(mask=mask, budget="model", k=k, skip=skip, family=family, granularity=granularity)
    selection = None
    ranking = []
    for name, weight in weights.items():
        score = SCORES[mask](weight, grads[name]).flatten().tolist()
        for run in range(math.ceil(len(score) / granularity)):
            ranking.append((-sum(score[run * granularity : (run + 1) * granularity]), name, run))
    ranking.sort()  # by name, as the weights are, where scores are equal
    take = max(1, round(k / granularity))
    leave = round(skip / granularity) + family * take
    if leave + take > len(ranking):
        with pytest.raises(ValueError, match="skip, family"):
            Selection(fields, weights)
        return
    selection = Selection(fields, weights)
    for i in order:
        name = list(weights)[i]
        selection.add(name, grads[name])
    expected = {
        name: [
            entry
            for run in sorted(run for _, owner, run in ranking[leave : leave + take] if owner == name)
            for entry in range(run * granularity, min((run + 1) * granularity, weights[name].numel()))
        ]
        for name in weights
    }
    assert {name: indices.tolist() for name, indices in selection.result().items()} == expected
    assert choose_entries(fields, weights, grads).keys() == expected.keys()


def test_the_models_ranking_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"{i:02}": torch.randn(100, 10) for i in range(20)}
    selection = Selection(config(budget="model", k=50), weights)
    for name in weights:
        selection.add(name, None)
        assert sum(runs.numel() for runs, _ in selection._best.values()) <= 150
    everything = torch.cat([weight.view(-1) for weight in weights.values()]).abs()
    expected = everything.topk(50).indices.sort().values
    chosen = [1000 * i + indices for i, indices in enumerate(selection.result().values())]
    assert torch.cat(chosen).tolist() == expected.tolist()


@pytest.mark.parametrize("mask", list(masks.MASKS))
@pytest.mark.parametrize("budget", [{"density": 0.013}, {"k": 11}, {"density": 0.05, "budget": "model"}])
@pytest.mark.parametrize("granularity", [1, 8])
def test_families_share_no_entry(mask: str, budget: dict, granularity: int) -> None:
    family = [
        choose_entries(config(mask=mask, family=i, granularity=granularity, **budget), WEIGHTS, GRADS) for i in range(4)
    ]
    for name in WEIGHTS:
        entries = torch.cat([chosen[name] for chosen in family])
        assert entries.unique().numel() == entries.numel()
        for chosen in family:
            runs = chosen[name].view(-1, granularity) if name != "layers.1" else chosen[name][:0].view(0, granularity)
            assert (runs[:, 0] % granularity == 0).all()
            assert (runs[:, -1] - runs[:, 0] == granularity - 1).all()
    again = choose_entries(config(mask=mask, family=3, granularity=granularity, **budget), WEIGHTS, GRADS)
    assert all(torch.equal(again[name], family[3][name]) for name in WEIGHTS)


def test_weights_of_one_shape_draw_differently() -> None:
    weights = {"a": torch.zeros(50, 50), "b": torch.zeros(50, 50)}
    chosen = choose_entries(config(mask="rand", seed=3), weights)
    assert chosen["a"].tolist() != chosen["b"].tolist()
    assert chosen["b"].tolist() == masks.rand(weights["b"], 0.01, seed=tensor_seed(3, "b")).tolist()


def test_struct_gets_its_options() -> None:
    options = {"axis": 1, "offset": 2, "diagonal": False}
    chosen = choose_entries(config(mask="struct", density=0.1, **options), WEIGHTS)
    assert torch.equal(chosen["layers.0"], masks.struct(WEIGHTS["layers.0"], 0.1, **options))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 501}, r"layers.1: k must lie in \[1, 500\].*got 501"),
        ({"r": 9}, r"layers.1: r \(rows \+ columns\), with r = 9, must lie in \[1, 500\].*got 540"),
        ({"k": 1389, "budget": "model"}, "budget: 1389 entries are more than the 1388"),
        ({"k": 260, "family": 1}, r"layers.1: skip must lie"),
        ({"mask": "grad"}, "layers.0: mask 'grad' ranks by the gradient: calibration batches are needed"),
        ({"mask": "snip", "budget": "model"}, "layers.0: mask 'snip' ranks by the gradient"),
        ({"mask": "struct", "offset": 30}, "layers.0: offset must lie in"),
    ],
)
def test_errors_name_the_weight(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        choose_entries(config(**fields), WEIGHTS)


@pytest.mark.parametrize("budget", ["tensor", "model"])
def test_nan_names_the_weight(budget: str) -> None:
    weights = {**WEIGHTS, "bad": torch.tensor([[1.0, math.nan]])}
    with pytest.raises(ValueError, match=r"^bad: NaN scores are refused"):
        choose_entries(config(budget=budget), weights)


def first_rows(weight, density, *, k=None, grad=None, seed=0, skip=0, granularity=1):
    assert k == round(density * weight.numel())
    assert not weight.requires_grad
    return torch.arange(skip, skip + k)


def test_a_users_function() -> None:
    weights = {"a": torch.nn.Parameter(torch.zeros(10, 10)), "b": torch.zeros(4, 5)}
    fields = config(mask=first_rows, density=0.1, family=1)
    chosen = choose_entries(fields, weights)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {"a": list(range(10, 20)), "b": [2, 3]}
    assert all(indices.dtype == torch.int32 for indices in chosen.values())
    loaded = shira.ShiraConfig.from_dict(fields.to_dict())
    assert isinstance(loaded.mask, str)
    assert choose_entries(loaded, weights)["a"].tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1, 1]), "got repeated ones"),
        (torch.tensor([3, 1, 3]), "got repeated ones"),
        (torch.tensor([3, 1]), "got unsorted ones"),
        (torch.tensor([1, 20]), r"must lie in \[0, 20\), got 20"),
        (torch.tensor([-1, 2]), r"must lie in \[0, 20\), got -1"),
        (torch.tensor([], dtype=torch.int64), "got none"),
        (torch.tensor([1.0, 2.0]), "must be 1-D int32 or int64, got torch.float32"),
        (torch.ones(20, dtype=torch.bool), "must be 1-D int32 or int64, got torch.bool"),
        (torch.tensor([[1, 2]]), "must be 1-D int32 or int64"),
        ([1, 2], "got list"),
        (None, "got NoneType"),
    ],
)
def test_what_a_users_function_gives_is_checked(result: object, message: str) -> None:
    def wrong(weight, density, **arguments):
        return result

    with pytest.raises(ValueError, match=rf"^layer: mask '.*wrong' must give sorted unique flat indices: {message}"):
        choose_entries(config(mask=wrong), {"layer": torch.zeros(4, 5)})


@pytest.mark.parametrize("mask", ["no.such_module:function", f"{__name__}:missing", f"{__name__}:outer.<locals>.mask"])
def test_a_function_that_cannot_be_imported(mask: str) -> None:
    with pytest.raises(ValueError, match="import failed; give ShiraConfig the function itself"):
        choose_entries(config(mask=mask), WEIGHTS)
    with pytest.raises(ValueError, match="is no function"):
        choose_entries(config(mask=f"{__name__}:WEIGHTS"), WEIGHTS)


def test_loading_a_config_imports_nothing() -> None:
    sys.modules.pop("wave", None)
    shira.ShiraConfig.from_dict({"target_modules": "all-linear", "mask": "wave:open"})
    assert "wave" not in sys.modules


def test_an_object_can_be_a_mask() -> None:
    class Own:
        def __call__(self, weight, density, **arguments):
            return masks.wm(weight, density, **arguments)

    fields = config(mask=Own(), k=3)
    assert fields.to_dict()["mask"].endswith("Own")
    assert counts(choose_entries(fields, WEIGHTS)) == [3, 3, 3]


@pytest.mark.parametrize("mask", ["struct", "rand", "wm", "small"])
def test_families_are_disjoint_whatever_skip_and_granularity_are(mask: str) -> None:
    weights = {"a": torch.randn(6, 10, generator=torch.Generator().manual_seed(0))}
    for granularity in (2, 3, 4):
        for skip in range(5):
            for k in (2, 3, 5):
                taken: set[int] = set()
                for family in range(4):
                    fields = {"k": k, "skip": skip, "family": family, "granularity": granularity}
                    chosen = choose_entries(config(mask=mask, **fields), weights)["a"].tolist()
                    assert taken.isdisjoint(chosen), fields
                    taken.update(chosen)
