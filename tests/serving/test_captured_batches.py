"""CUDA graphs captured inside ResidentAdapters.batch, and streams, without a GPU: what a graph would read when it is
replayed is there, whatever other threads make the bank forget, and holds the entries of the batch that is open then."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from batches import NAMES, Small, check_pages, check_rows, enter, in_another_thread, inputs, make, small_bank

import shira
from shira.serving import layers as unfused
from shira.serving import pages
from shira.serving import rows as serving_rows

Delta = tuple[torch.Tensor, torch.Tensor]  # the input of a layer, and what it added to the layer's output


@contextmanager
def calls_of(monkeypatch: pytest.MonkeyPatch, seen: Callable[..., None]) -> Iterator[None]:
    real = unfused.add_sparse_delta_mm_batched

    def watched(out: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> None:
        seen(out, x, *rest)
        real(out, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(unfused, "add_sparse_delta_mm_batched", watched)
        yield


def delta(out: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    added = torch.zeros_like(out)
    torch.ops.shira.add_sparse_delta_mm_batched(added, x, *rest)
    return added


class Graph:
    """What a CUDA graph of `model(x)` has of each product with a delta: the tensors that it reads, alive or not."""

    def __init__(self, model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model, self._x, self._monkeypatch = model, x, monkeypatch
        self._read: list[list[weakref.ref[torch.Tensor]]] = []

        def note(out: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> None:
            self._read.append([weakref.ref(tensor) for tensor in rest])

        me = threading.get_ident()
        with monkeypatch.context() as patch, calls_of(monkeypatch, note), torch.no_grad():
            patch.setattr(serving_rows, "is_captured", lambda _: threading.get_ident() == me)
            model(x)

    @property
    def is_alive(self) -> bool:
        return all(tensor() is not None for read in self._read for tensor in read)

    def eager(self) -> list[Delta]:
        """What the model's layers add now."""
        added: list[Delta] = []

        def note(out: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> None:
            added.append((x.clone(), delta(out, x, *rest)))

        with calls_of(self._monkeypatch, note), torch.no_grad():
            self._model(self._x)
        return added

    def replay(self, like: list[Delta]) -> list[torch.Tensor]:
        """What the graph's layers would add to the same inputs."""
        assert self.is_alive
        read = [[tensor() for tensor in tensors] for tensors in self._read]
        return [delta(out, x, *own) for (x, out), own in zip(like, read, strict=True)]  # type: ignore[arg-type]

    def check(self) -> None:
        """A replay does what the model does in the open batch, to the bit."""
        eager = self.eager()
        assert any(bool(added.any()) for _, added in eager)
        for (_, want), got in zip(eager, self.replay(eager), strict=True):
            assert torch.equal(want, got)

    def check_adds_nothing(self, like: list[Delta]) -> None:
        assert not any(bool(added.any()) for added in self.replay(like))


ROWS = ["a0", None, "a1"]
BUDGET = 5 * (pages.PAGE * 6 + 200)  # five pages, and tables of three slots: an adapter takes a page or two


def captured(
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[shira.ResidentAdapters], object] = lambda _: None,
    **options: Any,
) -> tuple[Small, shira.ResidentAdapters, Graph, list[Delta]]:
    """A model, its bank, a graph that was captured in a batch of three, and what the layers added then."""
    model, x = Small(), inputs(3, 2, 12)
    bank = small_bank(model, 6, **options)
    first(bank)
    with bank.batch(ROWS), torch.no_grad():
        model(x)  # warms up
        graph = Graph(model, x, monkeypatch)
        graph.check()
        like = graph.eager()
    return model, bank, graph, like


def layer_of(table: pages.Table | None) -> Any:
    return SimpleNamespace(shira_name="layer", shira_table=table)


def forget_shapes(rows: serving_rows.Rows) -> None:
    """What a thread does that runs other numbers of tokens: the oldest are forgotten."""
    for tokens in range(2, 30):
        rows.of(torch.empty(3, tokens, 4), layer_of(None))


def forget_batches(bank: shira.ResidentAdapters) -> None:
    """Batches of other sizes, of which the oldest are forgotten."""
    for count in range(4, 40):
        enter(bank.batch(["a0", *[None] * count]))
    gc.collect()


