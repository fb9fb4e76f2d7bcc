"""Training: `attach` makes chosen entries of a model's weights trainable, where they are.

Each trained weight gets a parameter `shira_values` [nnz], the true values of its entries, and stays where it is,
frozen. There is no copy of the weight and no further matrix product in the forward; the backward computes the gradient
of the entries alone where the layer allows that (see `shira.training.layers`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.adapter.base import check_base, check_fits, entries_of
from shira.adapter.checksum import checksum_of
from shira.adapter.header import check_name
from shira.adapter.placed import placed_in_model
from shira.adapter.tensor import AdapterTensor
from shira.masks.calibrate import Loss, calibrate
from shira.masks.choose import choose_entries
from shira.masks.config import ShiraConfig
from shira.model.claims import check_claim
from shira.model.modules import Users, sharded, users_of
from shira.model.names import canonical_in, first_names
from shira.training.buffers import TrainedBuffer, moved_by, trained_buffers, warn_of_scripted
from shira.training.disabled import at_base
from shira.training.distributed import check_bare, ignore_in_ddp, reduce_again_in_ddp
from shira.training.layers import Attached, check_forwards, make_attached, mixin_of, restore_classes
from shira.training.matching import is_saved, matched_weights, modules_to_save, weights_of
from shira.training.trained import TrainedWeight
from shira.training.vectors import in_arenas
from shira.training.watch import Watch
from shira_kernels.dtypes import ARITHMETIC, compute_dtype

Match = Callable[[nn.Module, ShiraConfig], list[nn.Parameter]]
Becomes = Callable[[str, nn.Module, str], type[Attached]]


class Handle:
    """The trained entries of a model: the parameters, the adapter that they make, and the way back.

    `attach` and `mask_gradients` make it. After `detach` all calls raise RuntimeError.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[TrainedWeight],
        buffers: list[TrainedBuffer],
        required_grad: dict[str, bool],
        saved: tuple[str, ...],
        config: ShiraConfig | None,
    ) -> None:
        self._model: nn.Module | None = model
        self._weights = weights
        self._buffers = buffers
        self._required_grad = required_grad
        self._saved = saved
        self._config = config
        self._is_disabled = False
        self._watch = Watch(model, weights)
        self._not_reduced = ignore_in_ddp(model, weights, buffers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Gives what is trained by its name in the model: an [nnz] vector for each weight, and modules_to_save."""
        model = self._attached_model
        values, bare = {trained.values for trained in self._weights}, canonical_in(model)
        for name, parameter in model.named_parameters():
            if parameter in values or is_saved(bare(name), self._saved):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Gives the parameters of `named_parameters`, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def write_back(self) -> None:
        """Writes values into weights now. An optimizer's step, a forward, `adapter()` and `state_dict()` do it alone.

        It must be called where none of these sees a change before the weights are used: after values were changed
        through their address (numpy, dlpack, a kernel of one's own); and, if anything but an optimizer's step changed
        them, in compiled models and, after `mask_gradients`, for modules that read a layer's weight instead of calling
        it.
        """
        self._check_enabled()
        for trained in self._weights:
            trained.write_back(always_compare=True)

    def adapter(self) -> Adapter:
        """Copies the trained entries to the CPU, as an adapter of kind "replace": exact bits, in the weights' dtype.

        Beside the weights it has the floating-point buffers of the state dict that training moved, as the running
        statistics of BatchNorm, but for those of modules_to_save. Where processes train together these are each
        process's own.

        Raises RuntimeError if a trained layer or weight was replaced.

        Warns:
            ShiraWarning: training moved a single integer other than num_batches_tracked, gave a buffer another shape or
                dtype, or moved one whose name no file can hold: the adapter leaves that buffer out.
        """
        self._check_enabled()
        self._watch.check()
        self.write_back()
        tensors = {}
        for trained in self._weights:
            tensors[trained.name] = AdapterTensor(
                indices=trained.indices.cpu().clone(),
                values=entries_of(trained.weight, trained.indices).cpu(),
                shape=tuple(trained.weight.shape),
                dtype=trained.weight.dtype,
                checksum=checksum_of(trained.base),
            )
        tensors |= {buffer.name: changes for buffer in self._buffers if (changes := buffer.changes()) is not None}
        return Adapter(tensors, self._config)

    @torch.no_grad()
    def detach(self, keep: bool = False) -> None:
        """Takes everything that `attach` added out of the model and restores its requires_grad flags.

        The entries and the buffers that training moved get their old bits back, or with `keep` stay as trained. Modules
        of modules_to_save stay as trained in both cases. Raises RuntimeError, and changes nothing, if a trained weight
        or the forward of its layer was replaced since `attach`.
        """
        self._check_enabled()
        model = self._attached_model
        check_forwards(model)
        for trained in self._weights:
            _ = trained.weight  # raises if it was replaced
        for trained in self._weights:  # before anything is taken out, so that it can be tried again if this fails
            if keep:
                trained.write_back(always_compare=True)
            else:
                trained.write_base()
        for buffer in () if keep else self._buffers:
            buffer.write_base()
        for buffer in self._buffers:
            buffer.release()
        for trained in self._weights:
            trained.release()
        restore_classes(model.modules())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        reduce_again_in_ddp(model, self._not_reduced)
        self._model = None

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Gives the model its base's entries and buffers, bit for bit, inside `with handle.disabled():`.

        It is for the reference of preference losses, and to compare. No model is copied, and a loss that was computed
        before the block can be backpropagated after it. Inside there are no gradients, as in torch.no_grad(), and what
        forwards move of the buffers is dropped. Modules of modules_to_save stay as trained, and keep what forwards in
        training mode move of their buffers. Other threads see the base, too. Blocks may be nested.

        Raises RuntimeError, inside, for forwards with gradients, optimizers' steps, `adapter()`, `write_back()`,
        `detach()`, `state_dict()`, `load_state_dict()` and copies of the model.
        """
        self._check_attached()
        if self._is_disabled:
            yield
            return
        self._is_disabled = True
        try:
            with at_base(self._weights, self._buffers):
                yield
        finally:
            self._is_disabled = False

    def _check_attached(self) -> None:
        if self._model is None:
            raise RuntimeError("the handle is detached")

    def _check_enabled(self) -> None:
        self._check_attached()
        if self._is_disabled:
            raise RuntimeError("inside handle.disabled() the model has its base's entries: leave the block first")

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
        ShiraWarning: the adapter has no checksum, so that it cannot be told whether it belongs to these weights; or a
            scripted module has floating-point buffers; or "all-linear" leaves out more than 1 % of the model beside
            embeddings, convolutions and the head.

    Floating-point buffers of the state dict, such as BatchNorm's running statistics, are copied, for training may move
    them: `Handle.adapter` has what it moved, and `Handle.detach` gives the old ones back.

    Several processes can train together (DistributedDataParallel, made after attach), several threads (nn.DataParallel)
    not. Whatever replaces weights or layers (tie_weights, resize_token_embeddings, parametrizations, fully_shard) comes
    before attach: the next forward raises RuntimeError otherwise.

    Where a module's forward reads a layer's `weight` instead of calling the layer, or beside that, the values get the
    gradient of that, too; the dense one exists for a moment. Outside of forwards `layer.weight` is the frozen
    parameter: what is computed from it there gives no gradient. Nothing trains a weight that is read in another way,
    from `parameters()` say: the first step of an optimizer warns of weights that had no part in a forward. There is no
    double backward through attached layers, and no transform of torch.func.

    A reentrant activation checkpoint gives no gradients unless one of its inputs requires grad, here as in any model
    whose first layers are frozen; models of transformers see to it when they enable checkpointing.
    """
    return attach_with(
        model,
        what,
        match=matched_weights,
        becomes=mixin_of,
        dense=False,
        calibration=calibration,
        loss=loss,
    )


@dataclass
class _Choice:
    """One weight to train, and what it gets."""

    name: str
    weight: torch.Tensor
    indices: torch.Tensor  # [nnz], flat positions
    values: torch.Tensor  # [nnz], the true values to start from
    base: torch.Tensor  # [nnz], the weight's own entries


def attach_with(
    model: nn.Module,
    what: ShiraConfig | Adapter,
    *,
    match: Match,
    becomes: Becomes,
    dense: bool,
    calibration: Iterable[Any] | None,
    loss: Loss | None,
) -> Handle:
    """Does what `attach` and `mask_gradients` share.

    match: gives the parameters that a config means. becomes: gives the class that a module which uses one is mixed
    with, by the module's name, the module, and the parameter's name in it; raises ValueError if it cannot be trained.
    dense: whether the weights themselves get gradients.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    check_bare(model)
    if any(isinstance(module, Attached) for module in model.modules()):
        raise RuntimeError("the model has entries attached already: detach them first")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attach must not be called in torch.inference_mode(): what it makes could not be trained")
    users = users_of(model)
    saved: tuple[str, ...] = ()
    moved: Mapping[TrainedBuffer, AdapterTensor] = {}
    if isinstance(what, ShiraConfig):
        weights = match(model, what)
        mixins = _mixins(model, weights, users, becomes)
        chosen = _choose(model, what, weights, calibration, loss)
        saved = modules_to_save(model, what, weights)
    elif calibration is not None:
        raise ValueError("calibration goes with a ShiraConfig: an adapter has its entries")
    elif isinstance(what, Adapter):
        what = placed_in_model(what, model)
        moved = moved_by(what, trained_buffers(model, saved))
        by_name = weights_of(model, [name for name, tensor in what.items() if tensor not in moved.values()])
        mixins = _mixins(model, list(by_name.values()), users, becomes)
        chosen = _continue(model, what, by_name)
    else:
        raise ValueError(f"attach takes a ShiraConfig or an Adapter, got {type(what).__name__}")
    for choice in chosen:
        check_claim(choice.name, choice.weight, "attach")
    buffers = trained_buffers(model, saved)
    for buffer in buffers:
        if buffer.now is not None:
            check_claim(buffer.name, buffer.now, "attach")
    warn_of_scripted(model)

    # Nothing was changed so far.
    required_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    bare = canonical_in(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_saved(bare(name), saved))
        if not parameter.requires_grad:
            parameter.grad = None  # an optimizer that has the parameter would still use it
    for buffer in buffers:
        buffer.keep()
    for buffer, tensor in moved.items():
        buffer.write(tensor)
    trained = _train(chosen, users, mixins, dense)
    handle = Handle(model, trained, buffers, required_grad, saved, what.config if isinstance(what, Adapter) else what)
    handle.write_back()
    return handle


def _train(
    chosen: Sequence[_Choice], users: Users, mixins: Mapping[nn.Module, type[Attached]], dense: bool
) -> list[TrainedWeight]:
    """Makes the modules of the chosen weights ones that train them."""
    places = [in_arenas([getattr(choice, kind) for choice in chosen]) for kind in ("values", "indices", "base")]
    weights = []
    for choice, *slices in zip(chosen, *places, strict=True):
        owner, role = users[choice.weight][0][1:]
        choice.weight.requires_grad_(dense)
        trained = TrainedWeight(choice.name, owner, role, tuple(slices), dense)
        for _, module, own_role in users[choice.weight]:
            make_attached(module, mixins[module], own_role, trained)
        weights.append(trained)
    return weights


def _mixins(
    model: nn.Module, weights: Sequence[nn.Parameter], users: Users, becomes: Becomes
) -> dict[nn.Module, type[Attached]]:
    """Returns what each module that uses one of the weights becomes. Raises ValueError if one cannot be trained."""
    names = first_names(model)
    mixins = {}
    for weight in weights:
        for own, module, role in users[weight]:
            try:
                mixins[module] = becomes(own, module, role)
            except ValueError as error:
                shared = "" if len(users[weight]) == 1 else f" ({names[weight]} is shared with it)"
                raise ValueError(f"{error}{shared}") from None
        _check_weight(names[weight], weight)
    return mixins


def _check_weight(name: str, weight: nn.Parameter) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"{error}: no adapter file could hold it; rename the module") from None
    if weight.is_meta or nn.parameter.is_lazy(weight):
        raise ValueError(f"{name}: the weight holds no data (meta device, or not initialized)")
    if weight.dtype not in ARITHMETIC:
        raise ValueError(f"{name}: the weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if reason := sharded(weight):
        raise ValueError(f"{name}: {reason}: attach takes the whole model, as it is before fully_shard")
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
) -> list[_Choice]:
    """Chooses the entries that a config means, in the model's order."""
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
        chosen.append(_Choice(name, weight, entries[name], base.to(compute_dtype(weight.dtype)), base))
    return chosen


def _continue(model: nn.Module, adapter: Adapter, weights: Mapping[str, nn.Parameter]) -> list[_Choice]:
    """Takes the entries of an adapter, in the model's order. Raises ValueError if it does not fit the model."""
    names = first_names(model)
    chosen: dict[torch.Tensor, _Choice] = {}
    for adapter_name, weight in weights.items():
        tensor = adapter[adapter_name]
        check_fits(adapter_name, tensor, weight)
        indices = tensor.indices.to(weight.device)
        base = entries_of(weight, indices)
        check_base(adapter_name, tensor, base)
        values = tensor.values.to(weight.device, compute_dtype(weight.dtype), copy=True)
        if tensor.kind == "add":
            values += base
        chosen[weight] = _Choice(names[weight], weight, indices, values, base)
    return [chosen[weight] for weight in names if weight in chosen]
