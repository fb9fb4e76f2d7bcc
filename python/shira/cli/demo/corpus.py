"""Text that every installation has: Python sources, C++ headers and English prose of installed packages.

Three domains, each cut into a training and a held-out part. A document belongs to the held-out part by a hash of the
last two components of its path, so vendored copies of one file fall on the same side, on every machine. Within a
domain each paragraph (text between blank lines) is kept once, which removes licence headers and generated boilerplate,
and a held-out paragraph that the loaded training text also has is dropped. Prose keeps sentences only; licences of one
family still resemble each other across the two parts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

DOMAINS = ("python", "cpp", "prose")
HELDOUT_SHARE = 0.1
MAX_DOCUMENT_BYTES = 200_000  # longer files are mostly generated tables
SEPARATOR = b"\0"  # begins each document

_PROSE_NAMES = re.compile(r"(METADATA|README|LICEN[CS]E|COPYING|NOTICE|AUTHORS|CHANGELOG)(\.(txt|md|rst))?", re.I)


class Split(NamedTuple):
    """Bytes of one domain, as 1-D uint8 tensors."""

    train: torch.Tensor
    heldout: torch.Tensor


def _installed_files() -> Iterator[Path]:
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            yield Path(str(distribution.locate_file(file)))


def _paths(domain: str) -> list[Path]:
    if domain == "cpp":
        include = Path(torch.__file__).parent / "include"
        # ATen/ops holds thousands of generated, nearly equal headers.
        return [path for path in include.rglob("*.h") if "ops" not in path.relative_to(include).parts]
    if domain == "python":
        return [path for path in _installed_files() if path.suffix == ".py"]
    return [path for path in _installed_files() if _PROSE_NAMES.fullmatch(path.name)]


def _key(path: Path) -> int:
    """A 64-bit hash of the last two path components, without version numbers: the same on every machine."""
    name = "/".join(re.sub(r"-\d[^/]*\.dist-info", "", part) for part in path.parts[-2:])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _is_prose(paragraph: str) -> bool:
    """Sentences: neither code nor tables, badges and addresses, which such files hold too."""
    letters = sum(character.isalpha() or character in " \n" for character in paragraph)
    return len(paragraph.split()) >= 8 and letters >= 0.9 * len(paragraph) and "```" not in paragraph


def _unseen_paragraphs(path: Path, seen: set[bytes], prose: bool) -> bytes:
    """The text of a file without paragraphs in `seen`; adds what it gives to `seen`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]  # the description, without the mail-like header
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text[:MAX_DOCUMENT_BYTES].replace("\r\n", "\n")):
        if prose and not _is_prose(paragraph):
            continue
        digest = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return "\n\n".join(kept).strip("\n").encode()


def load(domain: str, *, train_bytes: int, heldout_bytes: int) -> Split:
    """Reads at most `train_bytes` and `heldout_bytes` of a domain, in an order that the names of the files determine.

    Raises ValueError for an unknown domain, or if the installed packages hold no text of it.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    ordered = sorted({(_key(path), path) for path in _paths(domain)})
    border = int(HELDOUT_SHARE * 2**64)
    seen: set[bytes] = set()
    parts = []
    for keep_heldout, limit in ((False, train_bytes), (True, heldout_bytes)):
        chunks: list[bytes] = []
        size = 0
        for key, path in ordered:
            if size >= limit:
                break
            if (key < border) == keep_heldout and (text := _unseen_paragraphs(path, seen, domain == "prose")):
                chunks.append(SEPARATOR + text)
                size += len(chunks[-1])
        data = b"".join(chunks)[:limit]
        if limit and not data:
            raise ValueError(f"the installed packages hold no text of domain {domain!r}")
        parts.append(
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
    return Split(*parts)
