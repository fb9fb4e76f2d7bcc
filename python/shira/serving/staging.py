"""What is brought to the model's device ahead of a switch, and the streams of a GPU that must wait for each other."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch

from shira.serving import arena
from shira.serving.arena import Mix, Pieces, Plan
from shira.serving.registry import Registry


class Streams:
    """The stream that a bank's last call used on each GPU."""

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def follow(self, gpus: Collection[torch.device], held: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Lets the current stream of each GPU wait for what earlier calls launched on another, and the allocator know
        that it uses the tensors which `held()` gives.

        Raises RuntimeError while the current stream is being captured into a CUDA graph.
        """
        if gpus and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is being captured, which a bank's calls cannot be part of")
        for device in gpus:
            current = torch.cuda.current_stream(device)
            last = self._last.get(device, current)
            if last != current:
                current.wait_stream(last)
                for tensor in held():
                    if tensor.device == device:
                        tensor.record_stream(current)
            self._last[device] = current


class Staging:
    """Adapters and the plan of a mix that are ready for the next switch, off its critical path."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._pieces: dict[str, Pieces] = {}  # of staged adapters, where their weights are
        self._plan: Plan | None = None  # of the staged mix
        self._stream: torch.cuda.Stream | None = None  # the one that brings them

    @property
    def plan_bytes(self) -> int:
        """Bytes of the merged entries of the staged mix."""
        return self._plan.nbytes if self._plan is not None else 0

    def stage(self, mix: Mix, active: Plan | None) -> None:
        """Brings the mix to the model's device and merges its entries, instead of what was staged before.

        active: the plan of what is in the weights, which the staged mix may have too.
        """
        with self._side_stream():
            pieces = {name: self.on_device(name) for name, _ in mix}
            plan = self._plan_of(mix, active, pieces) if self._registry.needs_merge(mix) else None
        self._pieces, self._plan = pieces, plan
        self._share(self._stream)

    def clear(self) -> None:
        """Drops what is staged."""
        self._pieces, self._plan = {}, None

    def forget(self, name: str) -> None:
        """Drops what is staged of an adapter, and the plan of a mix that names it."""
        self._pieces.pop(name, None)
        if self._plan is not None and name in self._plan.names:
            self._plan = None

    def keep_only(self, names: Collection[str]) -> None:
        """Drops what is staged of all other adapters."""
        for name in [*self._pieces, *(self._plan.names if self._plan is not None else ())]:
            if name not in names:
                self.forget(name)

    def join(self) -> None:
        """Lets the current stream wait for what was staged, and the allocator know that it uses it."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        self._share(current)

    def on_device(self, name: str) -> Pieces:
        """Gives an adapter's pieces where its weights are."""
        return self._pieces.get(name) or {
            key: [piece if piece.values.device == key[1] else piece.to(key[1]) for piece in group]
            for key, group in self._registry.pieces_of(name).items()
        }

    def plan_of(self, mix: Mix, active: Plan | None = None) -> Plan:
        """Gives the plan of a mix: `active` or the staged one if it is of the same adapters, else a new one."""
        return self._plan_of(mix, active, {})

    def _plan_of(self, mix: Mix, active: Plan | None, pieces: Mapping[str, Pieces]) -> Plan:
        names = tuple(name for name, _ in mix)
        for plan in (active, self._plan):
            if plan is not None and plan.names == names:
                return plan
        return arena.merge({name: pieces.get(name) or self.on_device(name) for name in names})

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        """Where the model is on a GPU, lets the block work on a stream of the bank's own."""
        if not self._registry.gpus:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(min(self._registry.gpus, key=str))
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # adapters may still be on their way
        with torch.cuda.stream(self._stream):
            yield

    def _share(self, stream: torch.cuda.Stream | None) -> None:
        """Lets the allocator know that a stream uses what is staged."""
        if stream is None:
            return
        staged = [piece for pieces in self._pieces.values() for piece in itertools.chain(*pieces.values())]
        tensors = [tensor for piece in staged for tensor in (piece.arena.indices, piece.values)]
        for tensor in itertools.chain(tensors, self._plan.tensors if self._plan is not None else ()):
            if tensor.is_cuda:
                tensor.record_stream(stream)
