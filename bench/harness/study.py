"""What the studies share: runs that are written one by one and resumed, and how a command ends."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness.machine import cpu_name
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shira.files.atomic import write_atomically

INK = "#303438"
COLOURS = {"probe": "#9aa0a6", "full": "#3c4043", "lora": "#2f6fb5", "dora": "#2f6fb5", "shira": "#d9772b"}

Output = Annotated[Path, typer.Option(metavar="DIR", help="For results.json, report.md and a picture.")]
Quick = Annotated[bool, typer.Option("--quick", help="Two steps a run: shows that it works, no more.")]
ReportOnly = Annotated[bool, typer.Option("--report", help="Report on the results that are there; train none.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]


class StudyError(Exception):
    """What the user can put right; its text is all that is shown."""


class Runs:
    """results.json: what the runs belong to (header, checksum of the texts), conditions, runs.

    A run does not depend on which others there are, so methods and learning rates may be added to a study.

    Args:
        path: of the file, which need not be there.
        header: what all runs depend on, in parts that are mappings.

    Raises:
        StudyError: the file belongs to something else, or is not such a file.
    """

    def __init__(self, path: Path, header: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self.runs: list[dict[str, Any]] = []
        self.conditions: dict[str, Any] = {}
        self.digest: str | None = None
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            held = json.loads(self.path.read_text())
            header, self.runs = held["header"], held["runs"]
            self.digest, self.conditions = held["texts"], held["conditions"]
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{self.path} is not a results.json of this command ({error})") from None
        for field, value in self.header.items():
            if header.get(field) != value:
                raise StudyError(
                    f"{self.path} belongs to other {field}: {_difference(header.get(field), value)}; "
                    "choose another --output or remove it"
                )

    def missing(self) -> list[Any]:
        """What is still to be done, in order; each has a `label`."""
        raise NotImplementedError

    def check_texts(self, digest: str) -> None:
        if self.digest not in (None, digest):
            raise StudyError(
                f"{self.path} belongs to other texts ({self.digest}, now {digest}); choose another --output"
            )
        self.digest = digest

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.write()

    def write(self) -> None:
        content = {"header": self.header, "texts": self.digest, "conditions": self.conditions, "runs": self.runs}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The run with these fields."""
        for run in self.runs:
            if all(run.get(field) == value for field, value in fields.items()):
                return run
        return None


def _difference(held: Any, now: Any) -> str:
    if not isinstance(held, dict):
        return "it has none"
    fields = [field for field in {**held, **now} if held.get(field) != now.get(field)]
    return ", ".join(f"{field} {held.get(field)}, now {now.get(field)}" for field in fields[:2])


def complete(results: Runs, run: Callable[[Any], dict[str, Any]], console: Console) -> None:
    """Does what is missing, one run after the other, and writes each."""
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(results.missing())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)
        while missing := results.missing():
            progress.update(bar, completed=total - len(missing), description=missing[0].label)
            results.add(run(missing[0]))
        progress.update(bar, completed=total, description="done")


def check_complete(results: Runs) -> None:
    if results.missing():
        raise StudyError(f"{len(results.missing())} runs are missing in {results.path}: run without --report first")


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise StudyError(f"this needs {distribution}: pip install shira-kernels[dev]") from None


def conditions() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": "bfloat16 autocast over float32 weights",
        "torch": torch.__version__,
    }


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear from zero in a share `warmup` of the steps, then linear to zero."""
    rise = max(1, round(warmup * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds, n - 1."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds of the difference: a seed gives both the same texts and order."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return statistics.mean(differences), spread(differences)


def verdict(first: Sequence[float], second: Sequence[float], *, scale: float, digits: int, unit: str) -> str:
    """In words, whether two methods differ by more than the spread of their difference; more is better."""
    mean, deviation = (scale * number for number in paired(first, second))
    difference = f"{round(mean, digits) + 0.0:+.{digits}f} ± {deviation:.{digits}f} {unit}"  # + 0.0: no -0.0
    if abs(mean) <= deviation:
        return f"no difference beyond the spread ({difference})"
    agree = len({a > b for a, b in zip(first, second, strict=True)}) == 1
    return f"{'better' if mean > 0 else 'worse'} ({difference}{'' if agree else ', not with every seed'})"


def main(command: Callable[..., None], name: str) -> None:
    """Runs a command with the process's arguments; bad input ends with exit code 2 and one line on stderr."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    usage_error = typer.BadParameter.mro()[1]
    try:
        code = app(standalone_mode=False, prog_name=name)
    except usage_error as error:
        _fail(name, error.format_message())  # type: ignore[attr-defined]
    except (StudyError, OSError) as error:
        _fail(name, str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(name: str, message: str) -> None:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
