"""What others wrote is read with care: only regular files, only those of the folder that was given, only as much as can
be meant."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

_MOST_JSON = 2**26  # bytes: the index of 300 000 tensors has a third of it, and parsed it takes ten times as many


def check_regular(path: Path) -> None:
    """Refuses with ValueError a path that is neither a file nor a folder, such as a pipe, of which a read never ends.

    Raises OSError if nothing is there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: neither a file nor a folder")


def check_inside(folder: Path, path: Path) -> None:
    """Refuses with ValueError a path in a folder that a link leads out of it, and one that is not a regular file.

    Hugging Face's cache is a folder of links, `snapshots/<revision>/<file>` to `blobs/<hash>`, which may be followed.
    The folder itself may be reached by links. Raises OSError if nothing is there.
    """
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(folder))
    if not (real.is_relative_to(root) or real.parent in _blobs(root)):
        raise ValueError(f"{path}: a link that leads out of its folder, which is not followed: put a copy in its place")
    check_regular(path)


def check_folder(folder: Path) -> None:
    """`check_inside` for all that lies in a folder, but for what is hidden."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(place, name)
            if not name.startswith(".") and (path.is_symlink() or not (path.is_file() or path.is_dir())):
                check_inside(folder, path)


def read_inside(folder: Path, name: str, most: int = _MOST_JSON) -> dict[str, Any]:
    """The JSON object of a file in a folder, after `check_inside`. Raises as `read_json` does."""
    check_inside(folder, folder / name)
    return read_json(folder / name, most)


def read_json(path: Path, most: int = _MOST_JSON) -> dict[str, Any]:
    """A file's JSON object. Raises ValueError, also for a file of more than `most` bytes, and OSError."""
    check_regular(path)
    with open(path, "rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{path}: it must have at most {most} bytes")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: it must be JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it must be a JSON object")
    return found


def _blobs(root: Path) -> list[Path]:
    """Where the files of a folder lie, if it is a snapshot in Hugging Face's cache, or in one."""
    return [place.parent.parent / "blobs" for place in (root, *root.parents) if place.parent.name == "snapshots"]


def _raise(error: OSError) -> None:
    raise error
