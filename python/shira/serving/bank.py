"""Serving: several adapters beside one model, any of them (or a mix) written into its weights in place."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import numbers
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.adapter.base import check_base, check_fits
from shira.adapter.checksum import checksum_of
from shira.model.claims import check_claim, claim
from shira.model.interrupts import interrupts_held, no_autocast
from shira.model.modules import bypassed, users_of
from shira.model.names import first_names, resolve
from shira.serving import arena
from shira.serving import layers as unfused
from shira.serving.arena import Arena, Kept, Key, Piece, Pieces, Plan, Share, Write, Written, base_entries
from shira.serving.pages import Counts, Deltas, Immovable, Pages, Target
from shira_kernels import scatter_apply


@dataclass(frozen=True)
class BankStats:
    """What a bank holds, in bytes, and how it switched.

    Attributes:
        adapter_bytes: of each adapter's indices and values.
        saved_bytes: of the base's entries that the active target replaces.
        plan_bytes: of the merged entries of the active and the staged mix, and of positions that the active adapter
            needs beside its own, since it has aligned runs and is not active at strength 1.
        switches: how many there were; `using` makes two.
        last_switch_us: duration of the last one in us, on a GPU until all was launched; None before the first.
        unfused_bytes: of the pages and tables of unfused adapters, on the model's devices.
        pages: how many pages there are, of 4096 entries each.
        pages_used: those that hold something.
        resident: the adapters and mixes in them, as `switch` takes them, the least recently used first.
        hits: adapters and mixes that a batch found there.
        misses: those that had to be brought in.
        evictions: those that made room.
    """

    adapter_bytes: dict[str, int]
    saved_bytes: int
    plan_bytes: int
    switches: int
    last_switch_us: float | None
    unfused_bytes: int = 0
    pages: int = 0
    pages_used: int = 0
    resident: list[str | dict[str, float]] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    evictions: int = 0


class ResidentAdapters:
    """Adapters that stay beside a model and are switched in its live weights.

    The weights' addresses never change, so compiled code and captured graphs stay valid; and the entries that an
    adapter replaces are kept, so `switch(None)` gives the base back bit for bit after any sequence. A switch happens
    whole or not at all: after an error or an interrupt the weights are as before it. The model's parameters, their
    dtypes and devices must stay those that were there when an adapter was added.

    `batch` leaves the weights alone and gives each row of a batch its own adapter, unfused; see docs/unfused.md.

    Several threads may call a bank; their calls wait for each other. While a thread or an asyncio task is inside
    `using` or `batch`, switches and batches of others are refused. The bank does not know when the model runs: a
    forward during a switch may see part of it. Nor does it know who else writes the weights: load or train them after
    `switch(None)`.

    A tied weight (one parameter under several names) is one tensor, under any of its names. A parameter that shares
    memory with another one, without being the same, is refused.

    Args:
        model: any module. Names of its parameters are those of its state dict; PEFT's prefixes are understood.
        device_budget: bytes that unfused adapters may take on the model's devices. Adapters then live in host memory
            and are brought in when a batch needs them; the least recently used makes room. None: all stay there.
    """

    def __init__(self, model: nn.Module, *, device_budget: int | None = None) -> None:
        if device_budget is not None and (not _is_int(device_budget) or device_budget <= 0):
            raise ValueError(f"device_budget must be a positive number of bytes or None, got {device_budget!r}")
        self._model = model
        self._lock = threading.RLock()
        self._residents: dict[str, Pieces] = {}
        self._active: dict[str, float] | None = {}  # None: a switch failed, and so did the way back
        self._written: dict[Key, Written] = {}
        self._plan: Plan | None = None  # of the active mix
        self._staged: dict[str, Pieces] = {}  # adapters held on the host, brought to the device ahead
        self._staged_plan: Plan | None = None
        self._stream: torch.cuda.Stream | None = None  # that brings them
        self._users: list[_User] = []  # of open `using` blocks
        self._batch: _Batch | None = None  # the open one
        self._pages = Pages(device_budget)
        self._obstacles: dict[str, str] = {}  # why an adapter cannot be unfused
        self._linears: dict[torch.Tensor, list[nn.Module]] = {}  # of weights that batches change, the layers
        self._rows: dict[torch.device, unfused.Rows] = {}
        self._homes: dict[torch.Tensor, _Home] = {}  # of weights that adapters change
        self._gpus: set[torch.device] = set()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # that the last call used on each GPU
        self._switches = 0
        self._last_switch_us: float | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a bank cannot be copied or pickled; nor can weights that it is changing: switch(None) first")

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return list(self._residents)

    @property
    def active(self) -> str | dict[str, float] | None:
        """What the weights hold, as `switch` takes it: None is the base.

        Raises RuntimeError if a switch failed and the weights could not be put back; a switch that succeeds repairs it.
        """
        if self._active is None:
            raise RuntimeError("a switch failed, and so did the way back: switch(None) gives the base back")
        return _as_given(self._active) if self._active else None

    @property
    def stats(self) -> BankStats:
        """Memory held and time taken."""
        with self._lock:
            return BankStats(
                adapter_bytes={
                    name: sum(piece.nbytes for group in pieces.values() for piece in group)
                    for name, pieces in self._residents.items()
                },
                saved_bytes=sum(written.saved.nbytes for written in self._written.values()),
                plan_bytes=sum(plan.nbytes for plan in (self._plan, self._staged_plan) if plan is not None)
                + self._further_index_bytes(),
                switches=self._switches,
                last_switch_us=self._last_switch_us,
                unfused_bytes=self._pages.nbytes,
                pages=self._pages.count,
                pages_used=self._pages.used,
                resident=[_as_given(dict(target)) for target in self._pages.residents],
                hits=self._pages.hits,
                misses=self._pages.misses,
                evictions=self._pages.evictions,
            )

    @torch.no_grad()
    @no_autocast()
    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str] | Adapter,
        *,
        force: bool = False,
        check_finite: bool = False,
        on_host: bool = False,
    ) -> None:
        """Checks an adapter and copies it beside the model. Never touches the weights, whatever is active.

        Args:
            name: to switch to it; not taken yet.
            adapter: the adapter or its file, also one without indices: the model is the base.
            force: take it also if it was made for another base.
            check_finite: refuse values that are NaN or infinite. Without it they are written, and revert exactly.
            on_host: keep it in host memory, pinned for a model on a GPU, until it is staged or switched to. With a
                device_budget all are.

        Raises:
            ValueError: the name is taken, the model lacks a tensor, or has it with another shape or dtype, the adapter
                was made for another base, a value is not finite, a weight shares memory with another one, or the file
                is no valid adapter (AdapterFormatError).
            OSError: the file cannot be read.

        Warns:
            UserWarning: the adapter has no checksum, so that it cannot be told whether it was made for this base.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter must be a string that is not empty, got {name!r}")
        if not isinstance(adapter, (str, os.PathLike, Adapter)):
            raise ValueError(f"an adapter must be an Adapter or the path of its file, got {adapter!r}")
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter, base=_BaseWeights(self))
        if check_finite:
            for tensor_name, tensor in adapter.items():
                if not bool(tensor.values.isfinite().all()):
                    raise ValueError(f"{tensor_name}: values are not finite")
        with self._lock:
            if name in self._residents:
                raise ValueError(f"an adapter named {name!r} was added already")
            self._follow()
            pieces = self._prepare(adapter, force, on_host or self._pages.budget is not None)
            with interrupts_held():
                self._note_homes(pieces)
                self._note_linears(name, pieces)
                self._residents[name] = pieces

    def remove(self, name: str) -> None:
        """Forgets an adapter. Raises ValueError if there is none of that name, or it is active, or `using` or `batch`
        needs it."""
        with self._lock:
            self._check_names([name])
            if name in (self._active or {}) or any(name in user.before for user in self._users):
                raise ValueError(f"{name!r} is in use: switch to something else first")
            if self._batch is not None and name in self._batch.names:
                raise ValueError(f"{name!r} is in use: leave batch() first")
            del self._residents[name]
            if self._obstacles.pop(name, None) is None:
                self._pages.forget(name)
            self._trim()
            self._staged.pop(name, None)
            if self._staged_plan is not None and name in self._staged_plan.names:
                self._staged_plan = None

    def forget_graphs(self) -> None:
        """Says that no CUDA graph which was captured in a batch so far will be replayed again.

        What they read may then be laid out anew, or freed. Raises RuntimeError inside `batch`.
        """
        with self._lock:
            self._check_users()
            for rows in self._rows.values():
                rows.forget_graphs()
            self._trim()

    @torch.no_grad()
    @no_autocast()
    def stage(self, target: str | Mapping[str, float] | None) -> None:
        """Prepares a switch to `target`, off the critical path: merges the entries of a mix, and brings adapters that
        are held on the host to the model's device, on a stream of its own. Kept until the next switch or `stage`; None
        drops it. Raises what `switch` raises for a wrong target."""
        with self._lock:
            self._follow()
            with self._side_stream():
                wanted = self._normalized(target)
                self._staged = {name: self._on_device(name) for name in wanted}
                self._staged_plan = self._plan_for(wanted) if self._is_mix(wanted) else None
            self._share_staged(self._stream)

    @torch.no_grad()
    def switch(self, target: str | Mapping[str, float] | None) -> None:
        """Writes an adapter, or a mix, in place of whatever is active: only the entries of either, each once.

        Args:
            target: a name; or strengths by name: base + the sum of strength (value - base), in float32 (float64 for
                float64 weights) and rounded once; or None for the base. One name at strength 1 gives exactly its
                values. The merged entries of a mix are kept while it is active: other strengths need no merge.

        Raises:
            ValueError: a name is unknown or a strength not finite.
            RuntimeError: entries of a weight are attached for training, or written by another bank; another thread or
                task is inside `using`; a parameter of the model was replaced by another one.

        After any error, and after an interrupt, the weights hold what they held before; if even that cannot be
        written, the base.
        """
        began = time.perf_counter_ns()
        with self._lock:
            wanted = self._normalized(target)
            self._check_users()
            self._switch_counted(wanted, began)

    @contextlib.contextmanager
    def batch(
        self, names: Sequence[str | Mapping[str, float] | None], *, mode: str = "auto", tokens: int | None = None
    ) -> Iterator[None]:
        """Inside the `with` block row i of the model's batch uses `names[i]`; the weights hold the base.

        The linear layers that some adapter changes add each row's sparse delta to their output. The batch may be
        expanded in the block, each row by as much (beam search, num_return_sequences), flattened or padded: a layer
        that gets n rows uses `names[i // (n / len(names))]` for row i. Code compiled by torch.compile is made once for
        batches, and not anew for other adapters.

        Forwards of other threads inside the block use the batch too. Switches and further batches are refused, in this
        thread too; `add`, `stage`, and `remove` of what the batch does not name are not.

        A CUDA graph of `model(x)` that is captured inside the block (with "unfused") does at each replay what the model
        would do then: inside a later block of as many names each row gets that block's adapter, whichever came, went or
        were evicted in between; elsewhere the layers give what the weights hold. What it reads stays where it is, so a
        block that needs more room is refused until `forget_graphs` is called. docs/unfused.md has the rules.

        Args:
            names: for each row a name, strengths by name, or None for the base.
            mode: "unfused" as above. "fused": one target must own all rows; the block switches to it, and back. "auto":
                unfused, unless one target owns all rows and `tokens`, or the tokens that the block has run (outside of
                compiled code), are so many that fusing is cheaper; or unless it can only be fused.
            tokens: if known, how many the block will run.

        Raises:
            ValueError: `names` is no list or empty, a name is unknown or a strength not finite, an adapter changes
                something else than weights of nn.Linear and Conv1D of transformers, or the adapters of the batch take
                more than `device_budget`. In the block: a layer gets a number of rows that is no multiple of
                len(names).
            RuntimeError: an adapter is active; a batch is open, or another thread or task is inside `using`; another
                bank or `attach` changes the weights; a parameter of the model was moved, or replaced by another one;
                CUDA graphs read the pages, and the batch has no room there; a graph is being captured.
        """
        batch = _Batch(_caller())
        try:
            with self._lock:
                self._open(batch, self._targets(names), mode, tokens)
            yield
        finally:
            with interrupts_held(), self._lock:
                if self._batch is batch:
                    self._close(batch)

    @contextlib.contextmanager
    def using(self, target: str | Mapping[str, float] | None) -> Iterator[None]:
        """Switches for the length of a `with` block, then back to what was active before."""
        with self._lock:
            self._check_users()
            user = _User(_caller(), dict(self._active or {}))
        try:
            with self._lock:
                self._users.append(user)
                self.switch(target)
            yield
        finally:
            with interrupts_held(), self._lock:
                if user in self._users:
                    self._users.remove(user)
                if self._active != user.before:
                    self.switch(user.before or None)

    @torch.no_grad()
    def verify_base(self) -> None:
        """Compares the base under every adapter with what it was when the adapter was added, whatever is active.

        Raises ValueError naming the first adapter and tensor whose base entries are others.
        """
        with self._lock:
            self._follow()
            kept = self._kept()
            for name, pieces in self._residents.items():
                for piece in itertools.chain(*pieces.values()):
                    entries = piece.arena.single()
                    parts = zip(piece.names, piece.checksums, entries.parts, strict=True)
                    for tensor_name, checksum, (weight, part) in parts:
                        indices = entries.indices[part].to(weight.device)
                        if checksum_of(base_entries(weight, indices, kept)) != checksum:
                            raise ValueError(
                                f"{name}: {tensor_name}: the base entries changed since the adapter was added"
                            )

    def _check_users(self) -> None:
        if self._batch is not None:
            own = self._batch.caller == _caller()
            raise RuntimeError("leave batch() first" if own else "another thread or task is inside batch()")
        if any(user.caller != _caller() for user in self._users):
            raise RuntimeError("another thread or task is inside using(), which relies on what is active")

    def _targets(self, names: Sequence[str | Mapping[str, float] | None]) -> list[Target]:
        """What each row uses; empty for the base."""
        if not isinstance(names, (list, tuple)):
            raise ValueError(f"batch takes a list with a name, strengths by name, or None for each row, got {names!r}")
        if not names:
            raise ValueError("batch: names is empty; it must have one for each row")
        return [tuple(sorted(self._normalized(name, "batch").items())) for name in names]

    @torch.no_grad()
    def _open(self, batch: _Batch, targets: list[Target], mode: str, tokens: int | None) -> None:
        if mode not in unfused.MODES:
            raise ValueError(f"mode must be one of {', '.join(unfused.MODES)}, got {mode!r}")
        if tokens is not None and (not _is_int(tokens) or tokens < 0):
            raise ValueError(f"tokens must be an integer that is not negative, or None, got {tokens!r}")
        self._check_users()
        self._follow()
        if self._active != {}:
            raise RuntimeError(f"batch: {self.active!r} is in the weights: switch(None) first")
        distinct = set(targets)
        if mode == "fused" and len(distinct) > 1:
            raise ValueError(f"mode is 'fused', but the batch has {len(distinct)} different targets")
        batch.names = {name for target in distinct for name, _ in target}
        blocked = next((name for target in targets for name, _ in target if name in self._obstacles), None)
        many = tokens is not None and tokens > unfused.FUSE_AFTER_TOKENS
        if mode == "fused" or (mode == "auto" and len(distinct) == 1 and (many or blocked or targets[0] == ())):
            with interrupts_held():
                self._batch = batch
            self._switch_counted(dict(targets[0]))
            return
        if blocked is not None:
            raise ValueError(f"batch: {blocked!r} cannot be unfused: {self._obstacles[blocked]}; use switch")
        self._check_weights(self._linears)
        self._check_linears()
        self._bring_in([target for target in dict.fromkeys(targets) if target])
        meter = unfused.Meter(lambda: self._fuse_open(batch, dict(targets[0]))) if mode == "auto" else None
        slots = [self._pages.residents[target].number if target else -1 for target in targets]
        with interrupts_held():
            self._batch = batch
            for device in {weight.device for weight in self._pages.tables}:
                rows = self._rows.setdefault(device, unfused.Rows(device))
                rows.set(slots, meter if len(distinct) == 1 else None)
            for weight, table in self._pages.tables.items():
                claim(weight, self)
                batch.weights.append(weight)
                for module in self._linears[weight]:
                    batch.modules.append(module)
                    unfused.enter(module, table, self._rows[weight.device])

    @torch.no_grad()
    def _close(self, batch: _Batch) -> None:
        for module in batch.modules:
            unfused.leave(module)
        self._batch = None
        self._trim()
        try:
            self._follow()
            for rows in self._rows.values():
                rows.leave()
            if self._active != {}:
                self._switch_counted({})
        finally:
            written = {weight for written in self._written.values() for weight in written.arena.weights}
            for weight in batch.weights:
                if weight not in written:
                    claim(weight, None)

    @torch.no_grad()
    def _fuse_open(self, batch: _Batch, target: dict[str, float]) -> None:
        """Goes on fused, if the batch is still open."""
        with self._lock, interrupts_held():
            if self._batch is batch:
                self._switch_counted(target)
                for rows in self._rows.values():
                    rows.clear()

    @no_autocast()
    def _bring_in(self, targets: list[Target]) -> None:
        """Makes all of these resident."""
        if all(target in self._pages.residents for target in targets):  # the common case, which must be quick
            for target in targets:
                self._pages.residents.move_to_end(target)
            self._pages.hits += len(targets)
            return
        self._await_staged()
        plans: dict[Target, Plan] = {}
        needed: dict[Target, Counts] = {}
        for target in targets:
            if target in self._pages.residents:
                needed[target] = self._pages.residents[target].counts
            elif len(target) == 1:
                needed[target] = _counts(self._residents[target[0][0]])
            else:
                plans[target] = self._plan_for(dict(target))
                needed[target] = {
                    weight: part.stop - part.start
                    for merged in plans[target].arenas.values()
                    for weight, part in merged.parts
                }
        try:
            self._pages.make_room(needed, stay=self._read_by_graphs())
        except Immovable:
            raise RuntimeError(
                "batch: CUDA graphs that were captured in batches read the pages, which have no room for this batch: "
                "call forget_graphs() when they will not be replayed any more, and capture them again"
            ) from None
        known = sum(target in self._pages.residents for target in targets)
        self._pages.hits += known
        self._pages.misses += len(targets) - known
        for target, counts in needed.items():
            if target in self._pages.residents:
                self._pages.residents.move_to_end(target)
            else:
                self._pages.bring_in(target, counts, self._deltas(target, plans.get(target)))

    def _deltas(self, target: Target, plan: Plan | None) -> Deltas:
        """What a target adds to the base, which the weights hold: computed in float32 or more, rounded once."""
        strengths = dict(target)
        if len(strengths) > 1:
            plan = plan or self._plan_for(strengths)
            deltas = []
            for key, merged in plan.arenas.items():
                base = _base_now(merged)
                delta = arena.mixed_delta(base, plan.shares[key], strengths)
                deltas.append((merged, delta.to(key[0])))
            return deltas
        deltas = []
        [(name, strength)] = target
        for key, group in self._on_device(name).items():
            for piece in group:
                entries = piece.arena.single()
                delta = piece.values.to(torch.promote_types(key[0], torch.float32))
                if not piece.additive:
                    delta = delta - _base_now(entries)
                deltas.append((entries, (delta * strength).to(key[0])))
        return deltas

    def _note_linears(self, name: str, pieces: Pieces) -> None:
        """Whether a batch may use an adapter, and the layers that it then changes."""
        users, skipped = users_of(self._model), bypassed(self._model)
        linears, transposed = {}, {}
        for piece in itertools.chain(*pieces.values()):
            for tensor_name, weight in zip(piece.names, piece.arena.weights, strict=True):
                if reason := unfused.obstacle(weight, users, skipped):
                    self._obstacles[name] = f"{tensor_name}: {reason}"
                    return
                linears[weight] = [module for _, module, _ in users[weight]]
                transposed[weight] = bool(unfused.is_transposed(linears[weight][0]))
        self._linears.update(linears)
        self._pages.register(name, _counts(pieces), transposed)

    def _check_linears(self) -> None:
        """The layers still are what they were when adapters were added."""
        for modules in self._linears.values():
            for module in modules:
                if unfused.is_transposed(module) is None or "forward" in vars(module):
                    raise RuntimeError(
                        f"batch: the forward of a {type(module).__name__} was replaced since an adapter was added"
                    )

    def _check_weights(self, weights: Iterable[torch.Tensor]) -> None:
        """They still are the model's parameters, and nobody else is changing them."""
        for weight in weights:
            module, attribute, key = self._homes[weight]
            if module._parameters.get(attribute) is not weight:
                raise RuntimeError(
                    f"the {attribute} of a {type(module).__name__} was replaced since an adapter was added"
                )
            if (weight.dtype, weight.device) != key:
                raise RuntimeError(
                    f"the {attribute} of a {type(module).__name__} was {key[0]} on {key[1]} when an adapter was added, "
                    f"and is {weight.dtype} on {weight.device}: move it back, or remove its adapters and add them again"
                )
            check_claim("switch", weight, self)

    def _trim(self) -> None:
        """Forgets weights that no adapter changes, unless an open batch or a graph still reads what is kept of them."""
        if self._batch is None and not self._read_by_graphs():
            self._pages.trim()
            self._linears = {w: modules for w, modules in self._linears.items() if w in self._pages.weights}
        changed = {w for a in self._residents.values() for g in a.values() for p in g for w in p.arena.weights}
        kept = changed | self._linears.keys()
        self._homes = {weight: home for weight, home in self._homes.items() if weight in kept}

    def _read_by_graphs(self) -> bool:
        return any(rows.read_by_graphs for rows in self._rows.values())

    def _follow(self) -> None:
        """Lets the current stream of each GPU wait for what earlier calls launched on another, and the allocator know
        that it uses what the bank holds."""
        if self._gpus and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is being captured, which a bank's calls cannot be part of")
        for device in self._gpus:
            current = torch.cuda.current_stream(device)
            last = self._streams.get(device, current)
            if last != current:
                current.wait_stream(last)
                for tensor in self._held():
                    if tensor.device == device:
                        tensor.record_stream(current)
            self._streams[device] = current

    def _held(self) -> Iterator[torch.Tensor]:
        """What the bank keeps from call to call, beside what is staged."""
        for pieces in self._residents.values():
            for piece in itertools.chain(*pieces.values()):
                yield from (piece.arena.indices, piece.values)
        for written in self._written.values():
            yield from (written.arena.indices, written.saved)
        if self._plan is not None:
            yield from self._plan.tensors
        yield from self._pages.tensors
        for rows in self._rows.values():
            yield from rows.tensors

    def _further_index_bytes(self) -> int:
        pieces = (piece for pieces in self._residents.values() for piece in itertools.chain(*pieces.values()))
        own = {id(piece.arena.indices) for piece in pieces}
        own.update(id(merged.indices) for merged in (self._plan.arenas if self._plan else {}).values())
        found = [written.arena.indices for written in self._written.values()]
        return sum(indices.nbytes for indices in found if id(indices) not in own)

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._residents:
                raise ValueError(f"there is no adapter named {name!r}; there are {self.names}")

    def _normalized(self, target: str | Mapping[str, float] | None, caller: str = "switch") -> dict[str, float]:
        """A target as strengths by name; empty for the base."""
        if target is None:
            return {}
        if not isinstance(target, (str, Mapping)):
            raise ValueError(f"{caller} takes a name, strengths by name, or None, got {target!r}")
        strengths = {target: 1.0} if isinstance(target, str) else dict(target)
        if not strengths:
            raise ValueError("a mix must name at least one adapter; the base is None")
        self._check_names(strengths)
        for name, strength in strengths.items():
            largest = torch.finfo(torch.float32).max
            if not isinstance(strength, numbers.Real) or not -largest <= strength <= largest:
                raise ValueError(f"the strength of {name!r} must be a finite float32 number, got {strength!r}")
        return {name: float(strength) for name, strength in strengths.items()}

    def _prepare(self, adapter: Adapter, force: bool, on_host: bool) -> Pieces:
        """An adapter's tensors, checked, in as few pieces as can be."""
        first: dict[torch.Tensor, str] = first_names(self._model)
        rank = {weight: i for i, weight in enumerate(first)}
        names: dict[torch.Tensor, str] = {}
        weight: torch.Tensor
        for name, tensor in adapter.items():
            weight = resolve(self._model, name)
            check_fits(name, tensor, weight)
            check_claim(name, weight, self)
            if weight in names:
                raise ValueError(f"{name}: the adapter names the tensor {first[weight]!r} twice")
            names[weight] = name
        _check_memory(first, names)
        self._check_weights(weight for weight in names if weight in self._homes)

        kept = self._kept()
        checksums: dict[torch.Tensor, str] = {}
        alike: dict[tuple[Key, bool, torch.dtype], list[torch.Tensor]] = {}
        for weight in sorted(names, key=rank.__getitem__):
            tensor = adapter[names[weight]]
            base = base_entries(weight, tensor.indices.to(weight.device), kept)
            if not force:
                check_base(names[weight], tensor, base)
            compared = None if force else tensor.checksum
            checksums[weight] = compared or checksum_of(base)
            kind = ((weight.dtype, weight.device), tensor.kind == "add", tensor.values.dtype)
            alike.setdefault(kind, []).append(weight)

        pieces: Pieces = {}
        for (key, additive, _), weights in alike.items():
            tensors = [adapter[names[weight]] for weight in weights]
            # All adapters must have the same: one op takes the entries of two.
            wide = any((weight.dtype, weight.device) == key and weight.numel() >= 2**31 for weight in first)
            home = torch.device("cpu") if on_host else key[1]
            entries = Arena(
                tuple(rank[weight] for weight in weights),
                weights,
                arena.offsets_of([tensor.nnz for tensor in tensors]),
                torch.cat([tensor.indices for tensor in tensors]).to(home, torch.int64 if wide else torch.int32),
            )
            piece = Piece(
                [names[weight] for weight in weights],
                [checksums[weight] for weight in weights],
                entries if additive else entries.in_runs(),
                torch.cat([tensor.values for tensor in tensors]).to(home),
                additive,
            )
            pieces.setdefault(key, []).append(piece if home == key[1] else piece.pinned())
        return pieces

    def _note_homes(self, pieces: Pieces) -> None:
        """Where the weights of an adapter are."""
        keys = {w: key for key, group in pieces.items() for piece in group for w in piece.arena.weights}
        for module in self._model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter in keys:
                    self._homes.setdefault(parameter, (module, attribute, keys[parameter]))
        self._gpus.update(device for _, device in pieces if device.type == "cuda")

    def _is_mix(self, wanted: Collection[str]) -> bool:
        """Whether values are computed before they are written: several adapters, or one of several pieces."""
        return len(wanted) > 1 or any(len(group) > 1 for name in wanted for group in self._residents[name].values())

    def _on_device(self, name: str) -> Pieces:
        """An adapter's pieces where its weights are."""
        return self._staged.get(name) or {
            key: [piece if piece.values.device == key[1] else piece.to(key[1]) for piece in group]
            for key, group in self._residents[name].items()
        }

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        """Where the model is on a GPU, work on a stream of the bank's own."""
        devices = {key[1] for pieces in self._residents.values() for key in pieces if key[1].type == "cuda"}
        if not devices:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(min(devices, key=str))
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # adapters may still be on their way
        with torch.cuda.stream(self._stream):
            yield

    def _await_staged(self) -> None:
        """Lets the current stream wait for what was staged, and the allocator know that it uses it."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        self._share_staged(current)

    def _share_staged(self, stream: torch.cuda.Stream | None) -> None:
        """Lets the allocator know that a stream uses what is staged."""
        if stream is None:
            return
        staged = [piece for pieces in self._staged.values() for piece in itertools.chain(*pieces.values())]
        tensors = [tensor for piece in staged for tensor in (piece.arena.indices, piece.values)]
        for tensor in itertools.chain(tensors, self._staged_plan.tensors if self._staged_plan is not None else ()):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def _plan_for(self, wanted: Collection[str]) -> Plan:
        names = tuple(wanted)
        for plan in (self._plan, self._staged_plan):
            if plan is not None and plan.names == names:
                return plan
        return arena.merge({name: self._on_device(name) for name in names})

    def _writes(self, wanted: dict[str, float]) -> tuple[dict[Key, Write], Plan | None]:
        """What to write over the base for a target, and the plan behind it if it is a mix."""
        if not self._is_mix(wanted):
            return {
                key: Write(
                    piece.arena if strength == 1.0 else piece.arena.single(), piece.values, strength, piece.additive
                )
                for name, strength in wanted.items()
                for key, [piece] in self._on_device(name).items()
            }, None
        plan = self._plan_for(wanted)
        writes = {}
        for key, merged in plan.arenas.items():
            base = self._base_of(merged, plan.shares[key], self._written.get(key))
            writes[key] = Write(merged, arena.mixed(base, plan.shares[key], wanted))
        return writes, plan

    def _base_of(self, merged: Arena, shares: list[Share], written: Written | None) -> torch.Tensor:
        """The base's entries of a mix, whatever the weights hold now."""
        if written is not None and written.arena is merged:
            return written.saved
        share = next((share for share in shares if written is not None and share.piece.arena is written.arena), None)
        kept = {} if share is not None else self._kept()
        base = torch.cat([base_entries(weight, merged.indices[part], kept) for weight, part in merged.parts])
        if share is not None and written is not None:
            base[share.positions] = written.saved
        return base

    def _switch_counted(self, wanted: dict[str, float], began: int | None = None) -> None:
        began = time.perf_counter_ns() if began is None else began
        self._switch(wanted)
        self._switches += 1
        self._last_switch_us = (time.perf_counter_ns() - began) / 1e3

    @no_autocast()
    def _switch(self, wanted: dict[str, float]) -> None:
        self._follow()
        self._await_staged()
        writes, plan = self._writes(wanted)
        groups: list[tuple[Key, Written | Write]] = [*self._written.items(), *writes.items()]
        arenas = {(key, group.arena.ranks): group.arena for key, group in groups}  # most often one
        for entries in arenas.values():
            self._check_weights(entries.weights)
        before = self._active, self._plan
        with interrupts_held() as let_through:
            try:
                self._write(writes)
                let_through()
                self._active, self._plan = wanted, plan
            except BaseException:
                self._put_back(*before)
                raise
        self._staged, self._staged_plan = {}, None

    def _put_back(self, before: dict[str, float] | None, plan: Plan | None) -> None:
        """What was active before a switch that failed; if that fails too, the base."""
        self._active, self._plan = None, plan
        try:
            self._write(self._writes(before or {})[0])
        except Exception:  # noqa: BLE001 - whatever it was, the base is nearer, and the switch's own error is raised
            before, self._plan = {}, None
            self._write({})
        self._active = before or {}

    def _write(self, writes: dict[Key, Write]) -> None:
        """Writes in place of what is in the weights. If it fails, `_written` says of each key what it holds."""
        with torch.inference_mode(False):  # else no switch outside inference mode could write them
            saved = {key: torch.empty_like(write.values, dtype=key[0]) for key, write in writes.items()}
        for key in {**self._written, **writes}:
            old, new = self._written.get(key), writes.get(key)
            if new is not None:
                self._written[key] = new.put_in(old, saved[key])
            elif old is not None:
                old.take_out()
                del self._written[key]
            if old is None or new is None or new.arena.ranks != old.arena.ranks:
                for weight in old.arena.weights if old is not None else ():
                    claim(weight, None)
                for weight in new.arena.weights if new is not None else ():
                    claim(weight, self)
        torch.clear_autocast_cache()  # it may hold rounded copies of the old weights

    def _kept(self) -> Kept:
        """The entries of the base that the weights do not hold now."""
        kept: Kept = {}
        for written in self._written.values():
            entries = written.arena.single()
            kept.update((weight, (entries.indices[part], written.saved[part])) for weight, part in entries.parts)
        return kept

    @torch.no_grad()
    def _base_weight(self, name: str) -> torch.Tensor:
        """A copy of a weight as it is without any adapter."""
        weight = resolve(self._model, name)
        with self._lock:
            self._follow()
            base = weight.detach().clone(memory_format=torch.contiguous_format)
            for written in self._written.values():
                entries = written.arena
                for part in (part for changed, part in entries.parts if changed is weight):
                    saved = entries.in_units(written.saved)[part]
                    scatter_apply(entries.in_units(base.view(-1)), entries.indices[part], saved)
        return base


