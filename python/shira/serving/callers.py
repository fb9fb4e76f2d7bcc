"""Threads and asyncio tasks: who is inside `using` or `batch`, and who must wait for them."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from shira.serving.arena import Mix

Caller = tuple[int, int]  # a thread and an asyncio task


def current_caller() -> Caller:
    """Gives the thread and the asyncio task that run this."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop
        task = None
    return threading.get_ident(), id(task)


@dataclass(eq=False)
class Using:
    """An open `using` block: who opened it, and the mix that comes back at its end."""

    caller: Caller
    before: Mix
    is_over: bool = False  # if it is still noted, its end was cut off


class Callers:
    """The open `using` blocks."""

    def __init__(self) -> None:
        self._using: list[Using] = []

    def enter(self, block: Using) -> None:
        """Notes that a block was opened."""
        self._using = [*(other for other in self._using if not other.is_over), block]

    def knows(self, block: Using) -> bool:
        """Whether a block was noted, and not forgotten."""
        return block in self._using

    def leave(self, block: Using) -> None:
        """Forgets a block."""
        self._using.remove(block)

    def needs(self, name: str) -> bool:
        """Whether the end of a block brings an adapter back."""
        return any(name in dict(block.before) for block in self._using if not block.is_over)

    def check(self, batch: Caller | None) -> None:
        """Raises RuntimeError if the weights must stay as they are: a batch is open, or another caller is inside
        `using`. batch: who opened the batch."""
        if batch is not None:
            own = batch == current_caller()
            raise RuntimeError("leave batch() first" if own else "another thread or task is inside batch()")
        if any(block.caller != current_caller() and not block.is_over for block in self._using):
            raise RuntimeError("another thread or task is inside using(), which relies on what is active")
