"""Training: `attach` makes chosen entries of a model's weights trainable, where they are.

Each trained weight gets a parameter `shira_values` [nnz], the true values of its entries, and stays where it is,
frozen. There is no copy of the weight and no further matrix product in the forward; the backward computes the gradient
of the entries alone where the layer allows that (see `shira.training.layers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.adapter.base import check_base, check_fits, entries_of
from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import DTYPES, AdapterTensor
from shira.masks.calibrate import Loss, calibrate
from shira.masks.choose import choose_entries
from shira.masks.config import ALL_LINEAR, ShiraConfig, names_match
from shira.model.claims import check_claim, claim
from shira.model.modules import Users, is_bypassed, is_linear, users_of
from shira.model.names import canonical, first_names, resolve
from shira.training import layers
from shira.training.layers import Attached, Target


@dataclass
class Chosen:
    """One weight to train: its name, the modules that use it and as what, and what it gets."""

    name: str
    weight: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor  # the true values to start from
    base: torch.Tensor  # the weight's own entries


class Handle:
    """What `attach` gives back: the trained parameters, the adapter they make, and the way back."""

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        required_grad: dict[str, bool],
        saved: tuple[str, ...],
        config: ShiraConfig | None,
    ) -> None:
        self._model: nn.Module | None = model
        self._targets = targets
        self._required_grad = required_grad
        self._saved = saved
        self._config = config
        self._not_reduced = _ignore_in_ddp(model, targets)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by its name in the model: one [nnz] vector for each weight, and those of modules_to_save."""
        model = self._attached_model
        values = {target.values for target in self._targets}
        for name, parameter in model.named_parameters():
            if parameter in values or _is_saved(name, self._saved):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer gets."""
        return (parameter for _, parameter in self.named_parameters())

    def write_back(self) -> None:
        """Writes values into weights now. An optimizer's step, a forward, `adapter()` and `state_dict()` do it alone.

        To be called where none of these sees a change before the weights are used: values changed through `.data`; and,
        for values changed by anything but an optimizer's step, compiled models and modules that read a layer's weight
        instead of calling it, as nn.TransformerEncoderLayer does in evaluation.
        """
        self._check_attached()
        for target in self._targets:
            target.write_back(always_compare=True)

    def adapter(self) -> Adapter:
        """A copy of the trained entries on the CPU: kind "replace", in the weights' dtype, their exact bits."""
        self.write_back()
        tensors = {}
        for target in self._targets:
            tensors[target.name] = AdapterTensor(
                indices=target.indices.cpu().clone(),
                values=entries_of(target.weight, target.indices).cpu(),
                shape=tuple(target.weight.shape),
                dtype=target.weight.dtype,
                checksum=checksum_of(target.base),
            )
        return Adapter(tensors, self._config)

    @torch.no_grad()
    def detach(self, keep: bool = False) -> None:
        """Takes everything that `attach` added out of the model and restores its requires_grad flags.

        The entries get their old bits back, or with `keep` stay as trained. Modules of modules_to_save stay as trained
        in both cases.
        """
        model = self._attached_model
        for target in self._targets:  # before anything is taken out, so that it can be tried again if this fails
            if keep:
                target.write_back(always_compare=True)
            else:
                target.write_base()
        for target in self._targets:
            target.release()
            claim(target.weight, None)
        layers.restore_classes(model.modules())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        _reduce_again_in_ddp(model, self._not_reduced)
        self._model = None

    def _check_attached(self) -> None:
        if self._model is None:
            raise RuntimeError("the handle is detached")

    @property
    def _attached_model(self) -> nn.Module:
        self._check_attached()
        assert self._model is not None
        return self._model


