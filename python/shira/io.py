"""Files: atomic writes, and the adapter layout "shira/0".

One safetensors file. For each tensor it holds `<name>.indices` (int32 or int64) and `<name>.values`; the rest is one
JSON object in the metadata entry "adapter", beside the entry "format":

    {"config": {...} or null, "tensors": {name: {"shape": [...], "dtype": "bfloat16", "kind": "replace",
                                                 "checksum": "0f..." or null}},
     "provenance": {...}}

"provenance" is only there if the adapter has one.

This layout is not stable: later versions need not read it.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from shira.adapter import Adapter

FORMAT = "shira/0"
_TENSOR_FIELDS = {"shape", "dtype", "kind", "checksum"}


class AdapterFormatError(ValueError):
    """A file that is not a valid adapter; says the path and what is wrong."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that `path` holds either what it held before or all of `data`, also after a crash."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # "x" leaves the permissions to the umask, unlike the tempfile module.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes an adapter atomically."""
    from safetensors.torch import save as to_bytes

    arrays, tensors = {}, {}
    for name, tensor in adapter.items():
        # Copies, because safetensors refuses tensors that share memory.
        arrays[f"{name}.indices"] = tensor.indices.clone(memory_format=torch.contiguous_format)
        arrays[f"{name}.values"] = tensor.values.clone(memory_format=torch.contiguous_format)
        tensors[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "kind": tensor.kind,
            "checksum": tensor.checksum,
        }
    description = {"config": adapter.config and adapter.config.to_dict(), "tensors": tensors}
    if adapter.provenance is not None:
        description["provenance"] = adapter.provenance
    write_atomically(path, to_bytes(arrays, {"format": FORMAT, "adapter": json.dumps(description)}))


def load(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter, on the CPU. Raises AdapterFormatError if the file is anything but a valid one, or OSError."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # for the usual OSError, with errno and path
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterFormatError(f"{os.fspath(path)}: not a whole safetensors file: {error}") from None
    try:
        return _parse(metadata, arrays)
    except ValueError as error:
        raise AdapterFormatError(f"{os.fspath(path)}: {error}") from None


def _parse(metadata: dict[str, str], arrays: dict[str, torch.Tensor]) -> Adapter:
    from shira.adapter import Adapter, AdapterTensor
    from shira.config import ShiraConfig

    if metadata.get("format") != FORMAT:
        raise ValueError(f"unknown format {metadata.get('format')!r}, this version reads {FORMAT!r}")
    try:
        description = json.loads(metadata.get("adapter", ""))
    except (ValueError, RecursionError):
        raise ValueError('metadata entry "adapter" is not JSON') from None
    if not isinstance(description, dict) or set(description) - {"provenance"} != {"config", "tensors"}:
        raise ValueError('metadata entry "adapter" must hold "config" and "tensors", and may hold "provenance"')
    config, tensors = description["config"], description["tensors"]
    if not isinstance(tensors, dict) or not (config is None or isinstance(config, dict)):
        raise ValueError('"tensors" must be an object, and "config" an object or null')
    expected = {f"{name}.{part}" for name in tensors for part in ("indices", "values")}
    if wrong := expected.symmetric_difference(arrays):
        first = min(wrong)
        raise ValueError(f"tensor {first!r} is {'missing' if first in expected else 'not described'}")
    return Adapter(
        {
            name: AdapterTensor(arrays[f"{name}.indices"], arrays[f"{name}.values"], **_fields(name, fields))
            for name, fields in tensors.items()
        },
        config=None if config is None else ShiraConfig.from_dict(config),
        provenance=description.get("provenance"),
    )


def _fields(name: str, fields: Any) -> dict[str, Any]:
    """A tensor's description with Python types; what the values mean is left to Adapter to check."""
    if not isinstance(fields, dict) or set(fields) != _TENSOR_FIELDS:
        raise ValueError(f"{name}: the description must hold {', '.join(sorted(_TENSOR_FIELDS))}")
    shape, dtype = fields["shape"], fields["dtype"]
    if not isinstance(shape, list):
        raise ValueError(f"{name}: shape must be a list, got {shape!r}")
    return {**fields, "shape": tuple(shape), "dtype": getattr(torch, dtype, None) if isinstance(dtype, str) else None}
