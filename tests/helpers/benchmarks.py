"""What tests of bench/ need: its modules, and its cases run without being timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def modules(*names: str) -> Any:
    """Modules of bench/, by the last part of their names."""
    return SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in names})


def tiny_architecture(bench: Any) -> Any:
    return bench.architectures.Architecture("tiny", bench.architectures.llama_shapes(64, 96, 1), rank=1)


def untimed(seen: dict[str, Any]) -> Callable[..., None]:
    """Stands in for the benchmarks' fixture `compare`: it checks, then runs each side twice on each slot.

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
