"""`pytest bench --compare REV`: a made-up repository in which one revision is slower, and wrong arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import against
from harness.against import Outcome, Side, Time
from processes import ROOT

CASE = """
import time
import pytest
import shira
import shira_kernels
from harness.compare import Side


@pytest.mark.parametrize("name", ["work", "new_work"])
def test_work(compare, place, name):
    work = getattr(shira, name)
    sides = {"ours": Side(lambda _: work(), 1), "sleep": Side(lambda _: time.sleep(2e-3), 1)}
    compare(sides, ours="ours", baselines=["sleep"], slots=[None], check=lambda: None, place=place, group="group",
            label="label", info={"dtype": "float32"})
"""
PYPROJECT = """
[tool.pytest.ini_options]
pythonpath = ["bench"]
python_files = ["bench_*.py"]
markers = ["gpu: needs one"]
"""
BACKENDS = """
from collections import Counter

def calls():
    return Counter()
"""
WORK = """
import time

def work():
    time.sleep({seconds})
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This bench/ with one file of cases over packages that sleep; they sleep longer in the revision "slow"."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "bench/harness", folder / "bench/harness", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "bench/conftest.py", folder / "bench")
    files = {
        "pyproject.toml": PYPROJECT,
        ".gitignore": "/build/\n__pycache__/\n",
        "bench/cases/bench_work.py": CASE,
        "csrc/README.md": "",
        "shira_kernels/__init__.py": "",
        "shira_kernels/backends.py": BACKENDS,
        "python/shira/__init__.py": WORK.format(seconds=60e-3),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "slow")
    git(folder, "tag", "slow")
    (folder / "python/shira/__init__.py").write_text(WORK.format(seconds=2e-3) + "\nnew_work = work\n")
    git(folder, "commit", "-qam", "fast")
    return folder


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # In a worker of xdist pytest-benchmark times nothing.
    left_out = ("PYTHONPATH", "PYTEST_XDIST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    command = [sys.executable, "-m", "pytest", "bench", "--bench-seconds", "0", *arguments]
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)


def test_ratios_of_two_revisions(repository: Path) -> None:
    done = run(repository, "--compare", "slow", "--compare-rounds", "2", "-k", "1-thread")
    assert done.returncode == 0, done.stdout + done.stderr
    title, *lines = done.stdout.splitlines()
    assert "slow" in title
    (row,) = [line.split(" | ") for line in lines if line.startswith("| bench")]
    assert row[0] == "| bench_work.py::test_work[cpu-1-thread-work]"
    assert float(row[1].split()[0]) > 4  # 60 ms against 2, on a machine that may be busy
    assert float(row[3].split()[0]) < 4
    (missing,) = [line for line in lines if "does not run" in line]
    assert missing.startswith("- slow")
    assert "bench_work.py::test_work[cpu-1-thread-new_work]: AttributeError" in missing
    (folder,) = (repository / "build/compare").iterdir()
    assert folder.name.endswith("python-only")


@pytest.mark.parametrize(
    ("revision", "rounds", "message"),
    [
        ("nowhere", 1, "--compare: 'nowhere' is not a revision of this repository"),
        ("--all", 1, "--compare: '--all' is not a revision of this repository"),
        ("slow", 0, "--compare-rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(
    repository: Path, revision: str, rounds: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(against, "ROOT", repository)
    assert against.compare_revision(revision, rounds, []) == 2
    assert capsys.readouterr() == ("", message + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "nothing"], "--compare: no case is selected"),
        (["csrc"], "--compare runs the cases of bench/, not "),
    ],
)
def test_other_cases_than_those_of_bench(repository: Path, arguments: list[str], message: str) -> None:
    done = run(repository, "--compare", "slow", *arguments)
    assert done.returncode not in (0, 1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(against, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert against.compare_revision("HEAD", 1, []) == 2
    assert "git rev-parse: " in capsys.readouterr().err


def outcomes(*ratios: float) -> list[tuple[Outcome, Outcome]]:
    times = [(Time(10.0, "cpu/avx2", "copy", 5.0), Time(10.0 * ratio, "reference", "copy", 5.0)) for ratio in ratios]
    return [(Outcome({"a": here}), Outcome({"a": there})) for here, there in times]


HERE, THERE = Side("this tree", Path("here")), Side("old", Path("there"))


def test_the_median_of_the_rounds_counts_and_another_kernel_is_said() -> None:
    text = against.report(HERE, THERE, outcomes(1.5, 0.5, 2.0), "1")
    assert "| a | 1.500 [0.500, 2.000] | 1.500 [0.500, 2.000] | 1.000 [1.000, 1.000] | 10.0 | 15.0 | copy |" in text
    assert "- a: other kernels ran, cpu/avx2 here and reference there" in text


def test_a_case_without_a_control_has_no_net_ratio() -> None:
    done = [(Outcome({"a": Time(10.0, "cpu/avx2")}), Outcome({"a": Time(20.0, "cpu/avx2")}))]
    assert "| a | - | 2.000 [2.000, 2.000] | - | 10.0 | 20.0 | - |" in against.report(HERE, THERE, done, "1")


def test_a_case_that_fails_in_one_round_is_not_compared() -> None:
    done = outcomes(1.0, 1.0)
    done[1][1].times.clear()
    done[1][1].failed["a"] = "AssertionError: other bits"
    text = against.report(HERE, THERE, done, "1")
    assert "- old does not run a: AssertionError: other bits" in text
    assert text.endswith("Nothing compared.")


def test_the_sides_take_turns_in_going_first() -> None:
    order: list[Side] = []

    def run(side: Side) -> Outcome:
        order.append(side)
        return Outcome()

    against.run_in_turn((HERE, THERE), 3, run)
    assert order == [HERE, THERE, THERE, HERE, HERE, THERE]
