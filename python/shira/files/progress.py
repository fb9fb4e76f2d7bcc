"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # how many are done, of how many, and what comes now


def no_progress(done: int, total: int, what: str) -> None:
    """Shows nothing."""
