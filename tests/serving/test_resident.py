"""ResidentAdapters: after any sequence the weights hold exactly what they should, and the base comes back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import pickle
import random
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shira
from shira.adapter import checksum_of
from shira.serving import arena
from shira.serving import bank as resident

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {
    "a.weight": torch.float32,
    "b.weight": torch.bfloat16,
    "c.weight": torch.float32,
    "d.weight": torch.float64,
    "e.weight": torch.bfloat16,
}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.5, 1e30, 3e-39]


class Model(nn.Module):
    """Weights of several dtypes, one of them under two names, full of values that do not survive arithmetic."""

    def __init__(self, special: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, dtype in DTYPES.items():
            layer = nn.Linear(5, 4, bias=False, dtype=dtype)
            values = torch.randn(20, generator=generator, dtype=torch.float64)
            if special:
                values[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(values.view(4, 5))
            self.add_module(name.removesuffix(".weight"), layer)
        self.tied = nn.Linear(5, 4, bias=False)
        self.tied.weight = self.get_parameter("a.weight")
        if special:  # a NaN with a payload
            with torch.no_grad():
                self.get_parameter("a.weight").view(-1).view(torch.int32)[4] = 0x7FA12345


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().view(BITS[p.element_size()]) for n, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def agree(got: nn.Module, want: dict[str, torch.Tensor], base: nn.Module) -> bool:
    """The same bits, but a NaN that arithmetic made may be any."""
    now, before = snapshot(got), snapshot(base)
    made_nan = {name: p.detach().isnan() & (now[name] != before[name]) for name, p in got.named_parameters()}
    return all(
        torch.equal(now[name] * ~made_nan[name], torch.where(made_nan[name] & is_nan(want[name], p), 0, want[name]))
        for name, p in got.named_parameters()
    )


def is_nan(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return bits.view(like.dtype).isnan()


def entries(model: nn.Module, name: str, indices: torch.Tensor) -> torch.Tensor:
    return model.get_parameter(name).detach().view(-1)[indices.long()]


def make(model: nn.Module, seed: int, kind: str = "replace", names: tuple[str, ...] = tuple(DTYPES)) -> shira.Adapter:
    """An adapter of random entries for a model that holds its base."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, name in enumerate(names):
        dtype = model.get_parameter(name).dtype
        nnz = int(torch.randint(0, 20, (1,), generator=generator))
        indices = torch.randperm(20, generator=generator)[:nnz].sort().values
        values = torch.randn(nnz, generator=generator, dtype=torch.float64).to(dtype)
        if kind == "replace" and nnz:
            values[0] = SPECIAL[seed % len(SPECIAL)]
        if kind == "add" and name == "b.weight":
            values = values.float()
        indices = indices.int() if i % 2 else indices
        checksum = checksum_of(entries(model, name, indices))
        tensors[name] = shira.AdapterTensor(indices, values, (4, 5), dtype, kind, checksum)
    return shira.Adapter(tensors)


def expected(base: nn.Module, adapters: dict[str, shira.Adapter], target: dict[str, float]) -> dict[str, torch.Tensor]:
    """The weights with a mix, from its definition."""
    model = Model()
    model.load_state_dict(base.state_dict())
    for name in DTYPES:
        weight = model.get_parameter(name).detach()
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        old = weight.view(-1).to(compute)
        if len(target) == 1:
            [(key, strength)] = target.items()
            part = adapters[key].get(name)
            if part is not None:
                index, values = part.indices.long(), part.values.to(compute)
                if part.kind == "replace" and strength == 1.0:
                    weight.view(-1)[index] = part.values
                elif part.kind == "replace":
                    weight.view(-1)[index] = (old[index] + (values - old[index]) * strength).to(weight.dtype)
                else:
                    weight.view(-1)[index] = (old[index] + values * strength).to(weight.dtype)
            continue
        delta, touched = torch.zeros_like(old), torch.zeros(20, dtype=torch.bool)
        for key, strength in target.items():
            part = adapters[key].get(name)
            if part is not None:
                index, values = part.indices.long(), part.values.to(compute)
                delta[index] += strength * (values if part.kind == "add" else values - old[index])
                touched[index] = True
        weight.view(-1)[touched] = (old + delta)[touched].to(weight.dtype)
    return snapshot(model)


def test_the_expectation_is_not_the_base() -> None:
    base = Model()
    adapters = {"x": make(base, 1), "y": make(base, 2)}
    for target in ({"x": 1.0}, {"x": 0.5}, {"x": 1.0, "y": 1.0}):
        assert not same(expected(base, adapters, target), snapshot(base))


keys = st.sampled_from(["x", "y", "z", "x", "y", "z", "unknown"])
strengths = st.sampled_from([1.0, 0.5, -1.0, 0.0, 0.3, 2])
targets = st.one_of(st.none(), keys, st.dictionaries(keys, strengths, min_size=1, max_size=3))
steps = st.one_of(
    st.tuples(st.just("switch"), targets),
    st.tuples(st.just("using"), targets),
    st.tuples(st.just("stage"), targets),
    st.tuples(st.just("fail"), targets),
    st.tuples(st.just("add"), keys),
    st.tuples(st.just("remove"), keys),
)


