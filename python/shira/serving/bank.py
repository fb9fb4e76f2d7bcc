"""Serving: several adapters beside one model, any of them (or a mix) written into its weights in place.

A bank has the calls and their lock. What they change has owners, each in a file of its own: the adapters (registry),
what is ready for the next switch (staging), what the weights hold (switching), the open batch (batch), and who is
inside `using` (callers).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.model.interrupts import interrupts_held, lock_that_forks_wait_for, no_autocast
from shira.model.names import resolve_state, state_buffers
from shira.serving.arena import Mix
from shira.serving.batch import Batch, Batches, check_options, is_int
from shira.serving.callers import Callers, Using, current_caller
from shira.serving.registry import Registry, as_given, check_whole
from shira.serving.rows import Layout
from shira.serving.staging import Staging, Streams
from shira.serving.switching import Switching
from shira_kernels.dtypes import ARITHMETIC


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
    whole or not at all: after an error or an interrupt the weights are as before it. The model's parameters and
    buffers, their dtypes and devices must stay those that were there when an adapter was added.

    Entries of float64, float32, bfloat16 and float16 can be scaled and mixed. Those of other dtypes (float8, integers,
    bool) are replaced: at strength 1, by one adapter of a mix.

    `batch` leaves the weights alone and gives each row of a batch its own adapter, unfused; see docs/unfused.md.

    Several threads may call a bank; their calls wait for each other. While a thread or an asyncio task is inside
    `using` or `batch`, switches and batches of others are refused. The bank does not know when the model runs: a
    forward during a switch may see part of it. Nor does it know who else writes the weights: load or train them after
    `switch(None)`. A buffer that forwards write, such as BatchNorm's statistics in training, is written by others too.

    A tied weight (one parameter under several names) is one tensor, under any of its names. A parameter that shares
    memory with another one, without being the same, is refused.

    Args:
        model: any module. Names of its parameters and buffers are those of its state dict; PEFT's prefixes are
            understood.
        device_budget: bytes that unfused adapters may take on the model's devices. Adapters then live in host memory
            and are brought in when a batch needs them; the least recently used makes room. None: all stay there.

    Raises:
        ValueError: `device_budget` is neither None nor a positive whole number, or parameters are DTensors (FSDP2,
            tensor parallelism).
    """

    def __init__(self, model: nn.Module, *, device_budget: int | None = None) -> None:
        if device_budget is not None and (not is_int(device_budget) or device_budget <= 0):
            raise ValueError(f"device_budget must be a positive number of bytes or None, got {device_budget!r}")
        for name, weight in model.named_parameters():
            check_whole(name, weight)
        self._model = model
        self._lock = lock_that_forks_wait_for()  # of all that follows; a batch's forwards take it only to fuse
        self._callers = Callers()
        self._streams = Streams()
        self._registry = Registry(model, self)
        self._staging = Staging(self._registry)
        self._switching = Switching(self._registry, self._staging)
        self._batches = Batches(self._registry, self._staging, self._switching, device_budget)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a bank cannot be copied or pickled; nor can weights that it is changing: switch(None) first")

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return self._registry.names

    @property
    def active(self) -> str | dict[str, float] | None:
        """What the weights hold, as `switch` takes it: None is the base.

        Raises RuntimeError if a switch failed and the weights could not be put back; a switch that succeeds repairs it.
        """
        return self._switching.given

    @property
    def stats(self) -> BankStats:
        """Memory held and time taken."""
        with self._lock:
            pages = self._batches.pages
            return BankStats(
                adapter_bytes=self._registry.nbytes,
                saved_bytes=self._switching.saved_bytes,
                plan_bytes=self._switching.plan_bytes + self._staging.plan_bytes,
                switches=self._switching.count,
                last_switch_us=self._switching.last_us,
                unfused_bytes=pages.nbytes,
                pages=pages.count,
                pages_used=pages.used,
                resident=[as_given(mix) for mix in pages.residents],
                hits=pages.hits,
                misses=pages.misses,
                evictions=pages.evictions,
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
            ShiraWarning: the adapter has no checksum, so that it cannot be told whether it was made for this base.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter must be a string that is not empty, got {name!r}")
        if not isinstance(adapter, (str, os.PathLike, Adapter)):
            raise ValueError(f"an adapter must be an Adapter or the path of its file, got {adapter!r}")
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter, base=_BaseWeights(self._model, self._base_weight))
        if check_finite:
            for tensor_name, tensor in adapter.items():
                values = tensor.values if tensor.dtype in ARITHMETIC else tensor.values.float()  # for float8's sake
                if not bool(values.isfinite().all()):
                    raise ValueError(f"{tensor_name}: values are not finite")
        with self._lock:
            self._finish()
            self._registry.check_free(name)
            self._follow()
            on_host = on_host or self._batches.pages.budget is not None
            pieces = self._registry.prepare(adapter, self._switching.kept(), force=force, on_host=on_host)
            with interrupts_held(), self._batches.changing():  # handlers may call the bank, too
                self._batches.register(name, pieces)
                self._registry.add(name, pieces)

    def remove(self, name: str) -> None:
        """Forgets an adapter. Raises ValueError if there is none of that name, or it is active, or `using` or `batch`
        needs it."""
        with self._lock:
            self._finish()
            self._registry.check_names([name])
            if self._switching.needs(name) or self._callers.needs(name):
                raise ValueError(f"{name!r} is in use: switch to something else first")
            if self._batches.opened is not None and name in self._batches.opened.names:
                raise ValueError(f"{name!r} is in use: leave batch() first")
            with interrupts_held(), self._batches.changing():
                self._registry.remove(name)
                self._batches.remove(name)
                self._batches.trim()
                self._staging.forget(name)

    def forget_graphs(self) -> None:
        """Says that no CUDA graph which was captured in a batch so far will be replayed again.

        What they read may then be laid out anew, or freed. Raises RuntimeError inside `batch`.
        """
        with self._lock:
            self._finish()
            self._check_callers()
            with interrupts_held(), self._batches.changing():
                self._batches.forget_graphs()

    @torch.no_grad()
    @no_autocast()
    def stage(self, target: str | Mapping[str, float] | None) -> None:
        """Prepares a switch to `target`, off the critical path: merges the entries of a mix, and brings adapters that
        are held on the host to the model's device, on a stream of its own. Kept until the next switch or `stage`; None
        drops it. Raises what `switch` raises for a wrong target."""
        with self._lock:
            self._finish()
            self._follow()
            self._staging.stage(self._registry.mix_of(target), self._switching.plan)

    @torch.no_grad()
    def switch(self, target: str | Mapping[str, float] | None) -> None:
        """Writes an adapter, or a mix, in place of whatever is active: only the entries of either, each once.

        Args:
            target: a name; or strengths by name: base + the sum of strength (value - base), in float32 (float64 for
                float64 weights) and rounded once; or None for the base. One name at strength 1 gives exactly its
                values. The merged entries of a mix are kept while it is active: other strengths need no merge.

        Raises:
            ValueError: a name is unknown or a strength not finite; a tensor whose entries can only be replaced would be
                scaled or mixed.
            RuntimeError: entries of a weight are attached for training, or written by another bank; another thread or
                task is inside `using`; a parameter of the model was replaced by another one.

        After any error, and after an interrupt, the weights hold what they held before; if even that cannot be
        written, the base.
        """
        began = time.perf_counter_ns()
        with self._lock:
            self._finish()
            mix = self._registry.mix_of(target)
            self._check_callers()
            self._follow()
            self._switching.switch(mix, began)

    @contextlib.contextmanager
    def batch(
        self,
        names: Sequence[str | Mapping[str, float] | None],
        *,
        mode: str = "auto",
        tokens: int | None = None,
        rows: Layout = "first",
    ) -> Iterator[None]:
        """Inside the `with` block row i of the model's batch uses `names[i]`; the weights hold the base.

        The linear layers that some adapter changes add each row's sparse delta to their output. Each must get the
        batch's rows, as `rows` says; where targets differ, anything else is an error. Code compiled by torch.compile
        is made once for batches, and not anew for other adapters.

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
            rows: where the input [..., in] of a layer has the n rows of `names`. "first": [n, ..., in]. "repeated":
                [k n, ..., in], each row k times in place, with a k for each layer, as beams, num_return_sequences and
                inputs flattened to [batch * sequence, in] are. "second": [sequence, n, in], and [n, in]. "packed": n
                tokens, in any shape. Or a function of a layer's name and its input x, which gives one of these words,
                or int32 or int64 [tokens of x], the row of each token, -1 for the base.

        Raises:
            ValueError: `names` is no list or empty, a name is unknown or a strength not finite, an adapter changes
                something else than float64, float32, bfloat16 or float16 weights of nn.Linear and Conv1D of
                transformers, or the adapters of the batch take more than `device_budget`. In the block: a layer gets an
                input that has not the batch's rows where `rows` says, and the targets differ.
            RuntimeError: an adapter is active; a batch is open, or another thread or task is inside `using`; another
                bank or `attach` changes the weights; a parameter of the model was moved, or replaced by another one;
                CUDA graphs read the pages, and the batch has no room there; a graph is being captured. In the block: a
                module's forward reads the weight of a layer that an adapter changes, which has no rows' deltas.
        """
        batch = Batch(current_caller(), rows)
        try:
            with self._lock:
                self._finish()
                mixes = self._batches.mixes_of(names)
                check_options(mode, tokens, rows)
                self._check_callers()
                self._follow()
                self._batches.open(batch, mixes, mode, tokens, lambda: self._fuse(batch, mixes[0]))
            yield
        finally:
            try:
                self._leave_batch(batch)
            except BaseException:
                try:
                    self._leave_batch(batch)  # what cut it off, such as an interrupt, may be over
                finally:
                    batch.is_over = True
                raise

    @contextlib.contextmanager
    def using(self, target: str | Mapping[str, float] | None) -> Iterator[None]:
        """Switches for the length of a `with` block, then back to what was active before."""
        block = Using(current_caller(), ())
        try:
            with self._lock:
                self._finish()
                self._check_callers()
                block.before = self._switching.active or ()
                self._callers.enter(block)
                self.switch(target)
            yield
        finally:
            try:
                self._leave_using(block)
            except BaseException:
                try:
                    self._leave_using(block)
                finally:
                    block.is_over = True
                raise

    @torch.no_grad()
    def verify_base(self) -> None:
        """Compares the base under every adapter with what it was when the adapter was added, whatever is active.

        Raises ValueError naming the first adapter and tensor whose base entries are others.
        """
        with self._lock:
            self._finish()
            self._follow()
            self._registry.verify(self._switching.kept())

    def _leave_batch(self, batch: Batch) -> None:
        with interrupts_held(), self._lock:
            if self._batches.opened is batch:
                self._batches.close(batch, self._follow)

    def _leave_using(self, block: Using) -> None:
        with interrupts_held(), self._lock:
            if self._callers.knows(block):
                if not self._switching.holds(block.before):
                    self.switch(dict(block.before) or None)
                self._callers.leave(block)

    def _finish(self) -> None:
        """Ends what an interrupt cut off in an earlier call."""
        if self._batches.opened is not None and self._batches.opened.is_over:
            self._leave_batch(self._batches.opened)
        self._batches.repair()

    def _check_callers(self) -> None:
        """Raises RuntimeError if others rely on what is in the weights."""
        opened = self._batches.opened
        self._callers.check(opened.caller if opened is not None else None)

    def _follow(self) -> None:
        """Lets GPUs wait for what earlier calls launched on other streams; see `Streams.follow`."""
        self._streams.follow(self._registry.gpus, self._held)

    def _held(self) -> Iterator[torch.Tensor]:
        """What the bank keeps from call to call, beside what is staged."""
        yield from self._registry.tensors
        yield from self._switching.tensors
        yield from self._batches.tensors

    def _fuse(self, batch: Batch, mix: Mix) -> None:
        """Goes on with the mix in the weights, if the batch is still open."""
        with self._lock, interrupts_held():
            if self._batches.opened is batch:
                self._follow()
                self._batches.fuse(batch, mix)

    @torch.no_grad()
    def _base_weight(self, name: str) -> torch.Tensor:
        """Gives a copy of a weight as it is without any adapter."""
        weight = resolve_state(self._model, name)
        with self._lock:
            self._follow()
            return self._switching.base_weight(weight)


class _BaseWeights(Mapping[str, torch.Tensor]):
    """The base of a bank's model: the weights and buffers by name, each copied when it is asked for."""

    def __init__(self, model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
        self._model = model
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        parameters = self._model.named_parameters(remove_duplicate=False)
        return (name for name, _ in itertools.chain(parameters, state_buffers(self._model)))

    def __len__(self) -> int:
        return sum(1 for _ in self)
