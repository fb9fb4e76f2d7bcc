"""The rows of an open batch: which slot each one uses, on each device, and what running them has cost so far."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from shira.model.interrupts import lock_that_forks_wait_for
from shira.serving.pages import Table, sent

# When unfused inference has cost as much as switching in and out, in tokens that the block has run; a forward costs as
# much as FORWARD_TOKENS beside its tokens, since it reads all entries. From bench/cases/bench_unfused.py,
# test_fused_or_unfused (1 thread, hidden 1024, 1 %, float32): the two cost as much at about 6 forwards of 1 token, and
# at one forward of 128 to 200.
FUSE_AFTER_TOKENS = 150
FORWARD_TOKENS = 24

_KEPT = 16  # numbers of rows, and for each of them numbers of tokens, whose slots are kept

# Where a layer's input has the rows of the batch: docs/unfused.md, "Rows".
LAYOUTS = ("first", "repeated", "second", "packed")
Layout = str | Callable[[str, torch.Tensor], str | torch.Tensor]

Spread = Callable[[torch.Tensor, int], torch.Tensor]  # the slot of each row, and a number of tokens -> of each token
Key = tuple[int, Spread]  # tokens, and which of them are of which row

K = TypeVar("K")
T = TypeVar("T")


class Layer(Protocol):
    """A linear layer while a batch is open, as far as its rows need it."""

    shira_name: str
    shira_table: Table


def is_captured(x: torch.Tensor) -> bool:
    """Whether what is launched for x now goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def stream_of(x: torch.Tensor) -> int:
    """Which stream of a GPU runs what is launched for x now."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


class Rows:
    """The slot that each row of the open batch uses (-1 for none), on one device.

    A CUDA graph that was captured in a batch reads these tensors and the tables at their addresses whenever it is
    replayed. So both are kept; every later batch of as many rows writes the tensors, and they hold -1 in between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[int, dict[Key, torch.Tensor]] = {}  # slots by rows, by tokens; the latest last
        self._captured: set[int] = set()  # ids of those tensors that graphs read
        self._captured_tables: set[Table] = set()
        self.slots = torch.empty(0, device=device)
        self.meter: Meter | None = None
        self._layout: Layout = "first"
        self._alike = False  # whether all rows have one slot, so that it does not matter which token is of which row
        self._by_tokens: dict[Key, torch.Tensor] = {}
        # Some of `_by_tokens`, by the shape of x and the stream that is to read them: a decode step's lookup.
        self._by_shape: dict[tuple[torch.Size, int], torch.Tensor] = {}
        self._streams: set[torch.cuda.Stream] = set()  # that read or wrote them since the batch was opened
        # Of the dictionaries, but for that lookup: other threads may run the model too.
        self._lock = lock_that_forks_wait_for()

    @property
    def tensors(self) -> list[torch.Tensor]:
        with self._lock:
            return [each for by_tokens in self._known.values() for each in by_tokens.values()]

    @property
    def read_by_graphs(self) -> bool:
        """Whether a graph reads tables."""
        return bool(self._captured_tables)

    def forget_graphs(self) -> None:
        """Notes that no graph which was captured so far is replayed again."""
        with self._lock:
            self._captured.clear()
            self._captured_tables.clear()

    def set(self, slots: Sequence[int], meter: Meter | None, layout: Layout = "first") -> None:
        """Gives each row its slot. Tensors of earlier batches of as many rows are written, for captured graphs read
        them."""
        with self._lock, torch.inference_mode(False):
            new = sent(slots, torch.int32, self._device)
            count = len(slots)
            known = self._known.get(count) or {(count, repeated): torch.empty_like(new)}
            others = {number: each for number, each in self._known.items() if number != count}
            self._known = {**others, count: {key: each for key, each in known.items() if key[1] is not _alike}}
            self._forget(self._known, lambda by_tokens: any(id(each) in self._captured for each in by_tokens.values()))
            self._by_tokens = self._known[count]
            for (tokens, spread), each in self._by_tokens.items():
                each.copy_(spread(new, tokens))
            self.meter = meter
            self._layout, self._alike = layout, len(set(slots)) == 1
            self._by_shape.clear()
            self.slots = self._by_tokens[count, repeated]
            self._streams.clear()
            self._join(self.slots)

    def clear(self) -> None:
        """Gives no row a slot any more."""
        with self._lock:
            for each in self._by_tokens.values():
                each.fill_(-1)

    def leave(self) -> None:
        """Notes that the batch is over: what graphs read tells them to add nothing."""
        with self._lock:
            self._join(self.slots)
            for each in self._by_tokens.values():
                if id(each) in self._captured:
                    each.fill_(-1)

    def of(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Gives the slots [tokens] int32 for the input x [..., in] of a layer.

        Raises ValueError if x has not the batch's rows where the layout says.
        """
        if is_captured(x):
            return self._of_graph(x, layer)
        key = x.shape, stream_of(x)
        known = self._by_shape.get(key)
        if known is None:
            with self._lock:
                found = self._look(x, layer)
                if isinstance(found, torch.Tensor):  # the callable may give others for the next input of this shape
                    self._join(self.slots)
                    return found
                known = self._by_tokens.get(found)
                if known is None:
                    known = self._keep(found)
                self._join(known)
                if isinstance(self._layout, str):  # a callable may say something else for another layer
                    self._by_shape[key] = known
        return known

    def _of_graph(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Gives the same as `of` while a graph is captured, which makes what is read stay. All happens under the lock,
        so that no other thread can have it forgotten meanwhile."""
        with self._lock:
            found = self._look(x, layer)
            if not isinstance(found, torch.Tensor) and found[1] is _alike:  # a replay may have rows that differ
                raise self._misfit(x, layer)
            known = None if isinstance(found, torch.Tensor) else self._by_tokens.get(found)
            read = self.slots if known is None else known
            self._captured.add(id(read))
            self._captured_tables.add(layer.shira_table)
        if isinstance(found, torch.Tensor):
            return found
        # A tensor that was made now would be written by replays alone, so it is not kept for others: the graph spreads
        # the slots itself.
        tokens, spread = found
        return spread(read, tokens) if known is None else known

    def _join(self, slots: torch.Tensor) -> None:
        """On a GPU the current stream waits for those that wrote slots or pages, or may still read them."""
        if self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            for other in self._streams - {current}:
                current.wait_stream(other)
            slots.record_stream(current)
            self._streams.add(current)

    def compiled_for(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Gives the same as `of`, as a part of compiled code."""
        found = self._look(x, layer)
        if isinstance(found, torch.Tensor):
            return found
        tokens, spread = found
        return spread(self.slots, tokens)

    def _look(self, x: torch.Tensor, layer: Layer) -> Key | torch.Tensor:
        """Gives the number of tokens of x and how the slots are spread over them, or the slots themselves."""
        said = self._layout if isinstance(self._layout, str) else self._layout(layer.shira_name, x)
        if isinstance(said, torch.Tensor):
            return self._chosen(said, x, layer)
        if said not in LAYOUTS:
            raise ValueError(
                f"batch: `rows` gave {said!r} for {layer.shira_name!r}; it must be one of {', '.join(LAYOUTS)}, or a "
                "row for each token"
            )
        count, tokens = self.slots.shape[0], x.shape[:-1].numel()
        if said == "second":
            fits = x.dim() in (2, 3) and x.shape[-2] == count
        elif said == "packed":
            fits = tokens == count
        elif said == "repeated":
            fits = x.dim() > 1 and x.shape[0] % count == 0
        else:
            fits = x.dim() > 1 and x.shape[0] == count
        if fits or count == 1:
            return tokens, tiled if said == "second" else repeated
        if self._alike or tokens == 0:
            return tokens, _alike
        raise self._misfit(x, layer)

    def _chosen(self, rows: torch.Tensor, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Gives the slots of tokens whose rows the caller's function gave: [tokens], -1 for none."""
        count, tokens = self.slots.shape[0], x.shape[:-1].numel()
        if rows.shape != (tokens,) or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"batch: `rows` gave {rows.dtype} {[*rows.shape]} for {layer.shira_name!r}; it must be int32 or int64 "
                f"[{tokens}], a row for each token of an input of shape {[*x.shape]}"
            )
        unread = is_captured(x) or torch.compiler.is_compiling()
        if not unread and tokens and not bool(((rows >= -1) & (rows < count)).all()):
            raise ValueError(f"batch: `rows` gave a row for {layer.shira_name!r} that is not from -1 to {count - 1}")
        rows = rows.to(self.slots.device)
        return self.slots[rows.clamp_min(0)].masked_fill(rows < 0, -1)

    def _misfit(self, x: torch.Tensor, layer: Layer) -> ValueError:
        """Gives the error of an input that has not the batch's rows where the layout says."""
        count, name = self.slots.shape[0], layer.shira_name
        ways = []
        if x.dim() > 1 and x.shape[0] % count == 0:
            ways.append(
                "if each row stands several times in place (beams, num_return_sequences, [batch * sequence, in]), say "
                f"rows='repeated'; if the batch stands several times, as after torch.cat([x] * {x.shape[0] // count}), "
                f"give names * {x.shape[0] // count}"
            )
        if x.dim() == 3 and x.shape[1] == count:
            ways.append("if the sequence comes first, say rows='second'")
        if x.shape[:-1].numel() == count:
            ways.append("if it is one packed sequence with a name for each token, say rows='packed'")
        ways.append(
            "if it is not made of the batch's rows (positions that all rows share, tokens gathered for an expert), its "
            "adapters can only be switched to; `rows` may also be a function"
        )
        return ValueError(
            f"batch: {name!r} got an input of shape {[*x.shape]}, where the {count} rows of the batch are not found: "
            + "; ".join(ways)
        )

    def _keep(self, key: Key) -> torch.Tensor:
        tokens, spread = key
        with torch.inference_mode(False):
            self._by_tokens[key] = spread(self.slots, tokens).clone()
        self._forget(self._by_tokens, lambda each: each is self.slots or id(each) in self._captured)
        self._by_shape.clear()
        return self._by_tokens[key]

    @staticmethod
    def _forget(kept: dict[K, T], needed: Callable[[T], bool]) -> None:
        """Drops all but the latest ones, and those that are needed."""
        for key in [*kept][:-_KEPT]:
            if not needed(kept[key]):
                del kept[key]


def check_layout(layout: Layout) -> None:
    """Raises ValueError for a layout that there is not."""
    if not callable(layout) and layout not in LAYOUTS:
        raise ValueError(f"rows must be one of {', '.join(LAYOUTS)}, or a function, got {layout!r}")


def repeated(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """Gives each row's slot to as many tokens, one row after the other."""
    count = slots.shape[0]
    return slots[:, None].expand(count, tokens // count).reshape(-1)


def tiled(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """Gives the slots of all rows again and again."""
    count = slots.shape[0]
    return slots.expand(tokens // count, count).reshape(-1)


def _alike(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """Gives the one slot that all rows have to any number of tokens."""
    return slots[:1].expand(tokens)


class Meter:
    """Counts the tokens of a batch that one mix owns, and has it fused once they cost more than a switch.

    Waiting until then never costs more than about twice what the better way would have cost. Fused and unfused are the
    same function up to rounding, so it may happen between any two layers, but not inside of one: hence the lock, for
    other threads may run the model too. Compiled code does not count.
    """

    def __init__(self, fuse: Callable[[], None]) -> None:
        self.lock = threading.Lock()
        self._fuse = fuse
        self._fused = False
        self._first: nn.Module | None = None  # that ran in this block: each of its calls is a forward of the model
        self._tokens = 0
        _meters.add(self)

    @property
    def has_fused(self) -> bool:
        """Whether the weights hold the mix."""
        return self._fused

    def is_fused(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Whether the weights hold the mix, now that `module` is to run."""
        if self._first is None:
            self._first = module
        if module is self._first and not self._fused:
            self._tokens += x.shape[:-1].numel() + FORWARD_TOKENS
            # Autograd may have kept weights for a backward, autocast rounded copies of them, also for other threads; a
            # captured graph would hold the switch.
            kept = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
            if self._tokens > FUSE_AFTER_TOKENS and not kept and not is_captured(x):
                self._fuse()
                self._fused = True
        return self._fused


_meters: weakref.WeakSet[Meter] = weakref.WeakSet()


def _free_meters() -> None:
    """In a child of a fork nobody is inside of a layer, but the thread that forked."""
    for meter in _meters:
        meter.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_meters)
