"""Masks that rank by gradients: a few batches through the model, one dense gradient at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shira.masks.choose import Selection
from shira.masks.config import ShiraConfig
from shira.masks.ranking import needs_gradient
from shira_kernels.dtypes import ARITHMETIC, compute_dtype

Loss = Callable[[Any, Any], torch.Tensor]


def calibrate(
    model: nn.Module,
    config: ShiraConfig,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    max_bytes: int = 1 << 30,
) -> dict[str, torch.Tensor]:
    """Chooses the entries that a config means, ranked by the gradient of a loss.

    The dense gradients are never there all at once. With one batch each is ranked when it is ready, and freed. With
    several the weights are taken in groups, and all batches run once for each group, whose sums are held in float32
    (float64 for float64 weights).

    The model runs in evaluation mode, so that the result does not depend on dropout, with only the weights requiring
    grad. Afterwards it is as before, also if something raises: requires_grad flags, gradients, modes, buffers, and the
    state of torch's random number generators. Autocast is the caller's.

    Args:
        model: the model that the weights belong to.
        config: its mask is grad, snip, or a user's function, which gets the gradient as `grad`. `calibration` says how
            several batches' gradients become one.
        weights: name -> parameter of the model; one that several layers share, once.
        batches: what the model takes: a mapping is called as model(**batch), a tuple or list as model(*batch), anything
            else as model(batch). They are held in a list.
        loss: (what the model gave, the batch) -> a scalar; None for its attribute or entry `loss`.
        max_bytes: how many bytes a group's gradients may have; a group has at least one weight.

    Returns:
        name -> sorted flat indices, as of `choose_entries`.

    Raises:
        ValueError: no batches, a loss that is not a scalar or does not depend on the model, a weight that no gradient
            reaches (named), and what `choose_entries` raises.
        RuntimeError: in inference mode, where there are no gradients; from torch, if the model has reentrant activation
            checkpoints, which cannot compute the gradients of some parameters only.
    """
    if isinstance(config.mask, str) and not needs_gradient(config.mask) and ":" not in config.mask:
        raise ValueError(f"calibration: mask {config.mask!r} does not rank by gradients and takes no batches")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("calibration: there are no gradients in torch.inference_mode()")
    if type(max_bytes) is not int or max_bytes < 1:
        raise ValueError(f"max_bytes must be a whole number of at least 1, got {max_bytes!r}")
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(f"calibration: must be an iterable of batches, got {type(batches).__name__}")
    selection = Selection(config, weights)
    with _restored(model), torch.enable_grad():
        batches = list(batches)
        if not batches:
            raise ValueError("calibration: there must be at least one batch")
        model.eval()
        if len(batches) == 1:
            _check_reached(weights, _backward(model, weights, batches[0], loss, selection.add))
            return selection.result()
        for group in _groups(weights, max_bytes):
            for name, gradient in _sums(model, group, batches, loss, config.calibration).items():
                selection.add(name, gradient)
        return selection.result()


def _sums(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: list[Any], loss: Loss | None, calibration: str
) -> dict[str, torch.Tensor]:
    """Returns name -> the sum over all batches of the gradient, or of its absolute value."""
    sums: dict[str, torch.Tensor] = {}

    def collect(name: str, gradient: torch.Tensor) -> None:
        if calibration == "abs":
            gradient = gradient.abs()
        if name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient.to(compute_dtype(gradient.dtype), copy=True)

    for batch in batches:
        _backward(model, weights, batch, loss, collect)
    _check_reached(weights, sums)
    return sums


def _backward(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batch: Any,
    loss: Loss | None,
    receive: Callable[[str, torch.Tensor], None],
) -> set[str]:
    """Runs one batch forward and backward; `receive` gets each weight's gradient when it is ready, and it is freed.

    Returns the names of the weights that had one. A weight that several layers share gets the sum of theirs, once.
    """
    reached = set()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)

            def ready(parameter: torch.Tensor, name: str = name) -> None:
                reached.add(name)
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                with torch.no_grad():
                    receive(name, gradient.to_dense() if gradient.layout != torch.strided else gradient)

            handles.append(weight.register_post_accumulate_grad_hook(ready))
        value = _loss_of(_call(model, batch), batch, loss)
        # Other leaves, as inputs that require grad, get none.
        value.backward(inputs=list(weights.values()))
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss_of(output: Any, batch: Any, loss: Loss | None) -> torch.Tensor:
    value: Any
    if loss is not None:
        value = loss(output, batch)
    else:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise ValueError(
                f"calibration: what the model gave ({type(output).__name__}) has no loss: put labels into the batches, "
                "or give a loss function"
            )
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"calibration: the loss must be a tensor of one element, got {what}")
    if not value.requires_grad:
        raise ValueError("calibration: the loss does not depend on the weights: no gradient can be computed")
    return value


def _check_reached(weights: Iterable[str], reached: Container[str]) -> None:
    for name in weights:
        if name not in reached:
            raise ValueError(f"{name}: no gradient reached this weight: the calibration loss does not depend on it")


def _groups(weights: Mapping[str, nn.Parameter], max_bytes: int) -> Iterator[dict[str, nn.Parameter]]:
    """Cuts the weights into groups, in order, whose sums fit into `max_bytes`."""
    group: dict[str, nn.Parameter] = {}
    held = 0
    for name, weight in weights.items():
        size = weight.numel() * compute_dtype(weight.dtype).itemsize
        if group and held + size > max_bytes:
            yield group
            group, held = {}, 0
        group[name] = weight
        held += size
    if group:
        yield group


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts everything back that running a model may change."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    devices = {parameter.device for parameter, _, _ in parameters if parameter.is_cuda}
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with torch.random.fork_rng(sorted(device.index for device in devices)):
            yield
    finally:
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, training, own in modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, version, content in buffers:
                # BatchNorm moves its statistics without a new version.
                if buffer._version != version or (buffer.dtype in ARITHMETIC and not torch.equal(buffer, content)):
                    buffer.copy_(content)
