"""The difference of two checkpoints as an adapter, read two tensors at a time."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from shira.adapter.adapter import DTYPES, Adapter, AdapterTensor, checksum_of
from shira.files.checkpoint import Base, open_tensors
from shira.files.progress import Progress, no_progress
from shira.model.names import canonical
from shira_kernels import extract_changed, topk_indices

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
        top: of each tensor keep only the changes that are largest in magnitude, so many that they are at most this
            share of its entries, above 0 and up to 1; at least one. Of equal ones the first.
        common: leave out tensors that only one side has, instead of refusing them.
        progress: called before each tensor, with how many are done, how many there are, and its name.

    Returns:
        An adapter on the CPU of the tensors that changed, under their canonical names, in base's order, with checksums
        of the base's entries. Its provenance is {"diff": {"base": the file or folder's name or null, "tuned": ...}},
        and with `top` in there also "top"; "energy", by tensor the share of the sum of squared changes that is kept;
        and "energy_kept", that of all tensors together.

    Raises:
        ValueError: naming the tensor: only one side has it (a tensor that shares its memory with another one counts as
            that one), the sides have it with another shape or dtype, it changed and is not floating point (float64,
            float32, bfloat16 or float16), or is on the meta device; `top` out of range, or changes that are not finite
            with `top`; a file that is no whole safetensors file.
        OSError: a file cannot be read.

    Warns:
        UserWarning: tensors of which more than a tenth changed (`SPARSE_UP_TO`): they are kept whole unless `top` says
            otherwise, but an adapter saves little there.
    """
    check_top(top)
    sides = {"base": _own_names(base, "base"), "tuned": _own_names(tuned, "tuned")}
    names = _common_names(sides["base"], sides["tuned"], common)
    tensors: dict[str, AdapterTensor] = {}
    energies: Energies = {}
    for done, name in enumerate(names):
        progress(done, len(names), name)
        part, energy = changes(name, sides["base"].read(name), sides["tuned"].read(name), top)
        if part is not None:
            tensors[name] = part
            energies[name] = energy
    progress(len(names), len(names), "")
    warn_where_not_sparse(tensors, stacklevel=4)
    origin = {"base": _file_name(base), "tuned": _file_name(tuned), **energy_facts(top, energies)}
    return Adapter(tensors, provenance={"diff": origin})


def check_top(top: float | None) -> None:
    """Refuses with ValueError what is no share."""
    if top is not None and not 0 < top <= 1:
        raise ValueError(f"top must be a share of each tensor's entries, above 0 and up to 1, got {top!r}")


def energy_facts(top: float | None, energies: Energies) -> dict[str, Any]:
    """What a provenance says of `top`; nothing without."""
    if top is None:
        return {}
    for name, (_, energy) in energies.items():
        if not math.isfinite(energy):
            raise ValueError(f"{name}: the squares of its changes are too large to sum: leave out `top`")
    kept, of_all = (sum(energy[i] for energy in energies.values()) for i in (0, 1))
    by_tensor = {name: _share(*energy) for name, energy in energies.items()}
    return {"top": float(top), "energy": by_tensor, "energy_kept": _share(kept, of_all)}


