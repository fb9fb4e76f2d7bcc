"""Output that is there whole or not at all: written beside its place under another name, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path, force: bool) -> None:
    """Refuses with ValueError a file that is there unless `force`, a folder unless it is empty, and a folder to write
    to that is not there. What a folder may hold to be replaced is left to `check_replaceable`."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        if any(path.iterdir()) and not force:
            raise ValueError(f"{path}: there already; --force replaces it")
    elif os.path.lexists(path) and not force:
        raise ValueError(f"{path}: there already; --force replaces it")


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuses with ValueError an output that is one of the inputs, or lies in one, or around one."""
    target = Path(os.path.realpath(output))
    for path in inputs:
        place = Path(os.path.realpath(path))
        if place == target or place in target.parents or target in place.parents:
            raise ValueError(f"{output}: the output must be apart from {path}, which is read")


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

    After an error or an interrupt `path` holds what it held before. A file is replaced in one step; of a folder that is
    there the old one is moved aside first and removed last.
    """
    target = Path(os.path.realpath(path))
    mark = secrets.token_hex(8)
    temporary = target.with_name(f".{target.name}.{mark}.tmp")
    aside = target.with_name(f".{target.name}.{mark}.old")
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file)
        if target.is_dir() and any(target.iterdir()):
            os.rename(target, aside)
        os.replace(temporary, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        _remove(temporary)
        raise
    _sync(target.parent)
    _remove(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
