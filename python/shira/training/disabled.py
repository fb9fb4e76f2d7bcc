"""A model that is trained, with its base's entries for a while: the reference of preference losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from shira.model.interrupts import interrupts_held
from shira.training.buffers import TrainedBuffer
from shira.training.trained import TrainedWeight


@contextlib.contextmanager
def at_base(weights: Sequence[TrainedWeight], buffers: Sequence[TrainedBuffer]) -> Iterator[None]:
    """Gives weights and buffers their base's bits until the block is left. Inside there are no gradients."""
    trained_values = {id(trained.values) for trained in weights}

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(parameter) in trained_values for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError("an optimizer must not step inside handle.disabled(): leave the block first")

    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(refuse).remove)
        try:
            for buffer in buffers:
                stack.enter_context(buffer.at_base())
            for trained in weights:
                stack.enter_context(trained.at_base())
            torch.clear_autocast_cache()  # of weights that require grad it keeps what they were rounded to
            yield
        finally:
            with interrupts_held():
                stack.close()
                torch.clear_autocast_cache()