class _Side:
    """The tensors of one side by canonical name; those that share their memory with an earlier one are its aliases."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], argument: str) -> None:
        self._tensors = tensors
        self.own: dict[str, str] = {}
        for own in tensors:
            name = canonical(own)
            if name in self.own:
                raise ValueError(f"{argument} has the tensor {name!r} twice: as {self.own[name]!r} and as {own!r}")
            self.own[name] = own
        self.aliases = self._aliases()

    def _aliases(self) -> dict[str, str]:
        if not isinstance(self._tensors, dict):  # of a file: tensors there have memory of their own
            return {}
        first: dict[tuple[Any, ...], str] = {}
        aliases = {}
        for name, own in self.own.items():
            tensor = self._tensors[own]
            if tensor.numel() and not tensor.is_meta:
                memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if first.setdefault(memory, name) != name:
                    aliases[name] = first[memory]
        return aliases

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[self.own[name]].detach()


def _own_names(base: Base, argument: str) -> _Side:
    return _Side(open_tensors(base, argument), argument)


def _common_names(base: _Side, tuned: _Side, common: bool) -> list[str]:
    """The tensors to compare. Of tied ones the first; a name that only one side has must be such an alias."""
    for here, there, what in ((base, tuned, "tuned lacks"), (tuned, base, "base lacks")):
        missing = [name for name in here.own if name not in there.own and here.aliases.get(name) not in there.own]
        if missing and not common:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{what} the tensor {missing[0]!r}{more}; compare those that both have with `common`")
    both = [name for name in base.own if name in tuned.own]
    if not both:
        raise ValueError("base and tuned have no tensor of the same name")
    # Tied on both sides to the same tensor: kept once.
    return [
        name for name in both if base.aliases.get(name) is None or base.aliases.get(name) != tuned.aliases.get(name)
    ]


def changes(
    name: str, base: torch.Tensor, tuned: torch.Tensor, top: float | None
) -> tuple[AdapterTensor | None, tuple[float, float]]:
    """The changed entries of one tensor, None if there are none, and the energy of what is kept, and of all."""
    for tensor, side in ((base, "base"), (tuned, "tuned")):
        if tensor.is_meta:
            raise ValueError(f"{name}: {side}'s tensor is on the meta device and holds no data")
    for field in ("shape", "dtype"):
        old, new = getattr(base, field), getattr(tuned, field)
        if old != new:
            old, new = (tuple(side) if field == "shape" else side for side in (old, new))
            raise ValueError(f"{name}: the {field} is {old} in base, but {new} in tuned")
    indices, values = extract_changed(base, tuned.to(base.device))
    if not indices.numel():
        return None, (0.0, 0.0)
    if base.dtype not in DTYPES:
        raise ValueError(
            f"{name}: {indices.numel()} entries changed, but only float64, float32, bfloat16 and float16 tensors may, "
            f"not {base.dtype}"
        )
    entries = base.reshape(-1)[indices.long()]
    energy = (0.0, 0.0)
    if top is not None:
        kept, energy = _largest(name, entries, values, max(1, int(top * base.numel())))
        indices, values, entries = (as_kept[kept] for as_kept in (indices, values, entries))
    part = AdapterTensor(indices.cpu(), values.cpu(), tuple(base.shape), base.dtype, "replace", checksum_of(entries))
    return part, energy


def _largest(
    name: str, entries: torch.Tensor, values: torch.Tensor, k: int
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Which of the changed entries are among the k that changed most, and the energy of those, and of all."""
    change = values.to(torch.promote_types(values.dtype, torch.float32)) - entries
    if not bool(change.isfinite().all()):
        raise ValueError(f"{name}: `top` cannot rank changes that are not finite")
    kept = topk_indices(change.abs(), min(k, change.numel())).long()
    squares = change.double().square()
    return kept, (float(squares[kept].sum()), float(squares.sum()))


def _share(kept: float, of_all: float) -> float:
    return kept / of_all if of_all else 1.0


def warn_where_not_sparse(tensors: Mapping[str, AdapterTensor], stacklevel: int) -> None:
    """One warning for all tensors that are not sparse."""
    dense = {name: part.nnz / part.numel for name, part in tensors.items() if part.nnz > SPARSE_UP_TO * part.numel}
    if dense:
        first = ", ".join(f"{name} ({density:.1%})" for name, density in list(dense.items())[:3])
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        warnings.warn(
            f"not sparse: more than {SPARSE_UP_TO:.0%} of the entries changed in {first}{more}; "
            "`top` keeps only the largest changes",
            stacklevel=stacklevel,
        )


def _file_name(base: Base) -> str | None:
    return os.path.basename(os.path.abspath(base)) if isinstance(base, (str, os.PathLike)) else None
