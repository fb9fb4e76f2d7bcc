"""Errors and warnings whose messages know where they name an argument, so that a command can name its option instead.

A message is given in pieces: text, an `Argument`, or a tuple of pieces. In Python it reads as one text, with the
argument's own name; the command line asks for it in its words.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Argument:
    """The name of a Python argument in a message; `position` is that of one item, where the argument is a list."""

    name: str
    position: int | None = None

    def __str__(self) -> str:
        return f"`{self.name}`" if self.position is None else f"{self.name}[{self.position}]"


Piece: TypeAlias = "str | Argument | tuple[Piece, ...]"  # of a message


class _InPieces(Exception):
    """An exception or a warning that is made of a message's pieces."""

    @property
    def pieces(self) -> tuple[str | Argument, ...]:
        """The message: text, and the arguments that it names."""
        return tuple(_flat(self.args))

    def said(self, call: Callable[[Argument], str]) -> str:
        """The message, with what `call` gives for each argument."""
        return "".join(call(piece) if isinstance(piece, Argument) else str(piece) for piece in self.pieces)

    def __str__(self) -> str:
        return self.said(str)


class ArgumentError(_InPieces, ValueError):
    """What was given cannot be taken, or something is missing. `pieces` tells the arguments that the message names."""


class AdapterFormatError(_InPieces, ValueError):
    """A file that is not a valid adapter; says the path and what is wrong."""


class ShiraWarning(_InPieces, UserWarning):
    """The category of every warning of this package."""


def warn(*pieces: Piece) -> None:
    """Warns with a ShiraWarning that points at the line which called into this package, however deep the reason lies.

    So no function needs to count the frames between it and its user; those of decorators count as ours.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__")):
        level, frame = level + 1, frame.f_back
    warnings.warn(ShiraWarning(*pieces), stacklevel=level)


def _is_inside(module: str | None) -> bool:
    """Whether a module is one of ours, or of those whose decorators stand around our functions."""
    return module is not None and module.partition(".")[0] in ("shira", "shira_kernels", "torch", "contextlib")


def _flat(pieces: tuple[Piece, ...]) -> Iterator[str | Argument]:
    for piece in pieces:
        if isinstance(piece, tuple):
            yield from _flat(piece)
        else:
            yield piece