def attach(
    model: nn.Module,
    what: ShiraConfig | Adapter,
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Handle:
    """Makes entries of a model's weights trainable and freezes everything else.

    Args:
        model: any module; the trained layers must be nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding or the
            Conv1D of transformers, with contiguous float64, float32, bfloat16 or float16 weights. Layers that share a
            weight are trained together, under its first name, whichever of them is chosen. In subclasses with a forward
            of their own the dense gradient of that one layer exists for a moment.
        what: a ShiraConfig, which chooses layers and entries; or an Adapter to go on training, which must belong to the
            model's weights as they are.
        calibration: batches for the masks grad and snip, and for users' functions that rank by a gradient: see
            `shira.masks.calibrate.calibrate`.
        loss: (what the model gave, the batch) -> the loss of a calibration batch; None for the output's `loss`.

    Returns:
        The handle. `handle.parameters()` are ordinary float32 parameters (float64 for float64 weights), one [nnz]
        vector for each weight, for any optimizer.

    Raises:
        ValueError: what does not fit the model. Nothing was changed.
        RuntimeError: something is attached already, a ResidentAdapters has an adapter in the weights, or inference mode
            is on.

    Warns:
        UserWarning: the adapter has no checksum, so that it cannot be told whether it belongs to these weights.

    Several processes can train together (DistributedDataParallel), several threads (nn.DataParallel) not.

    A weight that is also read without calling its layer, as in F.linear(x, embedding.weight), gets the gradient of the
    layer's own calls only: use `mask_gradients` for it. There is no double backward through attached layers.

    A reentrant activation checkpoint gives no gradients unless one of its inputs requires grad, here as in any model
    whose first layers are frozen; models of transformers see to it when they enable checkpointing.
    """
    return attach_with(model, what, _matched_weights, _mixin, False, calibration, loss)


Match = Callable[[nn.Module, ShiraConfig], list[nn.Parameter]]
MixinFor = Callable[[str, nn.Module, str], type[Attached]]


def attach_with(
    model: nn.Module,
    what: ShiraConfig | Adapter,
    match: Match,
    mixin: MixinFor,
    dense: bool,
    calibration: Iterable[Any] | None,
    loss: Loss | None,
) -> Handle:
    """What `attach` and `mask_gradients` share.

    match: the parameters that a config means. mixin: what a module that uses one becomes, by its name and the
    parameter's in it; raises ValueError if it cannot be trained. dense: the weights themselves get gradients.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, Attached) for module in model.modules()):
        raise RuntimeError("the model has entries attached already: detach them first")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attach must not be called in torch.inference_mode(): what it makes could not be trained")
    users = users_of(model)
    saved: tuple[str, ...] = ()
    if isinstance(what, ShiraConfig):
        weights = match(model, what)
        mixins = _mixins(model, weights, users, mixin)
        chosen = _choose(model, what, weights, calibration, loss)
        saved = _modules_to_save(model, what, weights)
    elif calibration is not None:
        raise ValueError("calibration goes with a ShiraConfig: an adapter has its entries")
    elif isinstance(what, Adapter):
        by_name = _weights_of(model, what)
        mixins = _mixins(model, list(by_name.values()), users, mixin)
        chosen = _continue(model, what, by_name)
    else:
        raise ValueError(f"attach takes a ShiraConfig or an Adapter, got {type(what).__name__}")
    for part in chosen:
        check_claim(part.name, part.weight, "attach")

    required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_saved(name, saved))
        if not parameter.requires_grad:
            parameter.grad = None  # an optimizer that has the parameter would still use it
    places = [layers.in_arenas([getattr(part, kind) for part in chosen]) for kind in ("values", "indices", "base")]
    targets = []
    for part, *slices in zip(chosen, *places, strict=True):
        owner, role = users[part.weight][0][1:]
        part.weight.requires_grad_(dense)
        target = Target(part.name, owner, role, tuple(slices), dense)
        claim(part.weight, "attach")
        for _, module, own_role in users[part.weight]:
            layers.make_attached(module, mixins[module], own_role, target)
        targets.append(target)
    handle = Handle(model, targets, required_grad, saved, what.config if isinstance(what, Adapter) else what)
    handle.write_back()
    return handle


def _mixins(
    model: nn.Module, weights: Sequence[nn.Parameter], users: Users, mixin: MixinFor
) -> dict[nn.Module, type[Attached]]:
    """What each module that uses one of the weights becomes."""
    names = first_names(model)
    mixins = {}
    for weight in weights:
        for own, module, role in users[weight]:
            try:
                mixins[module] = mixin(own, module, role)
            except ValueError as error:
                shared = "" if len(users[weight]) == 1 else f" ({names[weight]} is shared with it)"
                raise ValueError(f"{error}{shared}") from None
        _check_weight(names[weight], weight)
    return mixins


def _mixin(name: str, module: nn.Module, role: str) -> type[Attached]:
    mixin = layers.mixin_of(module)
    if mixin is None:
        raise ValueError(f"{name}: only {layers.SUPPORTED} can be trained, got {type(module).__name__}")
    if role != "weight":
        raise ValueError(f"{name}.{role}: only the weight of {type(module).__name__} can be trained, not its {role}")
    if reason := layers.refusal(module):
        raise ValueError(f"{name}: {reason}")
    return mixin


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if weight.is_meta or nn.parameter.is_lazy(weight):
        raise ValueError(f"{name}: the weight holds no data (meta device, or not initialized)")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name}: the weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if type(weight.data) is not torch.Tensor:
        raise ValueError(f"{name}: the weight must be a plain tensor, got {type(weight.data).__name__}")
    if not weight.is_contiguous():
        raise ValueError(f"{name}: the weight must be contiguous, got strides {weight.stride()}")


def _choose(
    model: nn.Module,
    config: ShiraConfig,
    weights: Sequence[nn.Parameter],
    calibration: Iterable[Any] | None,
    loss: Loss | None,
) -> list[Chosen]:
    """The entries of a config, in the model's order."""
    names = first_names(model)
    by_name = {names[weight]: weight for weight in weights}
    named = {name: by_name[name] for name in names.values() if name in by_name}
    if calibration is None:
        entries = choose_entries(config, named)
    else:
        entries = calibrate(model, config, named, calibration, loss)
    chosen = []
    for name, weight in named.items():
        base = entries_of(weight, entries[name])
        chosen.append(Chosen(name, weight, entries[name], base.to(_values_dtype(weight)), base))
    return chosen


def _weights_of(model: nn.Module, adapter: Adapter) -> dict[str, nn.Parameter]:
    """The model's weight for each name of an adapter."""
    names = first_names(model)
    weights: dict[str, nn.Parameter] = {}
    for adapter_name in adapter:
        weight = resolve(model, adapter_name)
        if any(weight is other for other in weights.values()):
            raise ValueError(f"{adapter_name}: the adapter names the tensor {names[weight]!r} twice")
        weights[adapter_name] = weight
    if not weights:
        raise ValueError("the adapter holds no tensors")
    return weights


def _continue(model: nn.Module, adapter: Adapter, weights: Mapping[str, nn.Parameter]) -> list[Chosen]:
    """The entries of an adapter, in the model's order."""
    names = first_names(model)
    chosen: dict[torch.Tensor, Chosen] = {}
    for adapter_name, weight in weights.items():
        tensor = adapter[adapter_name]
        check_fits(adapter_name, tensor, weight)
        indices = tensor.indices.to(weight.device)
        base = entries_of(weight, indices)
        check_base(adapter_name, tensor, base)
        values = tensor.values.to(weight.device, _values_dtype(weight), copy=True)
        if tensor.kind == "add":
            values += base
        chosen[weight] = Chosen(names[weight], weight, indices, values, base)
    return [chosen[weight] for weight in names if weight in chosen]


def _matched_weights(model: nn.Module, config: ShiraConfig) -> list[nn.Parameter]:
    """The weights of the modules that target_modules means."""
    found = matched_modules(model, config)
    check_all_match(found, config)
    weights = []
    for name, module in found.items():
        _mixin(name, module, "weight")
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{name}: the weight must be a plain parameter")
        weights.append(weight)
    if not weights:
        raise ValueError(f"target_modules: {config.target_modules!r} matches no module of the model")
    return weights  # type: ignore[return-value]


def matched_modules(model: nn.Module, config: ShiraConfig) -> dict[str, nn.Module]:
    """The modules that target_modules means, by name; aliases too."""
    # A layer inside a wrapper of PEFT comes after the wrapper, and takes its name.
    named = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    if config.target_modules == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return {
            name: module
            for name, module in named.items()
            if is_linear(module) and module is not output and not is_bypassed(module)
        }
    return {name: module for name, module in named.items() if name_matches(name, config)}


def check_all_match(names: Iterable[str], config: ShiraConfig, kind: str = "module") -> None:
    """Refuses a list of target_modules with an entry that none of the names matches."""
    names = list(names)
    for entry in () if isinstance(config.target_modules, str) else config.target_modules:
        if not any(names_match(name, [entry]) for name in names):
            raise ValueError(f"target_modules: {entry!r} matches no {kind} of the model")


def name_matches(name: str, config: ShiraConfig) -> bool:
    """Whether a name is one of those in target_modules, which is a list or a regular expression."""
    wanted = config.target_modules
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else names_match(name, wanted)


def _modules_to_save(model: nn.Module, config: ShiraConfig, weights: Sequence[nn.Parameter]) -> tuple[str, ...]:
    trained = set(weights)
    for entry in config.modules_to_save:
        found = [parameter for name, parameter in model.named_parameters() if _is_saved(name, [entry])]
        if not found:
            raise ValueError(f"modules_to_save: {entry!r} matches no module with parameters")
        if any(parameter in trained or not parameter.is_floating_point() for parameter in found):
            raise ValueError(f"modules_to_save: {entry!r} holds a weight that is a target or not floating point")
    return tuple(config.modules_to_save)


def _is_saved(parameter_name: str, entries: Sequence[str]) -> bool:
    """Whether a parameter lies in a module that one of the entries names."""
    parts = canonical(parameter_name).split(".")[:-1]
    return any(names_match(".".join(parts[: i + 1]), entries) for i in range(len(parts)))


def _values_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _ignore_in_ddp(model: nn.Module, targets: list[Target]) -> list[str]:
    """Keeps indices and base entries, which never change, out of what DistributedDataParallel sends in each forward.

    Returns the names that were added to the list that it looks for.
    """
    names = {module: name for name, module in model.named_modules()}
    added = []
    for target in targets:
        prefix = names[target.owner] + "." if names[target.owner] else ""
        added += [prefix + target.indices_name, prefix + target.base_name]
    model._ddp_params_and_buffers_to_ignore = [*_ignored(model), *added]  # type: ignore[assignment]
    return added


def _reduce_again_in_ddp(model: nn.Module, added: list[str]) -> None:
    left = [name for name in _ignored(model) if name not in added]
    if left:
        model._ddp_params_and_buffers_to_ignore = left  # type: ignore[assignment]
    else:
        del model._ddp_params_and_buffers_to_ignore


def _ignored(model: nn.Module) -> Any:
    return getattr(model, "_ddp_params_and_buffers_to_ignore", [])
