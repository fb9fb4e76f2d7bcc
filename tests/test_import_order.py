"""The order in which the rooms of python/shira may import each other, and that no files import each other in a circle.

Every import counts: at the top of a file, inside a function, and under TYPE_CHECKING, for a type from above is a circle
of meaning. `import_module` counts where its argument is written out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "python/shira").is_dir())

# From the ground up. Rooms beside each other never import each other. "" is the package's own __init__.py.
FLOORS = (
    ("files",),
    ("model",),
    ("masks",),
    ("adapter",),
    ("training", "serving"),
    ("convert", "sync"),
    ("integrations",),
    ("",),
    ("cli",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def imports_of(tree: ast.Module, package: str) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """The line, the module and the names of each import; no names where the module itself is imported.

    package: the one that relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield node.lineno, module, tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, ()


class Package:
    """The files of a package, by module name, and what each imports of it: (line, module)."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        self.imports = {module: sorted(set(self._imports(module))) for module in self.files}

    def _imports(self, module: str) -> Iterator[tuple[int, str]]:
        path = self.files[module]
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for line, imported, names in imports_of(ast.parse(path.read_text(), str(path)), package):
            if imported.split(".")[0] != self.name:
                continue
            # A name is a module of its own, or something inside the module that it is imported from.
            modules = {f"{imported}.{name}" if f"{imported}.{name}" in self.files else imported for name in names}
            for found in modules or {imported}:
                while found not in self.files:  # an attribute, or a folder without __init__.py
                    found = found.rpartition(".")[0]
                yield line, found

    def room_of(self, module: str) -> str:
        """The folder of a module; "" for the package itself and for files beside its __init__.py."""
        parts = module.split(".")
        return parts[1] if len(parts) > 2 or (len(parts) == 2 and self.files[module].name == "__init__.py") else ""

    def where(self, module: str, line: int) -> str:
        return f"{self.files[module].relative_to(self.files[self.name].parent.parent)}:{line}"

    def wrong_floors(self) -> list[str]:
        """Imports of rooms that do not stand below, and what has no place in the order."""
        found = []
        for module, imports in self.imports.items():
            room = self.room_of(module)
            if room not in FLOOR_OF:
                found.append(f"{self.where(module, 1)}: the room {room!r} has no place in FLOORS")
                continue
            if room == "" and module != self.name:
                found.append(f"{self.where(module, 1)}: the file belongs into a room")
            for line, imported in imports:
                other = self.room_of(imported)
                if other != room and FLOOR_OF.get(other, -1) >= FLOOR_OF[room]:
                    stands = "beside" if FLOOR_OF[other] == FLOOR_OF[room] else "above"
                    below = room or self.name
                    found.append(f"{self.where(module, line)}: {imported} is imported, which stands {stands} {below!r}")
        return found

    def circles(self) -> list[str]:
        """The shortest circle of each file that is in one, unless it is in one that is named already."""
        found, seen = [], set[str]()
        for start in self.imports:
            if start not in seen and (circle := self._circle(start)):
                seen.update(circle)
                steps = zip(circle, [*circle[1:], start], strict=True)
                lines = [
                    f"{self.where(a, next(line for line, module in self.imports[a] if module == b))} imports {b}"
                    for a, b in steps
                ]
                found.append("; ".join(lines))
        return found

    def _circle(self, start: str) -> list[str]:
        """The modules of a shortest way from a module back to itself, or none."""
        ways = [[start]]
        reached: set[str] = set()
        for way in ways:
            for _, module in self.imports[way[-1]]:
                if module == start:
                    return way
                if module not in reached:
                    reached.add(module)
                    ways.append([*way, module])
        return []


SHIRA = Package(ROOT / "python/shira")


def test_each_room_imports_only_what_stands_below_it() -> None:
    wrong = SHIRA.wrong_floors()
    assert not wrong, "\n".join(["", *wrong])


def test_no_files_import_each_other_in_a_circle() -> None:
    circles = SHIRA.circles()
    assert not circles, "\n".join(["", *circles])


def test_the_kernels_import_nothing_of_the_library() -> None:
    kernels = Package(ROOT / "shira_kernels")
    for module, path in kernels.files.items():
        for line, imported, _ in imports_of(ast.parse(path.read_text()), module):
            assert imported.split(".")[0] != "shira", f"{kernels.where(module, line)}: {imported} is imported"


def made_up(folder: Path, files: dict[str, str]) -> Package:
    """A package `shira` of these files, by path; folders get an __init__.py."""
    for path, text in {"__init__.py": "", **files}.items():
        file = folder / "shira" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    return Package(folder / "shira")


GOOD = {
    "__init__.py": "from shira import masks\nfrom shira.training.attach import attach\n",
    "files/atomic.py": "import os\nimport shira_kernels\n",
    "masks/__init__.py": "from shira.masks.functions import wm as wm\n",
    "masks/functions.py": "from shira.masks import hashing\n",
    "masks/hashing.py": "from shira.files import atomic\n",
    "training/attach.py": "from shira.masks import wm\nfrom . import layers\nfrom ..masks.hashing import key\n",
    "training/layers.py": "def f():\n    from shira.files.atomic import hold\n",
    "cli/app.py": "import shira\nfrom shira.training import attach\n",
}


def test_a_tree_in_order_is_accepted(tmp_path: Path) -> None:
    tree = made_up(tmp_path, GOOD)
    assert not tree.wrong_floors()
    assert not tree.circles()
    assert tree.imports["shira.training.attach"] == [
        (1, "shira.masks"),
        (2, "shira.training.layers"),
        (3, "shira.masks.hashing"),
    ]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("files/a.py", "import os\nfrom shira.model import names", r"files/a.py:2: shira.model.names .* above 'files'"),
        ("masks/a.py", "def f():\n    import shira.adapter", r"masks/a.py:2: shira.adapter .* above 'masks'"),
        ("masks/a.py", "if TYPE_CHECKING:\n    from shira.adapter import A", r"a.py:2: shira.adapter .* above 'masks'"),
        ("masks/a.py", "from ..adapter import Adapter", r"masks/a.py:1: shira.adapter .* above 'masks'"),
        ("masks/a.py", "import_module('shira.adapter')", r"masks/a.py:1: shira.adapter .* above 'masks'"),
        ("serving/a.py", "from shira.training import layers", r"shira.training.layers .* beside 'serving'"),
        ("training/a.py", "import shira", r"training/a.py:1: shira is imported, which stands above 'training'"),
        ("__init__.py", "import shira.cli", r"shira/__init__.py:1: shira.cli is imported, .* above 'shira'"),
        ("loose.py", "", r"shira/loose.py:1: the file belongs into a room"),
        ("attic/__init__.py", "", r"shira/attic/__init__.py:1: the room 'attic' has no place in FLOORS"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, path: str, text: str, message: str) -> None:
    rooms = {"model/names.py": "", "adapter/__init__.py": "", "cli/__init__.py": ""}
    (problem,) = made_up(tmp_path, {**GOOD, **rooms, path: text}).wrong_floors()
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    "back",
    [
        "from shira.masks.functions import wm",
        "def f():\n    from shira.masks import functions",
        "if TYPE_CHECKING:\n    from .functions import Mask",
        "from shira.masks import wm",
    ],
)
def test_a_circle_is_found(tmp_path: Path, back: str) -> None:
    (circle,) = made_up(tmp_path, {**GOOD, "masks/hashing.py": back}).circles()
    assert re.search(r"shira/masks/functions.py:1 imports shira.masks.hashing", circle)
    assert re.search(r"shira/masks/hashing.py:[12] imports shira.masks", circle)
