"""Models in several processes: what cannot be trained is refused, and what never changes is not sent."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shira.training.buffers import TrainedBuffer
from shira.training.trained import TrainedWeight


def check_bare(model: nn.Module) -> None:
    """Raises ValueError if a model is in a wrapper that would not know of what `attach` adds."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", DataParallel)
    for module in model.modules():
        if isinstance(module, DataParallel) or (
            isinstance(module, (DistributedDataParallel, fsdp)) and distributed.get_world_size() > 1
        ):
            kind = type(module).__name__
            raise ValueError(
                f"the model is in a {kind}, which would not see what is attached: attach first, then wrap it"
            )


def ignore_in_ddp(model: nn.Module, weights: Iterable[TrainedWeight], buffers: Iterable[TrainedBuffer]) -> list[str]:
    """Keeps indices and the base, which never change, out of what DistributedDataParallel sends in each forward.

    Returns the names that were added to the list that it looks for, for `reduce_again_in_ddp`.
    """
    names = {module: name for name, module in model.named_modules()}
    added = []
    for trained in weights:
        prefix = names[trained.owner] + "." if names[trained.owner] else ""
        added += [prefix + trained.indices_name, prefix + trained.base_name]
    for buffer in buffers:
        prefix = names[buffer.owner] + "." if names[buffer.owner] else ""
        added.append(prefix + buffer.base_name)
    model._ddp_params_and_buffers_to_ignore = [*_ignored(model), *added]  # type: ignore[assignment]
    return added


def reduce_again_in_ddp(model: nn.Module, added: list[str]) -> None:
    """Takes the names that `ignore_in_ddp` added out of the list again."""
    left = [name for name in _ignored(model) if name not in added]
    if left:
        model._ddp_params_and_buffers_to_ignore = left  # type: ignore[assignment]
    else:
        del model._ddp_params_and_buffers_to_ignore


def _ignored(model: nn.Module) -> Any:
    return getattr(model, "_ddp_params_and_buffers_to_ignore", [])
