"""What modules become while a weight of theirs is trained.

A module that uses a trained weight changes its class for a subclass of it, in place. Before a forward the weight's
entries are overwritten with the values if those changed; then the forward is the module's own. How the values get their
gradient (`shira.training.taps`):

- nn.Linear, Conv1D of transformers: behind the layer, from its input.
- nn.Embedding: behind the layer, from its tokens.
- nn.Conv1d, nn.Conv2d, nn.Conv3d, and subclasses with a forward of their own: the module reads an alias of its weight.
- any module whose parameters `mask_gradients` trains: from the parameter's own gradient (`shira.training.hooks`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from shira.model.modules import is_bypassed, transformers_conv1d
from shira.training.taps import Alias, EmbeddingTap, LinearTap
from shira.training.trained import TrainedWeight


class Attached(nn.Module):
    """What a module's class becomes (mixed with that class) while a weight of it is trained."""

    shira_original: type[nn.Module]
    shira_mixin: type[Attached]
    shira_targets: dict[str, TrainedWeight]  # by the weight's name in this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.shira_write_back()
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def shira_write_back(self) -> None:
        # A compiled forward cannot read versions. There the hook on optimizers' steps has written the values.
        if not torch.compiler.is_compiling():
            for trained in self.shira_targets.values():
                trained.write_back()

    def shira_trains(self) -> TrainedWeight | None:
        """The module's "weight", if a gradient of its values is wanted now."""
        trained = self.shira_targets["weight"]
        if not torch.is_grad_enabled() or not trained.values.requires_grad:
            return None
        if not torch.compiler.is_compiling():
            trained.note_use()
        return trained

    def shira_owned(self) -> list[TrainedWeight]:
        """The trained weights whose values this module holds."""
        return [trained for trained in self.shira_targets.values() if getattr(trained, "owner", None) is self]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        move: Callable[[], object] = functools.partial(super()._apply, fn, recurse)
        for trained in self.shira_owned():
            move = functools.partial(trained.moving, fn, move)
        move()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for trained in self.shira_targets.values():
            trained.write_back(always_compare=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        for trained in self.shira_owned():
            if reason := trained.refusal(state_dict, prefix):
                errors.append(reason)
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for role, trained in self.shira_targets.items():
            trained.loaded_by(self, role)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for trained in self.shira_owned():
            trained.rebind_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        return _new, (self.shira_mixin, self.shira_original), *reduced[2:]

    def extra_repr(self) -> str:
        entries = sum(trained.indices.numel() for trained in self.shira_targets.values())
        return ", ".join(filter(None, (super().extra_repr(), f"shira_entries={entries}")))


class _AttachedLinear(Attached):
    """nn.Linear: weight [out, in]."""

    shira_transposed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.shira_write_back()
        trained = self.shira_trains()
        if trained is None:
            return super().forward(input)  # type: ignore[no-any-return]
        assert trained.csr is not None
        # As a matrix, so that the product is not a view: behind an identity in place on a view, autograd copies
        # gradients.
        rows = input.flatten(0, -2) if input.dim() > 2 else input
        output = LinearTap.apply(self.shira_product(rows), rows, trained.values, *trained.csr, self.shira_transposed)
        return output.view(*input.shape[:-1], output.shape[-1]) if input.dim() > 2 else output

    def shira_product(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.weight, self.bias)  # type: ignore[arg-type]


class _AttachedConv1D(_AttachedLinear):
    """The Conv1D of transformers, a linear layer with weight [in, out]."""

    shira_transposed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def shira_product(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, rows.view(-1, rows.shape[-1]), self.weight)  # type: ignore[arg-type]


class _AttachedEmbedding(Attached):
    """nn.Embedding: weight [rows, columns]."""

    padding_idx: int | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(input)
        trained = self.shira_trains()
        if trained is not None:
            rows = trained.weight.shape[0]
            output = EmbeddingTap.apply(output, input, trained.values, trained.indices, rows, self.padding_idx)
        return output


class _AttachedReader(Attached):
    """A module whose forward reads `self.weight`."""

    shira_alias: torch.Tensor | None  # what it reads while a forward runs whose gradient is wanted

    @property
    def weight(self) -> torch.Tensor | None:
        return self._parameters["weight"] if self.shira_alias is None else self.shira_alias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.shira_write_back()
        trained = self.shira_trains()
        if trained is None:
            return super().forward(*args, **kwargs)
        # An instance attribute "weight" would come before the parameter, but Dynamo of torch 2.10 and 2.11 cannot trace
        # its removal.
        self.shira_alias = Alias.apply(trained.values, trained.weight, trained.indices)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.shira_alias = None


_SUPPORTED = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding and Conv1D of transformers"


def mixin_of(name: str, module: nn.Module, role: str) -> type[Attached]:
    """What a module becomes when `attach` trains its parameter `role`; `name` is the module's, for errors.

    Raises ValueError if it cannot be trained so.
    """
    mixin = _known_mixin_of(module)
    if mixin is None:
        raise ValueError(f"{name}: only {_SUPPORTED} can be trained, got {type(module).__name__}")
    if role != "weight":
        raise ValueError(f"{name}.{role}: only the weight of {type(module).__name__} can be trained, not its {role}")
    if reason := _refusal(module):
        raise ValueError(f"{name}: {reason}")
    return mixin


def _known_mixin_of(module: nn.Module) -> type[Attached] | None:
    for kind, mixin in _kinds():
        if isinstance(module, kind):
            return mixin if type(module).forward is kind.forward else _AttachedReader
    return None


def _kinds() -> Iterator[tuple[type[nn.Module], type[Attached]]]:
    yield nn.Linear, _AttachedLinear
    yield nn.Embedding, _AttachedEmbedding
    yield from ((conv, _AttachedReader) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if conv1d := transformers_conv1d():
        yield conv1d, _AttachedConv1D


def _refusal(module: nn.Module) -> str | None:
    """Why a module of a known kind cannot be trained, if that is so."""
    if is_bypassed(module):
        return "nn.MultiheadAttention never calls this layer, so it cannot be trained"
    if "forward" in vars(module):
        return "its forward was replaced (by hooks of another library?), so it cannot be trained"
    if isinstance(module, nn.Embedding):
        for option in ("sparse", "scale_grad_by_freq", "max_norm"):
            if getattr(module, option):
                return f"an nn.Embedding with {option}={getattr(module, option)!r} cannot be trained"
    return None


@functools.cache
def _attached_class(mixin: type[Attached], original: type[nn.Module]) -> type[Attached]:
    namespace = {"shira_original": original, "shira_mixin": mixin, "__module__": original.__module__}
    return type(f"Shira{original.__name__}", (mixin, original), namespace)


def _new(mixin: type[Attached], original: type[nn.Module]) -> Attached:
    attached: type[Attached] = _attached_class(mixin, original)  # type: ignore[arg-type]
    return attached.__new__(attached)


def make_attached(module: nn.Module, mixin: type[Attached], role: str, trained: TrainedWeight) -> None:
    """Changes a module's class, so that it uses the trained weight as its `role`."""
    if not isinstance(module, Attached):
        module.__class__ = _attached_class(mixin, type(module))  # type: ignore[arg-type]
        module.shira_targets = {}  # type: ignore[assignment]
    assert isinstance(module, Attached)
    module.shira_targets[role] = trained
    if isinstance(module, _AttachedReader):
        module.shira_alias = None
    if isinstance(module, _AttachedLinear):
        trained.want_csr()


def restore_classes(modules: Iterable[nn.Module]) -> None:
    """Gives modules the class back that `make_attached` took, and takes out what it added."""
    for module in modules:
        if isinstance(module, Attached):
            del module.shira_targets
            if isinstance(module, _AttachedReader):
                del module.shira_alias
            module.__class__ = module.shira_original  # type: ignore[assignment]
