"""What could be wrong in bench/studies/fusion without anyone noticing: what is fused, unequal sizes, resuming."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from studies.fusion.plan import DOMAINS, METHODS, QUICK, Pair, Recipe, Results, Trial

import shira


@pytest.fixture(scope="module")
def fusion() -> ModuleType:
    return importlib.import_module("studies.fusion.run")


@pytest.fixture(scope="module")
def settings(fusion: ModuleType) -> Any:
    return dataclasses.replace(QUICK, steps=1, batch=1)


@pytest.fixture(scope="module")
def task(fusion: ModuleType) -> Iterator[Any]:
    """The real base on noise: what it learns does not matter here. On one thread, as the command runs."""
    generator = torch.Generator().manual_seed(0)

    def part() -> torch.Tensor:
        return torch.randint(256, (512,), generator=generator, dtype=torch.uint8)

    from shira.cli.demo import base

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fusion.Task(base.load_base(), {domain: fusion.Text(part(), part(), part()) for domain in DOMAINS})
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(fusion: ModuleType, task: Any, settings: Any) -> dict[str, dict[str, Any]]:
    """Both adapters of each method, each trained for a step."""
    return {
        method.name: {
            domain: fusion.train(task, recipe, domain, 3e-2, 0, settings)
            for recipe, domain in zip(method.recipes, DOMAINS, strict=True)
        }
        for method in METHODS
    }


def test_all_adapters_hold_equally_many_numbers(pairs: dict[str, dict[str, Any]], settings: Any) -> None:
    expected = 4 * settings.rank * (4 * (256 + 256) + 3 * (256 + 640))
    assert {trained.numbers for pair in pairs.values() for trained in pair.values()} == {expected}


def test_what_two_adapters_share(fusion: ModuleType, pairs: dict[str, dict[str, Any]], settings: Any) -> None:
    def share(name: str) -> float | None:
        return fusion.shared(*(trained.adapter for trained in pairs[name].values()))

    diagonals = 7 * 256 / (settings.rank * (4 * (256 + 256) + 3 * (256 + 640)))
    assert share("SHiRA wm, overlapping") == 1.0
    assert share("SHiRA wm, non-overlapping") == 0.0
    assert share("SHiRA struct") == pytest.approx(diagonals)
    assert 0.0 < share("SHiRA snip") < 1.0  # type: ignore[operator]
    assert share("LoRA") is None


def test_no_adapter_is_trained_twice(
    fusion: ModuleType, task: Any, pairs: dict[str, dict[str, Any]], settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_fit", None)
    first = fusion.train(task, Recipe("wm"), "cpp", 3e-2, 0, settings)
    assert first is pairs["SHiRA wm, overlapping"]["cpp"] is pairs["SHiRA wm, non-overlapping"]["cpp"]


@pytest.mark.parametrize("name", ["LoRA", "SHiRA wm, overlapping", "SHiRA struct"])
@torch.no_grad()
def test_each_state_is_the_base_and_its_deltas(
    fusion: ModuleType, task: Any, pairs: dict[str, dict[str, Any]], settings: Any, name: str
) -> None:
    """Against weights that are put together here, densely."""
    adapters = {domain: trained.adapter for domain, trained in pairs[name].items()}
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    ids = task.texts["cpp"].test[None, :64].long()
    expected = {}
    for state, strengths in fusion.states(settings).items():
        for key, weight in task.model.named_parameters():
            for domain, strength in strengths.items():
                weight += strength * _delta(adapters[domain], key, before[key])
        expected[state] = task.model(input_ids=ids).logits
        task.model.load_state_dict(before)
    base = task.model(input_ids=ids).logits
    seen = []
    for state, model in fusion.applied(task, adapters, settings):
        torch.testing.assert_close(model(input_ids=ids).logits, expected[state], atol=2e-4, rtol=1e-4)
        assert (expected[state] - base).abs().max() > 0.05
        seen.append(state)
    assert seen == ["cpp", "prose", "0.5", "1"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.state_dict().items())


def _delta(adapter: Any, key: str, base: torch.Tensor) -> torch.Tensor:
    delta = torch.zeros_like(base)
    if isinstance(adapter, shira.Adapter):
        if key in adapter:
            entries = adapter[key].indices.long()
            delta.view(-1)[entries] = adapter[key].values - base.view(-1)[entries]
        return delta
    prefix = "base_model.model." + key.removesuffix(".weight")
    if f"{prefix}.lora_A.weight" in adapter:
        delta += adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]  # alpha = rank: scaling 1
    return delta


def test_the_parts_of_a_domain_do_not_overlap(fusion: ModuleType, settings: Any) -> None:
    text = fusion._text("prose", settings)
    assert text.validation.numel() == settings.validation_bytes
    assert text.test.numel() == settings.test_bytes
    assert text.train.numel() + text.validation.numel() == settings.train_bytes
    # By position: licences of one family resemble each other across documents, and which there are depends on what is
    # installed.
    heldout_bytes = 16 * settings.test_bytes
    split = fusion.corpus.load("prose", train_bytes=settings.train_bytes, heldout_bytes=heldout_bytes)
    assert torch.equal(torch.cat([text.train, text.validation]), split.train)
    heldout = bytes(split.heldout.tolist())
    assert all(bytes(window.tolist()) in heldout for window in text.test.split(fusion.base.CONTEXT))


def test_too_little_text(fusion: ModuleType, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = fusion.corpus.Split(*torch.zeros(2, 1500, dtype=torch.uint8))
    monkeypatch.setattr(fusion.corpus, "load", lambda *_, **__: few)
    with pytest.raises(fusion.StudyError, match="too little text of domain 'prose'"):
        fusion._text("prose", settings)


def _fake_trained(fusion: ModuleType, done: list[Any]) -> Any:
    """Adapters that the middle learning rate makes best."""

    def fake(task: Any, recipe: Any, domain: str, lr: float, seed: int, _: Any) -> Any:
        done.append((recipe, domain, lr, seed))
        if len(done) == 5:
            raise KeyboardInterrupt
        return fusion.Trained({}, float("nan") if lr == recipe.learning_rates[0] else lr)

    return fake


def test_an_interrupted_command_goes_on(
    fusion: ModuleType, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that are there are not done again, pairs train with the best rates, and a report is written at the end."""
    done: list[Any] = []
    score = {"cpp": 2.0, "prose": 2.0}
    better = {"cpp": 1.5, "prose": 1.5}
    monkeypatch.setattr(fusion, "train", _fake_trained(fusion, done))
    monkeypatch.setattr(fusion, "load_task", lambda _: task)
    monkeypatch.setattr(fusion, "applied", lambda *_: [(state, None) for state in fusion.states(QUICK)])
    monkeypatch.setattr(fusion, "_scores", lambda model, _: better if model is None else score)
    with pytest.raises(KeyboardInterrupt):
        fusion.command(tmp_path, quick=True)
    fusion.command(tmp_path, quick=True)
    pairs = [pair for method in METHODS for pair in zip(method.recipes, DOMAINS, strict=True)]
    trials = sum(len(recipe.learning_rates) for recipe, _ in set(pairs))
    assert all(lr == recipe.learning_rates[1] for recipe, _, lr, _ in done[trials + 1 :])
    assert len(done) == trials + 1 + 2 * len(METHODS) * len(QUICK.seeds)
    assert (tmp_path / "fusion.png").read_bytes().startswith(b"\x89PNG")
    assert "numbers mean nothing" in (tmp_path / "report.md").read_text()
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_every_adapter_tries_as_many_learning_rates(fusion: ModuleType, settings: Any, tmp_path: Path) -> None:
    plans = Results(tmp_path / "results.json", settings).missing()
    tried = [(plan.recipe, plan.domain) for plan in plans if isinstance(plan, Trial)]
    assert len({tried.count(key) for key in tried}) == 1
    assert len(set(tried)) == 9  # wm's C++ adapter is that of both its methods
    assert len(set(map(str, plans))) == len(plans)