def test_a_replay_reads_the_batch_that_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bank, graph, like = captured(monkeypatch)
    for rows in (["a1", "a0", None], [None, None, "a0"], ROWS, ["a1"] * 3):
        with bank.batch(rows, mode="unfused"):
            graph.check()
        graph.check_adds_nothing(like)
    with bank.batch(["a0"] * 3, mode="fused"):
        graph.check_adds_nothing(like)
    with bank.batch(["a0", "a1"]):
        graph.check_adds_nothing(like)
    bank.switch("a0")
    graph.check_adds_nothing(like)


def test_other_threads_make_the_bank_forget_shapes_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bank, graph, like = captured(monkeypatch)
    with bank.batch(ROWS):
        [rows] = bank._batches._rows.values()
        in_another_thread(lambda: forget_shapes(rows))
        graph.check()
    in_another_thread(lambda: forget_batches(bank))
    graph.check_adds_nothing(like)
    with bank.batch(["a1", "a1", "a0"]):
        in_another_thread(lambda: forget_shapes(rows))
        graph.check()


def test_what_is_captured_is_not_forgotten_before_it_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread forgets shapes at the very moment between the lookup of the slots and the note."""
    model, x = Small(), inputs(3, 2, 12)
    bank = small_bank(model)
    with bank.batch(ROWS), torch.no_grad():
        model(x)
        [rows] = bank._batches._rows.values()
        other = threading.Thread(target=lambda: forget_shapes(rows))

        class Noted(set[int]):
            def add(self, item: int) -> None:
                if other.ident is None:
                    other.start()
                    other.join(0.2)  # it may have to wait
                super().add(item)

        rows._captured = Noted()
        graph = Graph(model, x, monkeypatch)
        other.join()
        graph.check()
    with bank.batch(["a1", "a0", None]):
        graph.check()


def test_a_shape_that_was_not_run_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph makes its slots itself, from those of the rows: nobody else may read what only replays write."""
    model = Small()
    bank = small_bank(model)
    with bank.batch(ROWS), torch.no_grad(), monkeypatch.context() as patch:
        [rows] = bank._batches._rows.values()
        patch.setattr(serving_rows, "is_captured", lambda _: True)
        layer = layer_of(bank._batches.pages.tables[model.first.weight])
        made = rows.of(torch.empty(3, 2, 12), layer)
        patch.undo()
        assert rows.of(torch.empty(3, 2, 12), layer) is not made
        slots = rows.slots
    forget_batches(bank)
    with bank.batch(["a1", "a0", None]):
        assert rows.slots is slots
        check = slots.tolist()
    assert check == [*(bank._batches.pages.residents[((name, 1.0),)].number for name in ("a1", "a0")), -1]
    assert slots.tolist() == [-1] * 3


