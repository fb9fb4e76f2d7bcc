"""The commands for adapter files: info, diff, apply, fuse, convert. Conversion loads when it is first used."""

from __future__ import annotations

import importlib.util
import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import shira
from shira.adapter.adapter import Adapter, describe
from shira.cli.console import CommandError, Json, in_bytes, plainly, print_json, print_table, progress_bar, say
from shira.files.checkpoint import TensorFolder
from shira.files.output import check_apart, check_free

_BASE_HELP = "What the adapter was made for: a safetensors file, or a folder of them such as a Hugging Face model's."
_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.", show_default=False)]
_Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
_AnyBase = Annotated[bool, typer.Option("--any-base", help="Go on where an adapter was made for another base.")]
_Weights = Annotated[
    list[float] | None,
    typer.Option("--weight", "-w", help="Strength of an adapter, once for each in their order; all 1 without."),
]
_OptionalBase = Annotated[Path | None, typer.Option("--base", "-b", metavar="FILE_OR_DIR", help=_BASE_HELP)]
_Top = Annotated[
    float | None,
    typer.Option(
        "--top",
        metavar="SHARE",
        help="Keep only the largest changes: this share of each tensor's entries, such as 0.01.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this module to the command line."""
    for command in (info, diff, apply, fuse, convert):
        app.command()(command)


def info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An adapter: a shira file, a weight patch, or a folder of PEFT.")
    ],
    base: _OptionalBase = None,
    json: Json = False,
) -> None:
    """Show what is in an adapter, tensor by tensor, and whether it was made for a base.

    Example: shira info blue.safetensors --base llama/
    """
    with plainly():
        from shira import convert as formats
        from shira.convert.merge import fit_of

        form = formats.format_of(file)
        if form == "peft-merged" or (form != "shira" and base is None):
            _info_of_arrays(file, form, json)
            return
        has_indices = form != "shira" or describe(file)[1]
        adapter = formats.read(file, base) if has_indices else describe(file)[0]
        facts = {"file": str(file), "format": form, "bytes": _size(file), **_facts(adapter)}
        facts["indices"] = "stored" if has_indices else "recomputed"
        if base is not None:
            fit = fit_of(adapter if has_indices else file, base)
            facts["fits"], facts["base"] = fit.fits, fit.reason
    if json:
        print_json(facts)
        return
    _print_tensors(adapter)
    say(f"{file}: format {form}, {_summary(adapter)}, {in_bytes(facts['bytes'])}")
    if adapter.nnz:
        print(f"{facts['bytes'] / adapter.nnz:.2f} bytes for each entry, all counted")
    if not has_indices:
        print("no indices: they are recomputed from the base, which commands take as --base")
    if adapter.config is not None:
        say(f"made with {adapter.config}")
    if adapter.provenance is not None:
        say(f"made of {_shortened(adapter.provenance)}")
    unknown = sum(tensor.checksum is None for tensor in adapter.values())
    if unknown:
        print(f"no checksum of the base in {unknown} of {len(adapter)} tensors: it cannot be told which it belongs to")
    if base is not None:
        say(f"the base {base}: {facts['base']}")


def diff(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="A safetensors file, or a folder of them.", show_default=False)
    ],
    tuned: Annotated[
        Path, typer.Argument(metavar="TUNED", help="The same model with other weights.", show_default=False)
    ],
    output: _Output,
    top: _Top = None,
    common: Annotated[bool, typer.Option("--common", help="Leave out tensors that only one side has.")] = False,
    force: _Force = False,
    json: Json = False,
) -> None:
    """Save what makes one checkpoint of another as an adapter: exact, two tensors in memory at a time.

    Example: shira diff llama/ llama-tuned/ -o tuned.safetensors

    Example: shira diff llama/ llama-tuned/ -o tuned.safetensors --top 0.01
    """
    with plainly():
        _check_output(output, [base, tuned], force)
        with progress_bar() as progress:
            adapter = shira.diff(base, tuned, top=top, common=common, progress=progress)
            progress(1, 1, f"writing {output.name}")
            adapter.save(output)
    _report_written(adapter, output, json)
    if not json:
        _print_tensors(adapter)


