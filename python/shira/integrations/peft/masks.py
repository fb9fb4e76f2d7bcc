"""This library's masks as PEFT takes them: `config.mask_fn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shira.files.errors import Argument, ArgumentError
from shira.masks import MASKS, Mask
from shira.masks.ranking import needs_gradient

MaskFunction = Callable[..., torch.Tensor]


def mask(which: str | Mask, *, seed: int | None = None, **options: Any) -> MaskFunction:
    """A mask of this library for PEFT's `ShiraConfig`: `config.mask_fn = shira.integrations.peft.mask("wm")`.

    It chooses r (in + out) entries of each layer's weight, as many as PEFT wants.

    Args:
        which: "wm", "grad", "snip", "struct", "rand" or "small", or a function like these ("which entries" in
            docs/masks.md). "grad" and "snip" rank by the gradient that stands in each weight's `grad`: run one or more
            batches backward before the adapter is added.
        seed: for masks that draw; None for the config's `random_seed`, or 0 where it has none. Layers of one shape get
            one mask, as with PEFT's own `random_seed`.
        options: further arguments of the mask, such as `skip`, `granularity` or `axis`.

    Returns:
        (layer, r) -> bool [out, in] on the weight's device, True at the chosen entries.

    Raises:
        ArgumentError: the mask is not known. From the function: a gradient that is not there, or a mask that gives
            another number of entries, as a granularity may.
    """
    if isinstance(which, str) and which not in MASKS:
        raise ArgumentError(Argument("which"), f" must be one of {', '.join(MASKS)} or a function, got {which!r}")
    function: Mask = MASKS[which] if isinstance(which, str) else which

    def mask_fn(base_layer: nn.Module, r: int, random_seed: int | None = None, **_: Any) -> torch.Tensor:
        weight: torch.Tensor = base_layer.weight  # type: ignore[assignment]
        if weight.grad is None and isinstance(which, str) and needs_gradient(which):
            raise ArgumentError(
                f"mask {which!r} ranks by gradients, and the weight of {base_layer} has none: run a loss backward with "
                "requires_grad on these weights before the adapter is added"
            )
        wanted = r * sum(weight.shape)
        chosen_seed = next((given for given in (seed, random_seed) if given is not None), 0)
        indices = function(
            weight.detach(), wanted / weight.numel(), k=wanted, grad=weight.grad, seed=chosen_seed, **options
        )
        if indices.numel() != wanted:
            raise ArgumentError(
                f"mask {which!r} gives {indices.numel()} entries for {base_layer} and PEFT needs {wanted}, "
                "r (in + out): choose a granularity that divides both the row length and this number"
            )
        chosen = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        return chosen.index_fill_(0, indices.long(), True).view(weight.shape)

    return mask_fn
