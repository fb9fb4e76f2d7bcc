"""What tests of bench/ need: its modules, and its cases run without being timed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BENCH = str(Path(__file__).parents[2] / "bench")


def module(name: str) -> Any:
    """A module of bench/."""
    sys.path.insert(0, BENCH)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(BENCH)


def modules(*names: str) -> Any:
    """Several, by name."""
    return SimpleNamespace(**{name: module(name) for name in names})


def tiny_architecture(bench: Any) -> Any:
    return bench.switching_sides.Architecture("tiny", bench.switching_sides.llama_shapes(64, 96, 1), rank=1)


def untimed(seen: dict[str, Any]) -> Callable[..., None]:
    """In place of the benchmarks' fixture `compare`: the check, then each side twice on each slot.

    seen: receives what the last case gave.
    """

    def run(sides: dict[str, Any], *, ours: str, baselines: list[str], check: Any, slots: list[Any], **_: Any) -> None:
        assert {ours, *baselines} <= sides.keys()
        seen.update(sides=sides, check=check, slots=slots)
        check()
        for side in sides.values():
            assert side.bytes_moved >= 0
            for slot in (*slots, *slots):
                with side.context():
                    side.before(slot)
                    side.run(slot)

    return run
