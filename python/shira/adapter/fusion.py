"""Fusion: what adapters add to a base, and several adapters as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from shira.adapter.adapter import Adapter, AdapterTensor, checksum_of
from shira.adapter.base import Find, Read, check_base, check_fits, entries_of, opened
from shira.files.checkpoint import Base
from shira.files.progress import Progress, no_progress
from shira_kernels import fuse_adapters
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
        Names are canonical, in a model as base those of a tensor's first use. Checksums are those of the base's entries
        over the union; with no base, that of a part that has all of the union's entries, else None. Its `provenance` is
        {"policy": ..., "adapters": [{"name": the file's name or null, "weight": ..., "kind": "add", "replace",
        "add+replace" or null if it changes nothing, "nnz": ..., "config": ... or null}]}; an adapter that has a
        provenance keeps it in its entry under "provenance".

    Raises:
        ValueError: naming the adapter's position and the tensor: a part of kind "replace" and no base, a base that
            lacks the tensor, has it with another shape or dtype, or other entries than the adapter was made for, two
            adapters that disagree about a tensor's shape or dtype; no adapter, a strength that is not finite, an
            unknown policy, a file that is no valid adapter (AdapterFormatError).
        OSError: a file cannot be read.

    Warns:
        UserWarning: a base is given and a part has no checksum, so that it cannot be told whether they belong together.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    loaded = [_loaded(position, pair, base) for position, pair in enumerate(adapters)]
    if not loaded:
        raise ValueError("adapters must hold at least one pair of an adapter and its strength")
    with opened(base) as find:
        by_name: dict[str, list[tuple[str, AdapterTensor, Read | None, float]]] = {}
        for position, (_, adapter, strength) in enumerate(loaded):
            for name, (label, tensor, read) in _parts(adapter, find).items():
                by_name.setdefault(name, []).append((f"adapters[{position}]: {label}", tensor, read, strength))
        tensors = {}
        for done, (name, parts) in enumerate(by_name.items()):
            progress(done, len(by_name), name)
            tensors[name] = _fused(parts, policy, force)
    return Adapter(tensors, provenance={"policy": policy, "adapters": [_origin(*entry) for entry in loaded]})


def _loaded(
    position: int, pair: tuple[Adapter | str | os.PathLike[str], float], base: Base | None
) -> tuple[str | None, Adapter, float]:
    """The file's name if there is one, the adapter, and its strength."""
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], (Adapter, str, os.PathLike)):
        raise ValueError(f"adapters[{position}] must be a pair (adapter or its path, strength), got {pair!r}")
    adapter, strength = pair
    largest = torch.finfo(torch.float32).max
    if not isinstance(strength, (int, float)) or not -largest <= strength <= largest:
        raise ValueError(f"adapters[{position}]: the strength must be a finite float32 number, got {strength!r}")
    if isinstance(adapter, Adapter):
        return None, adapter, float(strength)
    return os.path.basename(adapter), Adapter.load(adapter, base=base), float(strength)


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


def _fused(parts: list[tuple[str, AdapterTensor, Read | None, float]], policy: str, force: bool) -> AdapterTensor:
    """The parts of one tensor as one."""
    _, first, read, _ = parts[0]
    weight = read and read()
    device = first.indices.device
    indices, values = [], []
    for label, tensor, _, _ in parts:
        for field in ("shape", "dtype"):
            own, others = getattr(tensor, field), getattr(first, field)
            if own != others:
                raise ValueError(f"{label}: the tensor's {field} is {own}, but {others} in {parts[0][0]}")
        values.append(_delta(label, tensor, weight, force).to(device))
        indices.append(tensor.indices.to(device))
    strengths = torch.tensor([strength for *_, strength in parts], dtype=torch.float32, device=device)
    union, fused = fuse_adapters(indices, values, strengths, policy)
    if weight is not None:
        checksum: str | None = checksum_of(entries_of(weight, union))
    else:
        known = {tensor.checksum for _, tensor, _, _ in parts if tensor.nnz == union.numel()} - {None}
        if len(known) > 1 and not force:
            raise ValueError(f"{parts[-1][0]}: the adapters were made for different bases")
        checksum = known.pop() if len(known) == 1 else None
    return AdapterTensor(union, fused, first.shape, first.dtype, "add", checksum)


@torch.no_grad()
def deltas(adapter: Adapter, base: Base | None, *, force: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What an adapter adds to the base.

    Args:
        adapter: of any kind; parts of kind "add" are deltas already, those of kind "replace" need the base.
        base: the tensors that the adapter was made for, with names in any spelling; None if there is none.
        force: use the base also where its entries do not have the adapter's checksum.

    Returns:
        canonical name of the tensor -> (indices as the adapter has them, [nnz] float32, of float64 tensors float64:
        the values of kind "add", value - base of kind "replace"), on the adapter's device.

    Raises:
        ValueError: naming the tensor: a part of kind "replace" and no base, a base that lacks the tensor, has it with
            another shape or dtype, or other entries than the adapter was made for; a tensor named twice.
        OSError: the base's file cannot be read.

    Warns:
        UserWarning: a part has no checksum, so that it cannot be told whether it was made for this base.
    """
    with opened(base) as find:
        return {
            name: (tensor.indices, _delta(label, tensor, read and read(), force))
            for name, (label, tensor, read) in _parts(adapter, find).items()
        }


def _parts(adapter: Adapter, find: Find) -> dict[str, tuple[str, AdapterTensor, Read | None]]:
    """Canonical name -> the adapter's own name, its part, and how to read the base's tensor."""
    parts: dict[str, tuple[str, AdapterTensor, Read | None]] = {}
    for label, tensor in adapter.items():
        name, read = find(label)
        if name in parts:
            raise ValueError(f"{label}: the adapter names the tensor {name!r} twice")
        parts[name] = (label, tensor, read)
    return parts


def _delta(label: str, tensor: AdapterTensor, weight: torch.Tensor | None, force: bool) -> torch.Tensor:
    """[nnz] in the type that deltas are computed in."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    values = tensor.values.to(dtype)
    if weight is None:
        if tensor.kind == "replace":
            raise ValueError(f"{label}: a part of kind 'replace' becomes a delta by subtracting the base: give `base`")
        return values
    check_fits(label, tensor, weight)
    entries = entries_of(weight, tensor.indices)
    if not force:
        check_base(label, tensor, entries)
    return values if tensor.kind == "add" else values - entries.to(dtype)
