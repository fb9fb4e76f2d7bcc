"""Sparse weight patches, as vLLM and TRL have them: `<name>.indices` and `<name>.values`, the new entries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from shira.adapter.adapter import Adapter
from shira.adapter.base import check_base, check_fits, entries_of
from shira.adapter.tensor import AdapterTensor
from shira.convert.source import Found, Weights, tied_once
from shira.files.checkpoint import Base, TensorFolder, save_tensors
from shira.files.errors import Argument, ArgumentError
from shira.files.output import written_whole
from shira.files.progress import Progress
from shira.model.names import canonical
from shira_kernels.dtypes import compute_dtype, index_dtype


def read(path: Path, weights: Weights, progress: Progress) -> Mapping[str, AdapterTensor]:
    """The tensors of a patch, of kind "replace". Errors as in `shira.convert.read`."""
    tensors = TensorFolder(path)
    stems = [name.removesuffix(".indices") for name in tensors if name.endswith(".indices")]
    weights.check_names(map(canonical, stems))
    found = Found(path)
    for done, stem in enumerate(stems):
        name = canonical(stem)
        progress(done, len(stems), name)
        indices, values, weight = tensors[f"{stem}.indices"], tensors[f"{stem}.values"], weights[name]
        if indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{path}: {stem}.indices must be int32 or int64, got {indices.dtype}")
        if values.dtype != weight.dtype:
            raise ValueError(f"{path}: {stem}.values are {values.dtype}, but {weight.dtype} in the base")
        found[name] = weights.tensor(name, weight, indices, values, "replace")
    return tied_once(path, found, weights.uses, each=False)


def write(adapter: Adapter, path: Path, base: Base | None, *, force: bool) -> None:
    """Writes a patch. Without `force` a base is refused that the adapter was not made for."""
    weights = None if base is None else Weights(base)
    arrays: dict[str, torch.Tensor] = {}
    for label, tensor in adapter.items():
        name, values = canonical(label), tensor.values
        if weights is not None:
            weight = weights[name]
            check_fits(label, tensor, weight)
            entries = entries_of(weight, tensor.indices)
            if not force:
                check_base(label, tensor, entries)
            if tensor.kind == "add":
                wide = compute_dtype(tensor.dtype)
                values = (entries.to(wide) + values.to(wide)).to(tensor.dtype)
        elif tensor.kind == "add":
            reason = ": a patch has the new values, and this part is a change of the old: give "
            raise ArgumentError(label, reason, Argument("base"))
        indices = tensor.indices.to(index_dtype(tensor.numel))
        arrays |= {f"{name}.indices": indices.clone(), f"{name}.values": values.clone()}
    with written_whole(path) as temporary:
        save_tensors(arrays, temporary)
