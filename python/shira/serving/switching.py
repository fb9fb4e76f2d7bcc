"""What is in the weights now, and the way from there to another mix: planned, then written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from shira.model.claims import claim
from shira.model.interrupts import interrupts_held, no_autocast
from shira.serving import arena
from shira.serving.arena import Arena, Kept, Key, Mix, Plan, Share, Write, Written, base_entries
from shira.serving.registry import Registry, as_given
from shira.serving.staging import Staging
from shira_kernels import scatter_apply
from shira_kernels.bits import as_bits, joined


class Switching:
    """The mix that is in the weights, and the base's entries in its place.

    Attributes:
        active: the mix that the weights hold; None if a switch failed, and so did the way back.
        plan: of the active mix, if its entries had to be merged.
        count: how many switches there were.
        last_us: duration of the last one in us; None before the first.
    """

    def __init__(self, registry: Registry, staging: Staging) -> None:
        self.active: Mix | None = ()
        self.plan: Plan | None = None
        self.count = 0
        self.last_us: float | None = None
        self._registry = registry
        self._staging = staging
        self._written: dict[Key, Written] = {}

    @property
    def given(self) -> str | dict[str, float] | None:
        """What the weights hold, as `switch` takes it. Raises RuntimeError if that is not known."""
        if self.active is None:
            raise RuntimeError("a switch failed, and so did the way back: switch(None) gives the base back")
        return as_given(self.active) if self.active else None

    @property
    def weights(self) -> set[torch.Tensor]:
        """The weights that hold something else than the base."""
        return {weight for written in self._written.values() for weight in written.arena.weights}

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """What is kept from call to call."""
        for written in self._written.values():
            yield from (written.arena.indices, written.saved)
        if self.plan is not None:
            yield from self.plan.tensors

    @property
    def saved_bytes(self) -> int:
        """Bytes of the base's entries that the active mix replaces."""
        return sum(written.saved.nbytes for written in self._written.values())

    @property
    def plan_bytes(self) -> int:
        """Bytes of the active mix's plan, and of positions that the active adapter needs beside its own."""
        own = {id(piece.arena.indices) for piece in self._registry.pieces}
        own.update(id(merged.indices) for merged in (self.plan.arenas if self.plan else {}).values())
        found = [written.arena.indices for written in self._written.values()]
        further = sum(indices.nbytes for indices in found if id(indices) not in own)
        return further + (self.plan.nbytes if self.plan is not None else 0)

    def holds(self, mix: Mix) -> bool:
        """Whether the mix is active, in whatever order."""
        return self.active is not None and dict(self.active) == dict(mix)

    def needs(self, name: str) -> bool:
        """Whether the active mix names an adapter."""
        return self.active is not None and name in dict(self.active)

    @no_autocast()
    def switch(self, mix: Mix, began: int | None = None) -> None:
        """Writes a mix in place of the active one, whole or not at all.

        After an error or an interrupt the weights hold what they held before; if even that cannot be written, the base.

        Args:
            mix: of adapters that are there.
            began: when the switch began, by time.perf_counter_ns; None: now.
        """
        began = time.perf_counter_ns() if began is None else began
        self._staging.join()
        writes, plan = self._writes(mix)
        groups: list[tuple[Key, Written | Write]] = [*self._written.items(), *writes.items()]
        arenas = {(key, group.arena.ranks): group.arena for key, group in groups}  # most often one
        for entries in arenas.values():
            self._registry.check_weights(entries.weights)
        before = self.active, self.plan
        with interrupts_held() as let_through:
            try:
                self._write(writes)
                self.active, self.plan = mix, plan  # before handlers run, which may switch to another target
                let_through()
            except BaseException:
                self._put_back(*before)
                raise
        self._staging.clear()
        self.count += 1
        self.last_us = (time.perf_counter_ns() - began) / 1e3

    def _writes(self, mix: Mix) -> tuple[dict[Key, Write], Plan | None]:
        """Gives what to write over the base for a mix, and the plan behind it if values must be computed."""
        if not self._registry.needs_merge(mix):
            return {
                key: Write(
                    piece.arena if strength == 1.0 else piece.arena.single(), piece.values, strength, piece.additive
                )
                for name, strength in mix
                for key, [piece] in self._staging.on_device(name).items()
            }, None
        plan = self._staging.plan_of(mix, self.plan)
        writes = {}
        for key, merged in plan.arenas.items():
            base = self._base_of(merged, plan.shares[key], self._written.get(key))
            writes[key] = Write(merged, arena.mixed(base, plan.shares[key], dict(mix)))
        return writes, plan

    def _base_of(self, merged: Arena, shares: list[Share], written: Written | None) -> torch.Tensor:
        """Gives the base's entries of a mix, whatever the weights hold now."""
        if written is not None and written.arena is merged:
            return written.saved
        share = next((share for share in shares if written is not None and share.piece.arena is written.arena), None)
        kept = {} if share is not None else self.kept()
        base = joined(base_entries(weight, merged.indices[part], kept) for weight, part in merged.parts)
        if share is not None and written is not None:
            as_bits(base)[share.positions] = as_bits(written.saved)
        return base

    def _write(self, writes: dict[Key, Write]) -> None:
        """Writes in place of what is in the weights. If it fails, `_written` says of each key what it holds."""
        with torch.inference_mode(False):  # else no switch outside inference mode could write them
            after = {
                key: Written(write.arena, torch.empty_like(write.values, dtype=key[0])) for key, write in writes.items()
            }
        for key in {**self._written, **writes}:
            old, new = self._written.get(key), writes.get(key)
            if new is not None:
                self._written[key] = new.put_in(old, after[key])
            elif old is not None:
                old.take_out()
                del self._written[key]
            if old is None or new is None or new.arena.ranks != old.arena.ranks:
                for weight in old.arena.weights if old is not None else ():
                    claim(weight, None)
                if new is not None:
                    self._registry.claim(new.arena.weights)
        torch.clear_autocast_cache()  # it may hold rounded copies of the old weights

    def _put_back(self, before: Mix | None, plan: Plan | None) -> None:
        """Writes what was active before a switch that failed; if that fails too, the base."""
        self.active, self.plan = None, plan
        try:
            self._write(self._writes(before or ())[0])
        except Exception:  # noqa: BLE001 - whatever it was, the base is nearer, and the switch's own error is raised
            before, self.plan = (), None
            self._write({})
        self.active = before or ()

    def kept(self) -> Kept:
        """Gives the entries of the base that the weights do not hold now."""
        kept: Kept = {}
        for written in self._written.values():
            entries = written.arena.single()
            kept.update((weight, (entries.indices[part], written.saved[part])) for weight, part in entries.parts)
        return kept

    def base_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Gives a contiguous copy of a weight as it is without any adapter."""
        base = weight.detach().clone(memory_format=torch.contiguous_format)
        for written in self._written.values():
            entries = written.arena
            for part in (part for changed, part in entries.parts if changed is weight):
                saved = entries.in_units(written.saved)[part]
                scatter_apply(entries.in_units(base.view(-1)), entries.indices[part], saved)
        return base
