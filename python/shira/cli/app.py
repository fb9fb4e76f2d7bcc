"""The command `shira`."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

import shira_kernels
from shira.cli.adapters import add_commands
from shira.cli.console import CommandError, Json, console_for, plainly, print_json
from shira.masks.config import ALL_LINEAR, ShiraConfig
from shira.masks.functions import MASKS
from shira.model.names import printable
from shira_kernels import backends
from shira_kernels.ops import OPS

app = typer.Typer(help="Sparse high-rank adapters: train, save, switch.", no_args_is_help=True)

# Its module differs: older versions of typer raise click's, newer ones their own.
_USAGE_ERROR: type[Exception] = typer.BadParameter.mro()[1]

_LARGEST_SEED = 2**32 - 1  # that all generators take
_Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        "-b",
        metavar="FILE_OR_DIR",
        help="What they were made for: a safetensors file, or a folder of them.",
    ),
]
_FilesForce = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]


def _show_version(shown: bool) -> None:
    if not shown:
        return
    kernels: dict[str, None] = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        active = dict.fromkeys(backends.active(op, device) for op in OPS)
        # Ops for files have no kernels for GPUs, which says nothing of the others.
        kernels |= {kernel: None for kernel in active if kernel != "reference" or len(active) == 1}
    print(f"shira-kernels {shira_kernels.__version__}, torch {torch.__version__}, kernels {', '.join(kernels)}")
    raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and the kernels that run here."
        ),
    ] = False,
) -> None:
    if backends.extension_warning:
        print(f"shira: warning: {printable(backends.extension_warning)}", file=sys.stderr)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and less text: under a minute.")] = False,
    json: Json = False,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Adapters, report and picture.")] = Path(
        "shira-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="For training batches and generated text.")] = 0,
    force: _FilesForce = False,
) -> None:
    """Train two adapters on a small language model, switch between them, and show what that brings.

    Example: shira demo --quick --output my-demo
    """
    for package in ("transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"the demo needs {package}: pip install shira-kernels[train]")
    from shira.cli.demo import run

    with plainly():
        found = run.run_demo(
            run.QUICK if quick else run.FULL, output=output, seed=seed, force=force, console=console_for(json)
        )
    if json:
        print_json(found.to_dict())


@app.command()
def report(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Files of two or more adapters.")],
    base: _Base = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For report.html, report.png.")] = Path(
        "shira-report"
    ),
    json: Json = False,
    force: _FilesForce = False,
) -> None:
    """Show how adapters interfere: overlap, AWOM and AWOR, conflicts of sign, energies, tensor by tensor.

    Example: shira report blue.safetensors paint.safetensors --base llama/ -o blue-and-paint
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("the report needs matplotlib: pip install shira-kernels[train]")
    from shira.cli.report.run import run_report

    with plainly(adapters):
        found = run_report(adapters, base=base, output=output, force=force, console=console_for(json))
    if json:
        print_json(found.to_dict())


