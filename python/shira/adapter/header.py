"""The header of an adapter's file, which docs/format.md specifies: written, and parsed with every size checked."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from shira.adapter.checksum import DIGITS, checksum
from shira.adapter.tensor import AdapterTensor
from shira.masks.config import ShiraConfig
from shira_kernels.ops.encode_indices import MAX_NUMEL

FORMATS = ("shira/1", "shira/1.1")  # each of which has the types of the one before, and more
MAX_HEADER = 2**23  # bytes: JSON takes up to sixty times as many when it is parsed
BEGIN = b'{"__metadata__":{"checksum":"'  # of the header; the checksum's digits follow

_MAX_NAME, _MAX_DIMENSIONS = 512, 64
_ALIGNMENT = 8  # bytes
_LEAST = 60  # bytes that a header has beside a name wherever it names a tensor, and more
_STORED, _RECOMPUTED = "stored", "recomputed"
# As we and as safetensors name them: those of shira/1, and those of its minor version 1.
_ARITHMETIC = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {
    **_ARITHMETIC,
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_FIELDS = ("name", "shape", "dtype", "nnz", "kind", "base", "content")  # of a tensor's row in the description

_Regions: TypeAlias = "dict[str, tuple[str, list[Any], int, int]]"  # name -> dtype, shape, begin, end


@dataclass(frozen=True)
class TensorHeader:
    """What a header says of one tensor, checked. Regions are [begin, end) in the data."""

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
        """Number of elements of the model's tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a header says, checked.

    Attributes:
        tensors: by name, in the file's order.
        config: what made the adapter, if the file says it.
        provenance: of which adapters it was made, if of others.
        has_indices: whether they are stored; else they are recomputed from the base.
    """

    tensors: dict[str, TensorHeader]
    config: ShiraConfig | None
    provenance: dict[str, Any] | None
    has_indices: bool


@dataclass(frozen=True)
class Region:
    """One array of a file that is to be written: `data` holds `count` elements of `dtype`, as safetensors name it."""

    name: str
    dtype: str
    count: int
    data: memoryview


def regions_of(
    tensors: Mapping[str, AdapterTensor], values: Sequence[memoryview], codes: Sequence[memoryview] | None
) -> list[Region]:
    """The arrays of a file, in its order: values first, wide ones before others, so that all are aligned."""
    rows = sorted(zip(tensors.items(), values, strict=True), key=lambda row: -row[0][1].values.dtype.itemsize)
    regions = [
        Region(f"{name}.values", _DTYPES[_dtype_name(tensor.values.dtype)], tensor.nnz, data)
        for (name, tensor), data in rows
    ]
    if codes is not None:
        regions += [Region(f"{name}.indices", "U8", len(data), data) for name, data in zip(tensors, codes, strict=True)]
    return regions


def build(
    tensors: Mapping[str, AdapterTensor],
    digests: Sequence[str],
    config: ShiraConfig | None,
    provenance: Mapping[str, Any] | None,
    regions: Sequence[Region],
    *,
    has_indices: bool,
) -> tuple[bytes, bytes, bytes]:
    """The header's bytes in three pieces. `digests` are the checksums of each tensor's indices and values.

    Raises ValueError if it would be too long.
    """
    description: dict[str, Any] = {
        "config": config and _without_defaults(config),
        "indices": _STORED if has_indices else _RECOMPUTED,
        "fields": _FIELDS,
        "tensors": [
            [name, tensor.shape, _dtype_name(tensor.dtype), tensor.nnz, tensor.kind, tensor.checksum, digest]
            for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
        ],
    }
    if provenance is not None:
        description["provenance"] = provenance
    ends = itertools.accumulate((len(region.data) for region in regions), initial=0)
    entries = {
        region.name: {"dtype": region.dtype, "shape": [region.count], "data_offsets": offsets}
        for region, offsets in zip(regions, itertools.pairwise(ends), strict=True)
    }
    is_first = all(_dtype_name(tensor.dtype) in _ARITHMETIC for tensor in tensors.values())
    form = FORMATS[0] if is_first else FORMATS[1]  # the oldest, which most readers know
    metadata = {"checksum": "0" * DIGITS, "format": form, "adapter": _json(description)}
    text = _json({"__metadata__": metadata, **entries}, sort=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise _too_long(len(tensors))
    header = len(text).to_bytes(8, "little") + text
    return _with_checksum(header, checksum(header))


def check_length(names: Collection[str], has_indices: bool) -> None:
    """Refuses with ValueError tensors that no header has room for, before the work. `build` knows exactly."""
    places = 3 if has_indices else 2  # of a name: in the description, the values and the indices
    if sum(places * (len(name) + _LEAST) for name in names) > MAX_HEADER:
        raise _too_long(len(names))


def _too_long(tensors: int) -> ValueError:
    return ValueError(f"the header of a file of {tensors} tensors would have more than {MAX_HEADER} bytes")


def check_checksum(header: bytes) -> None:
    """Refuses with ValueError a header, its length included, of another format or with another checksum."""
    if not header.startswith(BEGIN, 8):
        raise ValueError("unknown format: the header must begin with the checksum of an adapter of format 'shira/1'")
    begin = 8 + len(BEGIN)
    given, found = header[begin : begin + DIGITS], checksum(*_with_checksum(header, "0" * DIGITS))
    if given != found.encode():
        raise ValueError(f"the header's checksum is {found}, not {shown(given)}: the file is damaged")


def _with_checksum(header: bytes, digits: str) -> tuple[bytes, bytes, bytes]:
    """A header with other digits in the checksum's place."""
    begin = 8 + len(BEGIN)
    return header[:begin], digits.encode(), header[begin + DIGITS :]


