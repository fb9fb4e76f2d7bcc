"""The command `shira`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from shira.cli_files import CommandError, add_commands

app = typer.Typer(help="Sparse high-rank adapters: train, save, switch.", add_completion=False, no_args_is_help=True)

# Its module differs: older versions of typer raise click's, newer ones their own.
_USAGE_ERROR: type[Exception] = typer.BadParameter.mro()[1]


@app.callback()
def _group() -> None:
    """With a callback, typer keeps a single command a subcommand."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and less text: under a minute.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there.")] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Adapters, report and picture.")] = Path("shira-demo"),
    seed: Annotated[int, typer.Option(min=0, help="For training batches and generated text.")] = 0,
) -> None:
    """Train two adapters on a small language model, switch between them, and show what that brings."""
    for package in ("transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"the demo needs {package}: pip install shira-kernels[train]")
    from shira.demo import run

    run.run_demo(run.QUICK if quick else run.FULL, output=output, json_file=json, seed=seed)


@app.command()
def report(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Files of two or more adapters.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="FILE_OR_DIR", help="What they were trained on: a safetensors file or a folder of them."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For report.html, report.png.")] = Path(
        "shira-report"
    ),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Show how adapters interfere: overlap, AWOM and AWOR, conflicts of sign, energies, tensor by tensor."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("the report needs matplotlib: pip install shira-kernels[train]")
    from shira import interference_report

    try:
        interference_report.run_report(adapters, base=base, output=output, json_file=json, force=force)
    except ValueError as error:
        raise CommandError(str(error)) from None


add_commands(app)


def main() -> None:
    """The console script: bad input ends with exit code 2 and one line on stderr."""
    try:
        code = app(standalone_mode=False, prog_name="shira")
    except _USAGE_ERROR as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except (CommandError, OSError) as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    if message:  # none comes with the help that `shira` alone shows
        print(f"shira: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
