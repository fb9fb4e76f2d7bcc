"""Adapter files of format "shira/1", which docs/format.md specifies.

One safetensors file, whose header is read and written here rather than by the safetensors library: the checksum covers
the header's bytes; nothing is read before the header's sizes are known to be those of the file; the file is read once,
so what was checked is what is used; and a file's bytes are a function of its content, whatever library is installed.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from shira.files.atomic import AdapterFormatError, write_atomically
from shira_kernels import decode_indices, encode_indices
from shira_kernels.bits import as_bits
from shira_kernels.ops.encode_indices import MAX_NUMEL

if TYPE_CHECKING:
    from shira.adapter.adapter import Adapter, AdapterTensor
    from shira.files.checkpoint import Base
    from shira.masks.config import ShiraConfig

FORMAT = "shira/1"
RECOMPUTABLE = ("wm", "small", "struct", "rand")  # masks that the base and the config tell

_MAX_HEADER = 2**23  # bytes: JSON takes up to sixty times as many when it is parsed
_MAX_NAME, _MAX_DIMENSIONS = 512, 64
_DIGITS = 32  # of a checksum: 16 bytes
_BEGIN = b'{"__metadata__":{"checksum":"'  # of the header; the checksum's digits follow
_ALIGNMENT = 8  # bytes
_STORED, _RECOMPUTED = "stored", "recomputed"
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
}  # as we and as safetensors name them
_FIELDS = ("name", "shape", "dtype", "nnz", "kind", "base", "content")  # of a tensor's row in the description
_PARALLEL_BYTES = 2**20  # below this threads cost more than they save


def checksum(*parts: bytes | memoryview) -> str:
    """SHA-256 of the parts one after the other, its first 16 bytes in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:_DIGITS]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements in order, little-endian, of a contiguous CPU tensor. No copy, but on big-endian machines."""
    return _little_endian(as_bits(tensor.detach())).view(torch.uint8).numpy().data


def _little_endian(bits: torch.Tensor) -> torch.Tensor:
    """The integers of a tensor with their bytes in file order, or back."""
    if sys.byteorder == "little" or bits.element_size() == 1:
        return bits
    return bits.view(torch.uint8).view(-1, bits.element_size()).flip(1).reshape(-1).view(bits.dtype)


def _checksums(contents: Sequence[tuple[memoryview, memoryview]]) -> list[str]:
    """`checksum` of each, on torch's number of threads where it is worth it."""
    if sum(len(part) for parts in contents for part in parts) < _PARALLEL_BYTES or torch.get_num_threads() == 1:
        return [checksum(*parts) for parts in contents]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda parts: checksum(*parts), contents))


def save(adapter: Adapter, path: str | os.PathLike[str], indices: bool = True, base: Base | None = None) -> None:
    """Writes an adapter atomically: see `Adapter.save`."""
    write_atomically(path, *to_parts(adapter, indices, base))


def to_parts(adapter: Adapter, indices: bool = True, base: Base | None = None) -> list[bytes | memoryview]:
    """The bytes of an adapter's file, in several pieces."""
    for name, tensor in adapter.items():
        _check_name(name)
        _check_shape(repr(name), tensor.shape)
    if not indices:
        _check_recomputable(adapter, base)
    codes = [bytes_of(_code(tensor)) for tensor in adapter.values()]
    values = [bytes_of(tensor.values.cpu().contiguous()) for tensor in adapter.values()]
    digests = _checksums(list(zip(codes, values, strict=True)))
    description: dict[str, Any] = {
        "config": adapter.config and _without_defaults(adapter.config),
        "indices": _STORED if indices else _RECOMPUTED,
        "fields": _FIELDS,
        "tensors": [
            [name, tensor.shape, _dtype_name(tensor.dtype), tensor.nnz, tensor.kind, tensor.checksum, digest]
            for (name, tensor), digest in zip(adapter.items(), digests, strict=True)
        ],
    }
    if adapter.provenance is not None:
        description["provenance"] = adapter.provenance
    # Values first, wide ones before others, so that all are aligned.
    regions = [
        (f"{name}.values", _dtype_name(tensor.values.dtype), tensor.nnz, part)
        for (name, tensor), part in zip(adapter.items(), values, strict=True)
    ]
    regions.sort(key=lambda region: -getattr(torch, region[1]).itemsize)
    if indices:
        regions += [(f"{name}.indices", "U8", len(code), code) for name, code in zip(adapter, codes, strict=True)]
    ends = list(itertools.accumulate((len(part) for *_, part in regions), initial=0))
    entries = {
        name: {"dtype": _DTYPES.get(dtype, dtype), "shape": [count], "data_offsets": [begin, end]}
        for (name, dtype, count, _), (begin, end) in zip(regions, itertools.pairwise(ends), strict=True)
    }
    metadata = {"checksum": "0" * _DIGITS, "format": FORMAT, "adapter": _json(description)}
    text = _json({"__metadata__": metadata, **entries}, sort=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"the file's header would have {len(text)} bytes, more than {_MAX_HEADER}")
    header = len(text).to_bytes(8, "little") + text
    return [*_with_checksum(header, checksum(header)), *(part for *_, part in regions)]


