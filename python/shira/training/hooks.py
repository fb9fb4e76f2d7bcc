"""Training by hooks: `mask_gradients` turns training of whole parameters into training of some of their entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.masks.calibrate import Loss
from shira.masks.config import ShiraConfig
from shira.training.attach import Handle, attach_with
from shira.training.layers import Attached
from shira.training.matching import matched_parameters


def mask_gradients(
    model: nn.Module,
    what: ShiraConfig | Adapter,
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Handle:
    """Does what `attach` does for any parameter of any module: dense gradients are made, gathered and freed at once.

    The chosen parameters get ordinary dense gradients from autograd. As soon as one is complete, its listed entries are
    added to the gradient of a compact parameter of values, and it is freed: at most a few layers' exist at a time. The
    optimizer gets `handle.parameters()`; if it is given `model.parameters()`, it finds no gradient at the dense ones
    and leaves them alone. Everything else is frozen but modules_to_save.

    Use `attach` for the layers that it knows: there the dense gradient is seldom formed, and several processes can
    train together; here their backward raises RuntimeError.

    Args:
        model: any module; the parameters must be contiguous float64, float32, bfloat16 or float16.
        what: a ShiraConfig or an Adapter, as for `attach`. target_modules may name modules, whose `weight` is meant,
            and parameters, as "in_proj_weight" or "layers.0.attention.in_proj_weight".
        calibration, loss: as for `attach`.

    Returns:
        The handle. `handle.parameters()` are ordinary float32 parameters (float64 for float64 parameters), one [nnz]
        vector for each parameter, for any optimizer.

    Raises:
        ValueError: what does not fit the model. Nothing was changed.
        RuntimeError: something is attached already, a ResidentAdapters has an adapter in the weights, or inference mode
            is on.

    Warns:
        ShiraWarning: the adapter has no checksum, so that it cannot be told whether it belongs to these weights; or
            "all-linear" leaves out much, as for `attach`.
    """
    return attach_with(
        model,
        what,
        match=matched_parameters,
        becomes=_mixin_of,
        dense=True,
        calibration=calibration,
        loss=loss,
    )


def _mixin_of(name: str, module: nn.Module, role: str) -> type[Attached]:
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{name}: a scripted module cannot be trained")
    return Attached