def _json(value: Any, sort: bool = True) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort, allow_nan=False)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_defaults(config: ShiraConfig) -> dict[str, Any]:
    """So that a config is written as it was before it had a field that was added later."""
    defaults = {name: field.default for name, field in config.__dataclass_fields__.items()}
    defaults["modules_to_save"] = []
    return {name: value for name, value in config.to_dict().items() if value != defaults[name]}


def parse(header: bytes, size: int) -> Header:
    """What a header, its length included, says of a file with `size` bytes of data. Raises ValueError."""
    if len(header) % _ALIGNMENT:
        raise ValueError(f"the header's length must be a multiple of {_ALIGNMENT}, got {len(header) - 8}")
    entries = _object("the header", _parsed("the header", header[8:]))
    metadata = _object("the header's __metadata__", entries.pop("__metadata__", None))
    minor = _minor_version(metadata.get("format"))
    newer = minor >= len(FORMATS)
    _check_fields("the header's __metadata__", metadata, {"checksum", "format", "adapter"}, newer=newer)
    regions = _regions(entries, size)

    where = "metadata entry 'adapter'"
    description = _object(where, _parsed(where, metadata["adapter"]))
    _check_fields(where, description, {"config", "indices", "fields", "tensors"}, {"provenance"}, newer=newer)
    form = description["indices"]
    if form not in (_STORED, _RECOMPUTED):
        raise ValueError(f"{where}: indices must be 'stored' or 'recomputed', got {shown(form)}")
    tensors = {}
    for row in _rows(where, description["fields"], description["tensors"], newer):
        tensor = _tensor(
            row, regions, _DTYPES if minor else _ARITHMETIC, form == _STORED
        )  # a name that is repeated finds no region of its own
        tensors[tensor.name] = tensor
    if regions and not newer:
        raise ValueError(f"tensor {shown(next(iter(regions)))} is not described")
    provenance = description.get("provenance")
    if provenance is not None:
        _object(f"{where}: provenance", provenance)
    return Header(tensors, _config(description["config"], newer), provenance, form == _STORED)


def _minor_version(form: object) -> int:
    """The format's minor version; 0 of the first. Refuses another major version."""
    match = re.fullmatch(r"shira/([1-9][0-9]{0,8})(?:\.([1-9][0-9]{0,8}))?", form) if isinstance(form, str) else None
    if match is None or match[1] != "1":
        raise ValueError(f"unknown format {shown(form)}: this version reads {FORMATS[0]!r} and its minor versions")
    return int(match[2] or 0)


def _regions(entries: dict[str, Any], size: int) -> _Regions:
    """Where each array lies. Together they fill the data, without a gap or an overlap."""
    regions = {}
    for name, entry in entries.items():
        where = f"tensor {shown(name)}"
        _check_fields(where, _object(where, entry), {"dtype", "shape", "data_offsets"})
        offsets, shape = entry["data_offsets"], entry["shape"]
        if not _are_sizes(offsets) or len(offsets) != 2 or not _are_sizes(shape) or not isinstance(entry["dtype"], str):
            raise ValueError(f"{where}: dtype, shape or data_offsets has another type than safetensors have")
        regions[name] = (entry["dtype"], shape, offsets[0], offsets[1])
    end = 0
    for name, (_, _, begin, stop) in sorted(regions.items(), key=lambda item: item[1][2:]):
        if begin != end or stop < begin:
            raise ValueError(f"tensor {shown(name)}: data_offsets must begin at {end}, where the one before ends")
        end = stop
    if end != size:
        raise ValueError(
            f"the header describes {end} bytes of data, but {size} follow it: the file is cut short or longer"
        )
    return regions


def _rows(where: str, fields: Any, tensors: Any, newer: bool) -> Iterable[dict[str, Any]]:
    """The description of each tensor: its values by field."""
    if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        raise ValueError(f"{where}: fields must be a list of names, got {shown(fields)}")
    if len(set(fields)) < len(fields):
        raise ValueError(f"{where}: fields has a name twice")
    _check_fields(f"{where}: fields", dict.fromkeys(fields), set(_FIELDS), newer=newer)
    if not isinstance(tensors, list):
        raise ValueError(f"{where}: tensors must be a list, got {shown(tensors)}")
    for i, row in enumerate(tensors):
        if not isinstance(row, list) or len(row) != len(fields):
            raise ValueError(f"{where}: tensors[{i}] must be a list of {len(fields)} values, got {shown(row)}")
        yield dict(zip(fields, row, strict=True))


