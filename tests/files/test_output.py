"""Output is there whole or not at all, and nothing is lost: processes killed at every line of the writing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

from shira.files.atomic import write_atomically
from shira.files.checkpoint import save_tensors
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
        with output.written_whole(target, folder=True) as new:
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
    with written_whole(target, folder=kind == "folder") as new:
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
    with written_whole(target, folder=kind == "folder") as new:
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
    with pytest.raises(OSError, match="no more renames"), written_whole(tmp_path / "target", folder=True) as new:
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


def test_a_file_is_refused_where_something_else_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    leader, follower = os.openpty()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        kinds = {"fifo": "a FIFO", "link": "a FIFO", "folder": "a folder", "socket": "a socket"}
        places = {tmp_path / name: kind for name, kind in kinds.items()} | {Path(os.ttyname(follower)): "a device"}
        for place, kind in places.items():
            before = os.lstat(place)
            calls: list[Callable[[], object]] = [lambda place=place: write_atomically(place, b"new")]
            if kind != "a folder":
                calls += [
                    lambda place=place: written_whole(place, folder=True).__enter__(),
                    lambda place=place: check_free(place, True),
                    lambda place=place: check_files_free(place.parent, [place.name], [], True),
                ]
            for call in calls:
                with pytest.raises(ValueError, match=f"{place.name}: {kind} is there"):
                    call()
            assert os.path.samestat(os.lstat(place), before)
    os.close(leader)
    os.close(follower)
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="file: a file is there"), written_whole(tmp_path / "file", folder=True):
        raise AssertionError("the block is not entered")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "folder", "link", "socket"]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_kept_and_new_ones_are_those_of_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        with umask(mask):
            write_atomically(tmp_path / f"{mask}", b"new")
            save_tensors({"a": torch.zeros(2)}, tmp_path / f"{mask}.safetensors")
            assert mode_of(tmp_path / f"{mask}") == mode_of(tmp_path / f"{mask}.safetensors") == mode
    for mode in (0o600, 0o640, 0o664, 0o444):
        (tmp_path / "file").touch()
        (tmp_path / "file").chmod(mode)
        write_atomically(tmp_path / "file", b"new")
        assert mode_of(tmp_path / "file") == mode
    with umask(0o022), written_whole(tmp_path / "folder", folder=True) as new:
        fill(new, "old", "folder")
    assert mode_of(tmp_path / "folder") == 0o755
    (tmp_path / "folder").chmod(0o700)
    (tmp_path / "folder" / "file").chmod(0o600)
    with umask(0o022), written_whole(tmp_path / "folder", folder=True) as new:
        fill(new, "new", "folder")
        (new / "other").write_text("new")
    found = {path.name: mode_of(path) for path in (tmp_path / "folder", *(tmp_path / "folder").iterdir())}
    assert found == {"folder": 0o700, "file": 0o600, "other": 0o644}


def test_what_is_written_is_hidden_until_it_is_there(tmp_path: Path) -> None:
    with umask(0), written_whole(tmp_path / "file") as new:
        assert mode_of(new.parent) == 0o700
        new.touch()


def test_the_next_file_of_a_name_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    mark = "0123456789abcdef"
    (tmp_path / f".file.{mark}.tmp").write_text("left by an earlier version")
    (tmp_path / f".file.{mark[::-1]}.tmp").mkdir()
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "file.old").touch()
    link, fifo = (tmp_path / f".file.{digit * 16}.tmp" for digit in "12")
    link.symlink_to("apart")
    os.mkfifo(fifo)
    living = tmp_path / f".file.{'f' * 16}.tmp"
    living.mkdir()
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    write_atomically(tmp_path / "file", b"new")
    assert sorted(os.listdir(tmp_path)) == [link.name, living.name, "apart", "file"]
    os.close(held)
    write_atomically(tmp_path / "file", b"newer")
    assert texts(tmp_path) == {"file": "newer", "apart/file.old": ""}
    assert sorted(os.listdir(tmp_path)) == [link.name, "apart", "file"]


@pytest.mark.parametrize("moment", ["opened", "locked"])
def test_a_new_one_that_another_process_took_for_left_behind_is_made_again(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {"opened": os.open, "locked": fcntl.flock}[moment]
    taken: list[Path] = []

    def late(*arguments: Any, **options: Any) -> Any:
        if not taken:
            taken.extend(tmp_path.glob(".file.*.tmp"))
            taken[0].rmdir()
        return real(*arguments, **options)

    monkeypatch.setattr(*((os, "open") if moment == "opened" else (fcntl, "flock")), late)
    write_atomically(tmp_path / "file", b"new")
    assert len(taken) == 1
    assert texts(tmp_path) == {"file": "new"}


TOGETHER = """
import os, sys
from pathlib import Path
from shira.files import output
from shira.files.atomic import write_atomically
folder, way = Path(sys.argv[1]), sys.argv[2]
if way == "renames":
    output._swap = lambda a, b: False
children = []
for number in range(4):
    if child := os.fork():
        children.append(child)
        continue
    try:
        for _ in range(60):
            if way == "file":
                write_atomically(folder / "target", bytes([number]) * 100_000)
            else:
                with output.written_whole(folder / "target", folder=True) as new:
                    new.mkdir()
                    for name in "ab":
                        (new / name).write_bytes(bytes([number]) * 1000)
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(0)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("way", ["file", "swaps", "renames"])
def test_several_processes_write_the_same(tmp_path: Path, way: str) -> None:
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}, {way!r}]\n{TOGETHER}"
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == ["target"]
    contents = {path.read_bytes()[:1] * path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    found = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert set(found) == contents
    assert len({content[:1] for content in found}) == 1


@pytest.mark.parametrize("folder", [False, True])
def test_errors_name_the_path_that_was_given(tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    full = os.strerror(errno.ENOSPC)

    def fail(two: bool) -> None:
        with written_whole("target", folder=folder) as new:
            name = str(new / "file" if folder else new)
            raise OSError(errno.ENOSPC, full, *(("source", None, name) if two else (name,)))

    for two in (False, True):
        with pytest.raises(OSError, match=full) as raised:
            fail(two)
        assert (raised.value.filename2 if two else raised.value.filename) == ("target/file" if folder else "target")
    (tmp_path / "no").touch()
    with pytest.raises(OSError, match="no/target"), written_whole("no/target"):
        raise AssertionError("the block is not entered")
