"""pytest plugin of the GPU check: `-p gpu_pytest --gpu-record FILE` appends the outcome of each test as it comes."""

from __future__ import annotations

import gpu_records
import pytest

NOTE = 300  # characters


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("shira").addoption("--gpu-record", metavar="FILE", help="where outcomes are appended")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-record")
    if path and not hasattr(config, "workerinput"):  # under xdist the controller alone hears of a worker that died
        config.pluginmanager.register(Recorder(path))


class Recorder:
    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            # xdist reports the test that a worker died in with the phase "???".
            outcome = "crashed" if report.when == "???" else report.outcome
            note = telling_line(report.longreprtext) if outcome in ("failed", "crashed") else ""
            seconds = round(report.duration, 3)
            gpu_records.append(self.path, test=report.nodeid, outcome=outcome, note=note, seconds=seconds)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            note = telling_line(report.longreprtext)
            gpu_records.append(self.path, test=f"{report.nodeid} (collection)", outcome="failed", note=note)


def telling_line(text: str) -> str:
    """The line that says what happened: the first with an error marker, else the first that is not xdist's."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[gw")]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (marked or lines or [""])[0][:NOTE]
