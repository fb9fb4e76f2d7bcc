"""`shira` in the test's own process, as at a terminal."""

from __future__ import annotations

import pytest

from shira import cli


def exit_code_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs `shira` with these arguments."""
    monkeypatch.setattr("sys.argv", ["shira", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


class Run:
    """Runs a line of arguments: exit code, output, errors. For a fixture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, line: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = exit_code_of(self._monkeypatch, *line.split())
        out, error = self._capsys.readouterr()
        return code, out, error
