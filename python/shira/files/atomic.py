"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Writes a file so that `path` holds either what it held before or all of `data`, also after a crash."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # "x" leaves the permissions to the umask, unlike the tempfile module.
        with open(temporary, "xb") as file:
            hold(file.fileno())
            for part in data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def name_file(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Gives the system's errors of writing, such as of a full disk, the file's name, which they lack."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = os.fspath(path)


def hold(descriptor: int) -> None:
    """Marks a temporary file or folder as one of a living process: another may remove it when the mark is gone."""
    with contextlib.suppress(OSError):  # a file system without locks, where nothing is ever removed
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
