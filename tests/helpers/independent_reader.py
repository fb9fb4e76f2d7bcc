"""A reader of adapter files written from docs/format.md alone, with nothing but Python's standard library."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, NamedTuple

# As the files call the types of values, as adapters do, bytes, and whether values may be added.
TYPES = [
    ("F64", "float64", 8, True), ("F32", "float32", 4, True),
    ("BF16", "bfloat16", 2, True), ("F16", "float16", 2, True),
    ("F8_E4M3", "float8_e4m3fn", 1, False), ("F8_E5M2", "float8_e5m2", 1, False),
    ("F8_E8M0", "float8_e8m0fnu", 1, False),
    ("I64", "int64", 8, False), ("I32", "int32", 4, False), ("I16", "int16", 2, False), ("I8", "int8", 1, False),
    ("U64", "uint64", 8, False), ("U32", "uint32", 4, False), ("U16", "uint16", 2, False), ("U8", "uint8", 1, False),
    ("BOOL", "bool", 1, False),
]  # fmt: skip
NAMES = {code: name for code, name, _, _ in TYPES}
SIZES = {name: size for _, name, size, _ in TYPES}
ADDED = [name for _, name, _, added in TYPES if added]


class Tensor(NamedTuple):
    shape: list[int]
    dtype: str
    kind: str
    base: str | None
    indices: list[int]
    values_dtype: str
    values: bytes


def sha(data: bytes) -> str:
    return hashlib.sha256(data).digest()[:16].hex()


def read(file: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the description that goes with them. The indices must be stored."""
    (length,) = struct.unpack("<Q", file[:8])
    header, data = file[: 8 + length], file[8 + length :]
    assert header[8:37] == b'{"__metadata__":{"checksum":"'
    assert header[37:69].decode() == sha(header[:37] + b"0" * 32 + header[69:])
    entries = json.loads(header[8:])
    metadata = entries.pop("__metadata__")
    major, _, minor = metadata["format"].partition(".")
    assert major == "shira/1"
    description = json.loads(metadata["adapter"])
    assert description["indices"] == "stored"

    found = {}
    for row in description["tensors"]:
        fields = dict(zip(description["fields"], row, strict=True))
        begin, end = entries[fields["name"] + ".indices"]["data_offsets"]
        code = data[begin:end]
        values_dtype = NAMES[entries[fields["name"] + ".values"]["dtype"]]
        begin, end = entries[fields["name"] + ".values"]["data_offsets"]
        values = data[begin:end]
        assert len(values) == SIZES[values_dtype] * fields["nnz"]
        assert begin % SIZES[values_dtype] == 0
        assert fields["dtype"] in (SIZES if minor else ADDED)
        if fields["kind"] == "replace":
            assert values_dtype == fields["dtype"]
        else:
            assert fields["kind"] == "add"
            assert fields["dtype"] in ADDED
            assert values_dtype in (fields["dtype"], "float32")
        assert values_dtype != "bool" or set(values) <= {0, 1}
        assert sha(code + values) == fields["content"]
        indices = decode(code, fields["nnz"])
        numel = 1
        for size in fields["shape"]:
            numel *= size
        assert not indices or indices[-1] < numel
        found[fields["name"]] = Tensor(
            fields["shape"], fields["dtype"], fields["kind"], fields["base"], indices, values_dtype, values
        )
    return found, description


def decode(code: bytes, nnz: int) -> list[int]:
    """Block by block, each from its row of the table."""
    blocks = (nnz + 4095) // 4096
    table = 16 * max(0, blocks - 1)
    indices: list[int] = []
    for block in range(blocks):
        index, escape = struct.unpack_from("<QQ", code, 16 * (block - 1)) if block else (-1, 0)
        assert index == (indices[-1] if indices else -1)
        at = table + nnz + escape
        for i in range(4096 * block, min(4096 * (block + 1), nnz)):
            gap = code[table + i]
            if gap >= 248:
                shift = 0
                while True:
                    byte = code[at]
                    at += 1
                    gap += 8 * ((byte & 127) << shift)
                    shift += 7
                    if byte < 128:
                        break
            index += 1 + gap
            indices.append(index)
    return indices
