"""Whole models from one adapter to another: ResidentAdapters against PEFT at equally many numbers.

Ours goes in one switch; PEFT unmerges the old adapter and merges the new one. Adapters sit in memory on all sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from harness.architectures import LLAMA_7B_PART, SMALL_LLAMA, Architecture, llama_shapes
from harness.compare import Place, Side, assert_same_bits
from harness.machine import cache_bytes
from harness.rotation import CACHE_TURNS
from harness.switching import (
    LORA,
    OURS,
    SHIRA_PEFT,
    base_of,
    check_merged,
    expected_of,
    make_adapter,
    make_lora,
    make_model,
    make_shira_peft,
    merge_other,
    touched_bytes,
    weights_of,
)

import shira

Slot = dict[str, Iterator[Callable[[], object]]]  # for each side, what its next calls do
SEEDS = {"blue": 1, "paint": 2}  # the adapters
MIXES = {"blue": 0.7, "paint": 0.3}, {"blue": 0.6, "paint": 0.4}
MIX, FIRST_MIX, LORA_MIX = (
    "new weights of a mix (ours)",
    "first switch to the mix (ours)",
    "add_weighted_adapter (PEFT)",
)
FEW, MANY = 8, 1000
ONE_LAYER = Architecture("1 Llama layer, hidden 256", llama_shapes(256, 704, 1), rank=1)


def do(side: str, slot: Slot) -> None:
    next(slot[side])()


def make_bank(
    architecture: Architecture, dtype: torch.dtype, device: str, adapters: dict[str, shira.Adapter]
) -> tuple[shira.ResidentAdapters, dict[str, torch.Tensor]]:
    """A bank that holds the adapters, and its model's weights."""
    model = make_model(architecture.shapes, dtype, device)
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    return bank, weights_of(model)


def switch_bytes(weights: dict[str, torch.Tensor], touched: int, old: shira.Adapter, new: shira.Adapter) -> int:
    """Bytes of ours from one adapter to another: the lines that hold an entry of either read and written once, the
    positions and kept values of the old one and the positions and values of the new one read, what it replaces kept."""
    itemsize = next(iter(weights.values())).element_size()
    return 2 * touched + old.nnz * (4 + itemsize) + new.nnz * (4 + 2 * itemsize)


def shira_peft_bytes(weights: dict[str, torch.Tensor], old: shira.Adapter, new: shira.Adapter) -> int:
    """Bytes of PEFT's unmerge and merge: the lines of each read and written; row, column and change of each entry."""
    lines = 2 * touched_bytes(weights, [old]) + 2 * touched_bytes(weights, [new])
    return lines + (old.nnz + new.nnz) * 12


def check_switch(
    bank: shira.ResidentAdapters, weights: dict[str, torch.Tensor], adapters: dict[str, shira.Adapter]
) -> None:
    """The new one's bits after the old one, and the base's after that; leaves "blue" active."""
    for name, want in (
        ("blue", adapters["blue"]),
        ("paint", adapters["paint"]),
        (None, {}),
        ("blue", adapters["blue"]),
    ):
        bank.switch(name)
        for layer, weight in weights.items():
            part = want.get(f"{layer}.weight")
            expected = expected_of(weight, part) if part else base_of(weight)
            assert_same_bits(f"{name}: {layer}", [weight], [expected])


def check_peft(lora: Any, shira_peft: Any, adapters: dict[str, shira.Adapter]) -> None:
    """Both merge what they should, up to rounding; leaves "blue" merged."""
    for peft in (lora, shira_peft):
        peft.merge_adapter(["blue"])
    check_merged(lora, "blue")
    for layer, weight in weights_of(shira_peft).items():
        want = expected_of(weight, adapters["blue"][f"{layer}.weight"])
        # PEFT may round the change too, which is of the order of 1e-3.
        torch.testing.assert_close(weight, want, rtol=2 * torch.finfo(weight.dtype).eps, atol=5e-5)


