"""The difference of two checkpoints as an adapter, read two tensors at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shira.adapter.adapter import Adapter
from shira.adapter.base import BaseTensors, same_bits
from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import DTYPES, AdapterTensor
from shira.files.checkpoint import Base
from shira.files.errors import Argument, ArgumentError, Piece, warn
from shira.files.progress import Progress, no_progress
from shira_kernels import extract_changed, topk_indices
from shira_kernels.bits import gathered
from shira_kernels.dtypes import ARITHMETIC, compute_dtype

# Above this share of changed entries a tensor is called not sparse. At 10 % of a bfloat16 tensor 97 % of its memory
# lines of 64 bytes are touched: a switch moves as much memory as one that writes the whole tensor.
SPARSE_UP_TO = 0.1

Energies = dict[str, tuple[float, float]]  # by tensor: of the changes that are kept, and of all


@torch.no_grad()
def diff(
    base: Base,
    tuned: Base,
    *,
    top: float | None = None,
    common: bool = False,
    progress: Progress = no_progress,
) -> Adapter:
    """What makes `tuned` of `base`, as an adapter of kind "replace": the entries whose bits differ, and tuned's values.

    Applying it to the base gives `tuned` bit for bit, unless `top` leaves something out. From files one tensor of each
    side is in memory at a time.

    Args:
        base: a model, its state dict, a safetensors file, or a folder of such files.
        tuned: the same model with other weights, in any of these forms. Names may have PEFT's prefixes on either side.
        top: of each tensor keep only the changes that are largest in magnitude, as many as are at most this share of
            its entries, above 0 and up to 1, but at least one. Of equal changes the first is kept. Tensors of other
            types than float64, float32, bfloat16 and float16 are kept whole: what they hold may be codes, not numbers.
        common: leave out tensors that only one side has, instead of refusing them.
        progress: called before each tensor, with how many are done, how many there are, and its name.

    Returns:
        An adapter on the CPU of the tensors that changed, under their canonical names, in base's order, with checksums
        of the base's entries. Its provenance is {"diff": {"base": the file or folder's name or null, "tuned": ...}},
        and with `top` in there also "top"; "energy", by tensor the share of the sum of squared changes that is kept;
        and "energy_kept", that of all tensors together.

    Raises:
        ValueError: naming the tensor: only one side has it (a tensor that shares its memory with another one counts as
            that one), base has it as one with another and tuned has two that differ, the sides have it with another
            shape or dtype, it changed and is of a dtype that an adapter cannot hold (such as complex ones), is on the
            meta device, or sparse or quantized; `top` out of range, or changes that are not finite with `top`; a file
            that is not a whole safetensors file.
        OSError: a file cannot be read.

    Warns:
        ShiraWarning: tensors of which more than a tenth changed (`SPARSE_UP_TO`): they are kept whole unless `top` says
            otherwise, but an adapter saves little there.
    """
    check_top(top)
    old, new = BaseTensors(base), BaseTensors(tuned, "tuned")
    for side in (old, new):
        side.check_names()
    names = _common_names(old, new, common)
    tensors: dict[str, AdapterTensor] = {}
    energies: Energies = {}
    for done, (name, partner) in enumerate(names.items()):
        progress(done, len(names), name)
        before = old[name]
        tensor, energy = changes(name, before, new.of_shape(partner, tuple(before.shape)), top)
        del before  # before the next is read
        if tensor is not None:
            tensors[name] = tensor
            energies[name] = energy
    progress(len(names), len(names), "")
    warn_where_not_sparse(tensors)
    origin = {"base": _file_name(base), "tuned": _file_name(tuned), **energy_facts(top, energies)}
    return Adapter(tensors, provenance={"diff": origin})


def check_top(top: float | None) -> None:
    """Refuses with ValueError what is not a share."""
    if top is not None and not 0 < top <= 1:
        raise ValueError(f"top must be a share of each tensor's entries, above 0 and up to 1, got {top!r}")


def energy_facts(top: float | None, energies: Energies) -> dict[str, Any]:
    """What a provenance says of `top`; nothing without."""
    if top is None:
        return {}
    for name, (_, energy) in energies.items():
        if not math.isfinite(energy):
            raise ArgumentError(f"{name}: the squares of its changes are too large to sum: leave out ", Argument("top"))
    kept, of_all = (sum(energy[i] for energy in energies.values()) for i in (0, 1))
    by_tensor = {name: _share(*energy) for name, energy in energies.items()}
    return {"top": float(top), "energy": by_tensor, "energy_kept": _share(kept, of_all)}


def _common_names(base: BaseTensors, tuned: BaseTensors, common: bool) -> dict[str, str]:
    """The tensors to compare, and tuned's name of each. Of tied ones the first; a name that only one side has must be
    such an alias."""
    aliases, others = base.aliases(), tuned.aliases()
    partners = _partners(base, aliases, tuned)
    for here, found, what in ((base, partners, "tuned lacks"), (tuned, _partners(tuned, others, base), "base lacks")):
        missing = [name for name in here if name not in found]
        if missing and not common:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ArgumentError(
                f"{what} the tensor {missing[0]!r}{more}; compare those that both have with ", Argument("common")
            )
    for name in tuned:
        if not base.has(name):
            _check_tied(name, base.own_names(name), tuned)
    for name, first in aliases.items():
        if name in tuned and others.get(name, name) != others.get(first, first):
            _check_tied(name, [first], tuned)
    both = {name: partner for name, partner in partners.items() if name not in aliases}
    if not both:
        raise ValueError("base and tuned have no tensor of the same name")
    return both


def _partners(here: BaseTensors, aliases: Mapping[str, str], there: BaseTensors) -> dict[str, str]:
    """The name that another side has each tensor under: the same, or if it is tied another of its names."""
    uses: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        uses.setdefault(first, []).append(alias)
    found = {}
    for name in here:
        first = aliases.get(name, name)
        partner = next((use for use in (name, first, *uses.get(first, ())) if use in there), None)
        if partner is not None:
            found[name] = partner
    return found


def _check_tied(name: str, others: Sequence[str], tuned: BaseTensors) -> None:
    """Refuses a tensor that base has as one with others of which tuned has one too, and with other values."""
    for other in others:
        if tuned.has(other) and not same_bits(tuned[name], tuned[other]):
            reason = f"base has it and {other!r} as one tensor, and in tuned they differ"
            raise ValueError(f"{name}: {reason}: compare with a base that has two")


def changes(
    name: str, base: torch.Tensor, tuned: torch.Tensor, top: float | None
) -> tuple[AdapterTensor | None, tuple[float, float]]:
    """The changed entries of one tensor, None if there are none, and the energy of what is kept, and of all."""
    for tensor, side in ((base, "base"), (tuned, "tuned")):
        if tensor.is_meta:
            raise ValueError(f"{name}: {side}'s tensor is on the meta device and holds no data")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name}: {side}'s tensor must be dense and plain, got {tensor.layout} {tensor.dtype}")
    for field in ("shape", "dtype"):
        old, new = getattr(base, field), getattr(tuned, field)
        if old != new:
            old, new = (tuple(side) if field == "shape" else side for side in (old, new))
            raise ValueError(f"{name}: the {field} is {old} in base, but {new} in tuned")
    tuned = tuned.to(base.device)
    if base.dtype not in DTYPES:
        if not torch.equal(_bytes_of(base), _bytes_of(tuned)):
            raise ValueError(f"{name}: it changed and is {base.dtype}, which no adapter can hold")
        return None, (0.0, 0.0)
    indices, values = extract_changed(base, tuned)
    if not indices.numel():
        return None, (0.0, 0.0)
    entries = gathered(base.resolve_neg().contiguous(), indices)
    energy = (0.0, 0.0)
    if top is not None and base.dtype in ARITHMETIC:
        kept, energy = _largest(name, entries, values, max(1, int(top * base.numel())))
        indices, values, entries = (as_kept[kept] for as_kept in (indices, values, entries))
    changed = AdapterTensor(indices.cpu(), values.cpu(), tuple(base.shape), base.dtype, "replace", checksum_of(entries))
    return changed, energy


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of any dtype, byte by byte."""
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _largest(
    name: str, entries: torch.Tensor, values: torch.Tensor, k: int
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Which of the changed entries are among the k that changed most, and the energy of those, and of all."""
    change = values.to(compute_dtype(values.dtype)) - entries
    if not bool(change.isfinite().all()):
        raise ArgumentError(f"{name}: ", Argument("top"), " cannot rank changes that are not finite")
    kept = topk_indices(change.abs(), min(k, change.numel())).long()
    squares = change.double().square()
    return kept, (float(squares[kept].sum()), float(squares.sum()))


def _share(kept: float, of_all: float) -> float:
    return kept / of_all if of_all else 1.0


def warn_where_not_sparse(tensors: Mapping[str, AdapterTensor]) -> None:
    """One warning for all tensors that are not sparse, of which a single number is not one."""
    dense = {n: t.nnz / t.numel for n, t in tensors.items() if t.nnz > SPARSE_UP_TO * t.numel and t.numel > 1}
    if dense:
        first = ", ".join(f"{name} ({density:.1%})" for name, density in list(dense.items())[:3])
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        ranked = any(tensors[name].dtype in ARITHMETIC for name in dense)
        hint: Piece = ("; ", Argument("top"), " keeps only the largest changes") if ranked else ""
        warn(f"not sparse: more than {SPARSE_UP_TO:.0%} of the entries changed in {first}{more}", hint)


def _file_name(base: Base) -> str | None:
    return os.path.basename(os.path.abspath(base)) if isinstance(base, (str, os.PathLike)) else None
