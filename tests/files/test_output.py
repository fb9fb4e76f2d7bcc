"""Output is there whole or not at all, and nothing is lost: processes killed at every line of the writing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shira.files.output import _swap, check_files_free, check_free, written_whole

# Writes a folder over another one in children that are killed at the 1st, 2nd, ... line of output.py that they run, and
# notes what is there after each, and after the next check of the place.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from shira.files import output
swaps = sys.argv[1] == "swaps"
if not swaps:
    output._swap = lambda a, b: False
target = Path("folder")

def fill(folder, text):
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(text)

def content():
    if not target.exists():
        return "nothing"
    return "".join(sorted({(target / name).read_text() for name in os.listdir(target)})) + str(len(os.listdir(target)))

def kill_at(line):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != output.__file__:
            return None
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

for line in range(1, 1000):
    shutil.rmtree(target, ignore_errors=True)
    fill(target, "old")
    child = os.fork()
    if child == 0:
        kill_at(line)
        with output.written_whole(target) as new:
            fill(new, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    after = content()
    output.check_free(target, True)
    print(after, content(), os.listdir("."))
    if status == 0:
        break
"""


def swaps_work(folder: Path) -> bool:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    try:
        return _swap(folder / "a", folder / "b")
    finally:
        (folder / "a").rmdir()
        (folder / "b").rmdir()


@pytest.mark.parametrize("way", ["swaps", "renames"])
def test_a_folder_is_replaced_whole_whenever_the_process_is_killed(tmp_path: Path, way: str) -> None:
    if way == "swaps" and not swaps_work(tmp_path):
        pytest.skip("this file system cannot swap two folders")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, way], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(lines) > 30
    assert {rest for _, _, rest in lines} == {"['folder']"}, "what a killed run left behind is removed"
    seen = [after for after, _, _ in lines]
    recovered = [content for _, content, _ in lines]
    assert set(recovered) == {"old3", "new3"}
    assert recovered == sorted(recovered, reverse=True), "old, and from some moment on new"
    if way == "swaps":
        assert seen == recovered, "at no moment anything else is there"
    else:
        assert "nothing" in seen
        assert all(before == after or before == "nothing" for before, after, _ in lines)


def fill(path: Path, text: str, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
        path = path / "file"
    path.write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def interrupted(target: Path, kind: str) -> None:
    with written_whole(target) as new:
        fill(new, "new", kind)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    for there in (False, True):
        if there:
            fill(target, "old", kind)
        before = texts(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            interrupted(target, kind)
        assert texts(tmp_path) == before
    with written_whole(target) as new:
        fill(new, "new", kind)
    assert list(texts(tmp_path).values()) == ["new"]
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_that_was_moved_aside_is_moved_back_if_the_new_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "target", "old", "folder")
    before, rename = texts(tmp_path), os.rename

    def fail_of_the_new(source: Path, target: Path) -> None:
        if source.name == "target" and target == tmp_path / "target":
            raise OSError("no more renames")
        rename(source, target)

    monkeypatch.setattr("shira.files.output._swap", lambda a, b: False)
    monkeypatch.setattr(os, "rename", fail_of_the_new)
    with pytest.raises(OSError, match="no more renames"), written_whole(tmp_path / "target") as new:
        fill(new, "new", "folder")
    assert texts(tmp_path) == before
    assert os.listdir(tmp_path) == ["target"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with written_whole(tmp_path / "target") as first:
        fill(first, "first", "file")
        with written_whole(tmp_path / "target") as second:
            fill(second, "second", "file")
        check_free(tmp_path / "target", True)
        assert first.read_text() == "first"
    assert texts(tmp_path) == {"target": "first"}


def test_only_leftovers_of_this_name_are_removed(tmp_path: Path) -> None:
    mark = "0123456789abcdef"
    mine = [f".a.{mark}.tmp", f".a.{mark[::-1]}.tmp"]
    others = [
        f".a.b.{mark}.tmp",
        f".b.{mark}.tmp",
        f"a.{mark}.tmp",
        ".a.tmp",
        f".a.{mark}.old",
        ".a.x123456789abcdef.tmp",
    ]
    for name in (*mine, *others):
        (tmp_path / name).write_text("")
    held = os.open(tmp_path / mine[1], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    check_free(tmp_path / "a", False)
    assert sorted(os.listdir(tmp_path)) == sorted([mine[1], *others])
    os.close(held)
    check_files_free(tmp_path, ["a"], [], False)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
