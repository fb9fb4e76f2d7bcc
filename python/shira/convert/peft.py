"""PEFT's own sparse adapters: SHiRA read and written, Super-Tuning read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shira.adapter.adapter import Adapter
from shira.adapter.base import BaseTensors
from shira.adapter.difference import changes
from shira.adapter.fusion import deltas
from shira.adapter.placed import placed
from shira.adapter.tensor import AdapterTensor
from shira.convert.source import (
    CONFIG,
    WEIGHTS,
    Found,
    Weights,
    check_count,
    peft_config,
    peft_tensors,
    tied_once,
    whole,
)
from shira.files.checkpoint import Base, TensorFolder, save_tensors
from shira.files.errors import warn
from shira.files.output import written_whole
from shira.files.progress import Progress
from shira.model.names import canonical


def read_shira(folder: Path, weights: Weights, progress: Progress) -> Mapping[str, AdapterTensor]:
    """The tensors of a SHiRA adapter, of kind "add". Errors as in `shira.convert.read`."""
    tensors = peft_tensors(folder)
    modules, others = _modules(folder, tensors, weights, ("shira_weight", "shira_indices"))
    found = Found(folder / WEIGHTS)
    for done, (module, fields) in enumerate(modules.items()):
        name = canonical(f"{module}.weight")
        progress(done, len(modules), name)
        weight, values = weights.arithmetic(name), tensors[fields["shira_weight"]]
        places = tensors[fields["shira_indices"]]
        if weight.dim() != 2 or places.dim() != 2 or places.shape[0] != 2:
            raise ValueError(f"{name}: rows and columns must be [2, nnz] for a matrix, got {list(places.shape)}")
        check_count(name, max(places.shape[1], values.numel()), weight)
        rows, columns = whole(name, places)  # float32 in files that were written on Windows
        if rows.numel() and not (
            0 <= int(rows.min()) <= int(rows.max()) < weight.shape[0]
            and 0 <= int(columns.min()) <= int(columns.max()) < weight.shape[1]
        ):
            raise ValueError(f"{name}: rows and columns must lie in the weight, {tuple(weight.shape)}")
        found[name] = weights.tensor(name, weight, rows * weight.shape[1] + columns, values.float(), "add")
    _add_saved_modules(found, tensors, others, weights)
    return tied_once(folder, found, weights.uses)


def read_supertuning(folder: Path, weights: Weights, progress: Progress) -> Mapping[str, AdapterTensor]:
    """The tensors of a Super-Tuning adapter, of kind "add". Errors and warnings as in `shira.convert.read`."""
    config, tensors = peft_config(folder), peft_tensors(folder)
    fields = ("supertuning_values", "supertuning_indices")
    modules, others = _modules(folder, tensors, weights, fields, optional="supertuning_indices")
    found = Found(folder / WEIGHTS)
    recomputed = 0
    for done, (module, keys) in enumerate(modules.items()):
        name = canonical(f"{module}.weight")
        progress(done, len(modules), name)
        # PEFT rounds the changes to the weight's type before it adds them.
        weight, values = weights.arithmetic(name), tensors[keys["supertuning_values"]]
        check_count(name, values.numel(), weight)
        values = values.to(weight.dtype)
        if "supertuning_indices" in keys:
            indices = tensors[keys["supertuning_indices"]]
        else:
            indices = _supertuning_indices(name, weight, config, values.numel())
            recomputed += 1
        found[name] = weights.tensor(name, weight, indices, values, "add")
    if recomputed:
        warn(
            f"{folder}: the positions of {recomputed} weights are not in the file and were found anew from the base's "
            "magnitudes; with another base, or where magnitudes are equal, they may be others than in training"
        )
    _add_saved_modules(found, tensors, others, weights)
    return tied_once(folder, found, weights.uses)


def _modules(
    folder: Path, tensors: TensorFolder, weights: Weights, fields: tuple[str, ...], optional: str = ""
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Of a PEFT file: path of a module -> field -> name of the tensor; and the names of all other tensors. Refuses with
    ValueError those of which the base has no weight."""
    modules: dict[str, dict[str, str]] = {}
    others = []
    for name in tensors:
        module, _, field = name.rpartition(".")
        if field in fields:
            modules.setdefault(module, {})[field] = name
        else:
            others.append(name)
    if not modules and not others:
        raise ValueError(f"{folder / WEIGHTS}: it has no tensors")
    for module, found in modules.items():
        if missing := [field for field in fields if field not in found and field != optional]:
            raise ValueError(f"{folder / WEIGHTS}: {module} has no {missing[0]}")
    weights.check_names(canonical(name) for name in (*(f"{module}.weight" for module in modules), *others))
    return modules, others


