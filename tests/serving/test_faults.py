"""Whatever cuts a call of a bank off, at whatever line: the call has happened whole or not at all, and what is called
next finds the adapters that are there, under their names, and the base."""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from processes import python
from torch import nn

import shira
from shira.model.interrupts import interrupts_held
from shira.serving import arena, pages
from shira.serving import bank as serving_bank

pytest.importorskip("transformers", reason="transformers is not installed")

from batches import NAMES, Small, alone, check_pages, check_rows, close, inputs, left_alone, make, weight_bits

SERVING = str(Path(serving_bank.__file__).parent)
MIX = {"x": 0.5, "kept": 2.0}
X = inputs(2, 12)


class FirstAt:
    """Raises at a line of serving/ at which it did not before; where it has at all, nothing."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.seen: set[tuple[str, int]] = set()
        self.at = ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(SERVING):
            return None
        place = (code.co_filename, frame.f_lineno)
        if event == "line" and place not in self.seen:
            self.seen.add(place)
            if linecache.getline(*place).strip() != "try:":  # which runs nothing
                self.at = f"{Path(code.co_filename).name}:{frame.f_lineno}"
                raise self.error(self.at)
        return self

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Gives up at the first new line of the block. The error does not leave the block."""
        self.at, before = "", sys.gettrace()
        try:
            sys.settrace(self)
            yield
        except self.error as error:
            assert str(error) == self.at  # noqa: PT017
        finally:
            sys.settrace(before)


def adapter(seed: int, kind: str = "replace") -> shira.Adapter:
    return make(Small(), seed, NAMES, kind=kind)


OLD, KEPT, NEW = adapter(1), adapter(2, "add"), adapter(3)


def weights_with(x: shira.Adapter, target: Any) -> dict[str, torch.Tensor]:
    """What a bank that nothing has befallen writes."""
    model = Small()
    bank = shira.ResidentAdapters(model)
    bank.add("x", x)
    bank.add("kept", KEPT)
    bank.switch(target)
    return weight_bits(model)


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(bits, expected[name]) for name, bits in weight_bits(model).items())


