"""What the kernels need of an adapter in one of PEFT's layers: its positions by rows, sorted and unique."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from shira.training.taps import csr_of
from shira_kernels.dtypes import ARITHMETIC, compute_dtype, index_dtype

_PREPARED = "_shira_prepared"  # in a layer's __dict__: what was prepared, by adapter


class _Prepared(dict[str, "Entries"]):
    """What was prepared for a layer. A copy or a pickle of the layer begins without it, and names no class of ours."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, ()


@dataclass
class Entries:
    """Positions in a weight [rows, columns], as PEFT's tensor `source` had them when it was read.

    row_ptr, col: as of `csr_of`, on the device of the adapter's values.
    indices: [nnz] the same as sorted and unique flat positions.
    order: None where PEFT's positions were sorted and unique; else, of as many positions, which of PEFT's values comes
        where; of fewer, as some were repeated, where each of PEFT's values goes.
    """

    source: torch.Tensor
    version: int
    row_ptr: torch.Tensor
    col: torch.Tensor
    indices: torch.Tensor
    order: torch.Tensor | None

    def in_order(self, values: torch.Tensor) -> torch.Tensor:
        """PEFT's values [any number] as those of `indices` [nnz]; repeated positions add up."""
        if self.order is None:
            return values
        if self.indices.numel() == self.order.numel():
            return values.index_select(0, self.order)
        return values.new_zeros(self.indices.numel()).index_add(0, self.order, values)


class Kind(Protocol):
    """One of PEFT's methods: where its layers keep what."""

    def names(self, layer: Any) -> nn.ParameterDict:
        """The adapters that the layer has, with their values."""

    def source(self, layer: Any, adapter: str) -> torch.Tensor:
        """PEFT's tensor of positions; KeyError if there is none."""

    def flat(self, layer: Any, source: torch.Tensor) -> torch.Tensor:
        """The positions as flat int64, -1 where they lie outside of the weight."""

    def values(self, layer: Any, adapter: str) -> torch.Tensor:
        """What the adapter adds at its positions, in PEFT's order."""

    def is_sparse(self, layer: Any, adapter: str) -> bool:
        """Whether the positions are all that the adapter changes."""


class Shira:
    def names(self, layer: Any) -> nn.ParameterDict:
        return layer.shira_weight

    def source(self, layer: Any, adapter: str) -> torch.Tensor:
        return layer.shira_indices[adapter]

    def flat(self, layer: Any, source: torch.Tensor) -> torch.Tensor:
        if source.dim() != 2 or source.shape[0] != 2:
            raise ValueError(f"shira_indices must be [2, nnz], rows and columns, got {tuple(source.shape)}")
        rows, columns = source.long()
        inside = (rows >= 0) & (rows < layer.out_features) & (columns >= 0) & (columns < layer.in_features)
        return torch.where(inside, rows * layer.in_features + columns, -1)

    def values(self, layer: Any, adapter: str) -> torch.Tensor:
        scale = layer.scaling[adapter]
        values = layer.shira_weight[adapter]
        return values if isinstance(scale, (int, float)) and scale == 1 else values * scale

    def is_sparse(self, layer: Any, adapter: str) -> bool:
        return True


class SuperTuning:
    def names(self, layer: Any) -> nn.ParameterDict:
        return layer.supertuning_values

    def source(self, layer: Any, adapter: str) -> torch.Tensor:
        return layer.supertuning_indices[adapter]

    def flat(self, layer: Any, source: torch.Tensor) -> torch.Tensor:
        flat = source.reshape(-1).long()
        return torch.where(flat < layer.out_features * layer.in_features, flat, -1)

    def values(self, layer: Any, adapter: str) -> torch.Tensor:
        dtype = layer.get_base_layer().weight.dtype  # PEFT rounds to it first
        values = layer.supertuning_values[adapter]
        return values.to(dtype) if dtype in ARITHMETIC else values

    def is_sparse(self, layer: Any, adapter: str) -> bool:
        return layer.supertuning_rank[adapter] == 0


def entries_of(kind: Kind, layer: Any, adapter: str) -> Entries:
    """The positions of an adapter in a layer, prepared once for each of PEFT's tensors.

    Raises:
        ValueError: the layer has no positions for the adapter, or they do not fit its weight or its values.
    """
    try:
        source = kind.source(layer, adapter)
    except KeyError:
        raise ValueError(
            f"adapter {adapter!r}: a layer [{layer.out_features}, {layer.in_features}] has values and no positions: "
            "load an adapter whose file has them, or give the config a mask_fn"
        ) from None
    prepared = layer.__dict__.get(_PREPARED)
    if not isinstance(prepared, _Prepared):
        prepared = layer.__dict__[_PREPARED] = _Prepared()
    for gone in prepared.keys() - kind.names(layer).keys():
        del prepared[gone]
    found = prepared.get(adapter)
    device = kind.names(layer)[adapter].device
    if (
        found is None
        or found.source is not source
        or source.is_inference()  # nothing counts its changes
        or found.version != source._version
        or found.row_ptr.device != device
    ):
        found = prepared[adapter] = _prepare(kind, layer, adapter, source)
    return found


def check_positions(kind: Kind, layer: Any, adapter: str, source: torch.Tensor) -> torch.Tensor:
    """The flat positions, int64, in PEFT's order; ValueError if they do not fit the weight or the values."""
    values = kind.names(layer)[adapter]
    flat = kind.flat(layer, source)
    shape = f"[{layer.out_features}, {layer.in_features}]"
    if flat.numel() != values.numel():
        raise ValueError(
            f"adapter {adapter!r}: a layer {shape} has {values.numel()} values and {flat.numel()} positions"
        )
    if flat.numel() and int(flat.min()) < 0:
        raise ValueError(f"adapter {adapter!r}: positions lie outside of a layer's weight {shape}")
    return flat


@torch.compiler.disable
@torch.inference_mode(False)  # so that training can save what an evaluation made
@torch.no_grad()
def _prepare(kind: Kind, layer: Any, adapter: str, source: torch.Tensor) -> Entries:
    flat = check_positions(kind, layer, adapter, source).to(kind.names(layer)[adapter].device)
    order = None
    if not bool((flat[1:] > flat[:-1]).all()):
        unique, places = flat.unique(return_inverse=True)
        order = flat.argsort() if unique.numel() == flat.numel() else places
        flat = unique
    shape = torch.Size((layer.out_features, layer.in_features))
    indices = flat.to(index_dtype(shape.numel()))
    version = 0 if source.is_inference() else source._version
    return Entries(source, version, *csr_of(flat, shape), indices, order)


def values_for(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in a dtype that the kernels take beside tensors of `dtype`, and contiguous."""
    wide = compute_dtype(dtype)
    return values.contiguous() if values.dtype in (dtype, wide) else values.to(wide)
