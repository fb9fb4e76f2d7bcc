"""Damaged and hostile adapter files: python tests/helpers/fuzz_adapter_file.py --seed 0 --files 1000000

Every file is refused with AdapterFormatError, or gives an adapter that an independent reader finds in it too. A file
whose checksums were not made right again is refused in any case. Prints the seed of a file that fails.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import sys
from collections import Counter
from typing import Any

import independent_reader
import torch

import shira
from shira.adapter import checksum_of
from shira.adapter import file as adapter_file
from shira.adapter.checksum import bytes_of
from shira.masks.choose import choose_entries

HUGE = [2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**400]
HOSTILE: list[Any] = [
    *(None, True, False, "", "x", [], {}, [[]], {"a": 1}, 0, 1, -1, 1.5, -0.0, 1e308, "nan", "0" * 32, "f" * 32),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "a\nb",
        "\x1b[2J",
        "\x00",
        "a..b",
        ".",
        "C:\\x",
        "n" * 600,
        "é",
        "\u202e",
        "\ud800",
    ),
    *(
        "float32",
        "bfloat16",
        "int64",
        "F32",
        "BF16",
        "U8",
        "I64",
        "int8",
        "I8",
        "bool",
        "shira/1.1",
        "add",
        "replace",
        "stored",
        "recomputed",
        "shira/1.7",
    ),
    *("shira/2", "shira/0", "os:system", "(" * 3000, "a{99999999999}", *HUGE),
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 5000, '{"a":' * 5000, "9" * 5000, '{"a":1,"a":2}', "'", "\\ud800"]


# Of the files without indices.
BASE = {"a": torch.arange(900.0).sin().view(30, 30), "b": torch.arange(50.0).cos().bfloat16()}


def to_pieces(adapter: shira.Adapter, indices: bool = True, base: Any = None) -> list[bytes | memoryview]:
    """An adapter's file: three pieces are its header."""
    content = adapter_file.Content(adapter, adapter.config, adapter.provenance, has_indices=indices)
    return adapter_file.to_pieces(content, base)


def to_bytes(adapter: shira.Adapter, indices: bool = True, base: Any = None) -> bytes:
    """An adapter's file in one piece."""
    return b"".join(to_pieces(adapter, indices, base))


def from_bytes(data: bytes, base: Any = None) -> shira.Adapter:
    """The adapter of a file's bytes."""
    content = adapter_file.from_bytes(data, base)
    return shira.Adapter(content.tensors, content.config, content.provenance)


def originals() -> list[bytes]:
    """Small files with all that a file can have; the last two have no indices."""
    draw = torch.Generator().manual_seed(0)

    def part(count: int, shape: tuple[int, ...], dtype: torch.dtype, kind: str, values: torch.dtype) -> Any:
        numel = max(1, torch.Size(shape).numel())
        indices = torch.randint(numel, (2 * count,), generator=draw).unique()[:count]
        entries = torch.randn(len(indices), generator=draw).to(values)
        return shira.AdapterTensor(indices, entries, shape, dtype, kind, "0123456789abcdef" * 2 if count % 2 else None)

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    config = shira.ShiraConfig(["q_proj"], mask="wm", density=0.02, granularity=2)
    adapters = [
        shira.Adapter({"a.weight": part(5, (40, 50), half, "replace", half)}, config),
        shira.Adapter(
            {
                "a": part(7, (900,), half, "add", single),
                "b.c": part(0, (3, 0), single, "replace", single),
                "b.d": part(9, (70, 1000, 1000), double, "replace", double),
            },
            provenance={"policy": "sum", "adapters": [{"name": None, "weight": 0.5}]},
        ),
        shira.Adapter({"long": part(5000, (1000, 500), torch.float16, "replace", torch.float16)}),
        shira.Adapter({}),
        shira.Adapter(
            {
                "eight": part(6, (40, 50), torch.float8_e4m3fn, "replace", torch.float8_e4m3fn),
                "count": part(1, (), torch.int64, "replace", torch.int64),
                "mask": part(3, (9,), torch.bool, "replace", torch.bool),
                "a.weight": part(5, (40, 50), half, "add", single),
            }
        ),
    ]
    whole = [to_bytes(adapter) for adapter in adapters]
    for more in (
        {"r": 1, "skip": 2, "granularity": 2, "budget": "model"},
        {"mask": "struct", "density": 0.1, "axis": 1},
    ):
        config = shira.ShiraConfig("all-linear", **more)
        parts = {}
        for name, indices in choose_entries(config, BASE).items():
            entries = BASE[name].view(-1)[indices.long()]
            shape, dtype = tuple(BASE[name].shape), BASE[name].dtype
            parts[name] = shira.AdapterTensor(indices, entries + 1, shape, dtype, checksum=checksum_of(entries))
        whole.append(to_bytes(shira.Adapter(parts, config), indices=False, base=BASE))
    return whole


def split(file: bytes) -> tuple[bytes, bytes]:
    """The header's text, and the data."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length], file[8 + length :]


def joined(text: bytes, data: bytes) -> bytes:
    """A file with this header, whose checksum is right wherever there is room for one."""
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    blank = header[:37] + b"0" * 32 + header[69:]
    return header[:37] + hashlib.sha256(blank).hexdigest()[:32].encode() + header[69:] + data


def parsed(text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header, and the description in its metadata."""
    header = json.loads(text)
    return header, json.loads(header["__metadata__"]["adapter"])


def text_of(header: dict[str, Any], description: Any) -> bytes:
    header["__metadata__"]["adapter"] = json.dumps(description, separators=(",", ":"))
    return json.dumps(header, separators=(",", ":")).encode()