@given(st.booleans(), st.booleans(), st.lists(steps, max_size=12))
@settings(deadline=None, max_examples=80)
def test_any_sequence(special: bool, filled: bool, sequence: list[tuple[str, Any]]) -> None:
    model, base = Model(special), Model(special)
    adapters = {
        "x": make(base, 1),
        "y": make(base, 2, "add", ("e.weight", "b.weight", "a.weight")),
        # Both kinds, also for one dtype.
        "z": shira.Adapter({**make(base, 3, names=("c.weight", "b.weight")), **make(base, 4, "add", ("a.weight",))}),
    }
    bank = shira.ResidentAdapters(model)
    present: dict[str, shira.Adapter] = {}
    if filled:
        for name, adapter in adapters.items():
            bank.add(name, adapter)
        present.update(adapters)
    current: dict[str, float] = {}
    addresses = [p.data_ptr() for p in model.parameters()]

    def strengths_of(target: Any) -> dict[str, float]:
        return {} if target is None else {target: 1.0} if isinstance(target, str) else dict(target)

    def check() -> None:
        want = expected(base, present, current) if current else snapshot(base)
        assert agree(model, want, base) if current and list(current.values()) != [1.0] else same(snapshot(model), want)
        assert strengths_of(bank.active) == current
        assert bank.names == list(present)
        assert [p.data_ptr() for p in model.parameters()] == addresses

    for action, argument in sequence:
        wanted = {} if action in ("add", "remove") else strengths_of(argument)
        if action == "add":
            if argument in present or argument == "unknown":
                with pytest.raises((ValueError, KeyError)):
                    bank.add(argument, adapters[argument])
            else:
                bank.add(argument, adapters[argument])
                present[argument] = adapters[argument]
        elif action == "remove":
            if argument not in present or argument in current:
                with pytest.raises(ValueError, match=argument):
                    bank.remove(argument)
            else:
                bank.remove(argument)
                del present[argument]
        elif not set(wanted) <= set(present):
            with pytest.raises(ValueError, match="there is no adapter"):
                bank.switch(argument)
        elif action == "switch":
            bank.switch(argument)
            current = wanted
        elif action == "stage":
            bank.stage(argument)
        elif action == "using":
            outer = current
            with bank.using(argument):
                current = wanted
                check()
            current = outer
        else:
            with each_write(failing([len(wanted)])), suppress(OSError):
                bank.switch(argument)
                current = wanted
        check()
        bank.verify_base()
    bank.switch(None)
    current = {}
    check()


