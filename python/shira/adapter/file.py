"""Adapter files of format "shira/1" or "shira/1.1", which docs/format.md specifies.

One safetensors file, whose header is read and written here rather than by the safetensors library: the checksum covers
the header's bytes; nothing is read before the header's sizes are known to be those of the file; the file is read once,
so what was checked is what is used; and a file's bytes are a function of its content, whatever library is installed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from shira.adapter.checksum import bytes_of, checksums, little_endian
from shira.adapter.header import (
    MAX_HEADER,
    Header,
    build,
    check_checksum,
    check_length,
    check_name,
    check_shape,
    parse,
    regions_of,
)
from shira.adapter.recompute import check_recomputable, recomputed
from shira.adapter.tensor import AdapterTensor, check_bools
from shira.files.atomic import write_atomically
from shira.files.checkpoint import Base
from shira.files.errors import AdapterFormatError, Argument, ArgumentError
from shira.files.reading import check_regular
from shira.masks.config import ShiraConfig
from shira_kernels import decode_indices, encode_indices
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import index_dtype


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        tensors: by name.
        config: what made the adapter, if known.
        provenance: of which adapters it was made, if of others; a JSON object.
        has_indices: whether the file has them; else they are recomputed from the base.
    """

    tensors: Mapping[str, AdapterTensor]
    config: ShiraConfig | None = None
    provenance: dict[str, Any] | None = None
    has_indices: bool = True


def write(path: str | os.PathLike[str], content: Content, base: Base | None = None) -> None:
    """Writes a file atomically. `base` is needed where the indices are left out: see `Adapter.save`.

    Raises:
        ValueError: a name or a shape that no file may have, or indices that cannot be left out.
        OSError: the file cannot be written.
    """
    write_atomically(path, *to_pieces(content, base))


def to_pieces(content: Content, base: Base | None = None) -> list[bytes | memoryview]:
    """A file's bytes, in several pieces. Raises ValueError as `write` does."""
    tensors = content.tensors
    check_length(tensors, content.has_indices)
    for name, tensor in tensors.items():
        check_name(name)
        check_shape(repr(name), tensor.shape)
    if not content.has_indices:
        check_recomputable(tensors, content.config, base)
    codes = [bytes_of(encode_indices(tensor.indices.cpu().contiguous(), tensor.numel)) for tensor in tensors.values()]
    values = [bytes_of(tensor.values.cpu().contiguous()) for tensor in tensors.values()]
    digests = checksums(list(zip(codes, values, strict=True)))
    regions = regions_of(tensors, values, codes if content.has_indices else None)
    header = build(tensors, digests, content.config, content.provenance, regions, has_indices=content.has_indices)
    return [*header, *(region.data for region in regions)]


def read(path: str | os.PathLike[str], base: Base | None = None) -> Content:
    """Reads a file; its tensors are on the CPU. `base` is needed for a file without indices.

    Raises:
        AdapterFormatError: the file is cut short, damaged, or anything else but a valid adapter; or it has no indices,
            and no base is given or the mask of the base is another one.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size, base)
        except ValueError as error:
            raise _refusal(f"{os.fspath(path)}: ", error) from None


def from_bytes(data: bytes, base: Base | None = None) -> Content:
    """What a file of these bytes holds. Raises AdapterFormatError."""
    try:
        return _read(io.BytesIO(data), len(data), base)
    except ValueError as error:
        raise _refusal("", error) from None


def describe(path: str | os.PathLike[str]) -> Content:
    """What a file's header says; the tensors are on the meta device.

    Only the header is read and checked. Raises AdapterFormatError or OSError.
    """
    with _opened(path) as file:
        try:
            header, _ = _read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise _refusal(f"{os.fspath(path)}: ", error) from None
    tensors = {
        name: AdapterTensor(
            torch.empty(found.nnz, dtype=index_dtype(found.numel), device="meta"),
            torch.empty(found.nnz, dtype=found.values_dtype, device="meta"),
            found.shape,
            found.dtype,
            found.kind,
            found.base,
        )
        for name, found in header.tensors.items()
    }
    return Content(tensors, header.config, header.provenance, header.has_indices)


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        check_regular(Path(path))
    except ValueError as error:
        raise _refusal("", error) from None
    return open(path, "rb", buffering=0)  # type: ignore[return-value]


def _read(file: BinaryIO, size: int, base: Base | None) -> Content:
    header, rest = _read_header(file, size)
    codes = {}
    if not header.has_indices:
        chosen = recomputed(header.tensors, header.config, base)
        codes = {name: encode_indices(indices, header.tensors[name].numel) for name, indices in chosen.items()}
    try:
        data = torch.empty(rest, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        raise ValueError(f"its {rest} bytes of data are more than there is memory for") from None
    _read_into(file, data.numpy().data)
    for name, found in header.tensors.items():
        if found.code is not None:
            codes[name] = data[slice(*found.code)]
    work = [(bytes_of(codes[name]), bytes_of(data[slice(*found.values)])) for name, found in header.tensors.items()]
    for found, digest in zip(header.tensors.values(), checksums(work), strict=True):
        if digest != found.content:
            raise ValueError(
                f"{found.name!r}: the content's checksum is {digest}, not {found.content}: the file is damaged"
                if header.has_indices
                else f"{found.name!r}: the mask that was recomputed from the base is not the one that was saved, or "
                "the file is damaged"
            )
    tensors = {}
    for name, found in header.tensors.items():
        try:
            indices = decode_indices(codes[name], found.nnz, found.numel)
        except RuntimeError as error:
            raise ValueError(f"{name!r}: indices: {str(error).partition(': ')[2]}") from None
        bits = as_bits(data[slice(*found.values)].view(found.values_dtype))
        values = little_endian(bits).view(found.values_dtype)
        check_bools(repr(name), values)
        tensors[name] = AdapterTensor(indices, values, found.shape, found.dtype, found.kind, found.base)
    return Content(tensors, header.config, header.provenance, header.has_indices)


def _read_header(file: BinaryIO, size: int) -> tuple[Header, int]:
    """The header of a file of `size` bytes, and how many bytes of data follow it."""
    length = bytearray(8)
    if size < 8:
        raise ValueError(f"the file is cut short, or no safetensors file: it has {size} bytes")
    _read_into(file, memoryview(length))
    count = int.from_bytes(length, "little")
    if count > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"the header must have at most {MAX_HEADER} bytes and end within the file, got {count} of {size} bytes: "
            "the file is cut short, or no safetensors file"
        )
    text = bytearray(count)
    _read_into(file, memoryview(text))
    header, rest = bytes(length + text), size - 8 - count
    check_checksum(header)
    return parse(header, rest), rest


def _read_into(file: BinaryIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file is cut short")
        done += count


def _refusal(where: str, error: ValueError) -> AdapterFormatError:
    """The error of a file, on one line: it may quote the file at any length."""
    pieces = error.pieces if isinstance(error, ArgumentError) else (str(error),)
    return AdapterFormatError(where, *(piece if isinstance(piece, Argument) else _one_line(piece) for piece in pieces))


def _one_line(text: str) -> str:
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:500])
    return line if len(text) <= 500 else f"{line}..."
