"""Interference between adapters: which entries two of them share, whether they pull the same way, and how their deltas
multiply (paper, section 4.2).

A delta is what an adapter adds to the base: of kind "add" its values, of kind "replace" its values minus the base. A
tensor counts as a matrix, rows being its first dimension and columns all others (a vector is one column), so for linear
layers, [out, in], the product A1^T A2 is [in, in]. Where an adapter lacks a tensor its delta is zero: that adds nothing
to AWOM, and only zeros to AWOR.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import torch

from shira.adapter.adapter import Adapter
from shira.adapter.base import BaseTensors
from shira.adapter.fusion import deltas
from shira.adapter.placed import placed
from shira.adapter.tensor import AdapterTensor
from shira.files.checkpoint import Base
from shira.model.names import canonical

Source: TypeAlias = Adapter | str | os.PathLike[str]  # an adapter or its file
_Counts = TypeVar("_Counts", bound="Overlap")
_BLOCK = 64  # rows of a product that are there at a time: 64 are nearly as fast as more, and need less memory


@dataclass(frozen=True)
class Overlap:
    """Which entries two adapters share, in one tensor. Those of several tensors add up: `sum(overlaps, Overlap())`.

    Attributes:
        entries: how many each adapter changes.
        common: how many both change.
    """

    entries: tuple[int, int] = (0, 0)
    common: int = 0

    def __add__(self: _Counts, other: _Counts) -> _Counts:
        return type(self)(*(_plus(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))

    @property
    def overlap(self) -> float:
        """Of the entries that at least one adapter changes, the share that both change (Jaccard); 0 of none."""
        return self.common / max(1, sum(self.entries) - self.common)


@dataclass(frozen=True)
class Interference(Overlap):
    """How two adapters' deltas meet, in one tensor. Those of several tensors add up: `sum(found, Interference())`.

    Attributes:
        opposite: how many of the common entries have deltas of opposite signs.
        energy: sum of squares of each adapter's deltas.
        product_energy: sum of squares of the elements of A1^T A2.
        product_nonzeros: how many of these elements are not zero.
        product_numel: how many there are.
        product_bound: the product of both energies, which product_energy cannot exceed.
    """

    opposite: int = 0
    energy: tuple[float, float] = (0.0, 0.0)
    product_energy: float = 0.0
    product_nonzeros: int = 0
    product_numel: int = 0
    product_bound: float = 0.0

    @property
    def awom(self) -> float:
        """The Frobenius norm of A1^T A2; of several tensors, of all products together."""
        return math.sqrt(self.product_energy)

    @property
    def relative_awom(self) -> float:
        """AWOM over the largest that deltas of these energies can have: from 0 (orthogonal, or one is zero) to 1."""
        return math.sqrt(self.product_energy / self.product_bound) if self.product_bound else 0.0

    @property
    def awor(self) -> float:
        """The share of zeros in A1^T A2; 1 if it has no elements."""
        return 1 - self.product_nonzeros / max(1, self.product_numel)

    @property
    def sign_conflicts(self) -> float:
        """Of the common entries, the share with deltas of opposite signs; 0 of none."""
        return self.opposite / max(1, self.common)


def awom(a: Source, b: Source, base: Base | None = None) -> float:
    """Adapter weight orthogonality magnitude: how far A1^T A2 is from zero (paper, definition 1).

    The paper says "l2 norm" and not of what. Here it is that of the elements, the Frobenius norm: the distance from the
    zero matrix, which is how the paper explains the metric, beside AWOR, which counts elements. Of whole adapters it is
    the root of the sum of squares over all tensors.

    Args:
        a, b: adapters or their files.
        base: what they were trained on, as in `shira.fuse`; needed for adapters of kind "replace", for files without
            indices, and where the adapters have the names of different checkpoints of one model.

    Raises:
        ValueError: there is no base and one is needed, or it is another one; the adapters have a tensor in different
            shapes; a delta is not finite; a file is not a valid adapter (AdapterFormatError).
        OSError: a file cannot be read.
    """
    return sum(interference(a, b, base).values(), Interference()).awom


def awor(a: Source, b: Source, base: Base | None = None) -> float:
    """Adapter weight orthogonality ratio: the share of zeros in A1^T A2 (paper, definition 2).

    Elements are computed in float64 and count as zero by value, so also where their terms cancel exactly. Of whole
    adapters it is the share over the products of all tensors that at least one of them changes.

    Arguments and errors as in `awom`.
    """
    return sum(interference(a, b, base).values(), Interference()).awor


def overlap(a: Source, b: Source, base: Base | None = None) -> float:
    """Of the entries that at least one of two adapters changes, the share that both change (Jaccard).

    It counts the entries that they list, whatever their values. `overlaps` has the counts of each tensor.

    Args:
        a, b: adapters or their files.
        base: what they were trained on, as in `shira.fuse`; needed for files without indices, and where the adapters
            have the names of different checkpoints of one model, since without it only equal names meet.

    Raises:
        ValueError: the adapters have a tensor in different shapes; a file is not a valid adapter (AdapterFormatError).
        OSError: a file cannot be read.
    """
    return sum(overlaps(a, b, base).values(), Overlap()).overlap


def overlaps(a: Source, b: Source, base: Base | None = None) -> dict[str, Overlap]:
    """By tensor, for all tensors that at least one adapter changes, those of `a` first. Arguments as in `overlap`."""
    return {name: overlap_of(first, second) for name, first, second in pairs(_loaded(a, base), _loaded(b, base))}


def interference(a: Source, b: Source, base: Base | None = None) -> dict[str, Interference]:
    """By tensor, for all tensors that at least one adapter changes, those of `a` first. Arguments as in `awom`."""
    return {
        name: interference_of(first, second) for name, first, second in pairs(as_deltas(a, base), as_deltas(b, base))
    }


def as_deltas(adapter: Source, base: Base | None = None) -> Adapter:
    """The adapter as one of kind "add". Errors as in `awom`; also a ValueError naming a delta that is not finite."""
    adapter = _loaded(adapter, base)
    tensors = {}
    for tensor, (name, (indices, values)) in zip(adapter.values(), deltas(adapter, base).items(), strict=True):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: the deltas are not all finite")
        tensors[name] = AdapterTensor(indices.cpu(), values.cpu(), tensor.shape, tensor.dtype, "add")
    return Adapter(tensors)


def pairs(a: Adapter, b: Adapter) -> Iterator[tuple[str, AdapterTensor | None, AdapterTensor | None]]:
    """The name of each tensor that at least one adapter changes, and what either has of it.

    Raises ValueError where their shapes differ.
    """
    own, others = _by_name(a), _by_name(b)
    for name in own | others:
        tensor, other = own.get(name), others.get(name)
        if tensor and other and tensor.shape != other.shape:
            raise ValueError(f"{name}: the adapters were made for different shapes, {tensor.shape} and {other.shape}")
        yield name, tensor, other


def overlap_of(first: AdapterTensor | None, second: AdapterTensor | None) -> Overlap:
    """The overlap of two adapters in one tensor, which one of them may lack."""
    entries = (first.nnz if first else 0, second.nnz if second else 0)
    return Overlap(entries, _common(first, second)[0].numel() if first and second else 0)


def interference_of(first: AdapterTensor | None, second: AdapterTensor | None) -> Interference:
    """The interference of two adapters of kind "add" in one tensor, which one of them may lack.

    In float64, on the CPU. Beside a few numbers per entry it needs (rows + columns) * 64 numbers of memory: neither the
    tensors nor the product are ever whole. The time is that of (entries * columns) sparse multiplications: about a
    second for two tensors of 4096 x 4096 at 2 %.
    """
    either = first or second
    if either is None:
        raise ValueError("first or second must be given")
    rows, columns = (either.shape[0], math.prod(either.shape[1:])) if either.shape else (1, 1)
    found, energy = overlap_of(first, second), (energy_of(first), energy_of(second))
    opposite, product_energy, product_nonzeros = 0, 0.0, 0
    if first and second and first.nnz and second.nnz:
        at, there = _common(first, second)
        opposite = int((first.values[at].sign() * second.values[there].sign() < 0).sum())
        product_energy, product_nonzeros = _product(_matrix(first, columns), _matrix(second, columns), rows, columns)
    return Interference(
        found.entries,
        found.common,
        opposite=opposite,
        energy=energy,
        product_energy=product_energy,
        product_nonzeros=product_nonzeros,
        product_numel=columns**2,
        product_bound=energy[0] * energy[1],
    )


def energy_of(tensor: AdapterTensor | None) -> float:
    """The sum of squares of a tensor's values; 0 if there is none."""
    return float(tensor.values.double().square().sum()) if tensor else 0.0


