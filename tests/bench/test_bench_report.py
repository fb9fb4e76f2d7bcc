"""bench/harness/report.py on made-up results: what a GPU's figures must not hide."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from harness import report


def side(median_us: float, host_us: float | None, ratio: float = 1.0) -> dict[str, Any]:
    return {
        "median_us": median_us,
        "iqr_us": 1.0,
        "ratio": ratio,
        "ratio_quartiles": [ratio, ratio],
        "bytes_moved": 10**6,
        "gb_per_s": 100.0,
        "share_of_copy": 0.5,
        "share_of_byte_bound": 0.6,
        "host_us": host_us,
        "kernel": "cuda",
    }


def case(group: str, device: str, sides: dict[str, Any], **more: Any) -> dict[str, Any]:
    info = {
        "label": f"a case on {device}",
        "place": device,
        "device": device,
        "threads": 1,
        "dtype": "bfloat16",
        "ours": "shira",
        "baselines": [name for name in sides if name != "shira"],
        "sides": sides,
        "byte_bound_us": 5.0,
        "copy_gb_per_s": 3000.0,
        "in_place_gb_per_s": 2900.0,
        "slots": 4,
        "torch": "2.11",
        "cpu": "a CPU",
        "isa": "AVX2",
        "gpu": "a GPU" if device == "cuda" else None,
        "command": "pytest bench/",
    }
    return {"group": group, "extra_info": {**info, **more}}


ON_GPU = {"shira": side(10.0, 250.0), "index_copy_": side(20.0, 30.0, 2.0)}
ON_CPU = {"shira": side(10.0, None), "index_copy_": side(8.0, None, 0.8)}
TRAINED = {"floor": "index_copy_", "peak_bytes": dict.fromkeys(ON_GPU, 1e9), "trained": dict.fromkeys(ON_GPU, 5)}
CASES = [
    case("switch", "cuda", ON_GPU),
    case("switch", "cpu", ON_CPU),
    case("sweep", "cuda", ON_GPU, sweep="nnz", nnz=10),
    case("sweep", "cuda", {"shira": side(500.0, 40.0), "index_copy_": side(700.0, 50.0, 1.4)}, sweep="nnz", nnz=100),
    case("training", "cuda", ON_GPU, **TRAINED),
    case("cpu only", "cpu", ON_CPU),
    case("waits", "cuda", {"shira": side(10.0, 8.0), "nonzero": side(40.0, 5100.0, 4.0)}),
    case("many calls", "cuda", {"shira": side(10.0, 8.0), "nonzero": side(40.0, 60.0, 4.0)}, calls_per_round=100),
]


def page(tmp_path: Path, cases: list[dict[str, Any]]) -> str:
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"datetime": "2026-01-01T00:00:00", "commit_info": {"id": "", "dirty": False}, "benchmarks": cases})
    )
    assert report.main([str(path), "-o", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "report.md").read_text()


def rows_of(text: str, group: str) -> list[dict[str, str]]:
    """The rows of a group's table, by column."""
    lines = text.split(f"## {group}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_every_table_of_a_gpu_has_the_hosts_time_beside_the_devices(tmp_path: Path) -> None:
    text = page(tmp_path, CASES)
    for group in ("switch", "sweep", "training"):
        rows = rows_of(text, group)
        assert [row["median"] for row in rows[:2]] == ["10.0 us", "20.0 us"]
        assert [row["host"] for row in rows[:2]] == ["250.0 us **HOST-BOUND**", "30.0 us **HOST-BOUND**"]
    assert [row["host"] for row in rows_of(text, "switch")[2:]] == ["", ""]
    assert [row["host"] for row in rows_of(text, "sweep")[2:]] == ["40.0 us", "50.0 us"]
    assert [row["host"] for row in rows_of(text, "waits")] == ["8.0 us", "5.10 ms (waits)"]
    assert [row["host"] for row in rows_of(text, "many calls")] == ["8.0 us", "60.0 us (waits)"]
    assert all("host" not in row for row in rows_of(text, "cpu only"))
    assert "**HOST-BOUND** marks" in text


def test_what_is_faster_on_the_device_may_lose_on_the_host(tmp_path: Path) -> None:
    losses = page(tmp_path, CASES).split("## Losses")[1].split("\n## ")[0].strip().splitlines()
    host = "one after the other, host time included, index_copy_ takes 0.12 of our time"
    assert losses == [
        "- switch; a case on cpu: index_copy_ takes 0.80 of our time",
        "- cpu only; a case on cpu: index_copy_ takes 0.80 of our time",
        f"- switch; a case on cuda: {host}",
        f"- sweep; a case on cuda: {host}",
        f"- training; a case on cuda: {host}",
    ]


def test_a_gpu_case_without_the_hosts_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = copy.deepcopy(CASES[:1])
    cases[0]["extra_info"]["sides"]["index_copy_"]["host_us"] = None
    with pytest.raises(AssertionError):
        page(tmp_path, cases)
    assert "no host_us in a benchmark on a GPU: a case on cuda" in capsys.readouterr().err