def _tensor(fields: dict[str, Any], regions: _Regions, dtypes: Mapping[str, str], has_indices: bool) -> TensorHeader:
    """One tensor's description; its regions are taken out of `regions`. dtypes: those that the format has."""
    name, shape, nnz, base = fields["name"], fields["shape"], fields["nnz"], fields["base"]
    check_name(name)
    where = repr(name)
    if not isinstance(shape, list):
        raise ValueError(f"{where}: shape must be a list, got {shown(shape)}")
    check_shape(where, shape)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in dtypes:
        raise ValueError(f"{where}: dtype must be one of {', '.join(dtypes)}, got {shown(fields['dtype'])}")
    dtype = getattr(torch, fields["dtype"])
    if type(nnz) is not int or not 0 <= nnz <= math.prod(shape):
        raise ValueError(f"{where}: nnz must lie in [0, {math.prod(shape)}], got {shown(nnz)}")
    if fields["kind"] not in ("replace", "add"):
        raise ValueError(f"{where}: kind must be 'replace' or 'add', got {shown(fields['kind'])}")
    if fields["kind"] == "add" and fields["dtype"] not in _ARITHMETIC:
        raise ValueError(f"{where}: kind must be 'replace' for {fields['dtype']}, got 'add'")
    for field, given in (("base", base), ("content", fields["content"])):
        if not (field == "base" and given is None) and not (
            isinstance(given, str) and re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", given)
        ):
            raise ValueError(f"{where}: {field} must be {DIGITS} hex digits, got {shown(given)}")

    def region(suffix: str) -> tuple[str, list[Any], int, int]:
        if f"{name}.{suffix}" not in regions:
            raise ValueError(f"{where}: tensor {name + '.' + suffix!r} is missing")
        return regions.pop(f"{name}.{suffix}")

    values, values_shape, begin, end = region("values")
    allowed = {_DTYPES[fields["dtype"]]: dtype} | ({"F32": torch.float32} if fields["kind"] == "add" else {})
    if values not in allowed:
        raise ValueError(f"{where}: values must be {' or '.join(allowed)}, got {shown(values)}")
    values_dtype = allowed[values]
    if values_shape != [nnz] or end - begin != nnz * values_dtype.itemsize or begin % values_dtype.itemsize:
        raise ValueError(f"{where}: values must be {nnz} numbers, aligned, got shape {shown(values_shape)}")
    code = None
    if has_indices:
        kind, code_shape, *bounds = region("indices")
        if kind != "U8" or code_shape != [bounds[1] - bounds[0]]:
            raise ValueError(f"{where}: indices must be U8 [bytes], got {shown(kind)} {shown(code_shape)}")
        code = (bounds[0], bounds[1])
    return TensorHeader(
        name, tuple(shape), dtype, nnz, fields["kind"], base, fields["content"], values_dtype, (begin, end), code
    )


def check_name(name: object) -> None:
    """A name is one of a state dict: parts between dots. It is a key and never a path; what could pass for one, or
    would garble a terminal, is refused with ValueError."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"a tensor's name must be a string of 1 to {_MAX_NAME} characters, got {shown(name)}")
    if not name.isprintable() or "/" in name or "\\" in name or not all(name.split(".")):
        raise ValueError(f"a tensor's name must be printable parts between dots, without slashes, got {shown(name)}")


def check_shape(where: str, shape: Iterable[Any]) -> None:
    """Refuses with ValueError a shape that no file may have."""
    sizes = list(shape)
    if not _are_sizes(sizes) or len(sizes) > _MAX_DIMENSIONS or math.prod(sizes) > MAX_NUMEL:
        raise ValueError(f"{where}: shape must be at most {_MAX_DIMENSIONS} sizes, 2^62 in all, got {shown(sizes)}")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_NUMEL for size in value)


def shown(value: object) -> str:
    """For a message: on one line, not long, with no control characters."""
    text = ascii(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


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
            raise ValueError(f"{shown(digits)} is too large a number")
        return number

    if not isinstance(text, (str, bytes)):
        raise ValueError(f"{where} must be JSON text, got {shown(text)}")
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {shown(value)}")
    return value


def _check_fields(
    where: str, fields: Mapping[str, Any], needed: set[str], optional: Collection[str] = (), newer: bool = False
) -> None:
    """Fields of a later minor version that are not known here are left alone."""
    if missing := needed - set(fields):
        raise ValueError(f"{where}: {min(missing)} is missing")
    if (unknown := set(fields) - needed - set(optional)) and not newer:
        raise ValueError(f"{where}: unknown field {shown(min(unknown))}")


def _config(fields: Any, newer: bool) -> ShiraConfig | None:
    if fields is None:
        return None
    _object("config", fields)
    try:
        return ShiraConfig.from_dict(fields)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        if newer:  # it may have fields that are not known here, and only says how the adapter came to be
            return None
        raise ValueError(f"config: {error}") from None
