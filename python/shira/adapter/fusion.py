"""Fusion: what adapters add to a base, and several adapters as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch

from shira.adapter.adapter import Adapter
from shira.adapter.base import BaseTensors, check_base, check_fits, entries_of
from shira.adapter.checksum import checksum_of
from shira.adapter.placed import placed
from shira.adapter.tensor import AdapterTensor, check_strengths
from shira.files.checkpoint import Base
from shira.files.errors import Argument, ArgumentError, Piece
from shira.files.progress import Progress, no_progress
from shira.model.names import canonical
from shira_kernels import fuse_adapters
from shira_kernels.dtypes import ARITHMETIC, compute_dtype
from shira_kernels.ops.fuse_adapters import POLICIES


@torch.no_grad()
def fuse(
    adapters: Sequence[tuple[Adapter | str | os.PathLike[str], float]],
    policy: str = "sum",
    base: Base | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> Adapter:
    """Several adapters as one, of kind "add": what they change together, entry by entry.

    With policy "sum", applying the result is what `ResidentAdapters.switch` does for a mix of the same strengths:
    float32 sums, rounded once. Bits may differ for float64 tensors, since strengths are float32 here; where the bank
    takes the adapters in another order; and with a single adapter of kind "replace" at strength 1, which the bank
    copies, while base + (value - base) is rounded.

    Args:
        adapters: at least one pair of an adapter, or its file, and its strength, which is rounded to float32.
        policy: how entries that several adapters change are combined, of the deltas times their strengths: "sum";
            "mean": the sum, divided by the number of adapters that have the entry; "ties": the mean of those whose sign
            is that of the sum; "last": the delta of the last adapter that has the entry, whatever the strengths.
        base: the tensors that the adapters were made for: a model whose weights hold them now, a state dict, or the
            path of a safetensors file or of a folder of them. Adapters of kind "replace" and files without indices
            need it.
        force: fuse also adapters that were made for another base.
        progress: called before each tensor, with how many are done, how many there are, and its name.

    Returns:
        An adapter with float32 values (float64 for float64 tensors), which are rounded only where they are applied.
        Tensors of types that can only be replaced, such as int8, stay as they are, of kind "replace".
        Names are canonical, in a model as base those of a tensor's first use. Checksums are those of the base's entries
        over the union; with no base, that of an adapter that has all of the union's entries, else None. Its
        `provenance` is {"policy": ..., "adapters": [{"name": the file's name or null, "weight": ..., "kind": "add",
        "replace", "add+replace" or null if it changes nothing, "nnz": ..., "config": ... or null}]}; an adapter that
        has a provenance keeps it in its entry under "provenance".

    Raises:
        ValueError: naming the adapter's position and the tensor: one of kind "replace" and no base, a base that
            lacks the tensor, has it with another shape or dtype, or other entries than the adapter was made for, two
            adapters that disagree about a tensor's shape or dtype; a tensor that can only be replaced, at another
            strength than 1 or in several adapters; no adapter, a strength that is not finite, an unknown policy, a file
            that is not a valid adapter (AdapterFormatError).
        OSError: a file cannot be read.

    Warns:
        ShiraWarning: a base is given and a tensor has no checksum, so that it cannot be told whether they belong
            together.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    loaded = [_loaded(Argument("adapters", position), pair, base) for position, pair in enumerate(adapters)]
    if not loaded:
        raise ValueError("adapters must hold at least one pair of an adapter and its strength")
    weights = None if base is None else BaseTensors(base)
    if weights is not None:
        for position, (name, adapter, strength) in enumerate(loaded):
            argument = (Argument("adapters", position), ": ")
            loaded[position] = name, placed(adapter, weights, force=force, argument=argument), strength
    by_name: dict[str, list[_Summand]] = {}
    for position, (_, adapter, strength) in enumerate(loaded):
        for name, (label, tensor) in _by_name(adapter, weights).items():
            summand = _Summand((Argument("adapters", position), f": {label}"), tensor, strength)
            by_name.setdefault(name, []).append(summand)
    tensors = {}
    for done, (name, summands) in enumerate(by_name.items()):
        progress(done, len(by_name), name)
        tensors[name] = _fused(name, summands, None if weights is None else weights[name], policy, force)
    return Adapter(tensors, provenance={"policy": policy, "adapters": [_origin(*entry) for entry in loaded]})


def checked_strength(called: Piece, strength: float) -> float:
    """Refuses with ValueError what is not a finite float32 number; `called` is what the message calls it."""
    largest = torch.finfo(torch.float32).max
    if not isinstance(strength, Real) or not -largest <= strength <= largest:
        raise ArgumentError(called, f" must be a finite float32 number, got {strength!r}")
    return float(strength)


@dataclass(frozen=True)
class _Summand:
    """An adapter's entries of one tensor, and their strength."""

    label: tuple[Argument, str]  # in messages: the adapter, and its name of the tensor
    tensor: AdapterTensor
    strength: float