def test_a_pair_with_another_rate_than_the_best_is_done_again(
    fusion: ModuleType, settings: Any, tmp_path: Path
) -> None:
    """As when a learning rate was added to the trials, and won."""
    results = Results(tmp_path / "results.json", settings)
    method = METHODS[0]
    results.add({"method": method.name, "seed": 0, "lr": dict.fromkeys(DOMAINS, method.recipes[0].learning_rates[0])})
    for recipe, domain in zip(method.recipes, DOMAINS, strict=True):
        assert Pair(method, 0) in results.missing()
        for lr in recipe.learning_rates:
            results.add({"recipe": recipe.name, "domain": domain, "lr": lr, "validation": 2 + lr})
    assert Pair(method, 0) not in results.missing()
    results.runs[-1]["validation"] = 1.0
    assert Pair(method, 0) in results.missing()


def test_drop_and_its_share(fusion: ModuleType) -> None:
    report = fusion.report
    row = report.Row(
        "LoRA",
        1,
        None,
        single=[{"cpp": 0.5, "prose": 0.1}, {"cpp": 0.4, "prose": 0.2}],
        other=[{"cpp": -0.1, "prose": 0.0}, {"cpp": 0.2, "prose": 0.0}],
        fused={"0.5": [], "1": [{"cpp": 0.3, "prose": 0.0}, {"cpp": 0.4, "prose": 0.2}]},
    )
    assert row.drop() == pytest.approx([0.15, 0.0])
    assert row.interaction() == pytest.approx([-0.1, -0.1])
    assert row.lost() == pytest.approx([0.5, 0.0])


def test_results_of_other_settings_are_refused(
    fusion: ModuleType, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "results.json"
    Results(path, settings).write()
    assert set(json.loads(path.read_text())["header"]) == {"settings", "versions"}
    monkeypatch.setattr(sys, "argv", ["fusion", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        fusion.main()
    assert "belongs to other settings" in capsys.readouterr().err


def test_a_report_needs_all_runs(
    fusion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["fusion", "--output", str(tmp_path), "--quick", "--report"])
    with pytest.raises(SystemExit, match="2"):
        fusion.main()
    assert "runs are missing" in capsys.readouterr().err
