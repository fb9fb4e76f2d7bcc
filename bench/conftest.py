"""Fixtures of the benchmarks: `place` (device and threads) and `compare`. See README.md."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.compare import Place, replay
from harness.compare import compare as run_comparison
from harness.machine import available_threads

CUDA = pytest.param(Place("cuda"), id="cuda", marks=pytest.mark.gpu)


def cpu_places() -> list[Any]:
    return [
        pytest.param(Place("cpu", threads), id=f"cpu-{threads}-thread{'s' if threads > 1 else ''}")
        for threads in sorted({1, available_threads()})
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("shira").addoption(
        "--bench-seconds", type=float, default=2.0, help="seconds of timed rounds per case (default: %(default)s)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.benchmark(timer=replay))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false"))


@pytest.fixture(params=[*cpu_places(), CUDA])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """One CPU thread, all that this process may use, and a GPU; torch's thread count is set to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param.threads)
    yield request.param
    torch.set_num_threads(threads)


@pytest.fixture(name="compare")
def compare_fixture(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """`compare.compare` with pytest-benchmark, the time budget and the command line filled in."""
    benchmark.extra_info["command"] = f"python -m pytest {shlex.join(request.config.invocation_params.args)}"
    return partial(run_comparison, benchmark, request.config.getoption("--bench-seconds"))