def _loaded(
    argument: Argument, pair: tuple[Adapter | str | os.PathLike[str], float], base: Base | None
) -> tuple[str | None, Adapter, float]:
    """The file's name if there is one, the adapter, and its strength."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], (Adapter, str, os.PathLike)):
        raise ArgumentError(argument, f" must be a pair (adapter or its path, strength), got {pair!r}")
    adapter, strength = pair[0], checked_strength((argument, ": the strength"), pair[1])
    if isinstance(adapter, Adapter):
        return None, adapter, strength
    return os.path.basename(adapter), Adapter.load(adapter, base=base), strength


def _origin(name: str | None, adapter: Adapter, strength: float) -> dict[str, Any]:
    """What the provenance says of one adapter."""
    origin = {
        "name": name,
        "weight": strength,
        "kind": "+".join(sorted({tensor.kind for tensor in adapter.values()})) or None,
        "nnz": adapter.nnz,
        "config": adapter.config and adapter.config.to_dict(),
    }
    return origin if adapter.provenance is None else {**origin, "provenance": adapter.provenance}


def _fused(name: str, summands: list[_Summand], weight: torch.Tensor | None, policy: str, force: bool) -> AdapterTensor:
    """What several adapters have of one tensor, as one. `weight` is the base's tensor, if there is a base."""
    first = summands[0].tensor
    if copied := [summand.tensor.dtype for summand in summands if summand.tensor.dtype not in ARITHMETIC]:
        check_strengths(name, copied[0], [(summand.label[0], summand.strength) for summand in summands])
        return _copied(summands[0], weight, force)
    device = first.indices.device
    indices, values = [], []
    for label, tensor in ((summand.label, summand.tensor) for summand in summands):
        for field in ("shape", "dtype"):
            own, others = getattr(tensor, field), getattr(first, field)
            if own != others:
                raise ArgumentError(label, f": the tensor's {field} is {own}, but {others} in ", summands[0].label)
        values.append(_delta(label, tensor, weight, force).to(device))
        indices.append(tensor.indices.to(device))
    strengths = torch.tensor([summand.strength for summand in summands], dtype=torch.float32, device=device)
    union, fused = fuse_adapters(indices, values, strengths, policy)
    if weight is not None:
        checksum: str | None = checksum_of(entries_of(weight, union))
    else:
        known = {s.tensor.checksum for s in summands if s.tensor.nnz == union.numel()} - {None}
        if len(known) > 1 and not force:
            raise ArgumentError(summands[-1].label, ": the adapters were made for different bases")
        checksum = known.pop() if len(known) == 1 else None
    return AdapterTensor(union, fused, first.shape, first.dtype, "add", checksum)


def _copied(summand: _Summand, weight: torch.Tensor | None, force: bool) -> AdapterTensor:
    """An adapter's tensor as it is, with the checksum of the base's entries if there is a base."""
    tensor = summand.tensor
    if weight is None:
        return tensor
    check_fits(summand.label, tensor, weight)
    entries = entries_of(weight, tensor.indices)
    if not force:
        check_base(summand.label, tensor, entries)
    return replace(tensor, checksum=checksum_of(entries))


@torch.no_grad()
def deltas(adapter: Adapter, base: Base | None, *, force: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What an adapter adds to the base.

    Args:
        adapter: of any kind; tensors of kind "add" are deltas already, those of kind "replace" need the base.
        base: the tensors that the adapter was made for, with names in any spelling; None if there is none.
        force: use the base also where its entries do not have the adapter's checksum.

    Returns:
        canonical name of the tensor -> (indices as the adapter has them, [nnz] float32, of float64 tensors float64:
        the values of kind "add", value - base of kind "replace"), on the adapter's device.

    Raises:
        ValueError: naming the tensor: one of kind "replace" and no base, or of a dtype whose entries can only be
            replaced; a base that lacks the tensor, has it with another shape or dtype, or other entries than the
            adapter was made for; a tensor named twice.
        OSError: the base's file cannot be read.

    Warns:
        ShiraWarning: a tensor has no checksum, so that it cannot be told whether it was made for this base.
    """
    weights = None if base is None else BaseTensors(base)
    return {
        name: (tensor.indices, _delta(label, tensor, None if weights is None else weights[name], force))
        for name, (label, tensor) in _by_name(adapter, weights).items()
    }


def _by_name(adapter: Adapter, weights: BaseTensors | None) -> dict[str, tuple[str, AdapterTensor]]:
    """Canonical name, in a model that of the first use -> the adapter's own name, and its tensor."""
    found: dict[str, tuple[str, AdapterTensor]] = {}
    for label, tensor in adapter.items():
        name = canonical(label) if weights is None else weights.find(label)
        if name in found:
            raise ValueError(f"{label}: the adapter names the tensor {name!r} twice")
        found[name] = (label, tensor)
    return found


def _delta(label: Piece, tensor: AdapterTensor, weight: torch.Tensor | None, force: bool) -> torch.Tensor:
    """[nnz] in the type that deltas are computed in."""
    if tensor.dtype not in ARITHMETIC:
        raise ArgumentError(label, f": it is {tensor.dtype}, whose entries can be replaced but have no differences")
    dtype = compute_dtype(tensor.dtype)
    values = tensor.values.to(dtype)
    if weight is None:
        if tensor.kind == "replace":
            reason = ": a part of kind 'replace' becomes a delta by subtracting the base: give "
            raise ArgumentError(label, reason, Argument("base"))
        return values
    check_fits(label, tensor, weight)
    entries = entries_of(weight, tensor.indices)
    if not force:
        check_base(label, tensor, entries)
    return values if tensor.kind == "add" else values - entries.to(dtype)