@pytest.mark.parametrize("budget", [None, BUDGET], ids=["grows", "budget"])
def test_adapters_come_and_go(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(bank: shira.ResidentAdapters) -> None:
        if budget is None:
            enter(bank.batch([*bank.names, {"a0": 0.5, "a1": 0.5}]))

    model, bank, graph, like = captured(monkeypatch, room, device_budget=budget)
    layout = [tensor.data_ptr() for tensor in bank._batches.pages.tensors]
    for turn in range(8):
        name = f"a{turn % 6}"
        in_another_thread(lambda name=name: bank.remove(name))
        bank.add(name, make(model, 100 + turn, NAMES[turn % 2 :]))
        graph.check_adds_nothing(like)
        with bank.batch([name, f"a{(turn + 3) % 6}", None]):
            graph.check()
            in_another_thread(lambda turn=turn: bank.remove(f"a{(turn + 1) % 6}"))
            graph.check()
        bank.add(f"a{(turn + 1) % 6}", make(model, 200 + turn, NAMES))
        check_pages(bank)
    assert [tensor.data_ptr() for tensor in bank._batches.pages.tensors] == layout
    assert budget is None or bank.stats.evictions > 0


@pytest.mark.parametrize("budget", [None, BUDGET], ids=["grows", "budget"])
def test_what_would_move_the_pages_is_refused_until_graphs_are_forgotten(
    budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank, graph, like = captured(monkeypatch, device_budget=budget)
    rows = ["a0", "a2", "a4", {"a0": 0.5}]  # more slots than there are
    before = bank.stats
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"CUDA graphs .* read the pages, .*: call forget_graphs\(\)"):
            enter(bank.batch(rows))
        assert bank.stats == before
        with bank.batch(["a1", None, "a0"]):
            graph.check()
            with pytest.raises(RuntimeError, match="leave batch"):
                bank.forget_graphs()
        before = bank.stats
    graph.check_adds_nothing(like)
    bank.forget_graphs()
    check_rows(bank, model, rows, inputs(len(rows), 12))
    check_pages(bank)
    gc.collect()
    assert not graph.is_alive


def test_a_slot_that_is_used_again_brings_nothing_of_a_removed_adapter_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph still reads the table of a weight that no adapter changes any more."""
    model, x = Small(), inputs(3, 12)
    bank = shira.ResidentAdapters(model)
    bank.add("both", make(model, 1, NAMES))
    bank.add("one", make(model, 2, NAMES[:1]))
    with bank.batch(["both", "one", None]), torch.no_grad():
        model(x)
        graph = Graph(model, x, monkeypatch)
    number = bank._batches.pages.residents[(("both", 1.0),)].number
    bank.remove("both")
    bank.add("next", make(model, 3, NAMES[:1]))
    with bank.batch(["next", "one", "next"]):
        assert bank._batches.pages.residents[(("next", 1.0),)].number == number
        graph.check()
        assert not bool(graph.eager()[-1][1].any())
    bank.remove("one")
    bank.remove("next")
    bank.forget_graphs()
    gc.collect()
    assert not bank._batches.pages.tables
    assert not bank._registry.homes
    assert not graph.is_alive


def test_what_is_removed_while_a_batch_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread removes the only adapter that changes a weight, whose table the graph is about to read."""
    model, x = Small(), inputs(3, 12)
    bank = shira.ResidentAdapters(model)
    bank.add("one", make(model, 2, NAMES[:1]))
    bank.add("other", make(model, 1, NAMES[1:]))
    with bank.batch([None, "one", "one"]), torch.no_grad():
        model(x)
        in_another_thread(lambda: bank.remove("other"))
        graph = Graph(model, x, monkeypatch)
    bank.add("next", make(model, 3, NAMES[:1]))
    with bank.batch(["next", "one", None]):
        graph.check()
    bank.forget_graphs()
    assert set(bank._batches.pages.tables) == {model.first.weight}
    enter(bank.batch(["next", None]))


def test_what_is_removed_inside_a_batch_goes_at_its_end() -> None:
    model = Small()
    bank = shira.ResidentAdapters(model)
    bank.add("one", make(model, 2, NAMES[:1]))
    bank.add("other", make(model, 1, NAMES[1:]))
    with bank.batch([None, "one"]):
        bank.remove("other")
        assert len(bank._batches.pages.tables) == 2
    assert set(bank._batches.pages.tables) == {model.first.weight} == set(bank._registry.homes)


def test_an_adapter_of_a_further_weight_is_no_matter_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Small(), inputs(3, 12)
    bank = shira.ResidentAdapters(model)
    bank.add("one", make(model, 2, NAMES[:1]))
    with bank.batch(["one", None, None]), torch.no_grad():
        model(x)
        graph = Graph(model, x, monkeypatch)
    bank.add("other", make(model, 1, NAMES[1:]))
    with bank.batch([None, "one", {"one": 0.5}]):
        graph.check()
    with pytest.raises(RuntimeError, match="forget_graphs"):
        enter(bank.batch(["other", None]))
    bank.forget_graphs()
    check_rows(bank, model, ["other", None, "one"], x)


# Streams, as the bank sees them


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class OnGpu:
    """A tensor that the bank holds."""

    device = torch.device("cuda", 0)

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record_stream(self, stream: Stream) -> None:
        self._log.append(f"used on {stream.name}")


def pretend_gpu(bank: shira.ResidentAdapters, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Stream]]:
    """The bank's model on a GPU, with a stack of current streams."""
    log: list[str] = []
    current = [Stream("main", log)]
    bank._registry.gpus.add(torch.device("cuda", 0))
    monkeypatch.setattr(bank, "_held", lambda: [OnGpu(log), torch.zeros(1)])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return log, current