def _with_checksum(header: bytes, digits: str) -> tuple[bytes, bytes, bytes]:
    """A header with other digits in the checksum's place."""
    begin = 8 + len(_BEGIN)
    return header[:begin], digits.encode(), header[begin + _DIGITS :]


def _json(value: Any, sort: bool = True) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort, allow_nan=False)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _code(tensor: AdapterTensor) -> torch.Tensor:
    return encode_indices(tensor.indices.cpu().contiguous(), tensor.numel)


def _without_defaults(config: ShiraConfig) -> dict[str, Any]:
    """So that a config is written as it was before it had a field that was added later."""
    defaults = {name: field.default for name, field in config.__dataclass_fields__.items()}
    defaults["modules_to_save"] = []
    return {name: value for name, value in config.to_dict().items() if value != defaults[name]}


@dataclass(frozen=True)
class _Part:
    """What the header says of one tensor, checked. Regions are [begin, end) in the data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nnz: int
    kind: str
    base: str | None
    content: str
    values_dtype: torch.dtype
    values: tuple[int, int]
    code: tuple[int, int] | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def load(path: str | os.PathLike[str], base: Base | None = None) -> Adapter:
    """Reads an adapter, on the CPU: see `Adapter.load`."""
    with open(path, "rb", buffering=0) as file:
        try:
            return _load(file, os.fstat(file.fileno()).st_size, base)
        except ValueError as error:
            raise AdapterFormatError(f"{os.fspath(path)}: {_one_line(error)}") from None


def loads(data: bytes, base: Base | None = None) -> Adapter:
    """The adapter of a file's bytes. Raises AdapterFormatError."""
    try:
        return _load(io.BytesIO(data), len(data), base)
    except ValueError as error:
        raise AdapterFormatError(_one_line(error)) from None


