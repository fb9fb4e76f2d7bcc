"""What must not come between: signals wait until a change is whole, forks until a lock is free, and autocast is off."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # whose functions make no enums, which takes longer than a switch
import contextlib
import itertools
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

# Those that may have a handler; Windows has neither of the two that may not.
_NUMBERS = sorted(signal.valid_signals() - {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")})


class _Waiting:
    """The handler of all signals that Python handles, while they are held."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # in whose place it is
        self._is_holding = True
        self._caught: list[tuple[int, FrameType | None]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._is_holding:
            self._caught.append((number, frame))
        else:
            self.handlers[number](number, frame)

    def take_place(self) -> None:
        """Takes the place of all handlers that are Python's."""
        for number, handler in zip(_NUMBERS, map(_signal.getsignal, _NUMBERS), strict=True):
            while isinstance(handler, _Waiting) and not handler._is_holding:  # left behind by `give_place`
                handler = handler.handlers[number]
            if callable(handler):
                self.handlers[number] = handler
                _signal.signal(number, self)

    def let_through(self) -> None:
        """Calls the handlers of what was caught, each of them, also if one raises."""
        try:
            while self._caught:
                number, frame = self._caught.pop(0)
                self.handlers[number](number, frame)
        finally:
            if self._caught:
                self.let_through()

    def give_place(self) -> None:
        """Puts the handlers back. One that is back may raise, and that of a further signal before the others are back:
        what is left here only passes signals on, until the next one takes its place."""
        self._is_holding = False
        try:
            self._put_back()
        except BaseException:
            self._put_back()
            raise

    def _put_back(self) -> None:
        for number, handler in reversed(self.handlers.items()):
            if _signal.getsignal(number) is self:
                _signal.signal(number, handler)


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Python's handlers of signals, which may raise between any two lines, wait until the block is left, or until the
    function that it gives is called."""
    waiting = _Waiting()
    try:
        if threading.current_thread() is threading.main_thread():  # no other runs handlers
            waiting.take_place()
        yield waiting.let_through
    finally:
        try:
            waiting.give_place()
        finally:
            try:
                waiting.let_through()
            finally:
                waiting.let_through()  # where another signal came before the first of these lines


# By the order in which they were made. A fork takes all: its child would wait for ever for one that is held by a thread
# which the child lacks, and find half done what that thread was doing.
_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_taken = threading.local()  # by the fork of this thread


def lock_that_forks_wait_for() -> Any:
    """Gives an RLock that every fork of this process takes first, and that is free in parent and child afterwards. Who
    holds several must take them in the order in which they were made."""
    lock = threading.RLock()
    _locks[next(_numbers)] = lock
    return lock


def _before_fork() -> None:
    with interrupts_held():
        _taken.locks = []
        for reference in _locks.valuerefs():
            if (lock := reference()) is not None:
                lock.acquire()
                _taken.locks.append(lock)


def _after_fork() -> None:
    with interrupts_held():
        while _taken.locks:
            _taken.locks.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Arithmetic of a bank's own is in the dtypes that it names."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
