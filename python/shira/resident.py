"""Serving: several adapters beside one model, any of them (or a mix) written into its weights in place."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shira.adapter import Adapter, checksum_of
from shira.attach import check_base, check_claim, check_fits, claim
from shira.names import first_names, resolve
from shira_kernels import scatter_apply_batched


@dataclass
class _Part:
    """An adapter's entries of one tensor, on its device."""

    weight: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    additive: bool
    checksum: str  # of the base entries when the adapter was added


@dataclass
class _Batch:
    """Parts that one call of scatter_apply_batched writes: the same dtypes, device and kind."""

    weights: list[torch.Tensor]
    offsets: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    additive: bool

    @classmethod
    def of(cls, parts: list[_Part]) -> _Batch:
        """Concatenates parts, which then are views of the whole."""
        offsets = torch.tensor([0, *itertools.accumulate(part.indices.numel() for part in parts)])
        indices = torch.cat([part.indices for part in parts])
        values = torch.cat([part.values for part in parts])
        for part, place in zip(parts, _places(offsets), strict=True):
            part.indices, part.values = indices[place], values[place]
        return cls([part.weight for part in parts], offsets, indices, values, parts[0].additive)


@dataclass
class _Resident:
    parts: dict[str, _Part]  # by the adapter's names
    batches: list[_Batch]