def _add_saved_modules(found: Found, tensors: TensorFolder, names: list[str], weights: Weights) -> None:
    """Adds what PEFT's `modules_to_save` hold, as differences from the base."""
    for name in names:
        own = canonical(name)
        tensor, _ = changes(own, weights[own], tensors[name], None)
        if tensor is not None:
            found[own] = tensor


def _supertuning_indices(name: str, weight: torch.Tensor, config: Mapping[str, Any], count: int) -> torch.Tensor:
    """Finds the positions as PEFT does, in the order of torch.topk, which is that of the values."""
    sparsity = config.get("sparsity")
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{name}: the positions are not in the file, and {CONFIG} has no sparsity from 0 to below 1")
    k = int(weight.numel() * (1 - sparsity))
    if k != count:
        raise ValueError(f"{name}: sparsity {sparsity} gives {k} positions, but there are {count} values")
    return weight.abs().flatten().topk(k, largest=bool(config.get("select_top", True))).indices


def write_shira(adapter: Adapter, path: Path, base: Base | None, *, force: bool) -> None:
    """Writes a folder of PEFT. Without `force` a base is refused that the adapter was not made for."""
    if not adapter:
        raise ValueError("the adapter changes nothing, and PEFT loads no adapter without layers")
    weights = None if base is None else BaseTensors(base).as_loaded()
    if weights is not None:  # PEFT's names are those of the model in memory
        adapter = placed(adapter, weights, force=force)
    for name, tensor in adapter.items():
        if len(tensor.shape) != 2 or not name.endswith(".weight"):
            raise ValueError(f"{name}: PEFT's SHiRA has weights of linear layers only, not a tensor of {tensor.shape}")
        if weights is not None and len(uses := weights.uses(canonical(name))) > 1:
            reason = f"is tied to {uses[1]} in the base, and PEFT would change it alone"
            raise ValueError(f"{name}: it {reason}: give a base that has two, with tie_word_embeddings false")
    rank = max((math.ceil(tensor.nnz / sum(tensor.shape)) for tensor in adapter.values()), default=1) or 1
    arrays: dict[str, torch.Tensor] = {}
    for (label, tensor), (name, (indices, values)) in zip(
        adapter.items(), deltas(adapter, weights, force=force).items(), strict=True
    ):
        count = rank * sum(tensor.shape)
        if count > tensor.numel:
            raise ValueError(
                f"{label}: PEFT gives all layers r (rows + columns) entries, here with r = {rank}, and {tensor.shape} "
                f"has fewer than {count}: the densest layers need another file"
            )
        unused = torch.ones(tensor.numel, dtype=torch.bool, device=indices.device)
        unused[indices.long()] = False
        filled, order = torch.cat([indices.long(), unused.nonzero().view(-1)[: count - tensor.nnz]]).sort()
        places = torch.stack([filled // tensor.shape[1], filled % tensor.shape[1]]).int()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        padded = torch.cat([values.float(), values.new_zeros(count - tensor.nnz, dtype=torch.float32)])
        arrays |= {f"{module}.shira_weight": padded[order], f"{module}.shira_indices": places.contiguous()}
    config = {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": str(base) if isinstance(base, (str, os.PathLike)) else None,
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",  # of which PEFT keeps nothing: the positions are those of the file
        "random_seed": None,
        "target_modules": sorted(canonical(name).removesuffix(".weight") for name in adapter),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    with written_whole(path, folder=True) as temporary:
        temporary.mkdir()
        save_tensors(arrays, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