@contextmanager
def each_write(action: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Replaces the ops that a bank writes with by `action(number of the write, do it)`."""
    numbers = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        for op in ("scatter_apply_batched", "scatter_switch_batched"):
            real = getattr(arena, op)
            patch.setattr(arena, op, lambda *a, real=real: action(next(numbers), lambda: real(*a)))
        yield


def failing(at: Collection[int]) -> Callable[[int, Callable[[], None]], None]:
    def write(number: int, do: Callable[[], None]) -> None:
        if number in at:
            raise OSError("the device is gone")
        do()

    return write


def interrupting(at: int, when: str) -> Callable[[int, Callable[[], None]], None]:
    def write(number: int, do: Callable[[], None]) -> None:
        if number == at and when == "before":
            signal.raise_signal(signal.SIGINT)
        do()
        if number == at and when == "after":
            signal.raise_signal(signal.SIGINT)

    return write


@pytest.mark.parametrize("target", ["y", None, {"x": 0.5, "y": 2.0}, {"x": 0.25}, "z"])
@pytest.mark.parametrize("start", ["x", None, {"x": 1.0, "y": 1.0}])
@pytest.mark.parametrize("fault", ["error", "before", "after"])
def test_a_switch_happens_whole_or_not_at_all(start: Any, target: Any, fault: str) -> None:
    model = Model()
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    bank.add("x", make(model, 1))
    bank.add("y", make(model, 2, "add"))
    bank.add("z", make(model, 3, names=("b.weight", "d.weight")))
    bank.switch(start)
    before = snapshot(model)
    writes = []
    with each_write(lambda number, do: (writes.append(number), do())):
        bank.switch(target)
    after = snapshot(model)
    bank.switch(start)
    for at in range(len(writes)):
        action = failing([at]) if fault == "error" else interrupting(at, fault)
        with each_write(action), pytest.raises(OSError if fault == "error" else KeyboardInterrupt):
            bank.switch(target)
        assert bank.active == start
        assert same(snapshot(model), before)
    assert not same(before, after) or start == target
    bank.switch(target)
    assert same(snapshot(model), after)
    bank.switch(None)
    assert same(snapshot(model), base)
    shira.attach(model, shira.ShiraConfig(["b", "c"], mask="rand", density=0.2)).detach()  # nothing is claimed


def test_if_there_is_no_way_back_it_is_the_base_and_if_not_even_that_it_says_so() -> None:
    model = Model()
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    bank.add("x", make(model, 1))
    bank.add("y", make(model, 2))
    bank.switch("x")
    with each_write(failing([2, 3])), pytest.raises(OSError, match="gone"):
        bank.switch("y")  # two of three dtypes are written, then nothing works twice
    assert bank.active is None
    assert same(snapshot(model), base)
    bank.switch("x")
    with each_write(failing(range(2, 99))), pytest.raises(OSError, match="gone"):
        bank.switch("y")
    with pytest.raises(RuntimeError, match=r"switch\(None\) gives the base back"):
        _ = bank.active
    bank.remove("y")  # what is written does not need it
    bank.verify_base()
    bank.switch(None)
    assert bank.active is None
    assert same(snapshot(model), base)


def test_interrupts_at_any_moment() -> None:
    """A thread interrupts the main one all the time; no switch is left half done."""
    model = Model()
    bank = shira.ResidentAdapters(model)
    states: dict[str | None, dict[str, torch.Tensor]] = {None: snapshot(model)}
    for seed, name in enumerate(("x", "y")):
        bank.add(name, make(Model(), seed + 1))
        bank.switch(name)
        states[name] = snapshot(model)
    done = threading.Event()
    main = threading.get_ident()

    def interrupt() -> None:
        generator = random.Random(0)
        while not done.wait(generator.random() * 2e-3):
            signal.pthread_kill(main, signal.SIGINT)

    interrupts = 0
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        for _ in range(400):
            try:
                for target in ("x", None, "y"):
                    bank.switch(target)
            except KeyboardInterrupt:
                interrupts += 1
    except KeyboardInterrupt:  # between the two
        interrupts += 1
    finally:
        while thread.is_alive():
            try:
                done.set()
                thread.join()
            except KeyboardInterrupt:
                interrupts += 1
    assert interrupts
    assert same(snapshot(model), states[bank.active])
    bank.switch(None)
    assert same(snapshot(model), states[None])


def test_threads_take_turns() -> None:
    model = Model()
    base = Model()
    adapters = {"x": make(base, 1), "y": make(base, 2, "add")}
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    errors: list[Exception] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for i in range(60):
                match generator.randrange(4):
                    case 0:
                        bank.switch(generator.choice(["x", "y", None]))
                    case 1:
                        bank.switch({"x": generator.random(), "y": 1.0})
                    case 2:
                        bank.stage({"y": 1.0, "x": 2.0})
                    case _:
                        bank.add(f"{seed}/{i}", adapters["x"])
                        bank.remove(f"{seed}/{i}")
        except Exception as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    active = bank.active
    current = {} if active is None else {active: 1.0} if isinstance(active, str) else active
    assert agree(model, expected(base, adapters, current) if current else snapshot(base), base)
    bank.verify_base()


def test_what_using_relies_on_is_not_switched_by_another_thread() -> None:
    model = Model()
    bank = shira.ResidentAdapters(model)
    bank.add("x", make(model, 1))
    bank.add("y", make(model, 2))

    def in_another_thread(action: Callable[[], object]) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(action).result()

    with bank.using("x"):
        before = snapshot(model)
        for action in (lambda: bank.switch("y"), lambda: bank.switch(None), lambda: bank.using("y").__enter__()):
            with pytest.raises(RuntimeError, match="another thread or task is inside using"):
                in_another_thread(action)
        assert same(snapshot(model), before)
        assert bank.active == "x"
        with bank.using("y"):  # the same thread may
            assert bank.active == "y"
        in_another_thread(lambda: bank.stage("y"))
    in_another_thread(lambda: bank.switch("y"))
    assert bank.active == "y"


@pytest.mark.parametrize("force", [False, True])
def test_adding_is_right_whatever_is_active(force: bool) -> None:
    model = Model()
    x, y = make(model, 1), make(model, 2)
    bank = shira.ResidentAdapters(model)
    bank.add("x", x)
    bank.switch("x")
    now = snapshot(model)
    bank.add("y", y, force=force)
    assert same(snapshot(model), now)
    bank.switch({"x": 0.5, "y": 0.25})
    bank.verify_base()
    bank.add("y again", y)


def llama_like(seed: int = 0, layers: int = 5) -> tuple[nn.Module, dict[str, shira.Adapter]]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(layers)))
    adapters = {}
    for name in ("x", "y"):
        handle = shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.3, seed=len(adapters)))
        with torch.no_grad():
            for values in handle.parameters():
                values.normal_()
        adapters[name] = handle.adapter()
        handle.detach()
    return model, adapters


def test_one_call_for_a_whole_model_writes_each_entry_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    calls: list[tuple[str, int]] = []
    for op in ("scatter_apply_batched", "scatter_switch_batched"):
        real = getattr(arena, op)
        monkeypatch.setattr(arena, op, lambda *a, op=op, real=real: (calls.append((op, len(a[0]))), real(*a)))
    bank.switch("x")
    bank.switch("y")
    bank.switch({"x": 0.5, "y": 0.5})
    bank.switch({"x": 0.25, "y": 0.5})
    bank.switch(None)
    assert calls == [
        ("scatter_apply_batched", 5),
        ("scatter_switch_batched", 5),
        ("scatter_switch_batched", 5),
        ("scatter_switch_batched", 5),
        ("scatter_apply_batched", 5),
    ]


def test_other_strengths_need_no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    merges: list[object] = []
    real = arena.merge
    monkeypatch.setattr(arena, "merge", lambda pieces: (merges.append(list(pieces)), real(pieces))[1])
    bank.switch({"x": 0.5, "y": 0.5})
    bank.switch({"x": 0.7, "y": -0.5})
    bank.switch({"x": 1.0, "y": 1.0})
    assert merges == [["x", "y"]]
    bank.stage({"y": 1.0, "x": 1.0})
    assert merges == [["x", "y"], ["y", "x"]]
    staged = bank.stats.plan_bytes
    bank.switch({"y": 0.5, "x": 1.0})
    assert merges == [["x", "y"], ["y", "x"]]
    assert 0 < bank.stats.plan_bytes < staged
    bank.switch("x")
    assert bank.stats.plan_bytes == 0
    bank.stage({"y": 1.0, "x": 1.0})
    bank.stage(None)
    assert bank.stats.plan_bytes == 0
    with pytest.raises(ValueError, match="no adapter named 'z'"):
        bank.stage("z")


def test_memory_is_indices_and_values_and_one_set_of_old_entries() -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model.bfloat16())
    for name, adapter in adapters.items():
        low = {n: changed(t, values=t.values.bfloat16(), dtype=torch.bfloat16) for n, t in adapter.items()}
        bank.add(name, shira.Adapter(low), force=True)
    assert bank.stats == resident.BankStats({name: 6 * a.nnz for name, a in adapters.items()}, 0, 0, 0, None)
    bank.switch("x")
    bank.switch("y")
    stats = bank.stats
    assert (stats.saved_bytes, stats.plan_bytes, stats.switches) == (2 * adapters["y"].nnz, 0, 2)
    assert stats.last_switch_us is not None
    assert stats.last_switch_us > 0


def test_a_switch_does_the_same_work_whatever_else_is_registered() -> None:
    model, adapters = llama_like()

    def calls_of_a_switch(registered: int) -> int:
        bank = shira.ResidentAdapters(model)
        for i in range(registered):
            bank.add(str(i), adapters["x" if i % 2 else "y"])
        bank.switch("0")
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += 1

        gc.disable()  # a collection would call Hypothesis
        sys.setprofile(count)
        try:
            bank.switch("1")
        finally:
            sys.setprofile(None)
            gc.enable()
        bank.switch(None)
        return calls

    calls_of_a_switch(2)  # what runs once
    assert calls_of_a_switch(2) == calls_of_a_switch(1000)


def test_adapters_of_different_tensors() -> None:
    model = Model(special=False)
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    adapters = {
        "ab": make(model, 1, names=("b.weight", "a.weight")),
        "ce": make(model, 2, names=("e.weight", "c.weight")),
        "bce": make(model, 3, names=("c.weight", "b.weight", "e.weight")),
        "none": shira.Adapter({}),
    }
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    for name in ("ab", "ce", "bce", "none", "ab", "bce", "ce"):
        bank.switch(name)
        assert same(snapshot(model), expected(Model(special=False), adapters, {name: 1.0}))
    # Only what is written now is claimed.
    shira.attach(model, shira.ShiraConfig(["a", "b", "d"], density=0.2)).detach()
    with pytest.raises(RuntimeError, match="ResidentAdapters is changing this weight"):
        shira.attach(model, shira.ShiraConfig(["c"], density=0.2))
    bank.switch(None)
    assert same(snapshot(model), base)


def test_values_that_are_not_finite_can_be_refused() -> None:
    model = Model()
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    tensors = dict(make(model, 1))
    values = tensors["c.weight"].values.clone()
    for wrong in (math.nan, math.inf, -math.inf):
        values[-1] = wrong
        adapter = shira.Adapter({**tensors, "c.weight": changed(tensors["c.weight"], values=values.clone())})
        with pytest.raises(ValueError, match="weight: values are not finite"):
            bank.add("x", adapter, check_finite=True)
        assert bank.names == []
        bank.add("x", adapter)
        bank.switch("x")
        bank.switch(None)
        assert same(snapshot(model), base)
        bank.remove("x")
    bank.add("y", make(model, 6, "add"), check_finite=True)


def test_parameters_that_share_memory_without_being_one_are_refused() -> None:
    model = nn.Module()
    whole = torch.zeros(6, 5)
    model.a = nn.Parameter(whole[:4])
    model.b = nn.Parameter(whole[2:])
    model.c = nn.Parameter(torch.zeros(4, 5))
    bank = shira.ResidentAdapters(model)
    part = shira.AdapterTensor(torch.tensor([0]), torch.ones(1), (4, 5), torch.float32, "replace", "0" * 32)
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="b: shares memory with 'a', but is not the same parameter"):
            bank.add("x", shira.Adapter({name: part}), force=True)
    bank.add("x", shira.Adapter({"c": part}), force=True)


def test_compiled_code_stays_valid() -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    compiles = []
    compiled = torch.compile(model, backend=lambda graph, _: (compiles.append(1), graph.forward)[1], fullgraph=True)
    x = torch.randn(3, 8)
    with torch.no_grad():
        for target in (None, "x", {"x": 0.5, "y": 0.5}, "y", None):
            bank.switch(target)
            assert torch.equal(compiled(x), model(x))
    assert len(compiles) == 1


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_adapters_on_the_host_are_the_same(device: str) -> None:
    model, adapters = llama_like()
    model.to(device)
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
        bank.add(f"{name} on the host", adapter, on_host=True)
    for target in ("x", {"x": 0.5, "y": 2.0}):
        bank.switch(target)
        want = snapshot(model)
        bank.switch(None)
        host = (
            f"{target} on the host" if isinstance(target, str) else {f"{k} on the host": v for k, v in target.items()}
        )
        for staged in (True, False):
            if staged:
                bank.stage(host)
            bank.switch(host)
            assert same(snapshot(model), want)
            bank.switch(None)
    bank.verify_base()
    assert same(snapshot(model), base)


def test_a_mix_is_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    bank = shira.ResidentAdapters(model)
    for name, value in (("x", 2**-8), ("y", 2**-20)):
        delta = shira.AdapterTensor(torch.tensor([0]), torch.tensor([value]), (1, 1), torch.bfloat16, "add")
        with pytest.warns(UserWarning, match="no checksum"):
            bank.add(name, shira.Adapter({"0.weight": delta}))
    # Above 1 bfloat16 has steps of 2^-7. Half of one is lost; a little more is not, unless it was rounded before.
    bank.switch("x")
    assert model[0].weight.item() == 1.0
    bank.switch({"x": 1.0, "y": 1.0})
    assert model[0].weight.item() == 1.0078125


def test_a_tied_weight_is_one_tensor_under_any_name() -> None:
    model = Model()
    bank = shira.ResidentAdapters(model)
    part = make(model, 1)["a.weight"]
    bank.add("x", shira.Adapter({"tied.weight": part}))
    bank.switch("x")
    assert torch.equal(entries(model, "a.weight", part.indices).view(torch.int32), part.values.view(torch.int32))
    with pytest.raises(ValueError, match=r"'a\.weight' twice"):
        bank.add("y", shira.Adapter({"a.weight": part, "tied.weight": part}))


def test_files_and_the_real_thing(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    ids = torch.randint(0, 40, (2, 10))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain, tuned = logits(), {}
    for name in ("blue", "paint"):
        handle = shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.1, seed=len(tuned)))
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.02)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        tuned[name] = logits()
        handle.adapter().save(tmp_path / f"{name}.safetensors")
        handle.detach()
    bank = shira.ResidentAdapters(model)
    for name in tuned:
        bank.add(name, tmp_path / f"{name}.safetensors")
    for name in ("blue", "paint", "blue"):
        bank.switch(name)
        assert torch.equal(logits(), tuned[name])
    with bank.using("paint"):
        assert torch.equal(logits(), tuned["paint"])
    assert bank.active == "blue"
    bank.switch(None)
    assert torch.equal(logits(), plain)


def test_peft_prefixes_are_understood() -> None:
    model = Model()
    wrapped = nn.Module()
    wrapped.base_model = nn.Module()
    wrapped.base_model.model = nn.Module()
    wrapped.base_model.model.a = nn.Module()
    wrapped.base_model.model.a.base_layer = model.a
    part = make(model, 1)["a.weight"]
    for target, name in ((model, "base_model.model.a.weight"), (wrapped, "a.weight"), (wrapped, "a.base_layer.weight")):
        bank = shira.ResidentAdapters(target)
        bank.add("x", shira.Adapter({name: part}))
        with bank.using("x"):
            assert torch.equal(
                entries(model, "a.weight", part.indices).view(torch.int32), part.values.view(torch.int32)
            )


def changed(part: shira.AdapterTensor, **fields: Any) -> shira.AdapterTensor:
    return shira.AdapterTensor(**{**vars(part), **fields})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("f.weight", lambda p: p, r"no parameter or buffer 'f\.weight'"),
        ("a.weight", lambda p: changed(p, shape=(5, 4)), r"a\.weight: the adapter's shape"),
        ("b.weight", lambda p: p, r"b\.weight: the adapter's dtype"),
        ("a.weight", lambda p: changed(p, checksum="0" * 32), r"a\.weight: .*another base"),
        ("c.weight", lambda p: p, r"c\.weight: .*another base"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, change: Callable[[shira.AdapterTensor], shira.AdapterTensor], message: str
) -> None:
    model = Model()
    before = snapshot(model)
    bank = shira.ResidentAdapters(model)
    wrong = shira.Adapter({"d.weight": make(model, 1)["d.weight"], name: change(make(model, 1)["a.weight"])})
    with pytest.raises(ValueError, match=message):
        bank.add("x", wrong)
    assert bank.names == []
    assert same(snapshot(model), before)
    if "another base" in message:
        bank.add("x", wrong, force=True)
        bank.switch("x")
        bank.verify_base()
        bank.switch(None)
        assert same(snapshot(model), before)
    else:
        with pytest.raises(ValueError, match=message):
            bank.add("x", wrong, force=True)


def test_weights_that_cannot_be_written_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    part = shira.AdapterTensor(torch.tensor([0]), torch.zeros(1), (4, 5), torch.float32)
    for weight, message in ((torch.randn(5, 4).t(), "contiguous"), (torch.empty(4, 5, device="meta"), "meta")):
        model[0].weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match=message):
            shira.ResidentAdapters(model).add("x", shira.Adapter({"0.weight": part}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nope", "no adapter named 'nope'; there are \\['x'\\]"),
        ({"x": 1.0, "nope": 1.0}, "nope"),
        ({}, "at least one"),
        ({"x": math.nan}, "finite"),
        ({"x": math.inf}, "finite"),
        ({"x": "1"}, "finite"),
    ],
)
def test_bad_targets_change_nothing(target: Any, message: str) -> None:
    model = Model()
    bank = shira.ResidentAdapters(model)
    bank.add("x", make(model, 1))
    bank.switch({"x": 0.5})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        bank.switch(target)
    with pytest.raises(ValueError, match=message), bank.using(target):
        pass
    assert same(snapshot(model), before)
    assert bank.active == {"x": 0.5}


def test_using_restores_after_an_error_and_pins_what_it_returns_to() -> None:
    model = Model()
    bank = shira.ResidentAdapters(model)
    bank.add("x", make(model, 1))
    bank.add("y", make(model, 2))
    bank.switch("x")
    before = snapshot(model)
    with bank.using("y"), bank.using(None):
        for name in ("x", "y"):
            with pytest.raises(ValueError, match="in use"):
                bank.remove(name)
    assert bank.active == "x"

    def fail() -> None:
        with bank.using("y"), bank.using(None):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bank.active == "x"
    assert same(snapshot(model), before)


def test_verify_base_notices_a_changed_base_even_under_an_adapter() -> None:
    model = Model()
    adapter = make(model, 1)
    bank = shira.ResidentAdapters(model)
    bank.add("x", adapter)
    with torch.no_grad():
        model.get_parameter("c.weight").view(-1)[adapter["c.weight"].indices[0]] += 1
    with pytest.raises(ValueError, match=r"x: c\.weight"):
        bank.verify_base()
    bank.switch("x")
    with pytest.raises(ValueError, match=r"x: c\.weight"):
        bank.verify_base()


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    bank = shira.ResidentAdapters(Model())
    with pytest.raises(shira.AdapterFormatError, match=r"x\.safetensors"):
        bank.add("x", path)
    assert bank.names == []


def test_switches_inside_and_outside_inference_mode() -> None:
    model = Model()
    before = snapshot(model)
    bank = shira.ResidentAdapters(model)
    with torch.inference_mode():
        bank.add("x", make(model, 1))
        bank.switch("x")
    applied = snapshot(model)
    bank.add("y", make(model, 2), force=True)
    bank.switch("y")
    bank.switch(None)
    assert same(snapshot(model), before)
    bank.switch("x")
    assert same(snapshot(model), applied)
    with torch.inference_mode():
        bank.switch(None)
    assert same(snapshot(model), before)


def test_training_and_switching_exclude_each_other() -> None:
    model = Model(special=False)
    before = snapshot(model)
    bank = shira.ResidentAdapters(model)
    bank.add("x", make(model, 1))
    config = shira.ShiraConfig(["b", "c"], density=0.2)
    bank.switch("x")
    with pytest.raises(RuntimeError, match="ResidentAdapters is changing this weight"):
        shira.attach(model, config)
    bank.switch(None)
    handle = shira.attach(model, config)
    with pytest.raises(RuntimeError, match="attach is changing this weight"):
        bank.switch("x")
    assert bank.active is None
    handle.detach()
    bank.switch("x")
    bank.switch(None)
    assert same(snapshot(model), before)


def test_wrong_arguments_are_named() -> None:
    model = Model()
    bank = shira.ResidentAdapters(model)
    adapter = make(model, 1)
    bank.add("x", adapter)
    with pytest.raises(ValueError, match="switch takes a name, strengths by name, or None, got 3"):
        bank.switch(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the strength of 'x' must be a finite float32 number"):
        bank.switch({"x": 10**400})
    with pytest.raises(ValueError, match="must be an Adapter or the path of its file, got 3"):
        bank.add("y", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the name of an adapter must be a string"):
        bank.add(None, adapter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: must be an AdapterTensor, got int"):
        shira.Adapter({"x": 3})  # type: ignore[dict-item]


def test_a_model_made_in_inference_mode_gets_its_base_back() -> None:
    with torch.inference_mode():
        model = Model()
        before = snapshot(model)
        bank = shira.ResidentAdapters(model)
        bank.add("x", make(model, 1))
        bank.switch("x")
        assert not same(snapshot(model), before)
        bank.switch(None)
        assert same(snapshot(model), before)


def test_mixes_of_as_many_entries_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    weight = model[0].weight
    base = torch.arange(16.0).view(4, 4)
    weight.data.copy_(base)
    bank = shira.ResidentAdapters(model)
    for i, name in enumerate("abcd"):
        part = shira.AdapterTensor(torch.arange(4) * 4 + i, torch.full((4,), float(i)), (4, 4), torch.float32)
        with pytest.warns(UserWarning, match="no checksum"):
            bank.add(name, shira.Adapter({"0.weight": part}))
    bank.switch({"a": 1.0, "b": 1.0})
    bank.switch({"c": 2.0, "d": 2.0})
    assert torch.equal(weight[:, :2], base[:, :2])
    assert torch.equal(weight[:, 2:], base[:, 2:] + 2 * (torch.tensor([2.0, 3.0]) - base[:, 2:]))


def test_an_adapter_of_the_same_name_is_another_one() -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    bank.add("a", adapters["x"])
    bank.add("b", adapters["x"])
    bank.stage("a")
    bank.remove("a")
    bank.add("a", adapters["y"])
    bank.switch("a")
    want = snapshot(model)
    bank.switch("b")
    bank.stage({"a": 1.0, "b": 1.0})
    bank.remove("a")
    bank.add("a", adapters["x"])
    bank.switch({"a": 1.0, "b": -1.0})
    assert not same(snapshot(model), want)
    bank.switch("a")
    other, adapters = llama_like()
    bank = shira.ResidentAdapters(other)
    bank.add("y", adapters["y"])
    bank.switch("y")
    assert same(snapshot(other), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_runs_are_listed_by_eight_bytes_and_mean_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 8, bias=False, dtype=dtype) for _ in range(3)))
    base = snapshot(model)
    adapters = {}
    for granularity, targets in ((8, "all-linear"), (4, ["0", "2"]), (1, ["1", "2"])):
        config = shira.ShiraConfig(targets, mask="rand", k=24, granularity=granularity)
        handle = shira.attach(model, config)
        with torch.no_grad():
            for values in handle.parameters():
                values.normal_()
        adapters[f"runs of {granularity}"] = handle.adapter()
        handle.detach()
    coarse, single = shira.ResidentAdapters(model), shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        coarse.add(name, adapter)
    monkeypatch.setattr(arena.Arena, "in_runs", lambda self: self)
    for name, adapter in adapters.items():
        single.add(name, adapter)
    unit = 8 // dtype.itemsize
    for name, adapter in adapters.items():
        index_bytes = coarse.stats.adapter_bytes[name] - adapter.nnz * dtype.itemsize
        assert index_bytes == 4 * adapter.nnz // (1 if name == "runs of 1" else unit)

    generator = random.Random(0)
    names = list(adapters)
    targets: list[Any] = [None, *names, {names[0]: 0.5}, {names[0]: 1.0, names[1]: 1.0}, dict.fromkeys(names, -0.5)]
    for start, target in itertools.product(targets, targets):
        single.switch(target)
        want = snapshot(model)
        single.switch(None)
        coarse.switch(start)
        if generator.random() < 0.5:
            coarse.stage(target)
        coarse.switch(target)
        assert same(snapshot(model), want)
        coarse.verify_base()
        coarse.switch(None)
        assert same(snapshot(model), base)


def test_autograd_notices_a_switch_of_runs() -> None:
    model = nn.Linear(16, 8, bias=False)
    part = shira.AdapterTensor(torch.arange(8, 24), torch.ones(16), (8, 16), torch.float32)
    bank = shira.ResidentAdapters(model)
    bank.add("runs", shira.Adapter({"weight": part}), force=True)
    bank.add(
        "nothing",
        shira.Adapter({"weight": changed(part, indices=part.indices[:0], values=part.values[:0])}),
        force=True,
    )
    for target in ("runs", "nothing", None):
        output = model(torch.randn(2, 16, requires_grad=True))
        bank.switch(target)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_runs_that_cannot_be_read_as_eight_bytes_are_single_entries() -> None:
    room = torch.zeros(100, dtype=torch.bfloat16)
    model = nn.Module()
    model.odd = nn.Parameter(torch.zeros(3, 7, dtype=torch.bfloat16))  # 42 bytes
    model.shifted = nn.Parameter(room[1:33].view(4, 8))  # begins at no multiple of 8 bytes
    model.shifted_run = nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    bank = shira.ResidentAdapters(model)
    for name, first in (("odd", 8), ("shifted", 8), ("shifted_run", 9)):
        indices = torch.arange(first, first + 8)
        shape = tuple(model.get_parameter(name).shape)
        part = shira.AdapterTensor(indices, torch.ones(8).bfloat16(), shape, torch.bfloat16)
        bank.add(name, shira.Adapter({name: part}), force=True)
        assert bank.stats.adapter_bytes[name] == 8 * (4 + 2)
        bank.switch(name)
        assert model.get_parameter(name).view(-1).nonzero().view(-1).tolist() == indices.tolist()
        bank.switch(None)


def test_two_banks_do_not_change_one_weight() -> None:
    model, adapters = llama_like()
    base = snapshot(model)
    first, second = shira.ResidentAdapters(model), shira.ResidentAdapters(model)
    for bank in (first, second):
        bank.add("x", adapters["x"])
    first.switch("x")
    for refused in (lambda: second.switch("x"), lambda: second.add("y", adapters["y"])):
        with pytest.raises(RuntimeError, match="ResidentAdapters is changing this weight"):
            refused()
    first.switch(None)
    second.switch("x")
    second.switch(None)
    assert same(snapshot(model), base)


def test_a_forgotten_bank_keeps_the_base() -> None:
    model, adapters = llama_like()
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    bank.add("x", adapters["x"])
    bank.switch("x")
    bank = shira.ResidentAdapters(model)
    gc.collect()
    with pytest.raises(RuntimeError, match=r"ResidentAdapters is changing this weight; .*switch\(None\), first"):
        bank.add("x", adapters["x"])
    with pytest.raises(TypeError, match="switch\\(None\\) first"):
        pickle.dumps(model)
    model.get_parameter("0.weight")._shira_owner.switch(None)
    assert same(snapshot(model), base)
    bank.add("x", adapters["x"])


def test_a_bank_that_holds_the_base_is_freed_as_soon_as_it_is_forgotten() -> None:
    """Its adapters may take gigabytes, which must not wait for the garbage collector."""
    model, adapters = llama_like()
    gc.disable()
    try:
        bank = shira.ResidentAdapters(model)
        bank.add("x", adapters["x"])
        with bank.using("x"):
            pass
        with bank.batch(["x", None]):
            pass
        forgotten = weakref.ref(bank)
        del bank
        assert forgotten() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("granularity", [1, 4])
def test_weights_that_moved_are_written_where_they_are(granularity: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    base = snapshot(model)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", k=16, granularity=granularity))
    with torch.no_grad():
        for values in handle.parameters():
            values.normal_()
    adapter = handle.adapter()
    handle.detach()
    bank = shira.ResidentAdapters(model)
    bank.add("x", adapter)
    bank.switch("x")
    tuned = snapshot(model)
    model.double().float()
    bank.switch(None)
    assert same(snapshot(model), base)
    model.double().float()
    bank.switch("x")
    assert same(snapshot(model), tuned)


def test_a_replaced_parameter_is_noticed() -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    bank.add("x", adapters["x"])
    bank.switch("x")
    before = snapshot(model)
    replaced = model[1].weight
    model[1].weight = nn.Parameter(replaced.detach().clone())
    for target in (None, "x", {"x": 0.5}):
        with pytest.raises(RuntimeError, match="the weight of a Linear was replaced"):
            bank.switch(target)
    assert same(snapshot(model), before)
    model[1].weight = replaced
    bank.switch(None)


def test_what_using_relies_on_is_not_switched_by_another_task() -> None:
    model, adapters = llama_like()
    base = snapshot(model)
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)

    async def serve(name: str, seconds: float) -> object:
        with bank.using(name):
            await asyncio.sleep(seconds)
            return bank.active

    async def both() -> list[object]:
        return await asyncio.gather(serve("x", 0.02), serve("y", 0.0), return_exceptions=True)

    served, refused = asyncio.run(both())
    assert served == "x"
    assert isinstance(refused, RuntimeError)
    assert bank.active is None
    assert same(snapshot(model), base)


def test_strengths_are_float32_numbers_of_any_type() -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    bank.add("x", adapters["x"])
    bank.switch({"x": np.float32(0.5)})
    half = snapshot(model)
    bank.switch({"x": 0.5})
    assert same(snapshot(model), half)
    for strength in (1e39, -1e39, np.float64("nan"), None):
        with pytest.raises(ValueError, match="finite float32 number"):
            bank.switch({"x": strength})


def test_an_interrupt_of_using_gives_back_what_was_active() -> None:
    model, adapters = llama_like()
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    bank.switch("x")
    before = snapshot(model)
    for when in ("before", "after"):
        with each_write(interrupting(0, when)), pytest.raises(KeyboardInterrupt), bank.using("y"):
            raise AssertionError("the block is not entered")
        with each_write(interrupting(1, when)), pytest.raises(KeyboardInterrupt), bank.using("y"):
            pass
        if bank.active != "x":  # the way back was interrupted, but nothing is half done
            bank.switch("x")
        assert same(snapshot(model), before)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: bank.switch("x")).result()  # nobody is inside any more
