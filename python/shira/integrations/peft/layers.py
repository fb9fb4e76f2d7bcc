"""What replaces methods of PEFT's layers. Each gets PEFT's own method, for what the kernels do not take.

A merge keeps, in the layer's `__dict__`, which entries it replaced and what it wrote there, as plain tensors: a copy or
a pickle of the layer has them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from shira.integrations.peft.entries import Kind, entries_of, values_for
from shira.integrations.peft.mixed import check_rows, rows_by_adapter
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import ARITHMETIC, compute_dtype

_KEPT = "_shira_kept"  # place in merged_adapters -> (adapter, indices, the entries before, the entries written)

Method = Callable[..., Any]


def forward(kind: Kind, original: Method) -> Method:
    """The base layer, called as it is, and the sparse product of each active adapter."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            check_rows(self, x, adapter_names)
            return _mixed(kind, self, adapter_names, x, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters or self.merged or not _is_plain(x):
            return original(self, x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        active = [adapter for adapter in self.active_adapters if adapter in kind.names(self)]
        for adapter in active:
            result = add_delta(kind, self, adapter, x, result)
        for adapter in active:
            if not kind.is_sparse(self, adapter):
                result = result + low_rank(self, adapter, x).to(result.dtype)
        return result

    return forward


def _mixed(kind: Kind, layer: Any, names: Sequence[str], x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` [rows, ..., out] plus, for each row of x [rows, ..., in], the product of the adapter named for it."""
    for adapter, rows in rows_by_adapter(names, x.device).items():
        if adapter not in kind.names(layer):
            continue
        part = x.index_select(0, rows)
        added = add_delta(kind, layer, adapter, part, result.index_select(0, rows))
        if not kind.is_sparse(layer, adapter):
            added = added + low_rank(layer, adapter, part).to(added.dtype)
        result = result.index_copy(0, rows, added)
    return result


def add_delta(kind: Kind, layer: Any, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` [..., out] plus x [..., in] times the adapter's entries, in the dtype of `result`."""
    entries = entries_of(kind, layer, adapter)
    x = x.to(result.dtype)  # autocast casts for the base layer's product, and leaves x
    values = values_for(entries.in_order(kind.values(layer, adapter)), x.dtype)
    delta = torch.ops.shira.sparse_delta_mm(x, entries.row_ptr, entries.col, values, layer.out_features)
    return delta.add_(result)


def low_rank(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """The part of a Super-Tuning adapter that is a LoRA, computed by PEFT's own modules in their dtype."""
    down, up = layer.supertuning_lora_A[adapter], layer.supertuning_lora_B[adapter]
    dropped = layer.supertuning_lora_dropout[adapter](x).to(down.weight.dtype)
    return up(down(dropped)) * (layer.supertuning_lora_alpha[adapter] / layer.supertuning_rank[adapter])


def merge(kind: Kind, original: Method) -> Method:
    """Adds the entries in place and keeps the old ones. With `safe_merge` nothing is written before all was checked."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        kept = self.__dict__.setdefault(_KEPT, {})
        for place in [place for place in kept if place >= len(self.merged_adapters)]:
            del kept[place]  # of merges that PEFT has taken back itself
        weight = _weight(self)
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if weight is None or not all(kind.is_sparse(self, name) for name in wanted if name in kind.names(self)):
            return original(self, safe_merge, adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in kind.names(self)]
        if safe_merge:
            _check_finite(kind, self, weight, names)
        for name in names:
            indices, old = _add(kind, self, name, weight)
            written = weight.detach().view(-1).index_select(0, indices)
            kept[len(self.merged_adapters)] = (name, indices, old, written)
            self.merged_adapters.append(name)
        return None

    return merge


def unmerge(kind: Kind, original: Method) -> Method:
    """Writes the kept entries back, the last merge first.

    An entry that was written by someone else since the merge loses what the merge added, and keeps the rest. What was
    merged without keeping anything is taken out by PEFT's own subtraction.
    """

    def unmerge(self: Any) -> None:
        if not self.merged:
            return original(self)
        kept = self.__dict__.setdefault(_KEPT, {})
        while self.merged_adapters:
            *others, name = self.merged_adapters
            record, weight = kept.pop(len(others), None), _weight(self)
            if record is not None and record[0] == name and weight is not None:
                _put_back(weight, *record[1:])
            else:
                self.merged_adapters = [name]
                try:
                    original(self)
                except BaseException:
                    self.merged_adapters = [*others, name]
                    raise
            self.merged_adapters = others
        return None

    return unmerge


def _weight(layer: Any) -> torch.Tensor | None:
    """The base layer's weight, if its entries can be written: a plain, dense parameter that is not quantised."""
    weight = layer.get_base_layer()._parameters.get("weight")
    if getattr(layer, "quantization_backend", None) is not None or type(weight) is not nn.Parameter:
        return None
    is_dense = weight.layout == torch.strided and weight.is_contiguous() and not weight.is_meta
    fits = weight.shape == (layer.out_features, layer.in_features)
    return weight if is_dense and fits and weight.dtype in ARITHMETIC else None


@torch.no_grad()
def _add(kind: Kind, layer: Any, adapter: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds an adapter's entries to a weight; returns their flat positions and the old entries."""
    entries = entries_of(kind, layer, adapter)
    indices = entries.indices.to(weight.device)
    values = entries.in_order(kind.values(layer, adapter)).to(weight.device)
    if values.dtype not in (weight.dtype, torch.float32):
        values = values.to(compute_dtype(weight.dtype))
    old = torch.empty(indices.numel(), dtype=weight.dtype, device=weight.device)
    torch.ops.shira.scatter_apply(weight, indices, values.contiguous(), 1.0, True, old)
    return indices, old


@torch.no_grad()
def _check_finite(kind: Kind, layer: Any, weight: torch.Tensor, names: list[str]) -> None:
    merged = weight.detach().clone()
    for name in names:
        _add(kind, layer, name, merged)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


@torch.no_grad()
def _put_back(weight: torch.Tensor, indices: torch.Tensor, old: torch.Tensor, written: torch.Tensor) -> None:
    indices, old, written = indices.to(weight.device), old.to(weight), written.to(weight)  # where it was moved or cast
    current = weight.detach().view(-1).index_select(0, indices)
    same = as_bits(current) == as_bits(written)
    if not bool(same.all()):
        wide = compute_dtype(weight.dtype)
        old = torch.where(same, old, (current.to(wide) - (written.to(wide) - old.to(wide))).to(weight.dtype))
    torch.ops.shira.scatter_apply(weight, indices, old)


def _is_plain(x: Any) -> bool:
    """Whether the kernels take a layer's input: an ordinary tensor outside of torch.func's transforms."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and x.layout == torch.strided
        and x.dim() > 0
        and not x.is_nested
        and x.dtype in ARITHMETIC
        and not torch._C._are_functorch_transforms_active()
    )
