"""`shira bench`, as at a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import exit_code_of
from safetensors.torch import save_file

from shira import Adapter, AdapterTensor
from shira.adapter import checksum_of
from shira.cli import bench as latency


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code_of(monkeypatch, "bench", "--seconds", "0", *arguments)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A base, adapters a (replace) and b (add), and `other` for another base."""
    base = {"layers.0.q.weight": torch.randn(40, 30), "norm.weight": torch.randn(30)}
    save_file(base, tmp_path / "base.safetensors")
    for seed, (name, kind) in enumerate((("a", "replace"), ("b", "add"), ("other", "replace"))):
        tensors = {}
        for tensor, weight in base.items():
            indices = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))[:9].sort().values
            old = weight.view(-1)[indices] + (name == "other")
            tensors[tensor] = AdapterTensor(
                indices, old * 2, tuple(weight.shape), torch.float32, kind, checksum=checksum_of(old)
            )
        Adapter(tensors).save(tmp_path / f"{name}.safetensors")
    Adapter({}).save(tmp_path / "empty.safetensors")
    return tmp_path


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_adapters_on_their_base(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    paths = [files / f"{name}.safetensors" for name in names]
    assert run(monkeypatch, *paths, "--base", files / "base.safetensors", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert list(found["switches"]) == [latency.OURS, latency.COPY, latency.LORA]
    assert all(timing["median_us"] > 0 and timing["ratio"] > 0 for timing in found["switches"].values())
    assert found["switches"][latency.OURS]["ratio"] == 1.0
    assert found["entries"] == dict.fromkeys(names, 18)
    assert (found["weights"], found["weight_bytes"], found["dtypes"]) == (2, 4 * 1230, ["float32"])
    assert found["rounds"] == 5
    assert found["threads"] == 1
    assert found["kernel"] in shown.err
    assert latency.LORA in shown.err


def test_all_ways_do_the_same_work(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch that writes other entries is not measured."""
    monkeypatch.setattr("shira.serving.arena.scatter_apply_batched", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="a switch wrote other entries than the adapter's"):
        latency.run_bench([files / "a.safetensors"], base=files / "base.safetensors", seconds=0.0)


def test_random_adapters_are_made_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(64, 32, bias=False)
    monkeypatch.setattr(latency, "random_model", lambda: model.requires_grad_(False))
    assert run(monkeypatch) == 0
    assert "random 1: " in capsys.readouterr().out


def test_bad_input_is_refused_in_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--base", files / "base.safetensors")
    a = files / "a.safetensors"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((a,), "adapters need the base"),
        (base, "--base needs adapters"),
        ((a, a, *base), "two adapters have the same name: a, a"),
        ((files / "other.safetensors", *base), "layers.0.q.weight: "),
        ((files / "empty.safetensors", *base), "empty: the adapter changes nothing"),
        ((files / "nothing.safetensors", *base), "No such file"),
        ((files / "base.safetensors", *base), "unknown format"),
        ((a, *base, "--threads", 0), "--threads"),
        ((a, *base, "--threads", 10**6), "--threads"),
        ((a, *base, "--seconds", -1), "--seconds"),
        ((a, *base, "--seconds", "nan"), "--seconds"),
        ((a, *base, "--seconds", "inf"), "--seconds must be finite and not negative, got inf"),
        ((a, *base, "--device", "gpu"), "--device must be cpu or cuda, got 'gpu'"),
    ]
    if not torch.cuda.is_available():
        cases.append(((a, *base, "--device", "cuda"), "--device cuda: torch finds no GPU"))
    for arguments, message in cases:
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
