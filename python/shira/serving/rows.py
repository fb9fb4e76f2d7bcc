"""The rows of an open batch: which slot each one uses, on each device, and what running them has cost so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from shira.serving.pages import Table, sent

# When unfused inference has cost as much as switching in and out, in tokens that the block has run; a forward costs as
# much as FORWARD_TOKENS beside its tokens, since it reads all entries. From bench/cases/bench_unfused.py,
# test_fused_or_unfused (1 thread, hidden 1024, 1 %, float32): the two cost as much at about 6 forwards of 1 token, and
# at one forward of 128 to 200.
FUSE_AFTER_TOKENS = 150
FORWARD_TOKENS = 24

_KEPT = 16  # numbers of rows, and for each of them numbers of tokens, whose slots are kept

T = TypeVar("T")


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
        self._known: dict[int, dict[int, torch.Tensor]] = {}  # slots by rows, by tokens; the latest last
        self._captured: set[int] = set()  # ids of those tensors that graphs read
        self._captured_tables: set[Table] = set()
        self.slots = torch.empty(0)
        self.meter: Meter | None = None
        self._by_tokens: dict[int, torch.Tensor] = {}
        # Some of `_by_tokens`, by the shape of x and the stream that is to read them: a decode step's lookup.
        self._by_shape: dict[tuple[torch.Size, int], torch.Tensor] = {}
        self._streams: set[torch.cuda.Stream] = set()  # that read or wrote them since the batch was opened
        self._lock = threading.Lock()  # of the dictionaries, but for that lookup: other threads may run the model too

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

    def set(self, slots: Sequence[int], meter: Meter | None) -> None:
        """Gives each row its slot. Tensors of earlier batches of as many rows are written, for captured graphs read
        them."""
        with self._lock, torch.inference_mode(False):
            new = sent(slots, torch.int32, self._device)
            known = self._known.pop(len(slots), None) or {len(slots): torch.empty_like(new)}
            self._known[len(slots)] = known
            self._forget(self._known, lambda by_tokens: any(id(each) in self._captured for each in by_tokens.values()))
            for tokens, each in known.items():
                each.copy_(_spread(new, tokens))
            self.meter = meter
            self._by_tokens = known
            self._by_shape.clear()
            self.slots = known[len(slots)]
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

    def of(self, x: torch.Tensor, table: Table) -> torch.Tensor:
        """Gives the slots [tokens] int32 for x [..., in] and the table of a layer. Row i of n uses the name
        i // (n / names)."""
        if is_captured(x):
            return self._of_graph(x, table)
        key = x.shape, stream_of(x)
        known = self._by_shape.get(key)
        if known is None:
            with self._lock:
                tokens = self._check(x)
                known = self._by_tokens.get(tokens)
                if known is None:
                    known = self._keep(tokens)
                self._join(known)
                self._by_shape[key] = known
        return known

    def _of_graph(self, x: torch.Tensor, table: Table) -> torch.Tensor:
        """Gives the same as `of` while a graph is captured, which makes what is read stay. All happens under the lock,
        so that no other thread can have it forgotten meanwhile."""
        with self._lock:
            tokens = self._check(x)
            known = self._by_tokens.get(tokens)
            read = self.slots if known is None else known
            self._captured.add(id(read))
            self._captured_tables.add(table)
        # A tensor that was made now would be written by replays alone, so it is not kept for others: the graph spreads
        # the slots itself.
        return _spread(read, tokens) if known is None else known

    def _join(self, slots: torch.Tensor) -> None:
        """On a GPU the current stream waits for those that wrote slots or pages, or may still read them."""
        if self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            for other in self._streams - {current}:
                current.wait_stream(other)
            slots.record_stream(current)
            self._streams.add(current)

    def compiled_for(self, x: torch.Tensor) -> torch.Tensor:
        """Gives the same as `of`, as a part of compiled code."""
        return _spread(self.slots, self._check(x))

    def _check(self, x: torch.Tensor) -> int:
        """Gives the number of tokens of x, whose number of rows must fit the batch."""
        count, tokens = self.slots.shape[0], x.shape[:-1].numel()
        rows = x.shape[0] if x.dim() > 1 else 1
        if rows % count and not (rows == 1 and tokens == count):  # packed: one row, a name for each token
            raise ValueError(f"batch: the model got {rows} rows, which is no multiple of the {count} names")
        return tokens

    def _keep(self, tokens: int) -> torch.Tensor:
        with torch.inference_mode(False):
            self._by_tokens[tokens] = _spread(self.slots, tokens).clone()
        self._forget(self._by_tokens, lambda each: each is self.slots or id(each) in self._captured)
        self._by_shape.clear()
        return self._by_tokens[tokens]

    @staticmethod
    def _forget(kept: dict[int, T], needed: Callable[[T], bool]) -> None:
        """Drops all but the latest ones, and those that are needed."""
        for key in [*kept][:-_KEPT]:
            if not needed(kept[key]):
                del kept[key]


def _spread(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    count = slots.shape[0]
    return slots[:, None].expand(count, tokens // count).reshape(-1)


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
