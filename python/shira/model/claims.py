"""Who changes a weight now: training or a bank, never both, for neither could give the base back then."""

from __future__ import annotations

import torch


def check_claim(name: str, weight: torch.Tensor, owner: object) -> None:
    """Raises RuntimeError if another than `owner` ("attach", or a bank) changes the weight now: with both at once
    neither could give the base back."""
    held = getattr(weight, "_shira_owner", owner)
    if held != owner:
        who = held if isinstance(held, str) else type(held).__name__
        raise RuntimeError(f"{name}: {who} is changing this weight; detach, or switch(None), first")


def claim(weight: torch.Tensor, owner: object) -> None:
    """Notes who changes a weight, and keeps it, for it has the base; None for nobody any more."""
    if owner is not None:
        weight._shira_owner = owner  # type: ignore[attr-defined]
    elif hasattr(weight, "_shira_owner"):
        del weight._shira_owner