def describe(path: str | os.PathLike[str]) -> tuple[Adapter, bool]:
    """What a file's header says, as an adapter of tensors on the meta device, and whether the file has indices.

    Only the header is read and checked. Raises AdapterFormatError or OSError.
    """
    from shira.adapter.adapter import Adapter, AdapterTensor

    def meta(nnz: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(nnz, dtype=dtype, device="meta")

    with open(path, "rb", buffering=0) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            parts, config, provenance, form = _parse(header, size - len(header))
        except ValueError as error:
            raise AdapterFormatError(f"{os.fspath(path)}: {_one_line(error)}") from None
    tensors = {
        part.name: AdapterTensor(
            meta(part.nnz, torch.int32 if part.numel < 2**31 else torch.int64),
            meta(part.nnz, part.values_dtype),
            part.shape,
            part.dtype,
            part.kind,
            part.base,
        )
        for part in parts
    }
    return Adapter(tensors, config, provenance), form == _STORED


def _load(file: BinaryIO, size: int, base: Base | None) -> Adapter:
    from shira.adapter.adapter import Adapter, AdapterTensor

    header = _read_header(file, size)
    parts, config, provenance, form = _parse(header, size - len(header))
    codes = _recompute(parts, config, base) if form == _RECOMPUTED else {}
    data = torch.empty(size - len(header), dtype=torch.uint8)
    _read_into(file, data.numpy().data)
    for part in parts:
        if part.code is not None:
            codes[part.name] = data[slice(*part.code)]
    work = [(bytes_of(codes[part.name]), bytes_of(data[slice(*part.values)])) for part in parts]
    for part, digest in zip(parts, _checksums(work), strict=True):
        if digest != part.content:
            raise ValueError(
                f"{part.name!r}: the mask that was recomputed from the base is not the one that was saved, or the file "
                "is damaged"
                if form == _RECOMPUTED
                else f"{part.name!r}: the content's checksum is {digest}, not {part.content}: the file is damaged"
            )
    tensors = {}
    for part in parts:
        try:
            indices = decode_indices(codes[part.name], part.nnz, part.numel)
        except RuntimeError as error:
            raise ValueError(f"{part.name!r}: indices: {str(error).partition(': ')[2]}") from None
        bits = as_bits(data[slice(*part.values)].view(part.values_dtype))
        values = _little_endian(bits).view(part.values_dtype)
        tensors[part.name] = AdapterTensor(indices, values, part.shape, part.dtype, part.kind, part.base)
    adapter = Adapter(tensors, config)
    adapter.provenance = provenance  # which was just parsed, so it need not be copied and checked again
    return adapter


def _read_into(file: BinaryIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file is cut short")
        done += count


def _read_header(file: BinaryIO, size: int) -> bytes:
    """The header with the eight bytes of its length before it; its checksum is right."""
    length = bytearray(8)
    if size < 8:
        raise ValueError(f"the file is cut short, or no safetensors file: it has {size} bytes")
    _read_into(file, memoryview(length))
    count = int.from_bytes(length, "little")
    if count > min(_MAX_HEADER, size - 8):
        raise ValueError(
            f"the header must have at most {_MAX_HEADER} bytes and end within the file, got {count} of {size} bytes: "
            "the file is cut short, or no safetensors file"
        )
    text = bytearray(count)
    _read_into(file, memoryview(text))
    header = bytes(length + text)
    if not text.startswith(_BEGIN):
        raise ValueError("unknown format: the header must begin with the checksum of an adapter of format 'shira/1'")
    given, found = text[len(_BEGIN) : len(_BEGIN) + _DIGITS], checksum(*_with_checksum(header, "0" * _DIGITS))
    if given != found.encode():
        raise ValueError(f"the header's checksum is {found}, not {_shown(bytes(given))}: the file is damaged")
    return header


def _parse(header: bytes, size: int) -> tuple[list[_Part], ShiraConfig | None, dict[str, Any] | None, str]:
    """What a header says, checked, of a file with so many bytes of data: the tensors, the config, the provenance, and
    how indices are given."""
    if len(header) % _ALIGNMENT:
        raise ValueError(f"the header's length must be a multiple of {_ALIGNMENT}, got {len(header) - 8}")
    entries = _object("the header", _parsed("the header", header[8:]))
    metadata = _object("the header's __metadata__", entries.pop("__metadata__", None))
    newer = _is_newer(metadata.get("format"))
    _check_fields("the header's __metadata__", metadata, {"checksum", "format", "adapter"}, newer=newer)
    regions = _regions(entries, size)

    where = "metadata entry 'adapter'"
    description = _object(where, _parsed(where, metadata["adapter"]))
    _check_fields(where, description, {"config", "indices", "fields", "tensors"}, {"provenance"}, newer=newer)
    form, fields, tensors = description["indices"], description["fields"], description["tensors"]
    if form not in (_STORED, _RECOMPUTED):
        raise ValueError(f"{where}: indices must be 'stored' or 'recomputed', got {_shown(form)}")
    if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        raise ValueError(f"{where}: fields must be a list of names, got {_shown(fields)}")
    if len(set(fields)) < len(fields):
        raise ValueError(f"{where}: fields has a name twice")
    _check_fields(f"{where}: fields", dict.fromkeys(fields), set(_FIELDS), newer=newer)
    if not isinstance(tensors, list):
        raise ValueError(f"{where}: tensors must be a list, got {_shown(tensors)}")
    # A name that is repeated finds no tensor of its own.
    parts = []
    for i, row in enumerate(tensors):
        if not isinstance(row, list) or len(row) != len(fields):
            raise ValueError(f"{where}: tensors[{i}] must be a list of {len(fields)} values, got {_shown(row)}")
        parts.append(_part(dict(zip(fields, row, strict=True)), regions, form == _STORED))
    if regions and not newer:
        raise ValueError(f"tensor {_shown(next(iter(regions)))} is not described")
    provenance = description.get("provenance")
    if provenance is not None:
        _object(f"{where}: provenance", provenance)
    return parts, _config(description["config"], newer), provenance, form


def _is_newer(form: object) -> bool:
    """Whether the format is a later minor version than this one. Refuses another major version."""
    match = re.fullmatch(r"shira/([1-9][0-9]{0,8})(\.[1-9][0-9]{0,8})?", form) if isinstance(form, str) else None
    if match is None or match[1] != "1":
        raise ValueError(f"unknown format {_shown(form)}: this version reads {FORMAT!r} and its minor versions")
    return match[2] is not None


def _regions(entries: dict[str, Any], size: int) -> dict[str, tuple[str, list[Any], int, int]]:
    """name -> (dtype, shape, begin, end). Together they fill the data, without a gap or an overlap."""
    regions = {}
    for name, entry in entries.items():
        where = f"tensor {_shown(name)}"
        _check_fields(where, _object(where, entry), {"dtype", "shape", "data_offsets"})
        offsets, shape = entry["data_offsets"], entry["shape"]
        if not _are_sizes(offsets) or len(offsets) != 2 or not _are_sizes(shape) or not isinstance(entry["dtype"], str):
            raise ValueError(f"{where}: dtype, shape or data_offsets has another type than safetensors have")
        regions[name] = (entry["dtype"], shape, offsets[0], offsets[1])
    end = 0
    for name, (_, _, begin, stop) in sorted(regions.items(), key=lambda item: item[1][2:]):
        if begin != end or stop < begin:
            raise ValueError(f"tensor {_shown(name)}: data_offsets must begin at {end}, where the one before ends")
        end = stop
    if end != size:
        raise ValueError(
            f"the header describes {end} bytes of data, but {size} follow it: the file is cut short or longer"
        )
    return regions


def _part(fields: dict[str, Any], regions: dict[str, tuple[str, list[Any], int, int]], stored: bool) -> _Part:
    """One tensor's description; its regions are taken out of `regions`."""
    name, shape, nnz, base = fields["name"], fields["shape"], fields["nnz"], fields["base"]
    _check_name(name)
    where = repr(name)
    if not isinstance(shape, list):
        raise ValueError(f"{where}: shape must be a list, got {_shown(shape)}")
    _check_shape(where, shape)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in _DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, got {_shown(fields['dtype'])}")
    dtype = getattr(torch, fields["dtype"])
    if type(nnz) is not int or not 0 <= nnz <= math.prod(shape):
        raise ValueError(f"{where}: nnz must lie in [0, {math.prod(shape)}], got {_shown(nnz)}")
    if fields["kind"] not in ("replace", "add"):
        raise ValueError(f"{where}: kind must be 'replace' or 'add', got {_shown(fields['kind'])}")
    for field, given in (("base", base), ("content", fields["content"])):
        if not (field == "base" and given is None) and not (
            isinstance(given, str) and re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", given)
        ):
            raise ValueError(f"{where}: {field} must be {_DIGITS} hex digits, got {_shown(given)}")

    def region(suffix: str) -> tuple[str, list[Any], int, int]:
        if f"{name}.{suffix}" not in regions:
            raise ValueError(f"{where}: tensor {name + '.' + suffix!r} is missing")
        return regions.pop(f"{name}.{suffix}")

    values, values_shape, begin, end = region("values")
    allowed = {_DTYPES[fields["dtype"]]: dtype} | ({"F32": torch.float32} if fields["kind"] == "add" else {})
    if values not in allowed:
        raise ValueError(f"{where}: values must be {' or '.join(allowed)}, got {_shown(values)}")
    values_dtype = allowed[values]
    if values_shape != [nnz] or end - begin != nnz * values_dtype.itemsize or begin % values_dtype.itemsize:
        raise ValueError(f"{where}: values must be {nnz} numbers, aligned, got shape {_shown(values_shape)}")
    code = None
    if stored:
        kind, code_shape, *bounds = region("indices")
        if kind != "U8" or code_shape != [bounds[1] - bounds[0]]:
            raise ValueError(f"{where}: indices must be U8 [bytes], got {_shown(kind)} {_shown(code_shape)}")
        code = (bounds[0], bounds[1])
    return _Part(
        name, tuple(shape), dtype, nnz, fields["kind"], base, fields["content"], values_dtype, (begin, end), code
    )


def _check_name(name: object) -> None:
    """A name is one of a state dict: parts between dots. It is a key and never a path; what could pass for one, or
    would garble a terminal, is refused."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"a tensor's name must be a string of 1 to {_MAX_NAME} characters, got {_shown(name)}")
    if not name.isprintable() or "/" in name or "\\" in name or not all(name.split(".")):
        raise ValueError(f"a tensor's name must be printable parts between dots, without slashes, got {_shown(name)}")


def _check_shape(where: str, shape: Iterable[Any]) -> None:
    sizes = list(shape)
    if not _are_sizes(sizes) or len(sizes) > _MAX_DIMENSIONS or math.prod(sizes) > MAX_NUMEL:
        raise ValueError(f"{where}: shape must be at most {_MAX_DIMENSIONS} sizes, 2^62 in all, got {_shown(sizes)}")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_NUMEL for size in value)


def _shown(value: object) -> str:
    """For a message: on one line, not long, with no control characters."""
    text = ascii(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(error: Exception) -> str:
    """The message of an error that may quote the file at any length."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)[:500])
    return text if len(str(error)) <= 500 else f"{text}..."


def _parsed(where: str, text: object) -> Any:
    """JSON. Refuses repeated names, and numbers that JSON or float64 does not have."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is repeated in an object")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    def finite(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise ValueError(f"{_shown(digits)} is too large a number")
        return number

    if not isinstance(text, (str, bytes)):
        raise ValueError(f"{where} must be JSON text, got {_shown(text)}")
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_shown(value)}")
    return value


def _check_fields(
    where: str, fields: Mapping[str, Any], needed: set[str], optional: Collection[str] = (), newer: bool = False
) -> None:
    """Fields of a later minor version that are not known here are left alone."""
    if missing := needed - set(fields):
        raise ValueError(f"{where}: {min(missing)} is missing")
    if (unknown := set(fields) - needed - set(optional)) and not newer:
        raise ValueError(f"{where}: unknown field {_shown(min(unknown))}")


def _config(fields: Any, newer: bool) -> ShiraConfig | None:
    from shira.masks.config import ShiraConfig

    if fields is None:
        return None
    _object("config", fields)
    try:
        return ShiraConfig.from_dict(fields)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        if newer:  # it may have fields that are not known here, and only says how the adapter came to be
            return None
        raise ValueError(f"config: {error}") from None


def _check_recomputable(adapter: Adapter, base: Base | None) -> None:
    """Refuses an adapter whose mask the base and the config do not give, or that was made for another base."""
    from shira.adapter.base import check_base, entries_of, opened

    parts = [(name, tensor.shape, tensor.dtype) for name, tensor in adapter.items()]
    for name, indices in _chosen(parts, adapter.config, base).items():
        if not torch.equal(indices.long(), adapter[name].indices.cpu().long()):
            raise ValueError(f"{name!r}: its indices are not those that the config chooses in this base")
    with opened(base) as find:
        for name, tensor in adapter.items():
            check_base(name, tensor, entries_of(find(name)[1](), tensor.indices))  # type: ignore[misc]


def _recompute(parts: list[_Part], config: ShiraConfig | None, base: Base | None) -> dict[str, torch.Tensor]:
    """name -> the code of the indices that the config chooses in the base."""
    found = _chosen([(part.name, part.shape, part.dtype) for part in parts], config, base)
    return {part.name: encode_indices(found[part.name], part.numel) for part in parts}


def _chosen(
    parts: list[tuple[str, tuple[int, ...], torch.dtype]], config: ShiraConfig | None, base: Base | None
) -> dict[str, torch.Tensor]:
    """name -> the indices that the config chooses in the base, on the CPU. One tensor of the base is read at a time."""
    from shira.adapter.base import opened
    from shira.masks.choose import Selection

    if config is None or config.mask_name not in RECOMPUTABLE:
        raise ValueError(
            f"indices can be left out only for the masks {', '.join(RECOMPUTABLE)}, which can be recomputed, "
            f"got {'no config' if config is None else 'mask ' + repr(config.mask_name)}"
        )
    if base is None:
        raise ValueError("indices that are left out are recomputed from the base: give `base`")
    if parts and config.granularity > max(math.prod(shape) for _, shape, _ in parts):
        raise ValueError(f"config: granularity must not exceed the largest tensor, got {_shown(config.granularity)}")
    one = torch.empty((), device="meta")
    try:
        selection = Selection(config, {name: one.expand(shape) for name, shape, _ in parts})
        with opened(base) as find:
            for name, shape, dtype in parts:
                weight = find(name)[1]()  # type: ignore[misc]
                if tuple(weight.shape) != shape or weight.dtype != dtype:
                    found = f"{weight.dtype} {tuple(weight.shape)}"
                    raise ValueError(f"{name}: the adapter's tensor is {dtype} {shape}, the base's {found}")
                selection.add(name, None, weight)
                del weight  # before the next is read
        return {name: indices.cpu() for name, indices in selection.result().items()}
    except (ValueError, OverflowError) as error:
        raise ValueError(f"the mask cannot be recomputed: {error}") from None
