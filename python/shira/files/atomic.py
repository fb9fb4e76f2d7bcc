"""Files that are written whole or not at all."""

from __future__ import annotations

import os

from shira.files.output import written_whole


def write_atomically(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Writes a file so that `path` holds either what it held before or all of `data`, also after a crash.

    A file that is there keeps its permissions; a new one has those of the umask.

    Raises:
        ValueError: a folder, a FIFO, a device or a socket is there.
        OSError: the file cannot be written.
    """
    with written_whole(path) as new, open(new, "wb") as file:
        for part in data:
            file.write(part)
