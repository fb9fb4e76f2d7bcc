"""A reader of adapter files written from docs/format.md alone, with nothing but Python's standard library."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, NamedTuple

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


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
    assert metadata["format"].split(".")[0] == "shira/1"
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
