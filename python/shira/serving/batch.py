"""A `batch` block: the slots of its rows, the adapters in the pages, and the layers that are entered and left."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import nn

from shira.model.claims import claim
from shira.model.interrupts import interrupts_held, no_autocast
from shira.model.modules import bypassed, users_of
from shira.model.names import canonical
from shira.serving import arena, layers, rows
from shira.serving.arena import Arena, Mix, Pieces, Plan
from shira.serving.callers import Caller
from shira.serving.pages import Counts, Deltas, Immovable, Pages
from shira.serving.registry import Registry
from shira.serving.staging import Staging
from shira.serving.switching import Switching
from shira.serving.trial import Trial
from shira_kernels.dtypes import compute_dtype

MODES = ("auto", "fused", "unfused")


@dataclass(eq=False)
class Batch:
    """A `batch` block: who opened it, where layers have its rows, the adapters that it names, and what it changed."""

    caller: Caller
    layout: rows.Layout
    names: set[str] = field(default_factory=set)
    modules: list[nn.Module] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    trial: Trial | None = None
    slots: list[int] = field(default_factory=list)  # of the rows, -1 for none
    meter: rows.Meter | None = None
    is_over: bool = False  # the block; if the batch is still open, its end was cut off
    was_closed: bool = False  # or `close` has failed once


class Batches:
    """The open batch, and what is kept from batch to batch: pages, rows, and the layers that adapters change.

    Args:
        budget: bytes of the pages and tables; None: as many as they need.

    Attributes:
        opened: the open batch, if there is one.
        pages: where the deltas of resident mixes are.
    """

    def __init__(self, registry: Registry, staging: Staging, switching: Switching, budget: int | None) -> None:
        self.opened: Batch | None = None
        self.pages = Pages(budget)
        self._registry = registry
        self._staging = staging
        self._switching = switching
        self._rows: dict[torch.device, rows.Rows] = {}
        self._obstacles: dict[str, str] = {}  # why an adapter cannot be unfused
        self._linears: dict[torch.Tensor, dict[str, nn.Module]] = {}  # of weights that batches change, the layers
        # By layout, the layers that are known to get the rows where it says.
        self._tried: dict[str, WeakSet[nn.Module]] = {word: WeakSet() for word in rows.LAYOUTS}
        self._is_whole = True

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """What is kept from call to call."""
        yield from self.pages.tensors
        for of_device in self._rows.values():
            yield from of_device.tensors

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around changes of what is noted of the adapters, here and in the registry. After an error or an interrupt in
        the block `repair` has something to do."""
        before, self._is_whole = self._is_whole, False
        yield
        self._is_whole = before

    def repair(self) -> None:
        """Makes what is noted that of the adapters in the registry, if a change was cut off."""
        if self._is_whole:
            return
        names = self._registry.names
        self._registry.recount()
        self._obstacles = {name: reason for name, reason in self._obstacles.items() if name in names}
        self.pages.repair(names)
        self._linears = {weight: modules for weight, modules in self._linears.items() if weight in self.pages.weights}
        self._staging.keep_only(names)
        self.trim()
        self._is_whole = True

    def register(self, name: str, pieces: Pieces) -> None:
        """Notes whether a batch may use an adapter, and the layers that it then changes."""
        users, skipped = users_of(self._registry.model), bypassed(self._registry.model)
        linears, transposed = {}, {}
        for piece in itertools.chain(*pieces.values()):
            for tensor_name, weight in zip(piece.names, piece.arena.weights, strict=True):
                if reason := layers.obstacle(weight, users, skipped):
                    self._obstacles[name] = f"{tensor_name}: {reason}"
                    return
                linears[weight] = {own: module for own, module, _ in users[weight]}
                transposed[weight] = bool(layers.is_transposed(users[weight][0][1]))
        self._linears.update(linears)
        self.pages.register(name, _counts(pieces), transposed)

    def remove(self, name: str) -> None:
        """Forgets an adapter that `register` noted; `trim` forgets its layers."""
        if self._obstacles.pop(name, None) is None:
            self.pages.forget(name)

    def trim(self) -> None:
        """Forgets weights that no adapter changes, unless an open batch or a graph still reads what is kept of them."""
        if self.opened is None and not self._read_by_graphs():
            for weight in self.pages.trim():
                self._linears.pop(weight, None)
        self._registry.trim(self._linears.keys())

    def forget_graphs(self) -> None:
        """Notes that no graph which was captured in a batch so far is replayed again."""
        for of_device in self._rows.values():
            of_device.forget_graphs()
        self.trim()

    def _read_by_graphs(self) -> bool:
        return any(of_device.read_by_graphs for of_device in self._rows.values())

    def mixes_of(self, names: Sequence[str | Mapping[str, float] | None]) -> list[Mix]:
        """Gives the mix of each row, sorted by name. Raises ValueError for what `ResidentAdapters.batch` refuses."""
        if not isinstance(names, (list, tuple)):
            raise ValueError(f"batch takes a list with a name, strengths by name, or None for each row, got {names!r}")
        if not names:
            raise ValueError("batch: names is empty; it must have one for each row")
        return [tuple(sorted(self._registry.mix_of(name, "batch"))) for name in names]

    @torch.no_grad()
    def open(self, batch: Batch, mixes: list[Mix], mode: str, tokens: int | None, fuse: Callable[[], None]) -> None:
        """Opens a batch: the layers add to each row what its mix changes, or the weights hold the mix of all rows.

        Args:
            batch: what is changed is noted in it, so that `close` can take it back also after an error.
            mixes: of the rows; sorted by name.
            mode: one of MODES.
            tokens: if known, how many the block will run.
            fuse: calls `fuse` with the mix of all rows, under the bank's lock. Layers call it once that is cheaper.

        Raises what `ResidentAdapters.batch` does, but for what others do meanwhile.
        """
        if self._switching.active != ():
            raise RuntimeError(f"batch: {self._switching.given!r} is in the weights: switch(None) first")
        distinct = set(mixes)
        if mode == "fused" and len(distinct) > 1:
            raise ValueError(f"mode is 'fused', but the batch has {len(distinct)} different targets")
        batch.names = {name for mix in distinct for name, _ in mix}
        blocked = next((name for mix in mixes for name, _ in mix if name in self._obstacles), None)
        many = tokens is not None and tokens > rows.FUSE_AFTER_TOKENS
        if mode == "fused" or (mode == "auto" and len(distinct) == 1 and (many or blocked or mixes[0] == ())):
            with interrupts_held():
                self.opened = batch
            self._switching.switch(mixes[0])
            return
        if blocked is not None:
            raise ValueError(f"batch: {blocked!r} cannot be unfused: {self._obstacles[blocked]}; use switch")
        self._registry.check_weights(self._linears)
        self._check_linears()
        self._bring_in([mix for mix in dict.fromkeys(mixes) if mix])
        meter = rows.Meter(fuse) if mode == "auto" and len(distinct) == 1 else None
        batch.slots, batch.meter = [self.pages.residents[mix].number if mix else -1 for mix in mixes], meter
        with interrupts_held():
            self.opened = batch
            for device in {weight.device for weight in self.pages.tables}:
                self._rows.setdefault(device, rows.Rows(device)).set(batch.slots, meter, batch.layout)
            batch.weights.extend(self.pages.tables)
            self._registry.claim(batch.weights)
            for weight, table in self.pages.tables.items():
                for name, module in self._linears[weight].items():
                    batch.modules.append(module)
                    layers.enter(canonical(name), module, table, self._rows[weight.device])
            if len(distinct) > 1 and isinstance(batch.layout, str):
                self._try(batch, batch.layout, len(mixes))

    def _try(self, batch: Batch, layout: str, count: int) -> None:
        """Has layers that have not been tried with this layout tried in the next forward."""
        tried = self._tried[layout]
        untried = {module for module in batch.modules if module not in tried}
        if untried:
            names = {
                table.row_ptr: " or ".join(canonical(name) for name in self._linears[weight])
                for weight, table in self.pages.tables.items()
            }
            batch.trial = Trial(self._registry.model, untried, names, count, layout, tried.update)
            batch.trial.open()

    @torch.no_grad()
    def fuse(self, batch: Batch, mix: Mix) -> None:
        """Goes on with the mix of all rows in the weights, or after an error as before."""
        self._switching.switch(mix)
        try:
            for of_device in self._rows.values():
                of_device.clear()
        except BaseException:
            self._switching.switch(())
            for of_device in self._rows.values():
                of_device.set(batch.slots, batch.meter, batch.layout)
            raise

    @torch.no_grad()
    def close(self, batch: Batch, follow: Callable[[], None]) -> None:
        """Takes back all that the open batch changed. After an error it can be called once more.

        follow: lets GPUs wait for earlier calls. If it raises twice, the layers are as before the batch, but a mix that
            the weights hold stays in them.
        """
        if batch.trial is not None:
            batch.trial.close()
        for module in batch.modules:
            layers.leave(module)
        try:
            follow()
            for of_device in self._rows.values():
                of_device.leave()
            if self._switching.active != ():
                self._switching.switch(())
        except BaseException:
            if batch.was_closed:
                self._end(batch)
            batch.was_closed = True
            raise
        self._end(batch)

    def _end(self, batch: Batch) -> None:
        written = self._switching.weights
        for weight in batch.weights:
            if weight not in written:
                claim(weight, None)
        with self.changing():
            self.opened = None
            self.trim()

    def _check_linears(self) -> None:
        """Raises RuntimeError if a layer is not what it was when adapters were added."""
        for modules in self._linears.values():
            for module in modules.values():
                if layers.is_transposed(module) is None or "forward" in vars(module):
                    raise RuntimeError(
                        f"batch: the forward of a {type(module).__name__} was replaced since an adapter was added"
                    )

    @no_autocast()
    def _bring_in(self, mixes: list[Mix]) -> None:
        """Makes all of these mixes resident."""
        if all(mix in self.pages.residents for mix in mixes):  # the common case, which must be quick
            for mix in mixes:
                self.pages.touch(mix)
            return
        self._staging.join()
        plans: dict[Mix, Plan] = {}
        needed: dict[Mix, Counts] = {}
        for mix in mixes:
            if mix in self.pages.residents:
                needed[mix] = self.pages.residents[mix].counts
            elif len(mix) == 1:
                needed[mix] = _counts(self._registry.pieces_of(mix[0][0]))
            else:
                plans[mix] = self._staging.plan_of(mix)
                needed[mix] = {
                    weight: part.stop - part.start
                    for merged in plans[mix].arenas.values()
                    for weight, part in merged.parts
                }
        with self.changing():
            try:
                self.pages.make_room(needed, stay=self._read_by_graphs())
            except Immovable:
                raise RuntimeError(
                    "batch: CUDA graphs that were captured in batches read the pages, which have no room for this "
                    "batch: call forget_graphs() when they will not be replayed any more, and capture them again"
                ) from None
            for mix, counts in needed.items():
                if not self.pages.touch(mix):
                    self.pages.bring_in(mix, counts, self._deltas(mix, plans.get(mix)))

    def _deltas(self, mix: Mix, plan: Plan | None) -> Deltas:
        """Gives what a mix adds to the base, which the weights hold: computed in float32 or more, rounded once."""
        if len(mix) > 1:
            plan = plan or self._staging.plan_of(mix)
            deltas = []
            for key, merged in plan.arenas.items():
                delta = arena.mixed_delta(_base_now(merged), plan.shares[key], dict(mix))
                deltas.append((merged, delta.to(key[0])))
            return deltas
        deltas = []
        [(name, strength)] = mix
        for key, group in self._staging.on_device(name).items():
            for piece in group:
                entries = piece.arena.single()
                delta = piece.values.to(compute_dtype(key[0]))
                if not piece.additive:
                    delta = delta - _base_now(entries)
                deltas.append((entries, (delta * strength).to(key[0])))
        return deltas


def check_options(mode: str, tokens: int | None, layout: rows.Layout) -> None:
    """Raises ValueError for a mode or a layout that there is not, or a number of tokens that is none."""
    rows.check_layout(layout)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if tokens is not None and (not is_int(tokens) or tokens < 0):
        raise ValueError(f"tokens must be an integer that is not negative, or None, got {tokens!r}")


def is_int(value: object) -> bool:
    """Whether it is an integer, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(pieces: Pieces) -> Counts:
    """Gives the number of entries of each weight."""
    return {
        weight: (part.stop - part.start) * piece.arena.unit
        for piece in itertools.chain(*pieces.values())
        for weight, part in piece.arena.parts
    }


def _base_now(entries: Arena) -> torch.Tensor:
    """Gives the base's entries, which the weights hold, in float32 or more."""
    parts = [weight.detach().view(-1)[entries.indices[part]] for weight, part in entries.parts]
    base = torch.cat(parts)
    return base.to(compute_dtype(base.dtype))
