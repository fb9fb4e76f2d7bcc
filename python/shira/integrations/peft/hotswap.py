"""Another adapter's file in the place of a loaded SHiRA adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.tuners.shira.layer import ShiraLayer

from shira.convert.source import peft_config, peft_tensors
from shira.files.errors import Argument, ArgumentError
from shira.integrations.peft.loading import check_positions


@torch.no_grad()
def hotswap(model: Any, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes the values and positions of a saved SHiRA adapter over those of a loaded one, in place.

    Nothing is allocated in the model: the tensors keep their addresses, and optimizers and the active adapters are as
    before. All is checked before anything is written. PEFT's own `hotswap_adapter` takes LoRA only.

    Args:
        model: a PeftModel with a SHiRA adapter of this name.
        path: a folder that `save_pretrained` wrote, of an adapter for the same layers with the same r.
        adapter_name: the adapter to be replaced; it must not be merged.

    Raises:
        ArgumentError: the adapter is merged or is not SHiRA; or, with the layer's name, the file does not fit.
        ValueError: the folder's files are damaged, or lie outside of it.
        OSError: they are not there: nothing is looked up elsewhere, and nothing is unpickled.
    """
    if adapter_name not in model.peft_config or model.peft_config[adapter_name].peft_type != "SHIRA":
        raise ArgumentError(Argument("adapter_name"), f" must be that of a SHiRA adapter, got {adapter_name!r}")
    folder = Path(path)
    if (kind := peft_config(folder)["peft_type"]) != "SHIRA":
        raise ArgumentError(Argument("path"), f": {path} must hold a SHiRA adapter, got {kind}")
    file = peft_tensors(folder)
    tensors = {name: file[name] for name in file}
    planned: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, ShiraLayer) or adapter_name not in layer.shira_weight:
            continue
        if adapter_name in layer.merged_adapters:
            raise ArgumentError(f"{name}: adapter {adapter_name!r} is merged: call unmerge_adapter first")
        check_positions(name, layer, adapter_name, tensors.get(f"{name}.shira_indices"))
        values, old = tensors.get(f"{name}.shira_weight"), layer.shira_weight[adapter_name]
        if values is None or values.shape != old.shape:
            got = None if values is None else list(values.shape)
            raise ArgumentError(f"{name}: {path} must have values {list(old.shape)} for this layer, got {got}")
        planned.append((old, tensors.pop(f"{name}.shira_weight")))
        planned.append((layer.shira_indices[adapter_name], tensors.pop(f"{name}.shira_indices")))
    if tensors:
        raise ArgumentError(
            f"{next(iter(tensors))}: {path} has this tensor, and adapter {adapter_name!r} has no place for it"
        )
    for old, new in planned:
        old.copy_(new)