class ResidentAdapters:
    """Adapters that stay beside a model and are switched in its live weights.

    The weights' addresses never change, and the entries that an adapter replaces are kept, so `switch(None)` gives the
    base back bit for bit after any sequence. The model's parameters, their dtypes and devices must stay those that were
    there when an adapter was added. Not for several threads at once.

    Args:
        model: any module. Names of its parameters are those of its state dict; PEFT's prefixes are understood.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._residents: dict[str, _Resident] = {}
        self._active: dict[str, float] = {}
        self._returns: list[dict[str, float]] = []  # what open `using` blocks go back to
        self._written: list[tuple[_Batch, torch.Tensor]] = []  # what is in the weights, with the old entries
        self._buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}  # where old entries are kept

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return list(self._residents)

    @property
    def active(self) -> str | dict[str, float] | None:
        """What the weights hold, as `switch` takes it: None is the base."""
        if list(self._active.values()) == [1.0]:
            return next(iter(self._active))
        return dict(self._active) or None

    @torch.no_grad()
    def add(self, name: str, adapter: str | os.PathLike[str] | Adapter, *, force: bool = False) -> None:
        """Checks an adapter and copies it to the model's devices. Never touches the weights, whatever is active.

        Args:
            name: to switch to it; not taken yet.
            adapter: the adapter or its file.
            force: take it also if it was made for another base.

        Raises:
            ValueError: the name is taken, the model lacks a tensor, or has it with another shape or dtype, the adapter
                was made for another base, or the file is no valid adapter (AdapterFormatError).
            OSError: the file cannot be read.

        Warns:
            UserWarning: the adapter has no checksum, so that it cannot be told whether it was made for this base.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter must be a string that is not empty, got {name!r}")
        if not isinstance(adapter, (str, os.PathLike, Adapter)):
            raise ValueError(f"an adapter must be an Adapter or the path of its file, got {adapter!r}")
        if name in self._residents:
            raise ValueError(f"an adapter named {name!r} was added already")
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter)
        self._residents[name] = self._prepare(adapter, force)

    def remove(self, name: str) -> None:
        """Forgets an adapter. Raises ValueError if there is none of that name, or it is active or `using` needs it."""
        self._check_names([name])
        if name in self._active or any(name in target for target in self._returns):
            raise ValueError(f"{name!r} is in use: switch to something else first")
        del self._residents[name]

    @torch.no_grad()
    def switch(self, target: str | Mapping[str, float] | None) -> None:
        """Writes an adapter, or a mix, in place of whatever is active.

        Args:
            target: a name; or strengths by name: base + the sum of strength (value - base), in float32 (float64 for
                float64 weights) and rounded once; or None for the base. One name at strength 1 gives exactly its
                values.

        Raises:
            ValueError: a name is unknown or a strength not finite. Nothing was changed.
            RuntimeError: entries of a weight are attached for training. Nothing was changed.

        If a write fails, every weight goes back to the base and the error is raised.
        """
        wanted = self._normalized(target)
        batches, strength = self._plan(wanted)
        buffers = self._buffers_for(batches)
        for batch in batches:
            for weight in batch.weights:
                check_claim("switch", weight, "ResidentAdapters")
        try:
            self._revert()
            for batch, saved in zip(batches, buffers, strict=True):
                self._write(batch, strength, saved)
            self._active = wanted
        except BaseException:
            self._revert()
            self._active = {}
            raise

    @contextlib.contextmanager
    def using(self, target: str | Mapping[str, float] | None) -> Iterator[None]:
        """Switches for the length of a `with` block, then back to what was active before."""
        before = self._active
        self.switch(target)
        self._returns.append(before)
        try:
            yield
        finally:
            self._returns.remove(before)
            self.switch(before or None)

    @torch.no_grad()
    def verify_base(self) -> None:
        """Compares the base under every adapter with what it was when the adapter was added, whatever is active.

        Raises ValueError naming the first adapter and tensor whose base entries are others.
        """
        kept = self._kept()
        for name, resident in self._residents.items():
            for tensor_name, part in resident.parts.items():
                if checksum_of(_base_entries(part.weight, part.indices, kept)) != part.checksum:
                    raise ValueError(f"{name}: {tensor_name}: the base entries changed since the adapter was added")

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._residents:
                raise ValueError(f"there is no adapter named {name!r}; there are {self.names}")

    def _normalized(self, target: str | Mapping[str, float] | None) -> dict[str, float]:
        """A target as strengths by name; empty for the base."""
        if target is None:
            return {}
        if not isinstance(target, (str, Mapping)):
            raise ValueError(f"switch takes a name, strengths by name, or None, got {target!r}")
        strengths = {target: 1.0} if isinstance(target, str) else dict(target)
        if not strengths:
            raise ValueError("a mix must name at least one adapter; the base is None")
        self._check_names(strengths)
        for name, strength in strengths.items():
            if not isinstance(strength, (int, float)) or not -sys.float_info.max <= strength <= sys.float_info.max:
                raise ValueError(f"the strength of {name!r} must be a finite number, got {strength!r}")
        return {name: float(strength) for name, strength in strengths.items()}

    def _prepare(self, adapter: Adapter, force: bool) -> _Resident:
        first = first_names(self._model)
        kept = self._kept()
        parts: dict[str, _Part] = {}
        seen: set[str] = set()
        for name, tensor in adapter.items():
            weight = resolve(self._model, name)
            check_fits(name, tensor, weight)
            if first[weight] in seen:
                raise ValueError(f"{name}: the adapter names the tensor {first[weight]!r} twice")
            seen.add(first[weight])
            indices = tensor.indices.to(weight.device)
            base = _base_entries(weight, indices, kept)
            if not force:
                check_base(name, tensor, base)
            parts[name] = _Part(
                weight, indices, tensor.values.to(weight.device), tensor.kind == "add", checksum_of(base)
            )
        return _Resident(parts, _batches(parts.values()))

    def _plan(self, wanted: dict[str, float]) -> tuple[list[_Batch], float]:
        """What to write over the base, and at which strength."""
        if len(wanted) == 1:
            [(name, strength)] = wanted.items()
            return self._residents[name].batches, strength
        by_weight: dict[torch.Tensor, list[tuple[_Part, float]]] = {}
        for name, strength in wanted.items():
            for part in self._residents[name].parts.values():
                by_weight.setdefault(part.weight, []).append((part, strength))
        kept = self._kept()
        return _batches([_mixed(weight, parts, kept) for weight, parts in by_weight.items()]), 1.0

    def _buffers_for(self, batches: list[_Batch]) -> list[torch.Tensor]:
        """Room for the old entries of each batch. It is what the last switch used, which `_revert` reads before."""
        needed: dict[tuple[torch.dtype, torch.device], int] = {}
        places = []
        for batch in batches:
            kind = batch.weights[0].dtype, batch.weights[0].device
            begin = needed.get(kind, 0)
            needed[kind] = begin + batch.indices.numel()
            places.append((kind, slice(begin, needed[kind])))
        for kind, size in needed.items():
            if kind not in self._buffers or self._buffers[kind].numel() < size:
                with torch.inference_mode(False):  # else no switch outside inference mode could write them
                    self._buffers[kind] = torch.empty(size, dtype=kind[0], device=kind[1])
        return [self._buffers[kind][place] for kind, place in places]

    def _write(self, batch: _Batch, strength: float, saved: torch.Tensor) -> None:
        """Writes a batch and notes it. An interrupt may come before or after the call, but not within: the version
        tells which, where the weights have one (inference tensors have none)."""
        version, noted = _version(batch), len(self._written)
        try:
            scatter_apply_batched(
                batch.weights, batch.offsets, batch.indices, batch.values, strength, batch.additive, saved
            )
            self._written.append((batch, saved))
        except BaseException:
            if _version(batch) != version and len(self._written) == noted:
                self._written.append((batch, saved))
            raise
        for weight in batch.weights:
            claim(weight, "ResidentAdapters")

    def _revert(self) -> None:
        """Gives the weights the base back. If it fails it can be called again."""
        while self._written:
            batch, saved = self._written[-1]
            scatter_apply_batched(batch.weights, batch.offsets, batch.indices, saved)
            for weight in batch.weights:
                claim(weight, None)
            self._written.pop()

    def _kept(self) -> dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The entries of the base that the weights do not hold now: weight -> (indices, old entries)."""
        return {
            weight: (batch.indices[place], saved[place])
            for batch, saved in self._written
            for weight, place in zip(batch.weights, _places(batch.offsets), strict=True)
        }


def _version(batch: _Batch) -> int:
    return 0 if not batch.weights or batch.weights[0].is_inference() else batch.weights[0]._version


def _places(offsets: torch.Tensor) -> list[slice]:
    borders = offsets.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(borders)]


def _batches(parts: Iterable[_Part]) -> list[_Batch]:
    """As few batches as can be."""
    alike: dict[Hashable, list[_Part]] = {}
    for part in parts:
        alike.setdefault((part.weight.dtype, part.weight.device, part.additive, part.values.dtype), []).append(part)
    return [_Batch.of(group) for group in alike.values()]


def _base_entries(
    weight: torch.Tensor, indices: torch.Tensor, kept: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """The base's entries, whatever the weight holds now."""
    entries = weight.detach().view(-1)[indices]
    if weight in kept and kept[weight][0].numel():
        changed, old = kept[weight]
        place = torch.searchsorted(changed.long(), indices.long()).clamp_(max=changed.numel() - 1)
        found = changed[place] == indices
        entries[found] = old[place[found]]
    return entries


def _mixed(
    weight: torch.Tensor,
    parts: list[tuple[_Part, float]],
    kept: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]],
) -> _Part:
    """Several adapters' entries of one weight as one that replaces."""
    union = torch.cat([part.indices.long() for part, _ in parts]).unique()
    base = _base_entries(weight, union, kept).to(torch.promote_types(weight.dtype, torch.float32))
    delta = torch.zeros_like(base)
    for part, strength in parts:
        place = torch.searchsorted(union, part.indices.long())
        values = part.values.to(base.dtype)
        delta[place] += strength * (values if part.additive else values - base[place])
    return _Part(weight, union, (base + delta).to(weight.dtype), additive=False, checksum="")
