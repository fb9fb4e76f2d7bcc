"""`Watch`: whether a model still is what `attach` made of it, looked at when its trained weights are first used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from shira.model.modules import users_of
from shira.training.layers import Attached
from shira.training.trained import TrainedWeight


class Watch:
    """What a handle and its weights ask before the first use, and before an adapter is made."""

    def __init__(self, model: nn.Module, weights: Sequence[TrainedWeight]) -> None:
        self._model, self._weights = model, weights
        self._is_checked = False
        for trained in weights:
            trained.check_model = self.check_once

    def check_once(self) -> None:
        """Calls `check` the first time."""
        if not self._is_checked:
            self.check()
            self._is_checked = True

    def check(self) -> None:
        """Raises RuntimeError if a trained layer is not in the model any more, or another layer shares its weight."""
        users = users_of(self._model)
        for trained in self._weights:
            modules = users.get(trained.weight, [])
            if all(module is not trained.owner for _, module, _ in modules):
                raise RuntimeError(f"{trained.name}: its layer was taken out of the model after attach")
            for name, module, role in modules:
                if not isinstance(module, Attached) or module.shira_targets.get(role) is not trained:
                    raise RuntimeError(f"{name}: its {role} was tied to {trained.name} after attach: do it before")
