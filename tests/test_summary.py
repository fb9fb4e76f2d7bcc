"""What the end of a run of the tests says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from processes import ROOT
from skips import counted

TESTS = """
import pytest

@pytest.mark.parametrize("i", range(3))
@pytest.mark.skip(reason="no GPU")
def test_on_a_gpu(i): pass

@pytest.mark.skip(reason="this processor does not run avx512")
def test_of_an_instruction_set(): pass

def test_of_a_package():
    pytest.importorskip("no_such_package", reason="it is not installed")

def test_bad(): assert 1 + 1 == 3

def test_good(): pass
"""


def test_one_line_counts_the_skips_and_failures_are_listed(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text("from skips import pytest_terminal_summary\n")
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/helpers")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    summary, failed, last = done.stdout.splitlines()[-3:]
    assert "short test summary" in summary
    assert "test_made_up.py::test_bad - " in failed
    assert "1 failed, 1 passed, 5 skipped in" in last
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("skipped:")]
    lacking = "1 an instruction set that this processor lacks (avx512)"
    assert line == f"skipped: 3 need a GPU; {lacking}; 1: it is not installed"
    assert done.stdout.count("no GPU") == 0


def test_nothing_is_said_where_nothing_was_skipped() -> None:
    assert counted([]) == ""
