"""Training: `attach` makes chosen entries of a model's weights trainable, where they are.

Each trained layer gets a parameter `shira_values` [nnz], the true values of its entries, and keeps its frozen weight.
Before a forward the weight's entries are overwritten with the values if those changed; the forward is then the layer's
own, and an identity behind it gives `shira_values` its gradient. So there is no copy of the weight and no further
matrix product in the forward; the backward forms the dense gradient of one layer at a time, and keeps its entries.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from shira.adapter import DTYPES, Adapter, AdapterTensor, checksum_of
from shira.config import ALL_LINEAR, ShiraConfig, names_match
from shira.names import canonical, first_names, resolve
from shira.select import choose_entries
from shira_kernels import scatter_apply


@dataclass
class _Written:
    """What the live weight holds; one object for all layers that share the weight."""

    marker: tuple[int, int] | None = None  # address and version of the values that were written last
    gradient_came: bool = False  # since then


class _Tap(torch.autograd.Function):
    """Gives back `output` as it is; its gradient passes, and the listed entries of the weight's are the values'."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        input: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        written: _Written,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, indices)
        ctx.values_dtype = values.dtype
        ctx.written = written
        # A view could not be changed in place by what follows, as in Sequential(Linear, ReLU(inplace=True)).
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_values = None
        if ctx.needs_input_grad[2]:
            input, indices = ctx.saved_tensors
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            dense = rows.t() @ input.reshape(-1, input.shape[-1]).to(rows.dtype)
            grad_values = dense.view(-1).index_select(0, indices).to(ctx.values_dtype)
            ctx.written.gradient_came = True
        return grad_output, None, grad_values, None, None


