"""Trained weights inside a model: `Target`, what one weight gets, and what the modules that use it become.

A module that uses a trained weight changes its class for a subclass of it, in place. The first one holds the values
[nnz] (a parameter), the indices and the base's entries (buffers). Before a forward the weight's entries are overwritten
with the values if those changed; then the forward is the module's own. How the values get their gradient:

- nn.Linear, Conv1D of transformers: an identity behind the layer keeps its input; its backward is `masked_grad`.
- nn.Embedding: an identity behind the layer; its backward sums the rows of each token.
- nn.Conv1d, nn.Conv2d, nn.Conv3d, and subclasses with a forward of their own: the module reads an alias of its weight,
  whose backward gathers from the dense gradient, which autograd makes for one layer at a time.
- of `mask_gradients`, any module: see `shira.training.hooks`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from shira.model.modules import is_bypassed, transformers_conv1d
from shira_kernels import scatter_apply
from shira_kernels.bits import as_bits
from shira_kernels.ops.masked_grad import masked_grad


class _Arena:
    """The memory of many vectors. It moves as one when each of their modules is moved."""

    def __init__(self, vectors: list[torch.Tensor]) -> None:
        self.data = torch.cat(vectors)
        self._moved_by: Any = None
        self._moved_from: int | None = None

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], keep_precision: bool) -> None:
        """What `module._apply(fn)` does, once for all modules; with `keep_precision` to float32 at least."""
        if fn is not self._moved_by:
            moved = fn(self.data)
            self._moved_by, self._moved_from = fn, self.data.data_ptr()
            self.data = precise(moved, self.data) if keep_precision else moved

    def begins(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> set[int | None]:
        """The addresses of vectors that `fn` has still to move, or has moved."""
        return {self.data.data_ptr(), self._moved_from if fn is self._moved_by else None}

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "_moved_by": None, "_moved_from": None}


def precise(moved: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`before` where `moved` is, in its dtype or float32 if that is more: trained values are never rounded to less."""
    return before.to(moved.device, torch.promote_types(moved.dtype, torch.float32))