@pytest.mark.parametrize("architecture", [SMALL_LLAMA, LLAMA_7B_PART], ids=["small", "7b"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switch(compare: Callable[..., None], place: Place, dtype: str, architecture: Architecture) -> None:
    """Switches from one to the other and back. Enough of our models take turns that each is met cold; PEFT has one."""
    kind = getattr(torch, dtype)
    adapters = {name: make_adapter(architecture, kind, seed) for name, seed in SEEDS.items()}
    bank, weights = make_bank(architecture, kind, place.device, adapters)
    touched = touched_bytes(weights, adapters.values())
    moved = switch_bytes(weights, touched, adapters["blue"], adapters["paint"])
    rotation = math.ceil(CACHE_TURNS * cache_bytes(place.device) / touched)
    banks = [bank] + [make_bank(architecture, kind, place.device, adapters)[0] for _ in range(rotation - 1)]
    lora = make_lora(make_model(architecture.shapes, kind, place.device), architecture, SEEDS)
    shira_peft = make_shira_peft(make_model(architecture.shapes, kind, place.device), architecture, SEEDS)
    merges = {
        LORA: cycle([partial(merge_other, lora, "paint"), partial(merge_other, lora, "blue")]),
        SHIRA_PEFT: cycle([partial(merge_other, shira_peft, "paint"), partial(merge_other, shira_peft, "blue")]),
    }
    slots = [{OURS: cycle([partial(bank.switch, "paint"), partial(bank.switch, "blue")]), **merges} for bank in banks]

    def check() -> None:
        check_switch(bank, weights, adapters)
        check_peft(lora, shira_peft, adapters)
        for other in banks[1:]:
            other.switch("blue")

    factors = 4 * 2 * architecture.nnz
    sides = {
        OURS: Side(partial(do, OURS), moved, torch.no_grad),
        LORA: Side(partial(do, LORA), 4 * sum(w.nbytes for w in weights.values()) + factors, torch.no_grad),
        SHIRA_PEFT: Side(
            partial(do, SHIRA_PEFT), shira_peft_bytes(weights, adapters["blue"], adapters["paint"]), torch.no_grad
        ),
    }
    with torch.no_grad():
        compare(
            sides,
            ours=OURS,
            baselines=[LORA, SHIRA_PEFT],
            slots=slots,
            check=check,
            place=place,
            group=f"From adapter A to B ({architecture}, cold)",
            label=f"{place}, {dtype}",
            info=architecture.facts(dtype),
        )


def mix_lora(peft: Any, weights: dict[str, float]) -> None:
    """PEFT's way to other weights: a new adapter of both factors side by side, which is exact, in place of the old."""
    peft.unmerge_adapter()
    peft.delete_adapter("mix")
    peft.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="cat")
    peft.merge_adapter(["mix"])


def check_mix(weights: dict[str, torch.Tensor], adapters: dict[str, shira.Adapter], mix: dict[str, float]) -> None:
    """base + the sum of strength (value - base) in float32, rounded once."""
    for layer, weight in weights.items():
        base = base_of(weight).float()
        wanted = base.clone()
        for name, strength in mix.items():
            part = adapters[name][f"{layer}.weight"]
            indices = part.indices.long().to(weight.device)
            change = part.values.to(weight.device).float() - base.view(-1)[indices]
            wanted.view(-1)[indices] += strength * change
        torch.testing.assert_close(weight, wanted.to(weight.dtype))
        assert not torch.equal(wanted, base)


@pytest.mark.parametrize(
    "place", [Place("cpu", 1), pytest.param(Place("cuda"), marks=pytest.mark.gpu)], ids=str, indirect=True
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mix(compare: Callable[..., None], place: Place, dtype: str) -> None:
    """Other weights for the active mix, against the first switch to it and against a new mix of LoRA adapters."""
    kind, architecture = getattr(torch, dtype), SMALL_LLAMA
    adapters = {name: make_adapter(architecture, kind, seed) for name, seed in SEEDS.items()}
    bank, weights = make_bank(architecture, kind, place.device, adapters)
    fresh, fresh_weights = make_bank(architecture, kind, place.device, adapters)
    lora = make_lora(make_model(architecture.shapes, kind, place.device), architecture, SEEDS)
    first, second = MIXES

    def forget(_: Any) -> None:
        """Back to the base; an adapter that is added anew has no mix with another."""
        fresh.switch(None)
        fresh.remove("paint")
        fresh.add("paint", adapters["paint"])

    def check() -> None:
        bank.switch(second)
        bank.switch(first)
        check_mix(weights, adapters, first)
        forget(None)
        fresh.switch(first)
        assert_same_bits("the first switch", list(fresh_weights.values()), list(weights.values()))
        lora.add_weighted_adapter(["blue", "paint"], list(first.values()), "mix", combination_type="cat")
        lora.merge_adapter(["mix"])
        check_merged(lora, "blue", "paint", strengths=tuple(first.values()))

    slot = {
        MIX: cycle([partial(bank.switch, second), partial(bank.switch, first)]),
        FIRST_MIX: cycle([partial(fresh.switch, first)]),
        LORA_MIX: cycle([partial(mix_lora, lora, second), partial(mix_lora, lora, first)]),
    }
    itemsize = kind.itemsize
    entries = sum(part.nnz for adapter in adapters.values() for part in adapter.values())
    # Every entry of either: its line and its value; the base that a mix starts from was kept.
    moved = 2 * touched_bytes(weights, adapters.values()) + entries * (4 + 2 * itemsize)
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    with torch.no_grad():
        compare(
            {
                MIX: Side(partial(do, MIX), moved, torch.no_grad),
                FIRST_MIX: Side(partial(do, FIRST_MIX), moved, torch.no_grad, before=forget),
                LORA_MIX: Side(partial(do, LORA_MIX), 4 * weight_bytes + 6 * 4 * architecture.nnz, torch.no_grad),
            },
            ours=MIX,
            baselines=[FIRST_MIX, LORA_MIX],
            slots=[slot],
            check=check,
            place=place,
            group=f"Other weights for a mix of two ({architecture})",
            label=f"{place}, {dtype}",
            info={**architecture.facts(dtype), "cold": False},
        )


@pytest.mark.parametrize(
    "place", [Place("cpu", 1), pytest.param(Place("cuda"), marks=pytest.mark.gpu)], ids=str, indirect=True
)
def test_registered(compare: Callable[..., None], place: Place) -> None:
    """Times a switch between two small adapters in a bank of 1000 and in one of 8: what the others cost it."""
    kind, architecture = torch.float32, ONE_LAYER
    adapters = {name: make_adapter(architecture, kind, seed) for name, seed in SEEDS.items()}
    others = [make_adapter(architecture, kind, seed) for seed in range(3, 3 + FEW)]
    banks = {}
    for count in (FEW, MANY):
        further = {str(i): others[i % len(others)] for i in range(count - len(adapters))}
        banks[f"{count} adapters registered"] = make_bank(architecture, kind, place.device, {**adapters, **further})

    def check() -> None:
        for (bank, weights), count in zip(banks.values(), (FEW, MANY), strict=True):
            assert len(bank.names) == count
            check_switch(bank, weights, adapters)

    few, many = banks
    weights = banks[few][1]
    moved = switch_bytes(weights, touched_bytes(weights, adapters.values()), adapters["blue"], adapters["paint"])
    slot = {
        name: cycle([partial(bank.switch, "paint"), partial(bank.switch, "blue")]) for name, (bank, _) in banks.items()
    }
    compare(
        {name: Side(partial(do, name), moved) for name in (many, few)},
        ours=many,
        baselines=[few],
        slots=[slot],
        check=check,
        place=place,
        group=f"Many adapters beside the active one ({architecture}, warm)",
        label=f"{place}, float32",
        info={**architecture.facts("float32"), "cold": False},
        calls=100,
    )
