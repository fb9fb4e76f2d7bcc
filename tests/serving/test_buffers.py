"""Buffers, and weights of dtypes that are only replaced, in a bank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from any_bits import random_bits
from oracle import bits
from torch import nn

import shira
from shira.adapter import DTYPES, checksum_of
from shira_kernels import backends
from shira_kernels.dtypes import COPIED

pytestmark = pytest.mark.filterwarnings("ignore:not sparse")
State = dict[str, torch.Tensor]


class AnyDtypes(nn.Module):
    """Of each dtype a parameter, a buffer and a single number; a tied buffer, and one that is in no state dict."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        for place, dtype in enumerate(DTYPES):
            name, at = str(dtype).removeprefix("torch."), 1000 * seed + 10 * place
            self.register_parameter(f"{name}_w", nn.Parameter(random_bits(dtype, (8, 16), at), requires_grad=False))
            self.register_buffer(f"{name}_b", random_bits(dtype, (7, 9), at + 1))
            self.register_buffer(f"{name}_n", random_bits(dtype, (), at + 2))
        self.inner = nn.Module()
        self.inner.register_buffer("tied", self.int8_b)
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def state_of(model: nn.Module) -> State:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def same(model: nn.Module, state: State) -> bool:
    now = state_of(model)
    return set(now) == set(state) and all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_dtype_switches_and_reverts_bit_for_bit(backend: str) -> None:
    if reason := backends.reason_unavailable("scatter_apply", backend):
        pytest.skip(reason)
    model, tuned, other = AnyDtypes(), AnyDtypes(1), AnyDtypes()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):  # of the second adapter runs of whole words, and more
            tensor.view(-1).view(torch.uint8)[:8].bitwise_xor_(1)
    base, wanted, others = state_of(model), state_of(tuned), state_of(other)
    first, second = shira.diff(model, tuned), shira.diff(model, other)
    assert "inner.tied" not in first
    bank = shira.ResidentAdapters(model)
    with backends.use(backend):
        bank.add("first", first)
        bank.add("second", second, check_finite=False)
        bank.stage("first")
        for target, state in (
            ("first", wanted), ("second", others), ("first", wanted), (None, base), ("second", others),
            ({"first": 1.0}, wanted), (None, base),
        ):  # fmt: skip
            bank.switch(target)
            assert same(model, state)
            bank.verify_base()
        with bank.using("second"):
            assert same(model, others)
            bank.add("while it is active", first)
            bank.switch("while it is active")
            assert same(model, wanted)
    assert same(model, base)