@app.command()
def train(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model with its tokenizer.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A text file, or rows of JSON (.jsonl).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For the adapter and its curve.")
    ] = Path("shira-train"),
    mask: Annotated[str, typer.Option(help="Which entries: wm, rand, struct, grad, snip or small.")] = "wm",
    density: Annotated[float, typer.Option(help="Share of each weight's entries that is trained.")] = 0.01,
    target_modules: Annotated[
        str, typer.Option(metavar="NAMES", help="Names of layers, with commas between; or all-linear.")
    ] = "all-linear",
    epochs: Annotated[float, typer.Option(help="How often each example is seen; above 0.")] = 3.0,
    max_steps: Annotated[int, typer.Option(min=0, help="Stop after this many steps; 0 sets no bound.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 8,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="At its highest; it then falls to 0.")
    ] = 2e-3,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example; longer ones are cut.")] = 256,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of examples that are only scored; 0: none.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(min=0, max=_LARGEST_SEED, help="For the split, the order, and masks that draw.")
    ] = 0,
    task: Annotated[
        str | None, typer.Option(help="causal-lm or classification; else what the model's architecture says.")
    ] = None,
    json: Json = False,
    force: _FilesForce = False,
) -> None:
    """Train an adapter for a Hugging Face causal language model or sequence classifier.

    DATA is a text file, or JSON lines: {"text": ...}; {"prompt": ..., "completion": ...}, of which the completion is
    learned; {"messages": [{"role": ..., "content": ...}]}, of which the assistant's turns are; or, for a classifier,
    {"text": ..., "label": ...}.

    Examples:

        shira train ./llama notes.txt -o notes

        shira train ./classifier reviews.jsonl --mask snip --density 0.02 --epochs 5 -o reviews
    """
    for package in ("transformers", "accelerate", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"training needs {package}: pip install shira-kernels[train]")
    from shira.cli.train.recipe import Recipe
    from shira.cli.train.run import run_training

    if mask not in MASKS:  # in Python also a function, which a name at a terminal does not call
        raise CommandError(f"--mask must be one of {', '.join(MASKS)}, got {mask!r}")

    names = target_modules if target_modules == ALL_LINEAR else [name.strip() for name in target_modules.split(",")]
    try:
        with plainly():
            numbers = run_training(
                model,
                data,
                output=output,
                config=ShiraConfig(names, mask=mask, density=density, seed=seed),
                recipe=Recipe(
                    epochs=epochs,
                    max_steps=max_steps,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    max_length=max_length,
                    held_out=held_out,
                    seed=seed,
                ),
                task=task,
                force=force,
            )
    except RuntimeError as error:
        raise CommandError(str(error)) from None
    if json:
        print_json(numbers)


@app.command()
def bench(
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="[ADAPTER]...", help="Adapter files; none: two random adapters.")
    ] = None,
    base: _Base = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of the CPU.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure.")] = 2.0,
    json: Json = False,
) -> None:
    """Measure how long switching takes on this machine, in turn with index_copy_ and with LoRA of equal size.

    Examples:

        shira bench

        shira bench blue.safetensors paint.safetensors --base ./model --threads 4
    """
    from shira.cli.bench import run_bench

    try:
        with plainly(adapters or []):
            found = run_bench(
                adapters or [], base=base, device=device, threads=threads, seconds=seconds, console=console_for(json)
            )
    except RuntimeError as error:
        raise CommandError(str(error)) from None
    if json:
        print_json(found.to_dict())


add_commands(app)


def main() -> None:
    """The console script: bad input ends with exit code 2 and one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _ended_by_exceptions(), _asking_nobody():
            code = app(standalone_mode=False, prog_name="shira")
            if sys.stdout is not None:
                sys.stdout.flush()
    except _USAGE_ERROR as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except BrokenPipeError:  # a reader such as `head` has seen enough
        _drop_unwritable_output()
        sys.exit(1)
    except CommandError as error:
        _fail(str(error))
    except OSError as error:
        _drop_unwritable_output()
        what, path = error.strerror or str(error), error.filename2 or error.filename  # of two the one that is written
        _fail(what if path is None else f"{os.fsdecode(path)}: {what}")
    except (KeyboardInterrupt, typer.Abort):  # Abort is a RuntimeError
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        _fail("there is not enough memory for this")
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # of a library in Rust, such as a tokenizer's; it is not an Exception
            raise
        _fail(f"a library failed: {' '.join(str(error).split())}")
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, by an exception: so it removes what it has begun to write."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _asking_nobody() -> Iterator[None]:
    """No command asks anything, and a library that does, such as whether to run a folder's code, is not answered."""
    with open(os.devnull) as nothing:
        before, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = before


def _drop_unwritable_output() -> None:
    """What standard output refuses would be written once more when Python ends, which then ends with code 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str) -> None:
    if message:  # none comes with the help that `shira` alone shows
        print(f"shira: {printable(message)}", file=sys.stderr)
    sys.exit(2)
