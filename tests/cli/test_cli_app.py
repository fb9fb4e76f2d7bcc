"""What `shira` offers beside its commands: its version, and completion in a shell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Run

import shira_kernels
from shira.cli.console import folder_made
from shira_kernels import backends


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


@pytest.fixture
def shira(tmp_path: Path) -> Path:
    """The command as a script, as it is installed."""
    script = tmp_path / "bin/shira"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom shira.cli import main\nmain()\n")
    script.chmod(0o755)
    return script


def test_the_version_is_one_line_with_what_runs_here(run: Run) -> None:
    code, out, error = run("--version")
    assert (code, error) == (0, "")
    kernel = backends.active("scatter_apply", "cpu")
    start = f"shira-kernels {shira_kernels.__version__}, torch {torch.__version__}, kernels {kernel}"
    assert out.startswith(start)
    assert re.fullmatch(r"(, (cuda|triton))*\n", out[len(start) :])


def test_help_is_a_screen(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert out.count("\n") < 50
    for option in ("--version", "--install-completion", "--show-completion"):
        assert option in out


def test_a_warning_of_missing_kernels_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "extension_warning", "slow\x1bhere")
    assert run("info nothing") == (
        2,
        "",
        "shira: warning: slow\\x1bhere\nshira: nothing: No such file or directory\n",
    )


def test_completion_in_bash(shira: Path, tmp_path: Path) -> None:
    """Installed by the command itself, in a home of its own, and asked as bash asks at a Tab."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("this needs bash")
    home = tmp_path / "home"
    home.mkdir()
    ask = (
        "shira --install-completion > /dev/null; . ~/.bashrc; "
        'COMP_WORDS=(shira di); COMP_CWORD=1; _shira_completion shira; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(shira fuse --po); COMP_CWORD=2; _shira_completion shira; echo "${COMPREPLY[@]}"'
    )
    environment = {"PATH": f"{shira.parent}:/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "diff\n--policy\n", "")


def test_completion_in_zsh(shira: Path) -> None:
    """What zsh's function for `shira` asks for, and the answer, which zsh evaluates; zsh itself is not run."""
    for variables, expected in (
        ({"_SHIRA_COMPLETE": "source_zsh"}, "#compdef shira"),
        ({"_SHIRA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "shira di"}, '_arguments \'*: :(("diff":"Save'),
    ):
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **variables}
        done = subprocess.run([shira], capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.lstrip().startswith(expected)


def test_a_folder_that_an_error_leaves_empty_is_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "deep/inside"
    with pytest.raises(KeyboardInterrupt), folder_made(folder):
        raise KeyboardInterrupt
    assert not (tmp_path / "deep").exists()
    with folder_made(folder):
        (folder / "file").touch()
    assert (folder / "file").exists()
    for there in (folder, tmp_path):
        with pytest.raises(KeyboardInterrupt), folder_made(there):
            raise KeyboardInterrupt
    assert (folder / "file").exists()