def apply(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="A safetensors file, or a folder of them.", show_default=False)
    ],
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Files of adapters.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE_OR_DIR", help="A file or folder like the base.", show_default=False
        ),
    ],
    weight: _Weights = None,
    any_base: _AnyBase = False,
    force: _Force = False,
    json: Json = False,
) -> None:
    """Write a checkpoint with adapters in its weights: as many files, the same names and metadata.

    Example: shira apply llama/ blue.safetensors -o llama-blue/

    Example: shira apply llama/ blue.safetensors paint.safetensors -w 0.7 -w 0.3 -o llama-mix/
    """
    with plainly(adapters):
        pairs = _pairs(adapters, weight)
        check_free(output, force)
        check_apart(output, [base, *adapters])  # of other formats merge_checkpoint gets no path
        with progress_bar() as progress:
            merged = shira.merge_checkpoint(
                base,
                [(_any_format(file, base), strength) for file, strength in pairs],
                output,
                force_base=any_base,
                overwrite=force,
                progress=progress,
            )
    if json:
        print_json(
            {
                "output": str(output),
                "adapters": [{"file": str(file), "weight": strength} for file, strength in pairs],
                "tensors": merged.tensors,
                "entries": merged.entries,
                "files": merged.files,
                "left_out": merged.left_out,
            }
        )
        return
    files = f"{len(merged.files)} file{'s' if len(merged.files) != 1 else ''}"
    say(f"{output}: {merged.entries} entries of {len(merged.tensors)} tensors written into {files}")
    if merged.left_out:
        say(f"not copied: {', '.join(merged.left_out)}")


def fuse(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Files of adapters.", show_default=False)],
    output: _Output,
    weight: _Weights = None,
    policy: Annotated[
        str, typer.Option(help="Of entries that several adapters change: their sum, mean, last, or ties (by sign).")
    ] = "sum",
    base: _OptionalBase = None,
    any_base: _AnyBase = False,
    force: _Force = False,
    json: Json = False,
) -> None:
    """Make one adapter of several. Adapters that hold new values, such as trained ones, need --base.

    Example: shira fuse blue.safetensors paint.safetensors -w 0.7 -w 0.3 --base llama/ -o mix.safetensors
    """
    with plainly(adapters):
        pairs = _pairs(adapters, weight)
        _check_output(output, [*adapters, *([base] if base else [])], force)
        loaded = [(_any_format(file, base), strength) for file, strength in pairs]
        with progress_bar() as progress:
            adapter = shira.fuse(loaded, policy, base, force=any_base, progress=progress)
            progress(1, 1, f"writing {output.name}")
            adapter.save(output)
    _report_written(adapter, output, json)


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A shira file, a weight patch, or a folder of PEFT.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE_OR_DIR", help="A file; with --to peft-shira a folder.", show_default=False
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="shira, peft-shira or patch (of vLLM and TRL).")] = "shira",
    base: _OptionalBase = None,
    top: _Top = None,
    trust_base: Annotated[
        bool,
        typer.Option(
            "--trust-base", help="The adapter was made for this base: take its checksum where the format has none."
        ),
    ] = False,
    indices: Annotated[
        bool,
        typer.Option(
            "--indices/--no-indices",
            help="A shira file may leave out indices that --base tells again: masks wm, small, struct and rand.",
            show_default=False,
        ),
    ] = True,
    any_base: _AnyBase = False,
    force: _Force = False,
    json: Json = False,
) -> None:
    """Convert an adapter from another tool's format, or to it. What it is in is seen by its content.

    In: shira files, PEFT's SHiRA and Super-Tuning, whatever else PEFT can merge such as LoRA and DoRA, weight patches.
    --top, for what PEFT merges, makes it sparse.

    Example: shira convert my-lora/ --base llama/ --top 0.02 -o my-lora.safetensors

    Example: shira convert blue.safetensors --base llama/ --to peft-shira -o blue-peft/

    Example: shira convert blue.safetensors --base llama/ --no-indices -o blue-small.safetensors
    """
    with plainly():
        from shira import convert as formats

        if to not in formats.WRITTEN:
            raise ValueError(f"--to must be one of {', '.join(formats.WRITTEN)}, got {to!r}")
        _check_output(output, [file, *([base] if base else [])], force, folder=to == "peft-shira")
        form = formats.format_of(file)
        if form == "peft-merged" and base is not None:
            _need("peft", "transformers")
        with progress_bar() as progress:
            adapter = formats.read(file, base, top=top, trust_base=trust_base, progress=progress)
            progress(1, 1, f"writing {output.name}")
            formats.write(adapter, output, to, base, indices=indices, overwrite=force, force_base=any_base)
    _report_written(adapter, output, json, {"from": form, "to": to})


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandError(f"merging a PEFT adapter needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _pairs(adapters: Sequence[Path], weights: Sequence[float] | None) -> list[tuple[Path, float]]:
    if weights and len(weights) != len(adapters):
        raise ValueError(
            f"give --weight once for each adapter or not at all: {len(adapters)} adapters, {len(weights)} weights"
        )
    return list(zip(adapters, weights or [1.0] * len(adapters), strict=True))


def _any_format(file: Path, base: Path | None) -> Adapter | Path:
    """A shira file stays a path, so that its name is known."""
    from shira import convert as formats

    form = formats.format_of(file)
    if form == "peft-merged":
        raise ValueError(f"{file}: make an adapter of it first: shira convert {file} --base BASE --top 0.02 -o FILE")
    return file if form == "shira" else formats.read(file, base)


def _check_output(output: Path, inputs: Sequence[Path], force: bool, folder: bool = False) -> None:
    check_free(output, force)
    check_apart(output, inputs)
    if output.is_dir() and not folder:
        raise ValueError(f"{output}: it must be a file, and there is a folder")


def _facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "entries": adapter.nnz,
        "density": adapter.density,
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "kind": tensor.kind,
                "entries": tensor.nnz,
                "density": tensor.nnz / max(1, tensor.numel),
                "checksum": tensor.checksum,
            }
            for name, tensor in adapter.items()
        },
        "config": adapter.config and adapter.config.to_dict(),
        "provenance": adapter.provenance,
    }