def with_checksums(text: bytes, data: bytes) -> bytes:
    """A file whose checksums of content are right too."""
    header, description = parsed(text)
    for row in description["tensors"]:
        content = b"".join(data[slice(*header[f"{row[0]}.{what}"]["data_offsets"])] for what in ("indices", "values"))
        row[6] = hashlib.sha256(content).hexdigest()[:32]
    return joined(text_of(header, description), data)


def flipped(draw: random.Random, data: bytes, times: int = 1) -> bytes:
    changed = bytearray(data)
    for _ in range(times if data else 0):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def spliced(draw: random.Random, data: bytes) -> bytes:
    """Cut short, a piece left out, repeated, or foreign bytes put in."""
    begin = draw.randrange(len(data) + 1)
    end = min(len(data), begin + draw.choice([1, 2, 8, 16, 100]))
    middle = draw.choice([b"", data[begin:end] * 2, draw.randbytes(draw.choice([1, 8, 16])), b"\xff" * 16])
    return data[:begin] if draw.random() < 0.3 else data[:begin] + middle + data[end:]


def change_json(draw: random.Random, value: Any) -> Any:
    """One place of a JSON value changed: replaced, left out, repeated, renamed, or moved by one."""
    places = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                walk(inner[key])

    value = copy.deepcopy(value)
    walk(value)
    if not places:
        return draw.choice(HOSTILE)
    inner, key = draw.choice(places)
    how = draw.randrange(5)
    if how == 0 and isinstance(inner[key], int):
        inner[key] += draw.choice([-8, -1, 1, 8, 2**32, 2**63])
    elif how == 1:
        del inner[key]
    elif how == 2 and isinstance(inner, list):
        inner.insert(key, copy.deepcopy(inner[key]))
    elif how == 2:
        inner[str(draw.choice(HOSTILE))] = inner.pop(key)
    else:
        inner[key] = copy.deepcopy(draw.choice(HOSTILE))
    return value


def mutated(draw: random.Random, file: bytes) -> tuple[bytes, bool]:
    """A changed file, and whether its checksums may be right."""
    text, data = split(file)
    how = draw.randrange(9)
    if how == 0:
        return flipped(draw, file, draw.choice([1, 1, 2, 5])), False
    if how == 1:
        return spliced(draw, file), False
    if how == 2:
        return joined(flipped(draw, text, draw.choice([1, 2, 5])), data), True
    if how == 3:
        return joined(text, spliced(draw, data)), True
    if how == 4:
        place = draw.randrange(len(text))
        return joined(text[:place] + draw.choice(RAW).encode() + text[place + draw.randrange(3) :], data), True
    header, description = parsed(text)
    if how == 5:
        return joined(text_of(header, change_json(draw, description)), data), True
    if how == 6:
        changed = change_json(draw, header)
        return joined(json.dumps(changed, separators=(",", ":")).encode(), data), True
    # The code of one tensor, with its bytes changed or their number too, and all else in order.
    names = [row[0] for row in description["tensors"] if f"{row[0]}.indices" in header and row[3]]
    if not names:
        return b"", False
    entry = header[f"{draw.choice(names)}.indices"]
    begin, end = entry["data_offsets"]
    code = flipped(draw, data[begin:end]) if how == 7 else spliced(draw, data[begin:end])
    if how == 7 and draw.random() < 0.3:
        place = draw.randrange(end - begin)
        code = code[:place] + draw.choice([b"\x00", b"\x80", b"\xf8", b"\xff"]) + code[place + 1 :]
    by = len(code) - (end - begin)
    for other in header:
        if other != "__metadata__" and header[other]["data_offsets"][0] >= end:
            header[other]["data_offsets"] = [offset + by for offset in header[other]["data_offsets"]]
    entry.update(shape=[len(code)], data_offsets=[begin, begin + len(code)])
    return with_checksums(text_of(header, description), data[:begin] + code + data[end:]), True


def outcome(file: bytes, original: bytes, may_be_right: bool) -> str:
    """Loads a file; AssertionError, or any error but AdapterFormatError, is a failure."""
    try:
        adapter = from_bytes(file, BASE)
    except shira.AdapterFormatError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 2000:
            raise AssertionError("a message must be one short line that a terminal can show") from error
        return "refused"
    if file == original:
        return "unchanged"
    assert may_be_right, "a changed bit was not noticed"
    if parsed(split(file)[0])[1]["indices"] == "stored":  # what the independent reader reads
        found, _ = independent_reader.read(file)
        assert set(found) == set(adapter)
    else:
        found = {}
    for name, other in found.items():
        tensor = adapter[name]
        assert tensor.indices.tolist() == other.indices
        assert bytes(bytes_of(tensor.values)) == other.values
        assert (list(tensor.shape), tensor.kind, tensor.checksum) == (other.shape, other.kind, other.base)
    again = from_bytes(to_bytes(adapter))
    assert list(again) == list(adapter)
    return "another adapter"


def run(seed: int, files: int) -> Counter[str]:
    """How many files had which outcome. File i of a seed is the same for any number of files."""
    found: Counter[str] = Counter()
    whole = originals()
    for i in range(files):
        draw = random.Random(f"{seed}/{i}")
        original = whole[draw.choice([0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6])]  # the simple ones more often
        file, may_be_right = mutated(draw, original)
        try:
            found[outcome(file, original, may_be_right)] += 1
        except Exception:
            print(f"file {i} of seed {seed}:", file[:4000], file=sys.stderr)
            raise
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(dict(run(arguments.seed, arguments.files)))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
