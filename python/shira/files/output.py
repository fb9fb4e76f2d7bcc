"""Output that is there whole or not at all: written beside its place under another name, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shira.files.errors import Argument, ArgumentError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_FILE, _FOLDER = "a file", "a folder"
_KINDS = {
    stat.S_IFREG: _FILE,
    stat.S_IFDIR: _FOLDER,
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses with ValueError a file that is there unless `overwrite`, a folder unless it is empty, what is neither,
    and a folder to write to that is not there; with OSError one that cannot be written to. What a folder may hold to be
    replaced is left to `check_replaceable`. What killed runs left behind is removed first."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    _check_kind(path, _FILE, _FOLDER)
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
        _check_kind(path, _FILE, _FOLDER)
        _clean_up(path)
    if there := [str(path) for path in files if path.is_dir() or (os.path.lexists(path) and not overwrite)]:
        raise ArgumentError(f"{', '.join(there)}: there already; ", Argument("overwrite"), " replaces files")
    _check_writable(place)


def _check_kind(path: Path, *kinds: str) -> None:
    """Refuses with ValueError what is there and is of another kind: written to a FIFO or a device it would be gone."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if (kind := _KINDS.get(stat.S_IFMT(mode), "something else")) not in kinds:
        raise ArgumentError(f"{path}: {kind} is there, and only {' or '.join(kinds)} is replaced")


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
def written_whole(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """Gives a path to write a file, or a folder, at; at the end of the block it takes the place of `path`.

    After an error or an interrupt `path` holds what it held before, or, if that came last, all of the new. Also a
    folder is replaced in one step. Only a file system that cannot swap two folders has the old one moved to
    `.NAME.MARK.tmp/NAME.old` first; if the process is killed just then, the next one moves it back. Of several
    processes that write the same, the last one's stays.

    What is replaced, a folder's files too, passes its permissions on, and where the system allows it its owner.

    Raises:
        ValueError: what is there is not a file, or not a folder, as the new one is.
        OSError: something cannot be written; names `path`.
    """
    _check_kind(Path(path), _FOLDER if folder else _FILE)
    target = Path(os.path.realpath(path))
    work: Path | None = None
    held = -1
    try:
        _clean_up(target)
        while work is None or not _is_at(held, work):  # as when another process took it for left behind
            if held >= 0:
                os.close(held)
                held = -1
            work = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
            held = _made_and_held(work)
        new = work / target.name
        yield new
        for file in sorted(new.rglob("*")) if folder else [new]:
            if file.is_file():
                _sync(file)
        _pass_on_permissions(target, new)
        _put(new, target, work)
        _sync(target.parent)
    except OSError as error:
        _name_as_given(error, target, work, path)
        raise
    finally:
        if work is not None:
            _remove(work, target)
        if held >= 0:
            os.close(held)


def _made_and_held(work: Path) -> int:
    """Makes a folder that only this user sees, and marks it as one of a living process: gives what holds the mark, or
    -1 if it is gone already. Another process may remove what has no mark."""
    work.mkdir(mode=0o700)
    try:
        held = os.open(work, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    with suppress(OSError):  # a file system without locks, where nothing is ever removed
        fcntl.flock(held, fcntl.LOCK_EX)
    return held


def _is_at(held: int, work: Path) -> bool:
    try:
        return held >= 0 and os.path.samestat(os.fstat(held), os.stat(work))
    except FileNotFoundError:
        return False


def _name_as_given(error: OSError, target: Path, work: Path | None, path: str | os.PathLike[str]) -> None:
    """Gives the system's errors of writing, such as of a full disk, the user's name of the file: they have that of the
    temporary one, or none."""
    if error.errno is None:
        return
    if error.filename is None:
        error.filename = os.fspath(path)
    for attribute in ("filename", "filename2"):  # copying has two
        name = getattr(error, attribute)
        if work is None or not isinstance(name, (str, os.PathLike)) or not Path(name).is_relative_to(work):
            continue
        new = work / target.name
        inner = Path(name).relative_to(new) if Path(name).is_relative_to(new) else Path()
        setattr(error, attribute, str(Path(path) / inner))


def _pass_on_permissions(old: Path, new: Path) -> None:
    """Gives a new file or folder, and each one in it, the permissions and the owner of the old one in its place."""
    for path in (*new.rglob("*"), new):
        try:
            before, after = os.lstat(old / path.relative_to(new)), os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_IFMT(before.st_mode) != stat.S_IFMT(after.st_mode) or stat.S_ISLNK(after.st_mode):
            continue
        if (before.st_uid, before.st_gid) != (after.st_uid, after.st_gid):
            with suppress(OSError):
                os.chown(path, before.st_uid, before.st_gid)
        if before.st_mode != after.st_mode:
            os.chmod(path, stat.S_IMODE(before.st_mode))


def _put(new: Path, target: Path, work: Path) -> None:
    """Gives `new` the place of `target`; a folder that was there is at `new` then."""
    if not new.is_dir():
        os.replace(new, target)
        return
    old = _old(work, target)
    while not _swap(new, target):  # or nothing is there to swap it with
        with suppress(FileNotFoundError):
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)  # another process has put its own there
            continue
        if old.exists():
            os.rename(old, new)
        return


def _clean_up(path: Path) -> None:
    """Removes what killed runs left beside `path`, and moves a folder back that one of them had moved aside."""
    target = Path(os.path.realpath(path))
    named = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp", re.DOTALL)
    try:
        names = os.listdir(target.parent)
    except OSError:
        return  # what may be written to, but not listed
    for work in (target.parent / name for name in names if named.fullmatch(name)):
        try:
            held = os.open(work, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would be waited for
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
