"""The switching benchmarks on tiny models: every case runs its checks and each side once; the drift study."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmarks
import pytest
import torch


@pytest.fixture(scope="module")
def bench() -> Any:
    return benchmarks.modules(
        "cases.bench_adapter_file",
        "cases.bench_adapter_steps",
        "cases.bench_dimensions",
        "cases.bench_switching",
        "harness.architectures",
        "harness.compare",
        "harness.rotation",
        "harness.switching",
    )


@pytest.fixture(scope="module")
def tiny(bench: Any) -> Any:
    return benchmarks.tiny_architecture(bench)


@pytest.fixture(scope="module")
def drift() -> ModuleType:
    return importlib.import_module("studies.drift.run")


@pytest.fixture
def compare() -> Callable[..., None]:
    return benchmarks.untimed({})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switch(bench: Any, compare: Any, tiny: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_switching, "cache_bytes", lambda _: 10_000)  # so that two models take turns
    bench.bench_switching.test_switch(compare, bench.compare.Place("cpu"), dtype, tiny)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mix(bench: Any, compare: Any, tiny: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_switching, "SMALL_LLAMA", tiny)
    bench.bench_switching.test_mix(compare, bench.compare.Place("cpu"), dtype)


def test_registered(bench: Any, compare: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_switching, "ONE_LAYER", tiny)
    monkeypatch.setattr(bench.bench_switching, "MANY", 20)
    bench.bench_switching.test_registered(compare, bench.compare.Place("cpu"))


def test_dimension(bench: Any, compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.rotation, "cache_bytes", lambda _: 0)
    bench.bench_dimensions.test_dimension(compare, bench.compare.Place("cpu"), "bfloat16", 64)


def test_steps(bench: Any, compare: Any, tiny: Any, tmp_path: Path) -> None:
    steps = bench.bench_adapter_steps
    sides = {name: kind(tiny, "cpu", tmp_path) for name, kind in ((steps.OURS, steps.Ours), (steps.LORA, steps.Lora))}
    with torch.no_grad():
        facts = {"nnz": tiny.nnz, "architecture": "tiny"}
        for side in sides.values():
            facts |= steps.check(side)
        assert 0 < facts["lora_drift_after_one_cycle"] < 1
        for step in steps.INVERSE:
            steps.test_step(compare, lambda _: (sides, facts), bench.compare.Place("cpu"), step)


def test_a_wrong_weight_is_noticed(bench: Any, tiny: Any) -> None:
    sides, dtype = bench.switching, torch.bfloat16
    weights = sides.weights_of(sides.make_model(tiny.shapes, dtype, "cpu"))
    name, weight = next(iter(weights.items()))
    assert sides.share_of_changed(weights) == 0
    before = weight.clone()
    weight.view(-1)[7] += 1
    assert sides.share_of_changed(weights) == 1 / tiny.numel
    with pytest.raises(AssertionError, match="1 of 4096"):
        bench.compare.assert_same_bits(name, [weight], [before])
    peft = sides.make_lora(sides.make_model(tiny.shapes, dtype, "cpu"), tiny, {"blue": 1})
    with pytest.raises(AssertionError):
        sides.check_merged(peft, "blue")  # not merged


def test_sdxl_shapes_are_those_of_the_unet(bench: Any) -> None:
    shapes = bench.architectures.sdxl_attention_shapes()
    assert len(shapes) == 560
    assert sum(shape == (1280, 2048) for shape in shapes.values()) == 120


def test_touched_lines_are_counted_once(bench: Any, tiny: Any) -> None:
    sides = bench.switching
    weights = sides.weights_of(sides.make_model(tiny.shapes, torch.float32, "cpu"))
    adapter = sides.make_adapter(tiny, torch.float32, 1)
    lines = {
        (name, (weight.data_ptr() + 4 * index) // 64)
        for name, weight in weights.items()
        for index in adapter[f"{name}.weight"].indices.tolist()
    }
    assert sides.touched_bytes(weights, [adapter]) == sides.touched_bytes(weights, [adapter] * 2) == 64 * len(lines)


def test_drift_end_to_end(drift: ModuleType, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "ARCHITECTURE", tiny)
    threads = torch.get_num_threads()
    try:
        drift.command(tmp_path, quick=True)
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(rows) == 3 * 2 * sum(map(len, drift.QUICK_ROUNDS.values()))
    for row in rows:
        assert (row["changed"] == row["largest"] == 0) == (row["method"] == drift.OURS), row
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "Made with --quick" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("arguments", [[], ["--output", "x", "--other"]])
def test_drift_refuses_wrong_arguments(
    drift: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["drift", *arguments])
    with pytest.raises(SystemExit, match="2"):
        drift.main()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("way", ["decode_indices", "encode_indices"])
def test_code_of_indices(bench: Any, compare: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_adapter_file, "cache_bytes", lambda _: 1)
    lists = [(torch.arange(0, 50_000, 7, dtype=torch.int32), 50_000)]
    bench.bench_adapter_file.test_code(compare, bench.compare.Place("cpu"), way, lambda _: lists, 0.01)


def test_file_to_model(bench: Any, compare: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.bench_adapter_file, "LLAMA", tiny)
    bench.bench_adapter_file.test_file_to_model(compare, bench.compare.Place("cpu"), tmp_path)
