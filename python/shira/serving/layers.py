"""Unfused adapters inside a model: what its linear layers become while a batch is open.

A layer whose weight some adapter changes becomes, in place, of a subclass whose forward adds each row's own sparse
delta to the layer's output. torch.compile guards on a module's class, so code compiled outside a batch is not used
inside of it; which adapters there are is in tensors, whose contents it does not guard.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shira.model import modules
from shira.model.modules import Users, is_inside_a_forward
from shira.serving.pages import Table
from shira.serving.rows import Rows
from shira_kernels import sparse_delta_mm_batched
from shira_kernels.dtypes import ARITHMETIC

_LIKE_OTHER = ("to", "type_as")
_OF_THE_FORM = (
    *("size", "stride", "dim", "numel", "ndimension", "nelement", "element_size", "get_device"),
    *("is_floating_point", "is_contiguous", "is_complex", "__hash__", "__len__"),
    *("zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
)

# The op looked up once: in a decode step each call follows a base product, which leaves no code in the caches.
add_sparse_delta_mm_batched = torch.ops.shira.add_sparse_delta_mm_batched.default


class _UnfusedLinear(nn.Module):
    """An nn.Linear while a batch is open."""

    shira_original: type[nn.Module]
    shira_name: str
    shira_table: Table
    shira_rows: Rows

    @property
    def weight(self) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        meter = self.shira_rows.meter
        if (meter is not None and meter.has_fused) or not is_inside_a_forward():
            return weight
        form = weight.detach().as_subclass(_Form)
        form.shira_name = self.shira_name
        return form

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a model cannot be copied or pickled inside batch(): leave it first")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.is_nested:
            raise ValueError(
                f"batch: {self.shira_name!r} got a nested tensor: give its values as one packed sequence, a name for "
                "each token, and rows='packed'"
            )
        table, rows = self.shira_table, self.shira_rows
        if torch.compiler.is_compiling():
            return _with_delta(self.shira_product(input), input, table, rows.compiled_for(input, self))
        meter = rows.meter
        if meter is None:
            return _with_delta(self.shira_product(input), input, table, rows.of(input, self))
        with meter.lock:
            fused = meter.is_fused(self, input)
            out = self.shira_product(input)
            return out if fused else _with_delta(out, input, table, rows.of(input, self))

    def shira_product(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self._parameters["weight"], self.bias)  # type: ignore[arg-type]


class _UnfusedConv1D(_UnfusedLinear):
    """A Conv1D of transformers while a batch is open."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    def shira_product(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.view(-1, input.shape[-1])
        out = torch.addmm(self.bias, rows, self._parameters["weight"])  # type: ignore[arg-type]
        return out.view(*input.shape[:-1], out.shape[-1])


class _Form(torch.Tensor):
    """What a module in its forward reads as the weight of an unfused layer: the dtype, shape and device, but not the
    entries, which are the base's and no row's."""

    shira_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name in _OF_THE_FORM or (name in _LIKE_OTHER and not isinstance(args[0], cls)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args)
            if not isinstance(result, torch.Tensor):
                return result
        layer = next((x.shira_name for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls)), "")
        raise RuntimeError(
            f"batch: the model reads the weight of {layer!r} without calling the layer: switch to the adapters that "
            "change it, and remove them from the bank before a batch of others"
        )


def _with_delta(out: torch.Tensor, x: torch.Tensor, table: Table, slots: torch.Tensor) -> torch.Tensor:
    """Gives the layer's output `out` for `x`, with each token's delta."""
    pool = table.pool
    # Autocast rounds the layer's input too; the deltas of float16 and bfloat16 weights stay what they are.
    own = out.dtype if pool.values.dtype == torch.float32 else pool.values.dtype
    if x.dtype != own:  # to() costs more than this where there is nothing to do
        x = x.to(own)
    if out.requires_grad or not out.is_contiguous() or own != out.dtype:
        delta = sparse_delta_mm_batched(x, slots, table.row_ptr, pool.col, pool.values, out.shape[-1], table.page_table)
        return out + delta.to(out.dtype)
    add_sparse_delta_mm_batched(out, x, slots, table.row_ptr, pool.col, pool.values, table.page_table)
    return out


@functools.cache
def _unfused_class(mixin: type[_UnfusedLinear], original: type[nn.Module]) -> type[_UnfusedLinear]:
    # Not torch's own `__module__`: of torch's classes torch.compile takes all shapes for constants.
    namespace = {"shira_original": original, "__module__": __name__}
    return type(f"Unfused{original.__name__}", (mixin, original), namespace)


def is_transposed(module: nn.Module) -> bool | None:
    """Gives what `modules.is_transposed` gives, also while a batch is open."""
    return isinstance(module, _UnfusedConv1D) if isinstance(module, _UnfusedLinear) else modules.is_transposed(module)


def obstacle(weight: torch.Tensor, users: Users, skipped: set[nn.Module]) -> str | None:
    """Gives why a batch cannot add a delta of this weight, or None if it can. skipped: what `bypassed` gave."""
    if weight not in users:
        return "it is a buffer"
    if weight.dtype not in ARITHMETIC:
        return f"it is {weight.dtype}, whose entries can be replaced, not added to"
    directions = set()
    for name, module, role in users[weight]:
        directions.add(is_transposed(module))
        if None in directions or role != "weight":
            return f"it is the {role} ({weight.dtype}) of {name!r}, a {type(module).__name__}"
        if module in skipped:
            return f"the module around {name!r} reads it without calling the layer"
        if "forward" in vars(module):
            return f"the forward of {name!r} was replaced (by hooks of another library?)"
    return "one of the layers that share it has it transposed" if len(directions) > 1 else None


def enter(name: str, module: nn.Module, table: Table, rows: Rows) -> None:
    """Makes a linear layer add the deltas of a table. name: the layer's, for errors."""
    mixin = _UnfusedConv1D if modules.is_transposed(module) else _UnfusedLinear
    _mark_dynamic(table)
    vars(module).update(shira_name=name, shira_table=table, shira_rows=rows)
    module.__class__ = _unfused_class(mixin, type(module))  # type: ignore[arg-type]


def leave(module: nn.Module) -> None:
    """Takes back what `enter` did, wherever that was interrupted."""
    if isinstance(module, _UnfusedLinear):
        module.__class__ = module.shira_original  # type: ignore[assignment]
    for name in ("shira_name", "shira_table", "shira_rows"):
        vars(module).pop(name, None)


def _mark_dynamic(table: Table) -> None:
    """Lets compiled code be used for more slots or pages, too."""
    if "torch._dynamo" in sys.modules:
        for tensor, dims in (
            (table.row_ptr, (0,)),
            (table.page_table, (0, 1)),
            (table.pool.col, (0,)),
            (table.pool.values, (0,)),
        ):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
