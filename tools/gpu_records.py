"""Records of the GPU check: JSON lines, each written at once, so that a killed process loses at most one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path | str, **record: Any) -> None:
    """Appends one line in one write, also while other processes append to the file."""
    line = (json.dumps(record, default=str) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path) -> list[Record]:
    """All records of a file; a line that a killed process left unfinished is skipped. An absent file has none."""
    found: list[Record] = []
    if not path.is_file():
        return found
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
