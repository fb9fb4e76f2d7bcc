"""The task of the study: which installed package does this docstring come from?

Docstrings of packages that `make` installs, whatever else is on the machine. Each module belongs to one part (train,
validation or test) by a hash of its path in the package, so that no module is in two. Names of the packages are masked,
and a text that the encoder would see twice, after masking and cutting, is kept once in the whole set.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Import name -> distribution: torch and numpy are needed to run, the others come with the extra `dev`.
PACKAGES = {
    "transformers": "transformers",
    "torch": "torch",
    "sympy": "sympy",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "networkx": "networkx",
    "numpy": "numpy",
    "mypy": "mypy",
    "huggingface_hub": "huggingface-hub",
    "fontTools": "fonttools",
    "peft": "peft",
}
SHARES = {"train": 0.55, "validation": 0.2, "test": 0.25}  # of the modules
MODULE_DOCSTRINGS = 12  # at most, of one module, so that none fills a class
WORDS = range(8, 41)  # shorter docstrings are dropped, longer ones cut

# Folders of copied projects, and of tests, which say "test" in every package.
_LEFT_OUT = re.compile(r"_?tests?|_?testing|test_.*|_?vendor(ed)?|externals?|extern|typeshed|deprecated")
# Any word with one of these in it is masked, dotted and hyphenated ones as a whole.
NAMES = (*PACKAGES, "hugging", "scikit", "mpl_toolkits")
_ALIASES = r"np|plt|mpl|nx|hf|sp|scikits?"
_NAMED = re.compile(
    rf"[\w./\-]*(?:{'|'.join(sorted(set(NAMES)))})[\w./\-]*|\b(?:{_ALIASES})\b(?:\.[\w.]+)?", re.IGNORECASE
)


@dataclass(frozen=True)
class Part:
    """Texts of one part: token ids [n, tokens], padded with `pad`, labels [n] into the list of packages."""

    ids: torch.Tensor
    labels: torch.Tensor
    texts: list[str]
    modules: list[str]
    pad: int

    @property
    def mask(self) -> torch.Tensor:
        """1 where a token is, 0 where padding is: [n, tokens]."""
        return (self.ids != self.pad).long()


def versions() -> dict[str, str]:
    """The packages that the texts come from. Raises LookupError naming one that is not installed."""
    found = {}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise LookupError(f"the task needs {distribution}: pip install shira-kernels[dev]") from None
    return found


def masked(docstring: str) -> str:
    """The words that count, one space between them, without names of packages."""
    return " ".join(_NAMED.sub("it", docstring).split()[: WORDS.stop - 1])


def part_of(module: str) -> str:
    """The part that a module belongs to, by its name alone."""
    place = _hash(module) / 2**64
    for part, share in SHARES.items():
        place -= share
        if place < 0:
            return part
    return part


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """Modules of a package, in an order that their names determine."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"the task needs {PACKAGES.get(package, package)}: pip install shira-kernels[dev]")
    root = Path(spec.submodule_search_locations[0])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not any(_LEFT_OUT.fullmatch(part.removesuffix(".py")) for part in parts):
            found.append(("/".join((package, *parts)), path))
    yield from sorted(found, key=lambda module: (_hash(module[0]), module[0]))


def docstrings(path: Path) -> list[str]:
    """Docstrings of a file, of the module first, then of classes and functions level by level, cleaned."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in map(masked, found) if len(text.split()) >= WORDS.start]


def load(
    counts: Mapping[str, int], tokenizer: Any, tokens: int, packages: Sequence[str] = tuple(PACKAGES)
) -> dict[str, Part]:
    """The parts, each with counts[part] texts of each package.

    Args:
        counts: part -> texts of one package.
        tokenizer: of transformers.
        tokens: longer texts are cut.
        packages: import names; a text's label is its package's place here.

    Raises:
        LookupError: a package is not installed, or has too few texts.
    """
    seen: set[tuple[int, ...]] = set()
    rows: dict[str, list[tuple[list[int], int, str, str]]] = {part: [] for part in counts}
    for label, package in enumerate(packages):
        missing = dict(counts)
        for module, path in _modules(package):
            part = part_of(module)
            if not any(missing.values()):
                break
            if not missing.get(part) or not (texts := docstrings(path)):
                continue
            new = []
            for text, ids in zip(texts, tokenizer(texts, truncation=True, max_length=tokens)["input_ids"], strict=True):
                if tuple(ids) not in seen:
                    seen.add(tuple(ids))
                    new.append((ids, label, text, module))
            new = new[: min(MODULE_DOCSTRINGS, missing[part])]
            rows[part] += new
            missing[part] -= len(new)
        for part, number in missing.items():
            if number:
                raise LookupError(f"{package} has {counts[part] - number} texts for {part}, {counts[part]} are needed")
    return {part: _part(rows[part], tokenizer.pad_token_id, tokens) for part in counts}


def _part(rows: list[tuple[list[int], int, str, str]], pad: int, tokens: int) -> Part:
    ids = torch.full((len(rows), tokens), pad)
    for row, (text, *_) in zip(ids, rows, strict=True):
        row[: len(text)] = torch.tensor(text)
    labels = torch.tensor([label for _, label, _, _ in rows])
    return Part(ids, labels, [text for _, _, text, _ in rows], [module for *_, module in rows], pad)


def digest(parts: Mapping[str, Part]) -> str:
    """A checksum of what the encoder sees, and of the labels."""
    state = hashlib.sha256()
    for name in sorted(parts):
        state.update(parts[name].ids.numpy().tobytes() + parts[name].labels.numpy().tobytes())
    return state.hexdigest()[:16]
