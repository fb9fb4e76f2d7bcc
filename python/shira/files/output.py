"""Output that is there whole or not at all: written beside its place under another name, then renamed."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shira.files.atomic import hold, name_file
from shira.files.errors import Argument, ArgumentError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses with ValueError a file that is there unless `overwrite`, a folder unless it is empty, and a folder to
    write to that is not there; with OSError one that cannot be written to. What a folder may hold to be replaced is
    left to `check_replaceable`. What killed runs left behind is removed first."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    _check_writable(path.parent)
    _clean_up(path)
    is_there = any(path.iterdir()) if path.is_dir() else os.path.lexists(path)
    if is_there and not overwrite:
        raise ArgumentError(f"{path}: there already; ", Argument("overwrite"), " replaces it")


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuses with ValueError an output that is one of the inputs, or lies in one, or around one."""
    target = Path(os.path.realpath(output))
    for path in inputs:
        place = Path(os.path.realpath(path))
        if place == target or place in target.parents or target in place.parents:
            raise ValueError(f"{output}: the output must be apart from {path}, which is read")


def check_files_free(folder: Path, names: Iterable[str], inputs: Iterable[Path], overwrite: bool) -> None:
    """Refuses with ValueError to write files into a folder, which is made where there is none: files that are there
    unless `overwrite`, and inputs among them. With OSError a place that cannot be written to. So both are known before
    the work. What killed runs left behind is removed first."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if place == folder else f'{place} is not a folder'}")
    files, inputs = [folder / name for name in names], list(inputs)
    for path in files:
        check_apart(path, inputs)
        _clean_up(path)
    if there := [str(path) for path in files if path.is_dir() or (os.path.lexists(path) and not overwrite)]:
        raise ArgumentError(f"{', '.join(there)}: there already; ", Argument("overwrite"), " replaces files")
    _check_writable(place)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def check_replaceable(folder: Path, files: Collection[str]) -> None:
    """Refuses with ValueError to replace a folder that holds other files than the new one will: `files`, their paths in
    it. So a folder with something else in it is never lost."""
    for path in sorted(folder.rglob("*")):
        inner = str(path.relative_to(folder))
        if not path.is_dir() and inner not in files:
            raise ValueError(f"{folder}: not replaced, because it holds {inner}, which the new folder would not")


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write a file or a folder at; at the end of the block it takes the place of `path`.

    After an error or an interrupt `path` holds what it held before, or, if that came last, all of the new. Also a
    folder is replaced in one step. Only a file system that cannot swap two folders has the old one moved to
    `.NAME.MARK.tmp/NAME.old` first; if the process is killed just then, the next one moves it back.
    """
    target = Path(os.path.realpath(path))
    _clean_up(target)
    work = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    work.mkdir()
    held = os.open(work, os.O_RDONLY)
    try:
        hold(held)
        new = work / target.name
        yield new
        for file in sorted(new.rglob("*")) if new.is_dir() else [new]:
            if file.is_file():
                _sync(file)
        _put(new, target, work)
        _sync(target.parent)
    except OSError as error:
        name_file(error, path)
        raise
    finally:
        _remove(work, target)
        os.close(held)


def _put(new: Path, target: Path, work: Path) -> None:
    """Gives `new` the place of `target`; a folder that was there is at `new` then."""
    if not target.is_dir():
        os.replace(new, target)
    elif not _swap(new, target):
        os.rename(target, _old(work, target))
        os.rename(new, target)
        os.rename(_old(work, target), new)


def _clean_up(path: Path) -> None:
    """Removes what killed runs left beside `path`, and moves a folder back that one of them had moved aside."""
    target = Path(os.path.realpath(path))
    for work in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.tmp"):
        try:
            held = os.open(work, os.O_RDONLY)
        except OSError:
            continue  # gone, or somebody else's
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(work, target)
        except OSError:
            pass  # its process lives, or it is somebody else's
        finally:
            os.close(held)


def _remove(work: Path, target: Path) -> None:
    if not work.is_dir():
        work.unlink(missing_ok=True)
        return
    if _old(work, target).exists() and not os.path.lexists(target):
        os.rename(_old(work, target), target)
    shutil.rmtree(work)


def _old(work: Path, target: Path) -> Path:
    return work / f"{target.name}.old"


def _swap(a: Path, b: Path) -> bool:
    """Swaps two paths in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