def test_calls_on_another_stream_wait_for_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    bank = small_bank(model)
    log, current = pretend_gpu(bank, monkeypatch)
    with bank.using("a0"):
        pass
    enter(bank.batch(["a0", "a1"]))
    assert not log
    waits = ["side waits for main", "used on side"]
    back = ["main waits for side", "used on main"]
    actions: list[Callable[[], object]] = [
        lambda: bank.switch("a1"),
        lambda: bank.switch(None),
        lambda: enter(bank.batch(["a0", "a1"])),
        bank.verify_base,
        lambda: bank.add("new", make(model, 9, NAMES)),
    ]
    for action in actions:
        log.clear()
        current.append(Stream("side", log))
        action()
        assert log == waits
        log.clear()
        current.pop()
        bank.verify_base()
        assert log == back
    log.clear()
    with bank.batch(["a0", "a1"]):  # left on another stream than it was opened on
        current.append(Stream("side", log))
    assert log == waits


def test_forwards_on_other_streams_wait_for_the_batch_and_it_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    current = [Stream("main", log)]
    rows = serving_rows.Rows(torch.device("cpu"))
    monkeypatch.setattr(serving_rows, "sent", lambda slots, dtype, _: torch.tensor(slots, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"used on {stream.name}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(serving_rows, "stream_of", lambda _: id(current[-1]))

    def run(tokens: int, stream: Stream) -> list[str]:
        current.append(stream)
        log.clear()
        assert rows.of(torch.empty(2, tokens, 4), layer_of(None)).tolist() == [3] * tokens + [5] * tokens
        current.pop()
        return list(log)

    main, side, third = current[0], Stream("side", log), Stream("third", log)
    rows.set([3, 5], None)
    rows._device = torch.device("cuda", 0)
    rows._join(rows.slots)
    assert run(4, main) == ["used on main"]
    assert run(4, main) == []
    assert run(4, side) == ["side waits for main", "used on side"]
    assert run(4, side) == []
    assert sorted(run(4, third)) == ["third waits for main", "third waits for side", "used on third"]
    log.clear()
    rows.leave()
    assert sorted(log) == ["main waits for side", "main waits for third", "used on main"]


def test_a_banks_calls_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    bank = small_bank(model)
    pretend_gpu(bank, monkeypatch)
    before, names = [p.clone() for p in model.parameters()], bank.names
    actions: list[Callable[[], object]] = [
        lambda: bank.switch("a1"),
        lambda: enter(bank.using("a1")),
        lambda: enter(bank.batch(["a1"])),
        lambda: enter(bank.batch(["a1"], mode="fused")),
        lambda: bank.stage("a1"),
        lambda: bank.add("new", make(model, 9, NAMES)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for action in actions:
            with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
                action()
    assert bank.names == names
    assert bank.active is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"), bank.batch(["a1", "a0"]):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert type(model.first) is nn.Linear
    assert bank._batches.opened is None


def test_a_model_that_was_moved_is_refused() -> None:
    model = Small()
    bank = small_bank(model)
    bank.switch("a1")
    held = model.first.weight.detach().clone()
    model.double()
    actions: list[Callable[[], object]] = [
        lambda: bank.switch(None),
        lambda: bank.switch("a0"),
        lambda: bank.add("new", make(model, 9, NAMES)),
    ]
    for action in actions:
        with pytest.raises(RuntimeError, match=r"Linear was torch.float32 on cpu .* is torch.float64 on cpu: move it"):
            action()
        assert bank.active == "a1"
    assert torch.equal(model.first.weight.float(), held)
    model.float()
    bank.switch(None)
    bank.verify_base()
    model.double()
    with pytest.raises(RuntimeError, match="move it back"):
        enter(bank.batch(["a0", "a1"]))
    for name in bank.names:
        bank.remove(name)
    bank.add("new", make(model, 9, NAMES))
    check_rows(bank, model, ["new", None], inputs(2, 12).double())
