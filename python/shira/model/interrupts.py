"""What must not come between: signals wait until a change is whole, and autocast is off."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Signals whose handlers commonly raise; SIGINT is held first and let through last.
_INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Python's handlers of signals, which may raise between any two lines, wait until the block is left, or until the
    function that it gives is called."""
    held: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {}

    def let_through() -> None:
        while held:
            number, frame = held.pop(0)
            handlers[number](number, frame)

    try:
        if threading.current_thread() is threading.main_thread():  # no other runs handlers
            for number in _INTERRUPTS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda *caught: held.append(caught))
        yield let_through
    finally:
        for number in reversed(handlers):
            signal.signal(number, handlers[number])
        let_through()


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Arithmetic of a bank's own is in the dtypes that it names."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
