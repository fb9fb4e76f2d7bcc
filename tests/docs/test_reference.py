"""The reference has an entry for every public name, and each docstring says what its reader needs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import shira
import shira_kernels
from shira import adapter, convert, masks
from shira_kernels import backends
from shira_kernels.ops import OPS

ROOT = Path(__file__).parent.parent.parent
SHIRA, OPS_PAGE = ROOT / "docs/reference/shira.md", ROOT / "docs/reference/ops.md"
ENTRIES = set(re.findall(r"^::: (\S+)$", SHIRA.read_text() + OPS_PAGE.read_text(), re.M))


def hosts() -> list[ModuleType]:
    """The integrations whose host is installed."""
    found = []
    for path in sorted((ROOT / "python/shira/integrations").glob("[a-z]*")):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(f"shira.integrations.{path.stem}"))
    return found


HOSTS = hosts()


def tool(name: str) -> ModuleType:
    """A script of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def names_of(package: ModuleType) -> list[str]:
    """`__all__`, or what a package imports under the name that it has itself: `from .. import x as x`."""
    if hasattr(package, "__all__"):
        return [name for name in package.__all__ if not name.startswith("_")]
    tree = ast.parse(inspect.getsource(package))
    imported = (alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)
    return [alias.asname for alias in imported if alias.asname == alias.name]


def public() -> dict[str, Any]:
    """Full name -> object, of all that callers may import."""
    found = {}
    for package in (shira, masks, convert, adapter, shira_kernels, *HOSTS):
        for name in names_of(package):
            found[f"{package.__name__}.{name}"] = getattr(package, name)
    return found


def entry_of(name: str, value: Any) -> str:
    """Where a name is documented: shira.adapter.Adapter is shira.Adapter."""
    last = name.rpartition(".")[2]
    if getattr(shira, last, None) is value and f"shira.{last}" in ENTRIES:
        return f"shira.{last}"
    return name


PUBLIC = public()
IN_PARTS = ("shira.masks", "shira.convert", "shira_kernels.backends")  # their names have entries


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - set(IN_PARTS)))
def test_a_public_name_has_an_entry(name: str) -> None:
    assert entry_of(name, PUBLIC[name]) in ENTRIES, "add a line `::: name` to a page of docs/reference"


def test_no_entry_is_of_a_name_that_is_gone() -> None:
    for entry in ENTRIES:
        package, _, last = entry.rpartition(".")
        if package in sys.modules or not package.startswith("shira.integrations."):  # where the host is absent
            assert hasattr(sys.modules[package], last), entry


def test_pages_are_those_that_the_script_makes() -> None:
    reference = tool("docs_reference")
    again = "run tools/docs_reference.py"
    assert reference.cli_page() == (ROOT / "docs/reference/cli.md").read_text(), again
    assert reference.ops_page(OPS_PAGE.read_text()) == OPS_PAGE.read_text(), again
    for command in reference.commands():
        assert f"\n## shira {command}\n" in reference.cli_page()


def test_pictures_are_those_that_the_script_draws() -> None:
    for name, svg in tool("docs_pictures").pictures().items():
        assert (ROOT / "docs/images" / name).read_text() == svg, f"{name}: run tools/docs_pictures.py"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_row_schema_and_entry(op: str) -> None:
    page = OPS_PAGE.read_text()
    assert f"\n| `{op}` |" in page
    schema = str(getattr(torch.ops.shira, op).default._schema).removeprefix("shira::")
    section = page.split(f"\n## {op}\n", 1)[1].split("\n## ", 1)[0]
    assert schema in " ".join(section.split())
    assert f"\n::: shira_kernels.{op}\n" in section


# --- docstrings


