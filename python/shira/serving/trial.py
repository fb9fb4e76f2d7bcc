"""A trial of a batch: do layers get its rows where the layout says?

Shapes alone do not tell. There may be as many positions as names, or a sequence that comes first may be as long as the
batch. So the first forward in which rows differ is computed twice, op by op: as it is, and with the rows of the batch
exchanged, their adapters with them. Whatever a layer gets must then be exchanged in the same way. Python code runs
once, so that caches and counters move on as ever; later forwards pay nothing.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from shira.serving.layers import add_sparse_delta_mm_batched

_ADD = add_sparse_delta_mm_batched
_GIVE = torch.ops.shira.sparse_delta_mm_batched.default

# How far a token may be from its like in the exchanged forward, as a share of its length. Most often both have the same
# bits, for a product gives a row the same wherever it stands; another row is as far away as rows are.
_NEAR = 0.05
_ITSELF = object()
_FEW = 100  # one token of as many may be further away: a router's choice can hang on the last bit

Tried = Callable[[Collection[nn.Module]], None]


class _Watched(nn.Module):
    """A module that holds layers which are to be tried."""

    shira_unwatched: type[nn.Module]


@functools.cache
def _watched_class(original: type[nn.Module]) -> type[_Watched]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Who took the bound method, as `generate` does, calls it also when the module is of its own class again.
        trial: Trial | None = None if torch.compiler.is_compiling() else vars(self).get("shira_trial")
        if trial is None:
            return original.__call__(self, *args, **kwargs)
        return _undisturbed(trial.call)(functools.partial(original.__call__, self), self, args, kwargs)

    names = {each: getattr(original, each) for each in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (_Watched, original), {"__call__": call, "shira_unwatched": original, **names})


class Trial:
    """Has the next call of each module that holds some of the layers computed beside its exchanged twin, once.

    Args:
        model: holds the layers.
        layers: those that are tried.
        names: of the layers whose entries a table's `row_ptr` has, for errors.
        rows: how many the batch has.
        layout: where they are, a word of `rows.LAYOUTS`.
        tried: receives the layers of a module that ran through, also those that it did not call.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[nn.Module],
        names: Mapping[torch.Tensor, str],
        rows: int,
        layout: str,
        tried: Tried,
    ) -> None:
        self._model, self._layers, self._names, self._tried = model, layers, names, tried
        self._rows, self._layout = rows, layout
        self._lock = threading.Lock()  # held by the call that is computed twice
        self._watched: list[nn.Module] = []

    def open(self) -> None:
        """Waits for the model, or a part of it, to be called."""
        for module in self._model.modules():
            if module not in self._layers and any(inner in self._layers for inner in module.modules()):
                self._watched.append(module)
                try:
                    module.__class__ = _watched_class(type(module))  # type: ignore[assignment, arg-type]
                except (TypeError, ValueError, RuntimeError):  # a class that refuses subclasses
                    continue
                vars(module)["shira_trial"] = self

    def close(self) -> None:
        """Takes back what `open` did, wherever that was interrupted."""
        self._forget(self._watched)

    def call(self, own: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Gives what a module's own call gives, computed twice unless one around it is."""
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if captured or not self._lock.acquire(blocking=False):
            return own(*args, **kwargs)
        torch.clear_autocast_cache()  # rounded weights of before would pass for a part of the batch
        try:
            with _uncompiled(), _Exchanged(self._model, self._names, self._rows, self._layout, (args, kwargs)):
                out = own(*args, **kwargs)
        finally:
            self._lock.release()
        inside = set(module.modules())
        self._forget([each for each in self._watched if each in inside])
        self._tried([layer for layer in self._layers if layer in inside])
        return out

    @staticmethod
    def _forget(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if isinstance(module, _Watched):
                module.__class__ = module.shira_unwatched  # type: ignore[assignment]
            vars(module).pop("shira_trial", None)


def _undisturbed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Dynamo off what it left to Python in a compiled model, as after many graph breaks: it would compile the
    trial itself."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _uncompiled() -> AbstractContextManager[object]:
    """Lets compiled functions run as they were written, for what they compute cannot be seen."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Exchanged(TorchDispatchMode):
    """Computes beside each tensor its twin: what it would be if each row of the batch were the next one.

    A tensor that was there before is a part of the batch, as inputs and caches are, if it has a row or several for
    each; those that the model holds never are. A tensor without a twin is its own. Where no twin can be computed, this
    gives up.
    """

    supports_higher_order_operators = True

    def __init__(
        self, model: nn.Module, names: Mapping[torch.Tensor, str], rows: int, layout: str, inputs: object
    ) -> None:
        super().__init__()
        self._names, self._rows, self._layout = names, rows, layout
        self._twins: Any = WeakTensorKeyDictionary()
        for module in model.modules():
            for held in tree_leaves(vars(module)):
                if isinstance(held, torch.Tensor):
                    self._twins[held] = held
        # A model may put its batch together itself, as for classifier-free guidance: then nothing can be exchanged.
        self._given_up = all(self._twin(leaf) is leaf for leaf in tree_leaves(inputs))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):  # flex_attention, for one
            self._give_up()
        if self._given_up:
            return func(*args, **kwargs)
        given = {argument.name: argument.default_value for argument in func._schema.arguments} | kwargs
        given.update(zip(given, args, strict=False))
        if func in (_ADD, _GIVE) and given["row_ptr"] in self._names:  # not those of another bank
            self._check(**given)
        try:
            twin = self._twin_of(func, given, args, kwargs)  # first, for `func` may write its arguments
        # Whatever an op of the user's raises for a twin that it does not take.
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
            self._give_up()
        out = func(*args, **kwargs)
        if not self._given_up:
            self._note(out, out if twin is None else twin)
        return out

    def _give_up(self) -> None:
        self._given_up = True
        self._twins.clear()

    def _check(
        self, x: torch.Tensor, token_adapter: torch.Tensor, row_ptr: torch.Tensor, **others: torch.Tensor | int | None
    ) -> None:
        """Raises ValueError if what a layer gets is not exchanged as the batch is. Exchanges the adapters, too."""
        for tensor in (row_ptr, *others.values()):
            if isinstance(tensor, torch.Tensor) and tensor not in self._twins:
                self._twins[tensor] = tensor
        if token_adapter.numel() and not self._is_exchanged(x, token_adapter):
            raise ValueError(
                f"batch: {self._names[row_ptr]!r} got an input of shape {[*x.shape]} without the batch's rows, though "
                "their number fits: when these were exchanged, it was not exchanged alike. If the sequence comes "
                "first, say rows='second'; if it is not made of the batch's rows (positions that all rows share, "
                "tokens gathered for an expert), its adapters can only be switched to; if you know better, let a "
                f"function say so: rows=lambda layer, x: {self._layout!r}"
            )

    def _is_exchanged(self, x: torch.Tensor, token_adapter: torch.Tensor) -> bool:
        """Whether a layer's input is exchanged as the batch is. Exchanges the adapters of its tokens, too."""
        twin = self._twin(x)
        if self._layout == "packed":  # tokens of one sequence do not stand for each other: is it of the batch at all?
            self._twins[token_adapter] = self._rolled(token_adapter, 0)
            return twin is not x
        dim = x.dim() - 2 if self._layout == "second" else 0
        by_row = token_adapter.view(x.shape[:-1]) if self._layout == "second" else token_adapter
        self._twins[token_adapter] = self._rolled(by_row, min(dim, by_row.dim() - 1)).reshape(-1)
        got, want = (each.reshape(-1, x.shape[-1]).float().nan_to_num() for each in (twin, self._rolled(x, dim)))
        away = (got - want).norm(dim=1) > _NEAR * want.norm(dim=1)
        return int(away.sum()) <= len(away) // _FEW

    def _twin_of(self, func: Any, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives what a call gives for its arguments' twins; None if these are the arguments themselves."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors) or "c10d" in func.namespace:
            raise NotImplementedError
        if "norm" in func.__name__ and (given.get("training") or given.get("train")):
            raise NotImplementedError  # it writes running statistics, which its schema does not say
        random = torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p") != 0.0
        if not tensors or func is torch.ops.aten.lift_fresh.default:
            return self._next_rows if random else torch.clone
        if random and given.get("train", True):
            raise NotImplementedError
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in tree_leaves(given.get(argument.name)):
                    if isinstance(written, torch.Tensor):
                        self._separate(written)
        if all(self._twin(tensor) is tensor for tensor in tensors):
            return None
        twin_args, twin_kwargs = tree_map(self._twin, (args, kwargs))
        return func(*twin_args, **twin_kwargs)

    def _note(self, out: Any, twin: Any) -> None:
        """Notes the twins of what a call gave. twin: what it gave for twins, or a function that makes them."""
        outs = tree_leaves(out)
        twins = outs if callable(twin) else tree_leaves(twin)
        for each, its_twin in zip(outs, twins, strict=False):
            if isinstance(each, torch.Tensor):
                own = twin(each) if callable(twin) else its_twin
                self._twins[each] = _ITSELF if own is each else own  # the tensor itself would keep it alive

    def _twin(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        twin = self._twins.get(leaf)
        if twin is None:
            twin = self._twins[leaf] = leaf if isinstance(leaf, nn.Parameter) else self._next_rows(leaf)
        return leaf if twin is _ITSELF else twin

    def _separate(self, written: torch.Tensor) -> None:
        """Gives a tensor that is about to be written a twin with memory of its own."""
        twin = self._twin(written)
        if twin.untyped_storage().data_ptr() == written.untyped_storage().data_ptr():
            self._twins[written] = twin.clone()

    def _next_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gives a tensor with each row replaced by the next; itself if it has not as many rows, or several for each."""
        if tensor.layout is not torch.strided or tensor.is_nested or is_traceable_wrapper_subclass(tensor):
            return tensor
        if not tensor.numel():
            return tensor
        if tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64) and bool((tensor.diff() == 1).all()):
            return tensor  # positions
        if self._layout in ("first", "repeated"):
            dims = [0] if tensor.dim() and tensor.shape[0] % self._rows == 0 else []
        else:
            dims = [dim for dim in range(min(tensor.dim(), 2)) if tensor.shape[dim] == self._rows]
        return self._rolled(tensor, dims[0]) if dims else tensor

    def _rolled(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        count = tensor.shape[dim]
        next_row = (torch.arange(count, device=tensor.device) + count // self._rows) % count
        return tensor.index_select(dim, next_row)  # which autocast leaves alone