_Home = tuple[nn.Module, str, Key]  # the module of a weight, what it calls it, and what it was when adapters came


class _BaseWeights(Mapping[str, torch.Tensor]):
    """The base of a bank's model: the weights by name, each copied when it is asked for."""

    def __init__(self, bank: ResidentAdapters) -> None:
        self._bank = bank

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._bank._base_weight(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._bank._model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(eq=False)
class _Batch:
    """An open `batch` block: who opened it, whom it names, and what it changed."""

    caller: tuple[int, int]
    names: set[str] = field(default_factory=set)
    modules: list[nn.Module] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _User:
    """An open `using` block: who opened it, and what comes back at its end."""

    caller: tuple[int, int]
    before: dict[str, float]


def _caller() -> tuple[int, int]:
    """The thread and the asyncio task that run this."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop
        task = None
    return threading.get_ident(), id(task)


def _as_given(strengths: Mapping[str, float]) -> str | dict[str, float]:
    return next(iter(strengths)) if list(strengths.values()) == [1.0] else dict(strengths)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(pieces: Pieces) -> Counts:
    """Entries of each weight."""
    return {
        weight: (part.stop - part.start) * piece.arena.unit
        for piece in itertools.chain(*pieces.values())
        for weight, part in piece.arena.parts
    }


def _base_now(entries: Arena) -> torch.Tensor:
    """The base's entries, which the weights hold, in float32 or more."""
    parts = [weight.detach().view(-1)[entries.indices[part]] for weight, part in entries.parts]
    base = torch.cat(parts)
    return base.to(torch.promote_types(base.dtype, torch.float32))


def _check_memory(first: Mapping[torch.Tensor, str], changed: Collection[torch.Tensor]) -> None:
    """No weight to be changed shares memory with another parameter, whose base would change with it."""
    reach, reaching = 0, None
    for weight in sorted((w for w in first if w.numel() and not w.is_meta), key=torch.Tensor.data_ptr):
        if reaching is not None and weight.data_ptr() < reach and (weight in changed or reaching in changed):
            raise ValueError(f"{first[weight]}: shares memory with {first[reaching]!r}, but is not the same parameter")
        last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        end = weight.data_ptr() + (last + 1) * weight.element_size()
        if end > reach:
            reach, reaching = end, weight