def counting() -> tuple[nn.Module, shira.ResidentAdapters, State]:
    """A model with adapters that change, beside weights: "a" a counter, "b" a mask, "c" nothing else."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
    model.eval()
    bank, base = shira.ResidentAdapters(model), {n: t.clone() for n, t in model.state_dict().items()}
    changes: dict[str, State] = {
        "a": {"1.num_batches_tracked": torch.tensor(100), "1.running_mean": torch.ones(4)},
        "b": {"mask": torch.tensor([True, False, True, False])},
        "c": {},
    }
    for place, (name, more) in enumerate(changes.items()):
        weight = base["0.weight"].clone()
        weight[place] += 1
        bank.add(name, shira.diff(base, {**base, **more, "0.weight": weight}))
    return model, bank, base


def test_a_mix_scales_what_are_numbers_and_replaces_the_rest() -> None:
    model, bank, base = counting()
    for target in ({"a": 1.0, "c": 0.5}, {"c": -2.0, "a": 1.0}, {"b": 1.0, "c": 0.25, "a": 1.0}):
        for _ in range(2):  # from the base, and from itself
            bank.switch(target)
            assert int(model[1].num_batches_tracked) == 100  # type: ignore[index]
            assert model.mask.tolist() == [True, False, True, False] if "b" in target else not model.mask.any()
            change = model.state_dict()["0.weight"] - base["0.weight"]
            rows = torch.tensor([target.get(name, 0.0) for name in "abc"] + [0.0])
            assert torch.allclose(change, rows[:, None].expand(4, 4), atol=1e-6)
        bank.switch("b")
        assert int(model[1].num_batches_tracked) == 0  # type: ignore[index]
    bank.stage({"a": 1.0, "c": 0.5})
    bank.switch({"a": 1.0, "c": 0.5})
    bank.switch(None)
    assert all(torch.equal(bits(tensor), bits(base[name])) for name, tensor in model.state_dict().items())


REFUSED: list[tuple[Any, str]] = [
    ({"a": 0.5}, "'a' changes '1.num_batches_tracked', which is torch.int64: .* at strength 1 only, got 0.5"),
    ({"c": 0.3, "b": 0.7}, "'b' changes 'mask', which is torch.bool: .* at strength 1 only, got 0.7"),
    ({"a": 1.0, "twin": 1.0}, "'a' and 'twin' both change '1.num_batches_tracked', which is torch.int64"),
]


@pytest.mark.parametrize(("target", "message"), REFUSED)
def test_what_would_be_scaled_or_mixed_is_refused_before_anything_is_written(target: Any, message: str) -> None:
    model, bank, base = counting()
    counter = shira.diff(base, {**base, "1.num_batches_tracked": torch.tensor(7)})
    bank.add("twin", counter)
    bank.switch("c")
    before = state_of(model)

    def using() -> None:
        with bank.using(target):
            raise AssertionError

    def batch() -> None:
        with bank.batch([target, None]):
            raise AssertionError

    for call in (lambda: bank.switch(target), lambda: bank.stage(target), using):
        with pytest.raises(ValueError, match=message):
            call()
        assert same(model, before)
        assert bank.active == "c"
    bank.switch(None)
    with pytest.raises(ValueError, match=message):
        batch()


def test_a_batch_names_what_it_cannot_add() -> None:
    bank = counting()[1]
    with (
        pytest.raises(ValueError, match="'b' cannot be unfused: mask: it is a buffer; use switch"),
        bank.batch(["b", None]),
    ):
        pass
    quantised = nn.Linear(8, 8, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    tuned = copy.deepcopy(quantised)
    tuned.weight[1, 2] = 5
    other = shira.ResidentAdapters(quantised)
    other.add("it", shira.diff(quantised, tuned))
    with (
        pytest.raises(ValueError, match=r"weight: it is torch.int8, whose entries can be replaced"),
        other.batch(["it", None]),
    ):
        pass
    with other.batch(["it", "it"]):  # one adapter for all rows is a switch
        assert quantised.weight[1, 2] == 5
    assert not quantised.weight.any()


def test_adapters_of_no_entries_and_of_no_tensors() -> None:
    model, bank, _ = counting()
    none = torch.empty(0, dtype=torch.int8)
    model.register_buffer("codes", torch.ones(3, 4, dtype=torch.int8))
    bank.add("nothing", shira.Adapter({}))
    bank.add(
        "no entries",
        shira.Adapter({"codes": shira.AdapterTensor(none.int(), none, (3, 4), torch.int8, checksum=checksum_of(none))}),
    )
    before = state_of(model)
    for target in ("nothing", "no entries", {"nothing": 0.5, "c": 1.0}, {"no entries": 1.0, "nothing": 0.3}):
        bank.switch(target)
        bank.verify_base()
        bank.switch(None)
        assert same(model, before)
    with bank.batch(["nothing", "c", None]):
        pass


def test_a_buffer_that_is_another_one_now_is_refused() -> None:
    model, bank, _ = counting()
    model[1].num_batches_tracked = torch.tensor(3)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="the num_batches_tracked of a BatchNorm1d was replaced"):
        bank.switch("a")
    bank.switch("b")


def test_a_model_that_was_moved_and_came_back() -> None:
    """`model.to` makes new buffers, also on the way back, and takes tied ones apart."""
    model, bank, base = counting()
    model.register_buffer("tied", model[1].running_mean)  # type: ignore[index]
    base["tied"] = base["1.running_mean"]
    bank.remove("a")
    tuned = copy.deepcopy(model)
    tuned.tied.fill_(1)
    bank.add("a", shira.diff(model, tuned))
    bank.switch("a")
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match=r"was torch.float32 on cpu .* and is torch.float64 on cpu: move it back"):
        bank.switch(None)
    model.to(torch.float32)
    assert model.tied is not model[1].running_mean  # type: ignore[index]
    bank.add("again", shira.diff(model, {**model.state_dict(), "1.running_mean": torch.zeros(4) + 2}), force=True)
    bank.switch("again")
    assert model[1].running_mean.tolist() == [2, 2, 2, 2]  # type: ignore[index]
    bank.switch(None)
    assert model.tied is model[1].running_mean  # type: ignore[index]
    assert all(torch.equal(bits(tensor), bits(base[name])) for name, tensor in model.state_dict().items())


def test_statistics_that_a_forward_moves_are_noticed() -> None:
    model, bank, _ = counting()
    model.train()(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"a: 1\.running_mean: the base entries changed since the adapter was added"):
        bank.verify_base()


def test_buffers_that_share_memory() -> None:
    model = nn.Module()
    memory = torch.zeros(8, dtype=torch.int16)
    model.register_buffer("whole", memory)
    model.register_buffer("begin", memory[:4])
    model.register_buffer("apart", torch.zeros(4, dtype=torch.int16))

    def adapter(name: str) -> shira.Adapter:
        index, value = torch.tensor([1]), torch.tensor([5], dtype=torch.int16)
        entry = model.get_buffer(name)[1:2]
        return shira.Adapter(
            {
                name: shira.AdapterTensor(
                    index, value, tuple(model.get_buffer(name).shape), torch.int16, checksum=checksum_of(entry)
                )
            }
        )

    bank = shira.ResidentAdapters(model)
    bank.add("apart", adapter("apart"))
    bank.add("begin", adapter("begin"))
    with pytest.raises(ValueError, match=r"(whole|begin): shares memory with"):
        bank.add("whole", adapter("whole"))
    bank.switch("begin")
    assert memory.tolist() == [0, 5, 0, 0, 0, 0, 0, 0]
    bank.switch(None)
    assert not memory.any()


def test_what_a_model_does_not_save_has_no_name() -> None:
    model = AnyDtypes()
    tensor = shira.AdapterTensor(torch.tensor([0]), torch.ones(1), (3,), torch.float32)
    with pytest.raises(ValueError, match="the model has no parameter or buffer 'cache'"):
        shira.ResidentAdapters(model).add("x", shira.Adapter({"cache": tensor}))


@pytest.mark.parametrize("dtype", COPIED, ids=str)
def test_finite_is_asked_of_any_dtype(dtype: torch.dtype) -> None:
    model = nn.Module()
    values = torch.arange(2 if dtype == torch.bool else 256, dtype=torch.uint8).view(dtype)
    model.register_buffer("w", torch.zeros_like(values.view(torch.uint8)).view(dtype))
    adapter = shira.diff(model, {"w": values})
    bank = shira.ResidentAdapters(model)
    if bool(values.float().isfinite().all()):
        bank.add("it", adapter, check_finite=True)
        return
    assert dtype.is_floating_point
    with pytest.raises(ValueError, match=r"^w: values are not finite"):
        bank.add("it", adapter, check_finite=True)
