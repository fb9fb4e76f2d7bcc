"""What all commands share: errors that end one, text and JSON on standard output, bars on standard error."""

from __future__ import annotations

import json as json_module
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from shira.files.errors import AdapterFormatError, Argument, ArgumentError, ShiraWarning
from shira.files.progress import Progress
from shira.model.names import printable

Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON on standard output, and nothing else.")]


class CommandError(Exception):
    """What the user can put right; its text is all that is shown."""


@contextmanager
def plainly(adapters: Sequence[Path] = ()) -> Iterator[None]:
    """Errors of the input become CommandErrors; our warnings one line each, and those of libraries nothing."""

    def option(argument: Argument) -> str:
        if argument.position is not None:
            return str(files.get(argument.position, argument))
        return "--force" if argument.name == "overwrite" else f"--{argument.name}"

    files = dict(enumerate(adapters))
    alike: dict[str, list[Any]] = {}  # by what follows the tensor's name: the first such warning, how many there are

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if isinstance(message, ShiraWarning):
            alike.setdefault(str(message).rpartition(": ")[2], [message.said(option), 0])[1] += 1

    # transformers would draw bars and report on weights by itself.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            yield
        except (ArgumentError, AdapterFormatError) as error:
            raise CommandError(printable(error.said(option))) from None
        except ValueError as error:
            raise CommandError(printable(str(error))) from None
        finally:
            for first, number in alike.values():
                more = f" (and {number - 1} more)" if number > 1 else ""
                print(f"shira: warning: {printable(first)}{more}", file=sys.stderr)


def console_for(json: bool) -> Console:
    """Where a command shows what it found: beside JSON not on standard output."""
    return Console(stderr=json)


def say(text: str) -> None:
    """Prints a line on standard output, without characters that a terminal would obey."""
    print(printable(text))


def print_json(facts: dict[str, Any]) -> None:
    """Prints facts on standard output."""
    print(json_module.dumps(facts, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under the names of their columns. On a narrow terminal the first column is folded, others are not."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        right = column in ("entries", "density")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    widths = [max(len(row[i]) for row in [columns, *rows]) + 2 for i in range(len(columns))]
    # A file gets lines as long as they are.
    least = sum(widths[1:]) + (min(widths[0], 20) if console.is_terminal else widths[0])
    console.width = max(console.width, least)
    console.print(table)


def in_bytes(size: int) -> str:
    """A size for people: "3.2 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def bar(*columns: ProgressColumn, console: Console | None = None, auto_refresh: bool = True) -> Bar:
    """A bar that is drawn only on a terminal, standard error without a `console`, and is gone at the end."""
    console = console or Console(stderr=True)
    return Bar(*columns, console=console, auto_refresh=auto_refresh, transient=True, disable=not console.is_terminal)


@contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Makes a folder for what the block writes. An error in it takes back what was made, unless a file is there."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise


@contextmanager
def progress_bar(first: str = "") -> Iterator[Progress]:
    """Shows how far work is whose steps have names; `first` is what it does before the first of them."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with bar(*columns) as shown:
        task = shown.add_task(first, total=None)

        def show(done: int, total: int, what: str) -> None:
            shown.update(task, completed=done, total=total, description=what)

        yield show
