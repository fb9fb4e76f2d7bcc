"""Options and fixtures of the benchmarks: `place` (device and threads) and `compare`. See README.md."""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.against import compare_revision
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
    group = parser.getgroup("shira")
    group.addoption(
        "--bench-seconds", type=float, default=2.0, help="seconds of timed rounds per case (default: %(default)s)"
    )
    group.addoption("--compare", metavar="REV", help="print the cases' ratios against the packages of a git revision")
    group.addoption(
        "--compare-rounds",
        type=int,
        default=5,
        metavar="N",
        help="with --compare: processes of each side (%(default)s)",
    )
    # What --compare gives its processes: the tree whose packages they time.
    group.addoption("--packages-of", metavar="DIR", help=argparse.SUPPRESS)


def pytest_configure(config: pytest.Config) -> None:
    if not (folder := config.getoption("--packages-of")):
        return
    for name in ("shira_kernels", "shira"):
        file = importlib.import_module(name).__file__
        if Path(folder).resolve() not in Path(file or "").resolve().parents:
            raise pytest.UsageError(f"{name} comes from {file}, not from {folder}")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """With --compare the cases run in processes of their own, and none in this one."""
    if not (revision := config.getoption("--compare")) or config.option.collectonly:
        return None
    here = Path(__file__).parent
    paths = [config.invocation_params.dir / argument for argument in config.args]
    for path in paths:
        if not Path(str(path).partition("::")[0]).resolve().is_relative_to(here):
            raise pytest.UsageError(f"--compare runs the cases of {here.name}/, not {path}")
    options = ["--bench-seconds", str(config.getoption("--bench-seconds"))]
    for option in ("-k", "-m"):
        if value := config.getoption(option):
            options += [option, value]
    return compare_revision(revision, config.getoption("--compare-rounds"), [*options, *map(str, paths)])


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
    options = request.config.option
    return partial(run_comparison, benchmark, options.bench_seconds, control_only=bool(options.packages_of))
