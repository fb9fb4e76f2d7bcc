"""bench/studies/interference: whether its adapters are those that its report describes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def interference() -> ModuleType:
    return importlib.import_module("studies.interference.run")


@pytest.mark.parametrize("density", [0.01, 0.02])
def test_all_designs_hold_as_many_numbers(interference: ModuleType, density: float) -> None:
    size = 300
    budget = density * size**2
    for design in ("SHiRA-WM", "SHiRA-Struct"):
        for delta in interference.draw(interference.Case(design, size, density), 0):
            assert delta.nnz == budget
    for factors in interference.draw(interference.Case("sparse LoRA", size, density), 0):
        numbers = sum(int(factor.count_nonzero()) for factor in factors)
        assert numbers == pytest.approx(budget, rel=0.1)
        product = factors[0] @ factors[1]
        assert product.square().mean() == pytest.approx(1, abs=0.4)


def test_the_masks_are_equal_for_wm_and_share_the_diagonal_for_struct(interference: ModuleType) -> None:
    first, second = interference.draw(interference.Case("SHiRA-WM", 100, 0.02), 0)
    assert torch.equal(first.indices, second.indices)
    assert not torch.equal(first.values, second.values)
    for case in [*interference.cases(interference.QUICK), *interference.cases(interference.FULL)]:
        if case.design == "SHiRA-Struct":
            first, second = interference.draw(case, 0)
            common = set(first.indices.tolist()) & set(second.indices.tolist())
            assert common == {(case.size + 1) * i for i in range(case.size)} & set(first.indices.tolist())
    assert not torch.equal(first.values, second.values)
    again, other = (interference.draw(case, seed)[0] for seed in (0, 1))
    assert torch.equal(again.values, first.values)
    assert not torch.equal(other.values, first.values)


@pytest.mark.parametrize("design", ["dense", "sparse LoRA", "SHiRA-WM", "SHiRA-Struct"])
def test_measures_are_those_of_the_dense_matrices(interference: ModuleType, design: str) -> None:
    deltas = interference.draw(interference.Case(design, 70, None if design == "dense" else 0.02), 3)
    first, second = (interference._dense(delta) for delta in deltas)
    product = first.T @ second
    found = interference.measure(*deltas)
    assert found.awom == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=1e-5)
    assert found.awor == 1 - int(product.count_nonzero()) / 4900
    bound = torch.linalg.matrix_norm(first) * torch.linalg.matrix_norm(second)
    assert found.relative_awom == pytest.approx(found.awom / float(bound), rel=1e-5)
    assert interference.spectral_norm(*deltas) == pytest.approx(float(torch.linalg.svdvals(product)[0]))


def run(interference: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["interference", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stopped:
            interference.main()
    finally:
        torch.set_num_threads(threads)
    return stopped.value.code


def test_quick(interference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert run(interference, monkeypatch, "--output", tmp_path, "--quick") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure4.png", "report.md", "results.json"]
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    settings = interference.QUICK
    assert len(results["rows"]) == len(settings.sizes) * 7
    assert all(len(row["awom"]) == settings.draws for row in results["rows"])
    text = (tmp_path / "report.md").read_text()
    assert "Made with --quick" in text
    assert "that held in 12 of 12 draws" in text  # what the proof of Lemma 4.5 shows
    assert "it was at most that in 0 of 12 draws" in text  # what its words say


@pytest.mark.parametrize("arguments", [[], ["--output", "x", "--threads", "0"], ["--output", "{file}"]])
def test_wrong_arguments(
    interference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = [argument.replace("{file}", str(tmp_path / "file")) for argument in arguments]
    assert run(interference, monkeypatch, *given) == 2
    assert capsys.readouterr().err.count("\n") == 1