class _AttachedLinear(nn.Linear):
    """What a layer's class becomes (mixed with that class) while entries of its weight are trained."""

    shira_original: type[nn.Linear]
    shira_values: nn.Parameter
    shira_indices: torch.Tensor
    shira_base: torch.Tensor
    shira_written: _Written

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.shira_write_back()
        output = super().forward(input)
        if torch.is_grad_enabled() and self.shira_values.requires_grad:
            output = _Tap.apply(output, input, self.shira_values, self.shira_indices, self.shira_written)
        return output

    @torch.no_grad()
    def shira_write_back(self, always_compare: bool = False) -> None:
        """Writes the values into the weight if they changed since the last time."""
        values, written = self.shira_values, self.shira_written
        marker = (values.data_ptr(), values._version)
        # Some optimizers write through `.data` or raw pointers and leave the version as it is. They cannot have stepped
        # without a gradient, so values are compared from the first gradient until a version shows that it was used.
        if marker != written.marker or ((written.gradient_came or always_compare) and self._differs()):
            scatter_apply(self.weight, self.shira_indices, values.to(self.weight.dtype))
            written.marker, written.gradient_came = marker, False

    def _differs(self) -> bool:
        return not torch.equal(self.weight.view(-1)[self.shira_indices], self.shira_values.to(self.weight.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to(dtype)` casts the weight; the trained values keep their precision.
        before = self.shira_values.data
        super()._apply(fn, recurse)
        if self.shira_values.dtype != before.dtype:
            self.shira_values.data = before.to(self.shira_values.device)
        self.shira_written.marker = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.shira_write_back(always_compare=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        indices = state_dict.get(prefix + "shira_indices")
        if indices is not None and not torch.equal(indices.to(self.shira_indices), self.shira_indices):
            errors.append(f"{prefix}shira_indices: the state dict was saved with other entries; attach with its config")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.shira_written.marker = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shira_entries={self.shira_indices.numel()}"


@functools.cache
def _attached_class(original: type[nn.Linear]) -> type[_AttachedLinear]:
    return type(f"Shira{original.__name__}", (_AttachedLinear, original), {"shira_original": original})


@dataclass
class _Target:
    """One weight to train: its name, the layers that share it, and what they get."""

    name: str
    layers: list[nn.Linear]
    indices: torch.Tensor
    values: torch.Tensor  # the true values to start from
    base: torch.Tensor  # the weight's own entries


class Handle:
    """What `attach` gives back: the trained parameters, the adapter they make, and the way back."""

    def __init__(
        self,
        model: nn.Module,
        targets: list[_Target],
        required_grad: dict[str, bool],
        saved: tuple[str, ...],
        config: ShiraConfig | None,
    ) -> None:
        self._model: nn.Module | None = model
        self._layers = {target.name: [_as_attached(layer) for layer in target.layers] for target in targets}
        self._required_grad = required_grad
        self._saved = saved
        self._config = config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by its name in the model: one [nnz] vector for each weight, and those of modules_to_save."""
        model = self._attached_model
        values = {layers[0].shira_values for layers in self._layers.values()}
        for name, parameter in model.named_parameters():
            if parameter in values or _is_saved(name, self._saved):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer gets."""
        return (parameter for _, parameter in self.named_parameters())

    def write_back(self) -> None:
        """Writes values into weights now. A layer's forward, `adapter()` and `state_dict()` do it by themselves.

        To be called where neither happens between a change and a use of the weights: values changed through `.data`
        without a gradient, or modules that read a layer's weight instead of calling it, as nn.TransformerEncoderLayer
        does in evaluation.
        """
        self._check_attached()
        for layers in self._layers.values():
            layers[0].shira_write_back(always_compare=True)

    def adapter(self) -> Adapter:
        """A copy of the trained entries on the CPU: kind "replace", in the weights' dtype, their exact bits."""
        self.write_back()
        tensors = {}
        for name, (layer, *_) in self._layers.items():
            tensors[name] = AdapterTensor(
                indices=layer.shira_indices.cpu().clone(),
                values=layer.weight.detach().view(-1)[layer.shira_indices].cpu(),
                shape=tuple(layer.weight.shape),
                dtype=layer.weight.dtype,
                checksum=checksum_of(layer.shira_base),
            )
        return Adapter(tensors, self._config)

    @torch.no_grad()
    def detach(self, keep: bool = False) -> None:
        """Takes everything that `attach` added out of the model and restores its requires_grad flags.

        The entries get their old bits back, or with `keep` stay as trained. Modules of modules_to_save stay as trained
        in both cases.
        """
        self._check_attached()
        for layers in self._layers.values():
            if keep:
                layers[0].shira_write_back(always_compare=True)
            else:
                scatter_apply(layers[0].weight, layers[0].shira_indices, layers[0].shira_base)
            claim(layers[0].weight, None)
            for layer in layers:
                for name in ("shira_values", "shira_indices", "shira_base", "shira_written"):
                    delattr(layer, name)
                layer.__class__ = layer.shira_original  # type: ignore[assignment]
        for name, parameter in self._attached_model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        self._model = None

    def _check_attached(self) -> None:
        if self._model is None:
            raise RuntimeError("the handle is detached")

    @property
    def _attached_model(self) -> nn.Module:
        self._check_attached()
        assert self._model is not None
        return self._model


def attach(model: nn.Module, what: ShiraConfig | Adapter) -> Handle:
    """Makes entries of a model's weights trainable and freezes everything else.

    Args:
        model: any module; the trained layers must be nn.Linear or subclasses whose forward takes one tensor, with
            contiguous float64, float32, bfloat16 or float16 weights. Layers that share a weight are trained together,
            under its first name, and all of them must be chosen.
        what: a ShiraConfig, which chooses layers and entries; or an Adapter to go on training, which must belong to the
            model's weights as they are.

    Returns:
        The handle. `handle.parameters()` are ordinary float32 parameters (float64 for float64 weights), one [nnz]
        vector for each weight, for any optimizer.

    Raises:
        ValueError: what does not fit the model. Nothing was changed.
        RuntimeError: something is attached already, a ResidentAdapters has an adapter in the weights, or inference mode
            is on.

    Warns:
        UserWarning: the adapter has no checksum, so that it cannot be told whether it belongs to these weights.
    """
    if any(isinstance(module, _AttachedLinear) for module in model.modules()):
        raise RuntimeError("the model has entries attached already: detach them first")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attach must not be called in torch.inference_mode(): what it makes could not be trained")
    saved: tuple[str, ...] = ()
    if isinstance(what, ShiraConfig):
        targets = _choose(model, what)
        saved = _modules_to_save(model, what, targets)
    elif isinstance(what, Adapter):
        targets = _continue(model, what)
    else:
        raise ValueError(f"attach takes a ShiraConfig or an Adapter, got {type(what).__name__}")

    for target in targets:
        check_claim(target.name, target.layers[0].weight, "attach")

    required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_saved(name, saved))
    for target in targets:
        values, written = nn.Parameter(target.values), _Written()
        claim(target.layers[0].weight, "attach")
        for layer in target.layers:
            layer.__class__ = _attached_class(type(layer))  # type: ignore[assignment, arg-type]
            attached = _as_attached(layer)
            attached.register_parameter("shira_values", values)
            attached.register_buffer("shira_indices", target.indices)
            attached.register_buffer("shira_base", target.base, persistent=False)
            attached.shira_written = written
    handle = Handle(model, targets, required_grad, saved, what.config if isinstance(what, Adapter) else what)
    handle.write_back()
    return handle


def check_claim(name: str, weight: torch.Tensor, owner: str) -> None:
    """Raises RuntimeError if another than `owner` ("attach" or "ResidentAdapters") changes the weight now: with both at
    once neither could give the base back."""
    held = getattr(weight, "_shira_owner", owner)
    if held != owner:
        raise RuntimeError(f"{name}: {held} is changing this weight; detach, or switch(None), first")


def claim(weight: torch.Tensor, owner: str | None) -> None:
    """Notes who changes a weight; None for nobody any more."""
    if owner is not None:
        weight._shira_owner = owner  # type: ignore[attr-defined]
    elif hasattr(weight, "_shira_owner"):
        del weight._shira_owner


def _as_attached(layer: nn.Linear) -> _AttachedLinear:
    assert isinstance(layer, _AttachedLinear)
    return layer


def _choose(model: nn.Module, config: ShiraConfig) -> list[_Target]:
    """The targets of a config, in the model's order."""
    names = first_names(model)
    by_weight: dict[torch.Tensor, list[nn.Linear]] = {}
    for name, module in _matches(model, config).items():
        layer = _checked_layer(name, module)
        layers = by_weight.setdefault(layer.weight, [])
        if layer not in layers:
            layers.append(layer)
    targets = []
    for weight, layers in by_weight.items():
        _check_users(model, names[weight], weight, layers)
    chosen = choose_entries(config, {names[weight]: weight for weight in by_weight})
    for weight, layers in by_weight.items():
        name = names[weight]
        indices = chosen[name]
        base = _entries(weight, indices)
        targets.append(_Target(name, layers, indices, base.to(_values_dtype(weight), copy=True), base))
    return targets


def _continue(model: nn.Module, adapter: Adapter) -> list[_Target]:
    """The targets of an adapter."""
    names = first_names(model)
    targets: dict[str, _Target] = {}
    for adapter_name, tensor in adapter.items():
        weight = resolve(model, adapter_name)
        name = names[weight]
        if name in targets:
            raise ValueError(f"{adapter_name}: the adapter names the tensor {name!r} twice")
        layers = []
        for own, module in model.named_modules():
            roles = [role for role, parameter in module._parameters.items() if parameter is weight]
            if roles and roles != ["weight"]:
                raise ValueError(f"{adapter_name}: only the weight of an nn.Linear can be trained, not its {roles[0]}")
            if roles:
                layers.append(_checked_layer(own, module))
        check_fits(adapter_name, tensor, weight)
        indices = tensor.indices.to(weight.device, copy=True)
        base = _entries(weight, indices)
        check_base(adapter_name, tensor, base)
        values = tensor.values.to(weight.device, _values_dtype(weight), copy=True)
        if tensor.kind == "add":
            values += base
        targets[name] = _Target(name, layers, indices, values, base)
    if not targets:
        raise ValueError("the adapter holds no tensors")
    return list(targets.values())


def check_fits(name: str, tensor: AdapterTensor, weight: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor of another shape or dtype than the model's, and a weight that cannot
    be written in place."""
    if tuple(weight.shape) != tensor.shape:
        raise ValueError(f"{name}: the adapter's shape is {tensor.shape}, the model's {tuple(weight.shape)}")
    if weight.dtype != tensor.dtype:
        raise ValueError(f"{name}: the adapter's dtype is {tensor.dtype}, the model's {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{name}: the model's tensor is on the meta device and holds no data")
    if not weight.is_contiguous():
        raise ValueError(f"{name}: the model's tensor must be contiguous, got strides {weight.stride()}")


def check_base(name: str, tensor: AdapterTensor, base: torch.Tensor) -> None:
    """Refuses with ValueError an adapter's tensor that was made for other base entries; warns if that is not known."""
    if tensor.checksum is None:
        warnings.warn(f"{name}: no checksum, so the adapter may belong to another base", stacklevel=3)
    elif tensor.checksum != checksum_of(base):
        raise ValueError(f"{name}: the adapter belongs to another base: the entries it changes have another checksum")


def _matches(model: nn.Module, config: ShiraConfig) -> Mapping[str, nn.Module]:
    """The modules that target_modules means, by name; aliases too."""
    wanted = config.target_modules
    found: Mapping[str, nn.Module]
    # A layer inside a wrapper of PEFT comes after the wrapper, and takes its name.
    named = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    if wanted == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = {
            name: module
            for name, module in named.items()
            if isinstance(module, nn.Linear) and module is not output and not _is_bypassed(module)
        }
    elif isinstance(wanted, str):
        pattern = re.compile(wanted)
        found = {name: module for name, module in named.items() if pattern.fullmatch(name)}
    else:
        found = {name: module for name, module in named.items() if names_match(name, wanted)}
    if not found:
        raise ValueError(f"target_modules: {wanted!r} matches no module of the model")
    return found


def _is_bypassed(module: nn.Module) -> bool:
    """nn.MultiheadAttention reads the weight of its out_proj, and never calls it."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _checked_layer(name: str, module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name}: only nn.Linear can be trained, got {type(module).__name__}")
    if _is_bypassed(module):
        raise ValueError(f"{name}: nn.MultiheadAttention never calls this layer, so it cannot be trained")
    if len(inspect.signature(type(module).forward).parameters) != 2:
        raise ValueError(f"{name}: the forward of {type(module).__name__} must take one tensor, as that of nn.Linear")
    if "forward" in vars(module):
        raise ValueError(f"{name}: its forward was replaced (by hooks of another library?), so it cannot be trained")
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(f"{name}: the weight must be a plain parameter")
    if weight.is_meta or nn.parameter.is_lazy(weight):
        raise ValueError(f"{name}: the weight holds no data (meta device, or not initialized)")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name}: the weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if not weight.is_contiguous():
        raise ValueError(f"{name}: the weight must be contiguous, got strides {weight.stride()}")
    return module


def _check_users(model: nn.Module, name: str, weight: torch.Tensor, layers: list[nn.Linear]) -> None:
    """Refuses a weight that also belongs to a module outside `layers`: its part of the gradient would be lost."""
    for other, module in model.named_modules():
        if module not in layers and any(parameter is weight for parameter in module._parameters.values()):
            raise ValueError(f"{name}: the weight also belongs to {other!r}, which target_modules must match too")


def _modules_to_save(model: nn.Module, config: ShiraConfig, targets: list[_Target]) -> tuple[str, ...]:
    trained = {layer.weight for target in targets for layer in target.layers}
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


def _entries(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return weight.detach().view(-1)[indices]
