"""Writes what the reference pages say about ops and commands: `python tools/docs_reference.py`.

docs/reference/cli.md is typer's help of every command. docs/reference/ops.md gets, after its marker, each op's schema
and the docstring of its module, and a line by which mkdocstrings adds arguments and errors. A test makes both again
and compares.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

import torch
import typer

from shira import cli
from shira_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
CLI, OPS_PAGE = ROOT / "docs/reference/cli.md", ROOT / "docs/reference/ops.md"
MARKER = "<!-- made by tools/docs_reference.py, to the end -->\n"
_ORDER = ("train", "info", "diff", "apply", "fuse", "convert", "report", "bench", "demo")

_CLI_HEAD = """# Command line

<!-- made by tools/docs_reference.py -->
Every command of `shira` with its arguments and options, as `shira COMMAND --help` shows them. What the commands do, and
what they promise about files, is in [command line and conversion](../convert.md); training is in
[training](../training.md#at-the-command-line).

Bad input ends with exit code 2 and one line on standard error, Ctrl-C with 130. `shira --install-completion` makes your
shell complete commands and options.
"""


def _group() -> Any:
    """The command `shira` with its commands, as click knows it."""
    return typer.main.get_command(sys.modules[cli.main.__module__].app)  # type: ignore[attr-defined]


def commands() -> dict[str, Any]:
    """The commands by name, in the order in which one meets them."""
    found = _group().commands
    return {name: found[name] for name in sorted(found, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))}


def cli_page() -> str:
    page = _CLI_HEAD
    if options := _options(_group()):
        page += "\n" + _table("option of `shira` itself", [(_option(p, {}), p) for p in options])
    return page + "".join(_command(name, command) for name, command in commands().items())


def _options(command: Any) -> list[Any]:
    """Its options but those of typer, whose words differ by its version."""
    typers = ("help", "install_completion", "show_completion")
    return [p for p in command.params if p.param_type_name == "option" and p.name not in typers]


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = _options(command)
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    usage = " ".join([f"shira {name}", *([] if not options else ["[OPTIONS]"]), *map(_metavar, arguments)])
    text, examples = _help(command.help)
    parts = [f"\n## shira {name}\n", f"```\n{usage}\n```\n", *(f"{paragraph}\n" for paragraph in text)]
    if examples:
        parts.append("```\n" + "\n".join(examples) + "\n```\n")
    if arguments:
        parts.append(_table("argument", [(f"`{_metavar(p)}`", p) for p in arguments]))
    parts.append(_table("option", [(_option(p, kinds), p) for p in options]))
    return "\n".join(parts)


def _help(text: str) -> tuple[list[str], list[str]]:
    """The paragraphs of a help text, and its examples."""
    paragraphs, examples = [], []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\b", "")):
        line = " ".join(paragraph.split())
        if line.startswith(("Example: ", "shira ")):
            examples.append(line.removeprefix("Example: "))
        elif line not in ("Examples:", ""):
            paragraphs.append(line)
    return paragraphs, examples


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return f"{name}..." if argument.nargs == -1 and not name.endswith("...") else name


def _option(option: Any, kinds: dict[str, Any]) -> str:
    """Its names, and what it takes, by its annotation: each version of typer says that in another way."""
    names = ", ".join(f"`{name}`" for name in option.opts)
    kind = str(kinds.get(option.name, "bool"))
    if "bool" in kind:
        return names
    return f"{names} `{option.metavar or ('X' if 'float' in kind else 'N' if 'int' in kind else 'WORD')}`"


def _table(kind: str, rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {kind} | | default |", "|---|---|---|"]
    lines += [f"| {shown} | {_cell(parameter.help or '')} | {_default(parameter)} |" for shown, parameter in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "must be given"
    value = parameter.default
    return "" if value is None or value is False or value == () or value == [] else f"`{value}`"


def op_contracts() -> str:
    """What follows the marker of the ops' page."""
    return "".join(_contract(op) for op in sorted(OPS))


def _contract(op: str) -> str:
    schema = str(getattr(torch.ops.shira, op).default._schema).removeprefix("shira::")
    docstring = inspect.cleandoc(importlib.import_module(f"shira_kernels.ops.{op}").__doc__ or "")
    if not docstring.startswith(f"{op}: "):
        raise ValueError(f"the docstring of shira_kernels/ops/{op}.py must begin with the op's name and a colon")
    meaning = docstring.removeprefix(f"{op}: ")
    meaning = re.sub(r"(?<!`)\b([a-z]+(?:_[a-z0-9]+)+)\b(?!`)", _as_code, meaning)
    return f"\n## {op}\n\n```\n{_wrapped(schema)}\n```\n\n{meaning[0].upper()}{meaning[1:]}\n\n::: shira_kernels.{op}\n"


def _as_code(match: re.Match[str]) -> str:
    """An op's name in a sentence; in an indented formula, and within backticks, it stays as it is."""
    begin = match.string.rfind("\n", 0, match.start()) + 1
    line = match.string[begin : match.start()]
    return match[1] if match[1] not in OPS or line.startswith("    ") or line.count("`") % 2 else f"`{match[1]}`"


def _wrapped(schema: str, width: int = 110) -> str:
    """A schema in lines of at most `width` characters, broken between arguments."""
    lines = [""]
    for part in re.split(r"(?<=, )", schema):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def ops_page(current: str) -> str:
    return current.split(MARKER, 1)[0] + MARKER + op_contracts()


def main() -> int:
    CLI.write_text(cli_page())
    OPS_PAGE.write_text(ops_page(OPS_PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