def _info_of_arrays(file: Path, form: str, json: bool) -> None:
    """What can be told of another tool's adapter without its base."""
    from shira.convert.source import peft_tensors

    tensors = TensorFolder(file) if form == "patch" else peft_tensors(file if file.is_dir() else file.parent)
    arrays = {name: tensors[name] for name in tensors}
    if json:
        shapes = {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in arrays.items()
        }
        print_json({"file": str(file), "format": form, "bytes": _size(file), "arrays": shapes})
        return
    rows = [(n, str(tuple(t.shape)), str(t.dtype).removeprefix("torch.")) for n, t in arrays.items()]
    print_table(("array", "shape", "dtype"), rows)
    say(f"{file}: format {form}, {len(arrays)} arrays, {in_bytes(_size(file))}")
    print("shira convert makes an adapter of it, with the --base that it was made for")


def _report_written(adapter: Adapter, output: Path, json: bool, more: dict[str, Any] | None = None) -> None:
    size = _size(output)
    if json:
        print_json({"output": str(output), **(more or {}), "bytes": size, **_facts(adapter)})
        return
    say(f"{output}: {_summary(adapter)}, {in_bytes(size)}")
    facts = (adapter.provenance or {}).get("diff") or (adapter.provenance or {}).get("converted") or {}
    if "energy_kept" in facts:
        print(f"{facts['energy_kept']:.1%} of the energy of all changes (the sum of their squares) is kept")
    if (
        (more or {}).get("to") == "shira"
        and len(adapter)
        and all(tensor.checksum is None for tensor in adapter.values())
    ):
        print("it has no checksum of its base, so it is applied with a warning; --trust-base takes the one given")


def _summary(adapter: Adapter) -> str:
    kinds = "+".join(sorted({tensor.kind for tensor in adapter.values()})) or "nothing"
    tensors = f"{len(adapter)} tensor{'s' if len(adapter) != 1 else ''}"
    return f"{adapter.nnz} entries in {tensors}, density {adapter.density:.3%}, kind {kinds}"


def _print_tensors(adapter: Adapter) -> None:
    rows = [
        (
            name,
            " x ".join(map(str, tensor.shape)) or "()",
            str(tensor.dtype).removeprefix("torch."),
            tensor.kind,
            str(tensor.nnz),
            f"{tensor.nnz / max(1, tensor.numel):.3%}",
            "unknown" if tensor.checksum is None else tensor.checksum[:8],
        )
        for name, tensor in adapter.items()
    ]
    print_table(("tensor", "shape", "dtype", "kind", "entries", "density", "base"), rows)


def _shortened(provenance: dict[str, Any]) -> str:
    text = json_module.dumps(provenance)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