def _loaded(source: Source, base: Base | None) -> Adapter:
    if not isinstance(source, (Adapter, str, os.PathLike)):
        raise ValueError(f"an adapter must be an Adapter or the path of its file, got {source!r}")
    adapter = source if isinstance(source, Adapter) else Adapter.load(source, base=base)
    return adapter if base is None else placed(adapter, BaseTensors(base))  # two adapters may name it differently


def _by_name(adapter: Adapter) -> dict[str, AdapterTensor]:
    tensors = {canonical(name): tensor for name, tensor in adapter.items()}
    if len(tensors) < len(adapter):
        raise ValueError(f"the adapter names a tensor twice: {', '.join(adapter)}")
    return tensors


def _plus(a: Any, b: Any) -> Any:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a + b


def _common(first: AdapterTensor, second: AdapterTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in either adapter's list the entries stand that both have: int64, in order, on the CPU."""
    wanted, listed = first.indices.cpu().long(), second.indices.cpu().long()
    place = torch.searchsorted(listed, wanted)
    found = (place < listed.numel()).nonzero().squeeze(1)
    found = found[listed[place[found]] == wanted[found]]
    return found, place[found]


@dataclass(frozen=True)
class _Matrix:
    """Entries of a matrix by column, from top to bottom."""

    row: torch.Tensor
    starts: torch.Tensor  # [columns + 1]: where each column begins
    values: torch.Tensor  # float64


def _matrix(tensor: AdapterTensor, columns: int) -> _Matrix:
    indices = tensor.indices.long()
    column, order = (indices % columns).sort(stable=True)
    starts = torch.searchsorted(column, torch.arange(columns + 1, device=column.device))
    return _Matrix((indices // columns)[order], starts, tensor.values.double()[order])


def _product(first: _Matrix, second: _Matrix, rows: int, columns: int) -> tuple[float, int]:
    """Sum of squares and number of nonzeros of A1^T A2, or of A2^T A1, which has the same.

    A block of A1's columns at a time is dense, [rows, 64]; the sparse A2^T times that is 64 columns of A2^T A1.
    Torch has a product of two sparse matrices too, but not on all CPUs, and here it is slower where it has: of the
    elements of the product of two 4096 x 4096 matrices at 2 %, four of five are not zero.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        transposed = torch.sparse_csr_tensor(
            second.starts,
            second.row,
            second.values,
            (columns, rows),
            device=second.values.device,
            check_invariants=False,
        )
    energy, nonzeros = 0.0, 0
    for left in range(0, columns, _BLOCK):
        width = min(_BLOCK, columns - left)
        counts = first.starts[left : left + width + 1].diff()
        here = slice(int(first.starts[left]), int(first.starts[left + width]))
        block = first.values.new_zeros(rows, width)
        block[first.row[here], torch.arange(width, device=counts.device).repeat_interleave(counts)] = first.values[here]
        product = (transposed @ block).view(-1)
        energy += float(product.dot(product))
        nonzeros += int(product.count_nonzero())
    return energy, nonzeros
