"""`TrainedWeight`: one weight of a model, some of whose entries are trained as a vector of values.

The weight's first module holds the values [nnz] (a parameter), the indices and the base's entries (buffers). The values
are written into the weight after each step of an optimizer, and before a forward if they changed.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from shira.files.errors import warn
from shira.model.claims import claim
from shira.model.names import some_of
from shira.training.taps import csr_of
from shira.training.vectors import Slice, Values, place, precise
from shira_kernels import scatter_apply
from shira_kernels.bits import as_bits


class TrainedWeight:
    """One trained weight, as its modules and optimizers see it: `values.shira_target` of the parameter `values`.

    An optimizer that updates the values and the weight in one go reads `weight`, `indices` and `base` at each step
    (they may have moved), and calls `wrote(values)` afterwards. After every other optimizer's step the values are
    written by a hook on all optimizers, or before the next forward.

    Attributes:
        name: the weight's name in the bare model.
        owner: the first module with that weight, which holds values, indices and base.
        role: the weight's name in the owner.
        attached: the weight as `attach` found it, whatever the owner has now.
        is_met: whether it was used in a graph, or an optimizer stepped.
        dense: whether the weight itself gets a gradient, from which that of the values is gathered.
        csr: (row_ptr, col) of the entries for `masked_grad`, if a module needs them.
        foreign: whether the values lie in memory that was given to them through `.data`, which others may write unseen.
        is_disabled: whether the weight has its base's entries for now (`shira.training.disabled`).
    """

    def __init__(self, name: str, owner: nn.Module, role: str, slices: tuple[Slice, Slice, Slice], dense: bool) -> None:
        suffix = "" if role == "weight" else f"_{role}"
        self.name, self.owner, self.role, self.dense = name, owner, role, dense
        self.values_name, self.indices_name, self.base_name = (
            f"shira_{vector}{suffix}" for vector in ("values", "indices", "base")
        )
        self._find_weight()
        self._shape = self.attached.shape
        self.csr: tuple[torch.Tensor, torch.Tensor] | None = None
        self.foreign = False
        self._wants_csr = False
        self._listed: tuple[int, int] | None = None  # address and version of the indices that `csr` was made of
        self._slices = slices
        # The values that the weight holds: the parameter, its plain tensor, and the version.
        self._marker: tuple[nn.Parameter | None, torch.Tensor, int] | None = None
        self._was_told = False  # by `wrote`, since the last step
        self._used = False  # in a graph that can give a gradient, since the values were written
        self._steps_are_seen = False  # an optimizer that calls step hooks has them
        self._gather: RemovableHandle | None = None
        self.is_met = False
        self.is_disabled = False
        self._reduced_by: weakref.ref[nn.Module] | None = None  # the DistributedDataParallel that ran it last
        self.check_model: Callable[[], None] | None = None  # called before the first use, if there is a handle

        values, indices, base = (own.vector() for own in slices)
        owner.register_parameter(self.values_name, Values(values))
        owner.register_buffer(self.indices_name, indices)
        owner.register_buffer(self.base_name, base)
        self.bind()

    @property
    def weight(self) -> torch.Tensor:
        """The weight. Raises RuntimeError if it was replaced or resized since `attach`."""
        if self.owner._parameters.get(self.role) is not self.attached:
            self.refuse_another_weight()
        self.check_shape()
        return self.attached

    @property
    def values(self) -> nn.Parameter:
        values = self.owner._parameters[self.values_name]
        assert values is not None
        return values

    @property
    def indices(self) -> torch.Tensor:
        indices = self.owner._buffers[self.indices_name]
        assert indices is not None
        return indices

    @property
    def base(self) -> torch.Tensor:
        base = self.owner._buffers[self.base_name]
        assert base is not None
        return base

    @property
    def plain(self) -> torch.Tensor:
        """The values without a gradient, in their memory and with their version counter: a plain tensor, which answers
        faster than a subclass such as `Values` does."""
        marker, values = self._marker, self.owner._parameters[self.values_name]
        return marker[1] if marker is not None and marker[0] is values else self.values.detach()

    @property
    def values_arena(self) -> torch.Tensor | None:
        """Where the values lie beside those of other weights; None where each has memory of its own, as in a process
        that shares them with another one."""
        return self._slices[0].arena.memory

    @property
    def indices_arena(self) -> torch.Tensor | None:
        """Where the indices lie beside those of other weights, or None."""
        return self._slices[1].arena.memory

    def check_enabled(self) -> None:
        """Raises RuntimeError if the weight has its base's entries for now."""
        if self.is_disabled:
            raise RuntimeError(
                f"{self.name}: inside handle.disabled() only forwards without gradients work: leave the block first"
            )

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """Gives the weight its base's entries until the block is left."""
        self.write_back(always_compare=True)
        weight, version, self.is_disabled = self.weight, self.weight._version, True
        try:
            self.write_base()
            yield
        finally:
            changed, used, self.is_disabled, self._marker = self._changed(), self._used, False, None
            self.write()
            self._used = used
            if not changed:  # a graph from before the block finds the bits that it saved
                torch._C._autograd._unsafe_set_version_counter((weight,), (version,))

    def wrote(self, values: torch.Tensor) -> None:
        """Notes that the weight holds these values already."""
        self._note()
        self._was_told = True

    def given_memory(self) -> None:
        """Notes that the values lie in memory that came from outside, which others may write unseen."""
        self._marker, self.foreign = None, True

    def write_back(self, always_compare: bool = False) -> None:
        """Writes the values into the weight if they changed since the last time."""
        self.check_enabled()
        # Some loops write through raw pointers and leave the version as it is, and have no optimizer whose steps are
        # seen. They cannot have stepped without a gradient, so values are compared after their use.
        compare = always_compare or self.foreign or (self._used and not self._steps_are_seen)
        if self._changed() or (compare and self._differs()):
            self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Writes the values into the weight."""
        values, weight = self.values, self.weight
        scatter_apply(weight, self.indices, values.to(weight.dtype))
        if getattr(values, "shira_target", None) is not self:
            self.bind()
        elif self._wants_csr:
            self.want_csr()
        self._marker = None
        self._note()

    def note_use(self) -> None:
        """Notes that the values take part in a graph. Raises RuntimeError if they cannot be trained in it."""
        if not self.is_met:
            self._check_first_use()
        self._used = True
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is not None and (self._reduced_by is None or self._reduced_by() is not wrapper):
            alone = wrapper.process_group.size() == 1
            if not alone and all(parameter is not self.values for parameter in wrapper._module_parameters):
                raise RuntimeError(
                    f"{self.name}: DistributedDataParallel was made before attach, and would let the processes' values "
                    "drift apart: attach to the bare model, then wrap it"
                )
            self._reduced_by = weakref.ref(wrapper)

    def _check_first_use(self) -> None:
        weight = self.weight
        if weight.requires_grad and not self.dense:
            raise RuntimeError(f"{self.name}: requires_grad was set after attach, which would train the whole weight")
        if self.check_model is not None:
            self.check_model()
        self.is_met = True

    def _find_weight(self) -> None:
        weight = self.owner._parameters[self.role]
        assert weight is not None
        self.attached = weight

    def check_shape(self) -> None:
        """Raises RuntimeError if the weight was resized since `attach`."""
        if self.attached.shape != self._shape:
            self.refuse_another_weight()

    def refuse_another_weight(self) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError(
            f"{self.name}: the weight was replaced or resized after attach (by tie_weights, resize_token_embeddings, "
            "a parametrization, fully_shard or functional_call): do that before attach"
        )

    def refuse_transforms(self) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError(
            f"{self.name}: torch.func transforms (grad, vmap, jvp) cannot go through trained entries: "
            "use autograd, or detach the handle first"
        )

    def after_step(self) -> None:
        """Does what a step of an optimizer that has the values asks for."""
        # Without a new version: see write_back.
        if self._changed() or (not self._was_told and self.values.grad is not None):
            self.write()
        self._steps_are_seen, self._was_told = True, False

    def bind(self) -> None:
        """Ties the parameters to this: a new one (after deepcopy, load_state_dict(assign=True)) lacks that."""
        self._find_weight()
        if type(self.values) is nn.Parameter:
            self.values.__class__ = Values  # type: ignore[assignment]
        self.values.shira_target = self  # type: ignore[attr-defined]
        claim(self.weight, "attach")
        _StepHook.watch(self)
        if self._wants_csr:
            self.want_csr()
        if self.dense:
            if self._gather is not None:
                self._gather.remove()
            gather = functools.partial(_gather_gradient, weakref.ref(self))
            self._gather = self.weight.register_post_accumulate_grad_hook(gather)

    @torch.no_grad()
    def loaded_by(self, module: nn.Module, role: str) -> None:
        """Takes up what a module with this weight has just loaded."""
        own, weight = module._parameters[role], self.owner._parameters[self.role]
        if own is not None and weight is not None and own is not weight:  # load_state_dict(assign=True) unties them
            weight.copy_(own)
            module._parameters[role] = weight
        self.bind()
        self.write()

    def want_csr(self) -> None:
        """Makes `csr`, for a module that needs it; again if what is loaded in place has other indices."""
        self._wants_csr = True
        listed = self.indices.data_ptr(), self.indices._version
        if self.csr is None or self._listed != listed:
            self.csr, self._listed = csr_of(self.indices, self.weight.shape), listed

    def rebind_copy(self) -> None:
        """Lays the copied vectors, which torch copied by themselves, side by side again."""
        values, indices, base = self._slices
        place(self.values, values.taken_in(self.values.detach()))
        self.owner._buffers[self.indices_name] = indices.taken_in(self.indices)
        self.owner._buffers[self.base_name] = base.taken_in(self.base)
        self._marker, self.foreign = None, False
        self.bind()

    def refusal(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> str | None:
        """Why a state dict cannot be loaded into the owner, if that is so."""
        if self.is_disabled:
            return f"{self.name}: inside handle.disabled() nothing can be loaded: leave the block first"
        weight, values = prefix + self.role, prefix + self.values_name
        indices, base = prefix + self.indices_name, prefix + self.base_name
        if indices in state_dict and not torch.equal(state_dict[indices].to(self.indices), self.indices):
            return f"{indices}: the state dict was saved with other entries; attach with its config"
        if weight in state_dict and values not in state_dict and not self._is_base(state_dict[weight]):
            return f"{weight}: the state dict has another base and no {values}; load it before attach, or detach first"
        if weight not in state_dict and base in state_dict and not _same_bits(state_dict[base], self.base):
            return f"{base}: the state dict was saved over another base, and has no {weight}"
        return None

    def _is_base(self, weight: torch.Tensor) -> bool:
        """Whether a weight has the base's entries."""
        if weight.shape != self.weight.shape:
            return True  # torch says what is wrong
        return _same_bits(weight.detach().reshape(-1)[self.indices.to(weight.device)], self.base)

    @torch.no_grad()
    def write_base(self) -> None:
        """Gives the weight its base's entries back."""
        scatter_apply(self.weight, self.indices, self.base)

    def release(self) -> None:
        """Takes everything but the weight out of the owner, and gives up the claim on it."""
        if self._gather is not None:
            self._gather.remove()
        _StepHook.forget(self)
        if hasattr(self.values, "shira_target"):
            del self.values.shira_target
        for name in (self.values_name, self.indices_name, self.base_name):
            delattr(self.owner, name)
        claim(self.weight, None)

    def moving(self, fn: Callable[[torch.Tensor], torch.Tensor], move: Callable[[], object]) -> None:
        """Calls `move`, by which the owner applies `fn` to its tensors. Values stay float32 or float64, and what lay in
        an arena lies there afterwards."""
        values, grad, foreign = self.values, self.values.grad, self.foreign
        before = values.detach()
        vectors = (values, self.indices, self.base)
        held = [own if own.holds(vector, fn) else None for own, vector in zip(self._slices, vectors, strict=True)]
        values.grad = None
        move()
        self._find_weight()
        if not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()  # moved to channels_last: entries are flat positions
        values = self.values
        if held[0] is not None:
            held[0].arena.move(fn, keep_precision=True)
            place(values, held[0].vector())
        else:
            place(values, precise(values.detach(), before))
        self.foreign = foreign and held[0] is None
        for name, own in zip((self.indices_name, self.base_name), held[1:], strict=True):
            if own is not None:
                own.arena.move(fn, keep_precision=False)  # indices are integers, which `.to(dtype)` leaves
                self.owner._buffers[name] = own.vector()
        if grad is not None:
            values.grad = grad.to(values)
        if self.csr is not None:
            row_ptr, col = self.csr
            self.csr = row_ptr.to(self.indices.device), col.to(self.indices.device)
            self._listed = self.indices.data_ptr(), self.indices._version
        self._marker = None

    def _note(self) -> None:
        values, plain = self.owner._parameters[self.values_name], self.plain
        self._marker, self._used = (values, plain, plain._version), False

    def _changed(self) -> bool:
        marker = self._marker
        return (
            marker is None
            or marker[0] is not self.owner._parameters[self.values_name]
            or marker[1]._version != marker[2]
        )

    @torch.no_grad()
    def _differs(self) -> bool:
        return not torch.equal(self.weight.view(-1)[self.indices], self.values.to(self.weight.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # torch cannot unpickle tensors of uint16, as columns are.
        gone = ("attached", "_gather", "_marker", "_reduced_by", "check_model", "csr")
        return {**self.__dict__, **dict.fromkeys(gone)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_parameters" in vars(self.owner):  # else the owner is copied later, and calls rebind_copy
            self.rebind_copy()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(as_bits(a.to(b.device)), as_bits(b))


class _StepHook:
    """One hook on the steps of all optimizers, there as long as any weight is trained."""

    _watched: ClassVar[weakref.WeakSet[TrainedWeight]] = weakref.WeakSet()
    _hook: ClassVar[RemovableHandle | None] = None

    @classmethod
    def watch(cls, trained: TrainedWeight) -> None:
        cls._watched.add(trained)
        if cls._hook is None:
            cls._hook = register_optimizer_step_post_hook(cls._after_step)

    @classmethod
    def forget(cls, trained: TrainedWeight) -> None:
        cls._watched.discard(trained)
        if not cls._watched and cls._hook is not None:
            cls._hook.remove()
            cls._hook = None

    @staticmethod
    def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        missed = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                trained = getattr(parameter, "shira_target", None)
                if isinstance(trained, TrainedWeight) and trained.values is parameter:
                    trained.after_step()
                    if not trained.is_met:  # by the first step
                        trained.is_met = True
                        if parameter.grad is None and not trained.dense:
                            missed.append(trained.name)
        if missed:
            warn(
                f"{some_of(missed)} had no part in the forwards before the first step. A weight that the model reads "
                "otherwise than by calling its layer or by `layer.weight` is not trained: use mask_gradients"
            )


@torch.no_grad()
def _gather_gradient(of: weakref.ref[TrainedWeight], weight: torch.Tensor) -> None:
    """Moves the listed entries of a dense gradient to the values, and frees it."""
    trained, dense = of(), weight.grad
    if trained is None or dense is None:
        return
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # Wrappers would put dense gradients back after this, or leave those of the values as they are in each process.
        raise RuntimeError(f"{trained.name}: mask_gradients trains in one process only; attach trains in several")
    values = trained.values
    if values.requires_grad:
        dense = dense.to_dense() if dense.is_sparse else dense
        entries = dense.reshape(-1).index_select(0, trained.indices).to(values.dtype)
        values.grad = entries if values.grad is None else values.grad.add_(entries)
        trained.note_use()
    weight.grad = None