def documented() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Name, function and docstring of each public function and method; a class's __init__ has the class's docstring."""
    done = set()
    functions = {**PUBLIC, **{f"shira_kernels.backends.{name}": getattr(backends, name) for name in BACKENDS}}
    for name, value in functions.items():
        value = inspect.unwrap(value) if callable(value) else value
        if id(value) in done:
            continue
        done.add(id(value))
        if inspect.isfunction(value):
            yield name, value, inspect.getdoc(value) or ""
        elif inspect.isclass(value):
            if "__init__" in vars(value) and name not in NOT_CALLED:
                yield name, value.__init__, inspect.getdoc(value) or ""
            for method, found in vars(value).items():
                function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{method}", inspect.unwrap(function), inspect.getdoc(function) or ""


NOT_CALLED = ("shira.Handle", "shira.masks.Mask")  # classes whose objects others make
BACKENDS = [entry.rpartition(".")[2] for entry in sorted(ENTRIES) if entry.startswith("shira_kernels.backends.")]
DOCUMENTED = {name: (function, text) for name, function, text in documented()}

# A docstring may say that arguments, results or errors are those of another one.
_ELSEWHERE = re.compile(r"\b(as (in|for|of|at|that of|when) |the same as |every optimizer|what `\w+` raises)", re.I)
_UNNEEDED = {"self", "cls", "args", "kwargs"}
# Values whose names say all that a caller must know, in docstrings of one sentence.
_SHORT = re.compile("name|path|keep|enabled|names|op|device|backend|closure|param_group|state_dict|fields|target")


def section(text: str, name: str) -> str:
    """The indented lines of a section such as `Args:`."""
    match = re.search(rf"^{name}:\n((?:[ \t]+.*\n?|\n)+)", text + "\n", re.M)
    return match[1] if match else ""


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name not in _UNNEEDED]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_docstring_names_its_parameters(name: str) -> None:
    function, text = DOCUMENTED[name]
    assert text, "it has no docstring"
    described = section(text, "Args") + section(text, "Attributes")
    for parameter in parameters(function):
        in_section = re.search(rf"^\s+(\w+, )*{parameter.name}(, \w+)*: ", described, re.M)
        in_words = f"`{parameter.name}`" in text or f"{parameter.name}: " in text
        short = not described and _SHORT.fullmatch(parameter.name)
        assert in_section or in_words or short or _ELSEWHERE.search(text), f"{parameter.name} is not described"


_SHAPE = re.compile(r"\[|any shape|0-d|weight's shape|of the same shape|as (in|for)|like `|not used")
_DTYPE = re.compile(r"u?int\d+|b?float\d*|dtype|of 1, 2, 4 or 8 bytes|as (in|for)|like `|not used")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_tensor_has_its_shape_and_dtype(name: str) -> None:
    function, text = DOCUMENTED[name]
    described = section(text, "Args")
    for parameter in parameters(function):
        if not re.match(r"(list\[)?torch\.Tensor\b|'?(list\[)?torch\.Tensor", str(parameter.annotation)):
            continue
        match = re.search(rf"^(\s+)(\w+, )*{parameter.name}(, \w+)*: (.*(?:\n\1\s+.*)*)", described, re.M)
        words = match[4] if match else text  # in a docstring without Args the text has it, or says where it is
        if not match and _ELSEWHERE.search(text):
            continue
        assert _SHAPE.search(words), f"{parameter.name}: no shape"
        assert _DTYPE.search(words), f"{parameter.name}: no dtype"


def raises(function: Callable[..., Any], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function raises, itself or by a function of its module."""
    if not hasattr(function, "__code__") or function.__code__.co_filename == "<string>":  # a dataclass's __init__
        owner = function.__qualname__.partition(".")[0]
        made = next(value for value in PUBLIC.values() if getattr(value, "__name__", "") == owner)
        return hasattr(made, "__post_init__")
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree)):
        return True
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    around = function.__globals__
    return any(
        raises(around[name], seen | called)
        for name in called - seen
        if inspect.isfunction(around.get(name)) and around[name].__module__ == function.__module__
    )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_docstring_says_what_is_raised_and_returned(name: str) -> None:
    function, text = DOCUMENTED[name]
    is_op = name.rpartition(".")[2] in OPS and name.startswith("shira_kernels.")
    if is_op or raises(function):
        assert re.search(r"\bRaises\b", text) or _ELSEWHERE.search(text), "it raises, and does not say what"
    result = str(inspect.signature(function).return_annotation)
    # "Makes ..." does something; "Gives ..." and a noun, "The entries of ...", say what the result is.
    verb = re.match(r"(?!Gives|Yields|Says|Copies)[A-Z][a-z]+s [a-z`]", text)
    if verb and result not in ("None", "Iterator[None]", "Any") and not name.endswith((".__init__", ".Adapter")):
        assert re.search(r"\bReturns\b", text) or _ELSEWHERE.search(text), "it returns something, and does not say what"
    if is_op and result != "None":
        assert section(text, "Returns"), "it returns something, and has no Returns"
        assert _SHAPE.search(section(text, "Returns"))
        assert _DTYPE.search(section(text, "Returns"))


@pytest.mark.parametrize("name", sorted(n for n in PUBLIC if not callable(PUBLIC[n]) and n not in IN_PARTS))
def test_a_constant_says_what_it_is(name: str) -> None:
    value = PUBLIC[name]
    if inspect.ismodule(value):
        assert value.__doc__
        return
    package, _, last = name.rpartition(".")
    tree = ast.parse(inspect.getsource(sys.modules[package]))
    origin = next(
        node.module for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.asname == last for alias in node.names)
    )  # fmt: skip
    body = ast.parse(inspect.getsource(importlib.import_module(origin))).body
    for node, following in itertools.pairwise(body):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == last for target in targets):
            assert isinstance(following, ast.Expr), f"{last} has no docstring below it"
            assert isinstance(following.value, ast.Constant), f"{last} has no docstring below it"
            return
    raise AssertionError(f"{last} is not assigned in {origin}")


# --- architecture, contributing


def test_every_file_of_shira_is_in_the_tree() -> None:
    """A file of a room by its name, a folder inside a room by the folder's."""
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = dict(re.findall(r"^  (\w+)/ .*\n((?:    .*\n)+)", page.split("\npython/shira/\n", 1)[1], re.M))
    for path in (ROOT / "python/shira").glob("*/**/*.py"):
        room, inside = path.relative_to(ROOT / "python/shira").parts[:2]
        if not inside.startswith("__"):
            assert (inside if inside.endswith(".py") else f"{inside}/") in rooms[room].split(), f"{room}/{inside}"


def test_contributing_names_the_smallest_op() -> None:
    """By the lines of all its files, of the ops that have a kernel in each language that an op needs."""
    lines = {}
    for op in OPS:
        needed = [
            *(ROOT / f"shira_kernels/{folder}/{op}.py" for folder in ("ops", "reference", "triton")),
            *(ROOT / f"csrc/cpu/{op}{ending}" for ending in (".cpp", "_kernel.h")),
        ]
        if all(path.is_file() for path in needed):
            cuda = [ROOT / f"csrc/cuda/{op}{ending}" for ending in (".cu", ".cuh")]
            files = needed + [path for path in cuda if path.is_file()]
            lines[op] = sum(len(path.read_text().splitlines()) for path in files)
    smallest = min(lines, key=lambda op: lines[op])
    assert f"Copy the smallest one, `{smallest}`" in (ROOT / "CONTRIBUTING.md").read_text(), lines