def add(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    bank.remove("x")
    yield
    bank.add("x", OLD)


def add_fused_only(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    """A batch cannot add it to the outputs of layers."""
    bank.remove("x")
    yield
    bank.add("x", make(Small(), 1, ["first.bias"]))


def remove(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    with bank.batch(["x", MIX]):
        pass
    bank.stage(MIX)
    yield
    bank.remove("x")


def stage(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    bank.stage("x")
    yield
    bank.stage(MIX)


def switch(start: Any, target: Any) -> Callable[..., Iterator[None]]:
    def action(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
        bank.switch(start)
        yield
        bank.switch(target)

    return action


def batch(*rows: Any, **options: Any) -> Callable[..., Iterator[None]]:
    def action(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
        bank.remove("x")  # and so out of the pages
        bank.add("x", OLD)
        for tried in bank._batches._tried.values():
            tried.clear()
        yield
        with bank.batch(list(rows), **options):
            model(X)

    return action


def long_batch(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    """It is fused on the way."""
    yield
    with torch.no_grad(), bank.batch(["x"]):
        for _ in range(9):
            model(X)


def using(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    bank.switch("kept")
    yield
    with bank.using("x"):
        pass


def others(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    yield
    bank.forget_graphs()
    bank.verify_base()
    _ = bank.stats, bank.names, bank.active


ACTIONS: dict[str, Callable[..., Iterator[None]]] = {
    "add": add,
    "add-fused-only": add_fused_only,
    "remove": remove,
    "stage": stage,
    "switch": switch("x", MIX),
    "switch-in": switch(None, "x"),
    "switch-out": switch(MIX, None),
    "switch-between": switch("x", "kept"),
    "batch": batch("x", MIX),
    "batch-fused": batch("x", "x", mode="fused"),
    "long-batch": long_batch,
    "using": using,
    "others": others,
}


BUDGET = 36 * pages.PAGE  # bytes
CASES = [(name, KeyboardInterrupt, None) for name in ACTIONS] + [
    ("switch", MemoryError, None),
    ("batch", MemoryError, BUDGET),
]


@pytest.mark.parametrize(("name", "error", "budget"), CASES)
def test_cut_off_at_any_line(name: str, error: type[BaseException], budget: int | None) -> None:
    first, model = FirstAt(error), Small()
    bank = shira.ResidentAdapters(model, device_budget=budget)
    bank.add("kept", KEPT)
    bank.add("x", OLD)
    base, count = weight_bits(model), 0
    bank.remove("x")
    bank.add("x", NEW)
    rows = torch.cat(alone(bank, ["x", MIX], lambda i: model(X[i : i + 1])))
    bank.remove("x")
    bank.add("x", OLD)
    old = {str(target): weights_with(OLD, target) for target in ("x", "kept", MIX, None)}
    new = {str(target): weights_with(NEW, target) for target in ("x", "kept", MIX, None)}
    while True:
        run = ACTIONS[name](bank, model)
        next(run)
        with first.raising():
            next(run, None)
        active = bank.active
        assert bank.names in (["kept", "x"], ["kept"]), first.at
        assert same(model, old[str(active)]), first.at
        assert [type(module) for module in model.modules()] == [type(module) for module in Small().modules()], first.at
        if active is not None:  # else what was staged stays
            bank.switch(None)
        assert same(model, base), first.at
        assert not any(hasattr(p, "_shira_owner") for p in model.parameters()), first.at
        if "x" in bank.names:
            bank.remove("x")
        bank.add("x", NEW)
        with torch.no_grad(), bank.batch(["x", MIX]):
            close(model(X), rows)
        check_pages(bank)
        bank.switch(MIX)
        assert same(model, new[str(MIX)]), first.at
        bank.stage("x")
        bank.switch("x")
        assert same(model, new["x"]), first.at
        bank.switch(None)
        bank.remove("x")
        bank.add("x", OLD)
        count += 1
        if not first.at:
            break
    assert count > 10
    bank.remove("x")
    bank.remove("kept")
    assert not bank._registry.homes
    assert not bank._batches._linears
    assert not bank._batches.pages.tables


SIGNALS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGRTMAX]


class Stop(Exception):
    pass


@contextmanager
def handled(*numbers: int) -> Iterator[list[int]]:
    """Signals whose handlers raise; gives those that came."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise Stop(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
        assert {signal.getsignal(number) for number in numbers} == {stop}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def switched_to_x() -> tuple[Small, shira.ResidentAdapters]:
    model = Small()
    bank = shira.ResidentAdapters(model)
    bank.add("x", OLD)
    bank.add("kept", KEPT)
    bank.switch("x")
    return model, bank


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_of_all_signals_wait_for_a_switch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = switched_to_x()
    real = arena.scatter_switch_batched

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        if not came:
            signal.raise_signal(number)

    monkeypatch.setattr(arena, "scatter_switch_batched", interrupted)
    with handled(number) as came, pytest.raises(Stop):
        bank.switch("kept")
    assert came == [number]
    assert bank.active == "x"
    assert same(model, weights_with(OLD, "x"))
    bank.switch(None)
    assert same(model, weights_with(OLD, None))


def test_a_handler_may_switch_to_another_target(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = switched_to_x()
    real = arena.scatter_switch_batched

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        monkeypatch.setattr(arena, "scatter_switch_batched", real)
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(arena, "scatter_switch_batched", interrupted)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: bank.switch("x"))
    try:
        bank.switch("kept")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert bank.active == "x"
    assert same(model, weights_with(OLD, "x"))
    bank.switch(None)
    assert same(model, weights_with(OLD, None))


def test_every_handler_is_called_though_each_raises() -> None:
    """And each is back in its place."""
    with handled(*SIGNALS) as came:
        for depth in (1, 2):
            with pytest.raises(Stop), ExitStack() as stack:
                raise_all(stack, depth, came)
            assert came == SIGNALS
            came.clear()


def raise_all(stack: ExitStack, depth: int, came: list[int]) -> None:
    for _ in range(depth):
        stack.enter_context(interrupts_held())
    for number in SIGNALS:
        signal.raise_signal(number)
    assert not came


def test_signals_while_a_block_is_left() -> None:
    """Two at once, before anything could be held: what is not done then is done by the next call."""
    model = Small()
    bank = shira.ResidentAdapters(model)
    bank.add("x", OLD)
    bank.add("kept", KEPT)
    leave = type(bank)._leave_batch
    for often in (1, 2):
        failures = iter([Stop] * often)

        def cut_off(*arguments: Any, failures: Iterator[type[Stop]] = failures) -> None:
            for failure in failures:
                raise failure
            leave(*arguments)

        with left_alone(model):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(bank), "_leave_batch", cut_off)
                with pytest.raises(Stop), bank.batch(["x", "kept"]):
                    pass
            assert (type(model.first) is nn.Linear) == (often == 1)
            bank.stage(None)
            assert type(model.first) is nn.Linear


FORKED = """
import os, sys, threading, time, torch
from torch import nn
import shira

model = nn.Linear(64, 64)
base = model.weight.detach().clone()
tuned = [base + 1, base + 2]
bank = shira.ResidentAdapters(model)
for i, weight in enumerate(tuned):
    bank.add(str(i), shira.diff({"weight": base}, {"weight": weight}))
done = threading.Event()

def switch():
    while not done.is_set():
        for name in ("0", "1", None):
            bank.switch(name)

thread = threading.Thread(target=switch)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        active = bank.active
        right = torch.equal(model.weight, base if active is None else tuned[int(active)])
        bank.switch("1")
        right &= torch.equal(model.weight, tuned[1])
        with bank.using(None):
            right &= torch.equal(model.weight, base)
        os._exit(0 if right else 3)
    end = time.monotonic() + 20
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.001)
    if found != (child, 0):
        os.kill(child, 9)
        print("the child", "hung" if found == (0, 0) else f"ended with {found[1]}")
        break
done.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_waits_for_the_calls_of_other_threads() -> None:
    done = python(FORKED, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_adapters_come_and_go_in_several_threads() -> None:
    model = Small()
    bank = shira.ResidentAdapters(model)
    bank.add("kept", KEPT)

    def come_and_go(name: str) -> None:
        for _ in range(20):
            bank.add(name, OLD)
            with suppress(RuntimeError), bank.batch([name, "kept"]):
                pass
            bank.remove(name)

    threads = [threading.Thread(target=come_and_go, args=(str(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bank.names == ["kept"]
    check_rows(bank, model, ["kept", None], X)
    check_pages(bank)


def test_what_stands_in_for_handlers_and_was_not_removed_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two more signals came while handlers were put back; the next call removes it."""

    def cut_off(*_: object) -> None:
        raise Stop

    with handled(*SIGNALS) as came:
        with monkeypatch.context() as patch:
            patch.setattr("shira.model.interrupts._Waiting._put_back", cut_off)
            with pytest.raises(Stop), interrupts_held():
                pass
        for number in SIGNALS:
            with pytest.raises(Stop):
                signal.raise_signal(number)
        assert came == SIGNALS
        with interrupts_held():
            pass