class Slice:
    """Where a vector lies in an arena."""

    def __init__(self, arena: _Arena, begin: int, end: int) -> None:
        self.arena, self._begin, self._end = arena, begin, end

    def vector(self) -> torch.Tensor:
        # `.data`: each vector counts its own versions.
        return self.arena.data[self._begin : self._end].data

    def holds(self, tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether this is the tensor's memory, or was before `fn` moved the arena."""
        return tensor.data_ptr() - self._begin * tensor.element_size() in self.arena.begins(fn)


def in_arenas(vectors: list[torch.Tensor]) -> list[Slice]:
    """Copies vectors into one arena for each dtype and device, in the given order."""
    alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for vector in vectors:
        alike.setdefault((vector.dtype, vector.device), []).append(vector)
    arenas = {kind: (_Arena(group), 0) for kind, group in alike.items()}
    slices = []
    for vector in vectors:
        kind = vector.dtype, vector.device
        arena, begin = arenas[kind]
        slices.append(Slice(arena, begin, begin + vector.numel()))
        arenas[kind] = arena, begin + vector.numel()
    return slices


class Target:
    """One trained weight, as its modules and optimizers see it: `values.shira_target` of the parameter `values`.

    An optimizer that updates the values and the weight in one go reads `weight`, `indices` and `base` at each step
    (they may have moved), and calls `wrote(values)` afterwards. After every other optimizer's step the values are
    written by a hook on all optimizers, or before the next forward.

    Attributes:
        name: of the weight in the bare model.
        owner: the first module with that weight, which holds values, indices and base.
        role: the weight's name in the owner.
        dense: whether the weight itself gets a gradient, from which that of the values is gathered.
        csr: (row_ptr, col) of the entries for `masked_grad`, if a module needs them.
    """

    def __init__(self, name: str, owner: nn.Module, role: str, slices: tuple[Slice, Slice, Slice], dense: bool) -> None:
        suffix = "" if role == "weight" else f"_{role}"
        self.name, self.owner, self.role, self.dense = name, owner, role, dense
        self.values_name, self.indices_name, self.base_name = (
            f"shira_{part}{suffix}" for part in ("values", "indices", "base")
        )
        self.csr: tuple[torch.Tensor, torch.Tensor] | None = None
        self._wants_csr = False
        self._slices = slices
        self._marker: tuple[int, int] | None = None  # address and version of the values that the weight holds
        self._was_told = False  # by `wrote`, since the last step
        self._used = False  # in a graph that can give a gradient, since the values were written
        self._steps_are_seen = False  # an optimizer that calls step hooks has them
        self._gather: RemovableHandle | None = None

        values, indices, base = (part.vector() for part in slices)
        owner.register_parameter(self.values_name, nn.Parameter(values))
        owner.register_buffer(self.indices_name, indices)
        owner.register_buffer(self.base_name, base)
        self.bind()

    @property
    def weight(self) -> torch.Tensor:
        weight = self.owner._parameters[self.role]
        assert weight is not None
        return weight

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

    def wrote(self, values: torch.Tensor) -> None:
        """Notes that the weight holds these values already."""
        self._note(values)
        self._was_told = True

    def write_back(self, always_compare: bool = False) -> None:
        """Writes the values into the weight if they changed since the last time."""
        values = self.values
        changed = (values.data_ptr(), values._version) != self._marker
        # Some loops write through `.data` or raw pointers and leave the version as it is, and have no optimizer whose
        # steps are seen. They cannot have stepped without a gradient, so values are compared after their use.
        compare = always_compare or (self._used and not self._steps_are_seen)
        if changed or (compare and self._differs()):
            self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Writes the values into the weight."""
        values, weight = self.values, self.weight
        scatter_apply(weight, self.indices, values.to(weight.dtype))
        if getattr(values, "shira_target", None) is not self:
            self.bind()
        self._note(values)

    def note_use(self) -> None:
        """The values take part in a graph."""
        self._used = True

    def after_step(self) -> None:
        """What a step of an optimizer that has the values asks for."""
        values = self.values
        changed = (values.data_ptr(), values._version) != self._marker
        if changed or (values.grad is not None and not self._was_told):  # without a new version: see write_back
            self.write()
        self._steps_are_seen, self._was_told = True, False

    def bind(self) -> None:
        """Ties parameters to this target: a new parameter (after deepcopy, load_state_dict(assign=True)) lacks that."""
        self.values.shira_target = self  # type: ignore[attr-defined]
        _Steps.watch(self)
        if self._wants_csr:
            self.want_csr()
        if self.dense:
            if self._gather is not None:
                self._gather.remove()
            gather = functools.partial(_gather_gradient, weakref.ref(self))
            self._gather = self.weight.register_post_accumulate_grad_hook(gather)

    def want_csr(self) -> None:
        """A module needs `csr`."""
        self._wants_csr = True
        if self.csr is None:
            self.csr = csr_of(self.indices, self.weight.shape)

    def rebind_copy(self) -> None:
        """Makes the copy of an arena the memory of the copied values, which torch copied by themselves."""
        mine = self._slices[0].vector()
        if torch.equal(mine, self.values.data):
            self.values.data = mine
        self.bind()

    def refusal(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> str | None:
        """Why a state dict cannot be loaded into the owner, if that is so."""
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
        """Takes everything but the weight out of the owner."""
        if self._gather is not None:
            self._gather.remove()
        _Steps.forget(self)
        if hasattr(self.values, "shira_target"):
            del self.values.shira_target
        for name in (self.values_name, self.indices_name, self.base_name):
            delattr(self.owner, name)

    def moving(self, fn: Callable[[torch.Tensor], torch.Tensor], move: Callable[[], object]) -> None:
        """Calls `move`, by which the owner applies `fn` to its tensors; values keep their dtype, arenas stay arenas."""
        values, grad = self.values, self.values.grad
        before = values.data
        vectors = (values, self.indices, self.base)
        held = [part if part.holds(vector, fn) else None for part, vector in zip(self._slices, vectors, strict=True)]
        values.grad = None
        move()
        if not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()  # moved to channels_last: entries are flat positions
        values = self.values
        if held[0] is not None:
            held[0].arena.move(fn, keep_precision=True)
            values.data = held[0].vector()
        else:
            values.data = precise(values.data, before)
        for name, part in zip((self.indices_name, self.base_name), held[1:], strict=True):
            if part is not None:
                part.arena.move(fn, keep_precision=False)  # indices are integers, which `.to(dtype)` leaves
                self.owner._buffers[name] = part.vector()
        if grad is not None:
            values.grad = grad.to(values)
        if self.csr is not None:
            row_ptr, col = self.csr
            self.csr = row_ptr.to(self.indices.device), col.to(self.indices.device)
        self._marker = None

    def _note(self, values: torch.Tensor) -> None:
        self._marker, self._used = (values.data_ptr(), values._version), False

    @torch.no_grad()
    def _differs(self) -> bool:
        return not torch.equal(self.weight.view(-1)[self.indices], self.values.to(self.weight.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # torch cannot unpickle tensors of uint16, as columns are.
        return {**self.__dict__, "_gather": None, "_marker": None, "csr": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_parameters" in vars(self.owner):  # else the owner is copied later, and calls rebind_copy
            self.rebind_copy()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(as_bits(a.to(b.device)), as_bits(b))


class _Steps:
    """One hook on the steps of all optimizers, as long as there are targets."""

    _targets: ClassVar[weakref.WeakSet[Target]] = weakref.WeakSet()
    _hook: ClassVar[RemovableHandle | None] = None

    @classmethod
    def watch(cls, target: Target) -> None:
        cls._targets.add(target)
        if cls._hook is None:
            cls._hook = register_optimizer_step_post_hook(cls._after_step)

    @classmethod
    def forget(cls, target: Target) -> None:
        cls._targets.discard(target)
        if not cls._targets and cls._hook is not None:
            cls._hook.remove()
            cls._hook = None

    @staticmethod
    def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                target = getattr(parameter, "shira_target", None)
                if isinstance(target, Target) and target.values is parameter:
                    target.after_step()


@torch.no_grad()
def _gather_gradient(of: weakref.ref[Target], weight: torch.Tensor) -> None:
    """Moves the listed entries of a dense gradient to the values, and frees it."""
    target, dense = of(), weight.grad
    if target is None or dense is None:
        return
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # Wrappers would put dense gradients back after this, or leave those of the values as they are in each process.
        raise RuntimeError(f"{target.name}: mask_gradients trains in one process only; attach trains in several")
    values = target.values
    if values.requires_grad:
        dense = dense.to_dense() if dense.is_sparse else dense
        entries = dense.reshape(-1).index_select(0, target.indices).to(values.dtype)
        values.grad = entries if values.grad is None else values.grad.add_(entries)
        target.note_use()
    weight.grad = None


def csr_of(indices: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """(row_ptr, col) of sorted flat positions in a matrix, in the narrowest dtypes that `masked_grad` takes."""
    rows, columns = shape
    flat = indices.long()
    borders = torch.arange(rows + 1, device=indices.device) * columns
    row_ptr = torch.searchsorted(flat, borders)
    narrow = torch.uint16 if columns <= 0xFFFF else torch.int32
    wide = torch.int32 if indices.numel() < 2**31 else torch.int64
    return row_ptr.to(wide), (flat % columns).to(narrow)


def _passed(ctx: Any, output: torch.Tensor) -> torch.Tensor:
    """What the forward of a tap gives back: its input, and no view of it, which what follows could not change in place,
    as in Sequential(Linear, ReLU(inplace=True))."""
    if torch.compiler.is_compiling():
        # Dynamo of torch 2.10 and 2.11 makes a view of what is marked dirty, too. Inductor removes this copy.
        return output.clone()
    ctx.mark_dirty(output)
    return output


class _LinearTap(torch.autograd.Function):
    """Gives back `output` as it is; its gradient passes, and the listed entries of the weight's are the values'.

    output [..., out], input [..., in]; the weight is [out, in], or with `transposed` [in, out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        input: torch.Tensor,
        values: torch.Tensor,
        row_ptr: torch.Tensor,
        col: torch.Tensor,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, row_ptr, col)
        ctx.transposed, ctx.values_dtype = transposed, values.dtype
        return _passed(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_values = None
        if ctx.needs_input_grad[2]:
            input, row_ptr, col = ctx.saved_tensors
            input = input.to(grad_output.dtype)  # under autocast the layer cast it too
            left, right = (input, grad_output) if ctx.transposed else (grad_output, input)
            grad_values = masked_grad(left, right, row_ptr, col).to(ctx.values_dtype)
        return grad_output, None, grad_values, None, None, None


class _EmbeddingTap(torch.autograd.Function):
    """As `_LinearTap`, behind an embedding: output [..., columns], tokens [...] below `rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        tokens: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        rows: int,
        padding_idx: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, indices)
        ctx.rows, ctx.padding_idx, ctx.values_dtype = rows, padding_idx, values.dtype
        return _passed(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, indices = ctx.saved_tensors
        tokens, entries = tokens.reshape(-1).long(), indices.long()
        count, columns = tokens.numel(), grad_output.shape[-1]
        # Equal tokens add up at the place of one of them, so that nothing here has the weight's size. The place after
        # the last stays zero, for rows without a token.
        place = torch.arange(count, device=tokens.device)
        place_of_row = tokens.new_full((ctx.rows,), count).index_copy_(0, tokens, place)
        gradients = grad_output.reshape(-1, columns).to(ctx.values_dtype)
        sums = gradients.new_zeros(count + 1, columns)
        if sums.is_cuda:  # index_add_ sums in any order there; this sorts
            sums.index_put_((place_of_row[tokens],), gradients, accumulate=True)
        else:
            sums.index_add_(0, place_of_row[tokens], gradients)
        if ctx.padding_idx is not None:
            place_of_row[ctx.padding_idx] = count
        grad_values = sums[place_of_row[entries // columns], entries % columns]
        return grad_output, None, grad_values, None, None, None


class _Alias(torch.autograd.Function):
    """The weight, as a function of the values."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.values_dtype = values.dtype
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dense: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return dense.reshape(-1).index_select(0, indices).to(ctx.values_dtype), None, None


class Attached(nn.Module):
    """What a module's class becomes (mixed with that class) while a weight of it is trained."""

    shira_original: type[nn.Module]
    shira_mixin: type[Attached]
    shira_targets: dict[str, Target]  # by the weight's name in this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.shira_write_back()
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def shira_write_back(self) -> None:
        # A compiled forward cannot read versions. There the hook on optimizers' steps has written the values.
        if not torch.compiler.is_compiling():
            for target in self.shira_targets.values():
                target.write_back()

    def shira_trains(self) -> Target | None:
        """The target of the weight if a gradient is wanted."""
        target = self.shira_targets["weight"]
        if not torch.is_grad_enabled() or not target.values.requires_grad:
            return None
        if not torch.compiler.is_compiling():
            target.note_use()
        return target

    def shira_owned(self) -> list[Target]:
        return [target for target in self.shira_targets.values() if getattr(target, "owner", None) is self]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        move: Callable[[], object] = functools.partial(super()._apply, fn, recurse)
        for target in self.shira_owned():
            move = functools.partial(target.moving, fn, move)
        move()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for target in self.shira_targets.values():
            target.write_back(always_compare=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        for target in self.shira_owned():
            if reason := target.refusal(state_dict, prefix):
                errors.append(reason)
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for target in self.shira_targets.values():
            target.bind()
            target.write()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for target in self.shira_owned():
            target.rebind_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        return _new, (self.shira_mixin, self.shira_original), *reduced[2:]

    def extra_repr(self) -> str:
        entries = sum(target.indices.numel() for target in self.shira_targets.values())
        return ", ".join(filter(None, (super().extra_repr(), f"shira_entries={entries}")))


class _AttachedLinear(Attached):
    """nn.Linear: weight [out, in]."""

    shira_transposed = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.shira_write_back()
        target = self.shira_trains()
        if target is None:
            return super().forward(input)  # type: ignore[no-any-return]
        assert target.csr is not None
        # As a matrix, so that the product is no view: behind an identity in place on a view autograd copies gradients.
        rows = input.flatten(0, -2) if input.dim() > 2 else input
        output = _LinearTap.apply(self.shira_product(rows), rows, target.values, *target.csr, self.shira_transposed)
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
    padding_idx: int | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(input)
        target = self.shira_trains()
        if target is not None:
            rows = target.weight.shape[0]
            output = _EmbeddingTap.apply(output, input, target.values, target.indices, rows, self.padding_idx)
        return output


class _AttachedReader(Attached):
    """A module whose forward reads `self.weight`."""

    shira_alias: torch.Tensor | None  # what it reads while a forward runs whose gradient is wanted

    @property
    def weight(self) -> torch.Tensor | None:
        return self._parameters["weight"] if self.shira_alias is None else self.shira_alias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.shira_write_back()
        target = self.shira_trains()
        if target is None:
            return super().forward(*args, **kwargs)
        # An instance attribute "weight" would come before the parameter, but Dynamo of torch 2.10 and 2.11 cannot trace
        # its removal.
        self.shira_alias = _Alias.apply(target.values, target.weight, target.indices)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.shira_alias = None


SUPPORTED = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding and Conv1D of transformers"


def _kinds() -> Iterator[tuple[type[nn.Module], type[Attached]]]:
    yield nn.Linear, _AttachedLinear
    yield nn.Embedding, _AttachedEmbedding
    yield from ((conv, _AttachedReader) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if conv1d := transformers_conv1d():
        yield conv1d, _AttachedConv1D


def mixin_of(module: nn.Module) -> type[Attached] | None:
    """What trains the module's weight; None if nothing does."""
    for kind, mixin in _kinds():
        if isinstance(module, kind):
            return mixin if type(module).forward is kind.forward else _AttachedReader
    return None


def refusal(module: nn.Module) -> str | None:
    """Why a module that `mixin_of` knows cannot be trained, if that is so."""
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


def make_attached(module: nn.Module, mixin: type[Attached], role: str, target: Target) -> None:
    """Makes a module one that uses the target's weight as its `role`."""
    if not isinstance(module, Attached):
        module.__class__ = _attached_class(mixin, type(module))  # type: ignore[arg-type]
        module.shira_targets = {}  # type: ignore[assignment]
    assert isinstance(module, Attached)
    module.shira_targets[role] = target
    if isinstance(module, _AttachedReader):
        module.shira_alias = None
    if isinstance(module, _AttachedLinear):
        target.want_csr()


def restore_classes(modules: Iterable[nn.Module]) -> None:
    """The way back of `make_attached`."""
    for module in modules:
        if isinstance(module, Attached):
            del module.shira_targets
            if isinstance(module, _AttachedReader):
                del module.shira_alias
            module.__class__ = module.shira_original  # type: ignore[assignment]
