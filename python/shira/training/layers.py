"""What modules become while a weight of theirs is trained.

A module that uses a trained weight changes its class for a subclass of it, in place. Before a forward the weight's
entries are overwritten with the values if those changed; then the forward is the module's own. How the values get their
gradient (`shira.training.taps`):

- nn.Linear, Conv1D of transformers: behind the layer, from its input.
- nn.Embedding: behind the layer, from its tokens.
- nn.Conv1d, nn.Conv2d, nn.Conv3d, subclasses with a forward of their own, inputs that are not plain tensors (jagged
  ones), and whatever else reads such a layer's `weight` during a forward, instead of calling the layer or beside it:
  from an alias of the weight.
- any module whose parameters `mask_gradients` trains: from the parameter's own gradient (`shira.training.hooks`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor

from shira.model.modules import has_forward_of, is_inside_a_forward, transformers_conv1d
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
        if torch.compiler.is_compiling():
            return
        if torch._C._are_functorch_transforms_active():
            self.shira_check_transforms()
        for role, trained in self.shira_targets.items():
            if self._parameters.get(role) is not trained.attached:
                trained.refuse_another_weight()
            if not trained.is_met:
                trained.check_shape()
            if not trained.is_disabled or torch.is_grad_enabled():
                trained.write_back()

    def shira_check_transforms(self) -> None:
        """Raises RuntimeError if a transform of torch.func has taken a trained weight or its values."""
        for role, trained in self.shira_targets.items():
            for tensor in (self._parameters.get(role), trained.values):
                if tensor is not None and is_functorch_wrapped_tensor(tensor):
                    trained.refuse_transforms()

    def shira_owned(self) -> list[TrainedWeight]:
        """The trained weights whose values this module holds."""
        return [trained for trained in self.shira_targets.values() if getattr(trained, "owner", None) is self]

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("nn.DataParallel cannot train an attached model; DistributedDataParallel can")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _check_keeps(fn, next(self.parameters(recurse=False)).device)
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
        for trained in self.shira_targets.values():
            trained.check_enabled()
        reduced: Any = super().__reduce_ex__(2)
        return _new, (self.shira_mixin, self.shira_original), *reduced[2:]

    def extra_repr(self) -> str:
        entries = sum(trained.indices.numel() for trained in self.shira_targets.values())
        return ", ".join(filter(None, (super().extra_repr(), f"shira_entries={entries}")))


class _AttachedLayer(Attached):
    """A layer of which `attach` trains the "weight". During a forward its weight is an alias, for whoever reads it."""

    @property
    def weight(self) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")  # as a parametrization expects that took it
        if not is_inside_a_forward():  # where `layer.weight.data = ...` must find the parameter itself
            return weight
        self.shira_write_back()
        trained = self.shira_trains()
        return weight if trained is None else Alias.apply(trained.values, weight, trained.indices)

    @weight.setter
    def weight(self, value: object) -> None:  # where it is not a parameter any more
        self.shira_targets["weight"].refuse_another_weight()

    def shira_trains(self) -> TrainedWeight | None:
        """What trains the weight, if a gradient of its values is wanted now."""
        trained = self.shira_targets["weight"]
        if not torch.is_grad_enabled() or not trained.values.requires_grad:
            return None
        if not torch.compiler.is_compiling():
            trained.note_use()
        return trained

    def shira_check_transforms(self) -> None:
        super().shira_check_transforms()
        trained = self.shira_targets["weight"]
        if torch.is_grad_enabled() and trained.values.requires_grad:
            trained.refuse_transforms()


class _AttachedLinear(_AttachedLayer):
    """nn.Linear: weight [out, in]."""

    shira_transposed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.shira_write_back()
        trained = self.shira_trains()
        if trained is None:
            return self.shira_product(input)
        if not _is_plain(input):
            return super().forward(input)  # type: ignore[no-any-return]
        assert trained.csr is not None
        # As a matrix, so that the product is not a view: behind an identity in place on a view, autograd copies
        # gradients.
        rows = input.flatten(0, -2) if input.dim() > 2 else input
        output = LinearTap.apply(self.shira_product(rows), rows, trained.values, *trained.csr, self.shira_transposed)
        return output.view(*input.shape[:-1], output.shape[-1]) if input.dim() > 2 else output

    def shira_product(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self._parameters["weight"], self.bias)  # type: ignore[arg-type]


class _AttachedConv1D(_AttachedLinear):
    """The Conv1D of transformers, a linear layer with weight [in, out]."""

    shira_transposed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def shira_product(self, input: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.bias, input.view(-1, input.shape[-1]), self._parameters["weight"])  # type: ignore[arg-type]
        return rows if input.dim() == 2 else rows.view(*input.shape[:-1], rows.shape[-1])


class _AttachedEmbedding(_AttachedLayer):
    """nn.Embedding: weight [rows, columns]."""

    padding_idx: int | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.shira_write_back()
        trained = self.shira_trains()
        if trained is None or not _is_plain(input):
            return super().forward(input)  # type: ignore[no-any-return]
        weight = self._parameters["weight"]
        assert weight is not None
        output = nn.functional.embedding(input, weight, self.padding_idx)
        return EmbeddingTap.apply(output, input, trained.values, trained.indices, weight.shape[0], self.padding_idx)  # type: ignore[no-any-return]


def _check_keeps(fn: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    """Raises RuntimeError for what moves a module's tensors and leaves their contents behind."""
    probe = torch.tensor([time.perf_counter_ns()], device=device)
    moved = fn(probe)
    if moved.is_meta or not torch.equal(moved.cpu(), probe.cpu()):
        raise RuntimeError("attached entries would be lost (on the meta device, or by to_empty): detach first")


def _is_plain(input: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor: neither nested nor of a class with arithmetic of its own."""
    return type(input) in (torch.Tensor, nn.Parameter) and not input.is_nested


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
            return mixin if has_forward_of(module, kind) else _AttachedLayer
    return None


def _kinds() -> Iterator[tuple[type[nn.Module], type[Attached]]]:
    yield nn.Linear, _AttachedLinear
    yield nn.Embedding, _AttachedEmbedding
    yield from ((conv, _AttachedLayer) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if conv1d := transformers_conv1d():
        yield conv1d, _AttachedConv1D


def _refusal(module: nn.Module) -> str | None:
    """Why a module of a known kind cannot be trained, if that is so."""
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
    if isinstance(module, _AttachedLinear):
        trained.want_csr()


def check_forwards(model: nn.Module) -> None:
    """Raises RuntimeError if the forward of an attached layer was replaced by one that may call it."""
    for name, module in model.named_modules():
        if isinstance(module, Attached) and "forward" in vars(module) and not _holds_its_forward(module):
            raise RuntimeError(
                f"{name}: its forward was replaced after attach, and may call the attached one: put it back first"
            )


def _holds_its_forward(module: nn.Module) -> bool:
    """Whether the module has its class's forward as an attribute, as hooks that were removed leave it."""
    return getattr(module.forward, "__func__", None) is type(module).forward


def restore_classes(modules: Iterable[nn.Module]) -> None:
    """Gives modules the class back that `make_attached` took, and takes out what it added."""
    for module in modules:
        if isinstance(module, Attached):
            if _holds_its_forward(module):
                vars(module).pop("forward", None)
            del module.shira_targets
            module.__class__ = module.shira_original  # type: ignore[assignment]
