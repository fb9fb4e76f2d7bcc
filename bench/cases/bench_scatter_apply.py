"""scatter_apply and its batched forms against torch's own scatters and against fusing LoRA.

Random sorted unique indices, int32 for ours and int64 for torch's ops, which take nothing else; weights, entries and
LoRA factors are all rotated, so every side meets all of its inputs cold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.compare import Place, Side, assert_same_bits
from harness.rotation import SharedSlot, Slot, make_rotation, make_shared_rotation, touched_bytes
from harness.scatter import (
    LLAMA_7B_PART,
    LORA_ADDMM,
    LORA_MATMUL,
    RANK,
    SHAPE,
    SMALL_LLAMA,
    apply,
    apply_batched,
    facts,
    forced_backends,
    index_copy,
    list_facts,
    lora_addmm,
    lora_bytes,
    lora_matmul_add,
    outcome,
    scatter,
    sparse_bytes,
    switch,
    switch_by_index_copy,
)

scatter_apply = torch.ops.shira.scatter_apply
scatter_apply_batched = torch.ops.shira.scatter_apply_batched

DTYPES = ["float32", "bfloat16"]
KEEPING, ADDITIVE = "scatter_apply, old values kept", "scatter_apply, additive"


def apply_keeping(slot: Slot) -> None:
    scatter_apply(slot.weights[0], slot.indices, slot.values, 1.0, False, slot.saved)


def apply_additive(slot: Slot) -> None:
    scatter_apply(slot.weights[0], slot.indices, slot.values, 1.0, True)


def switch_in_two_calls(slot: SharedSlot) -> None:
    old, new = slot.lists
    scatter_apply_batched(old.weights, old.offsets, old.indices, old.values)
    scatter_apply_batched(new.weights, new.offsets, new.indices, new.values, 1.0, False, new.saved)


def check_replacing(sides: dict[str, Side], names: list[str], slot: Slot, baseline: str = "index_copy_") -> None:
    """The sides called `names` leave the same bits as the baseline, and those are not the bits from before."""
    want = outcome(sides[baseline], slot).weights
    assert all(not torch.equal(w, before) for w, before in zip(want, slot.weights, strict=True))
    for name in names:
        assert_same_bits(name, outcome(sides[name], slot).weights, want)


def check_switch(sides: dict[str, Side], replacing: list[str], slot: Slot) -> None:
    check_replacing(sides, replacing, slot)

    kept = outcome(sides[KEEPING], slot)
    old = [slot.parts[0].flat[slot.indices64]]
    assert_same_bits("saved", [kept.saved], old)
    scatter_apply(kept.weights[0], kept.indices, kept.saved)
    assert_same_bits("reverted", kept.weights, slot.weights)

    added = slot.copy().parts[0]
    added.flat[added.indices64] += added.values
    assert_same_bits("additive", outcome(sides[ADDITIVE], slot).weights, [added.weight])

    fused, summed = (outcome(sides[name], slot).weights[0] for name in (LORA_ADDMM, LORA_MATMUL))
    torch.testing.assert_close(fused, summed)
    assert not torch.equal(fused, slot.weights[0])


@pytest.mark.parametrize("rotation", [None, 6], ids=["cold", "six"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_switch(compare: Callable[..., None], place: Place, dtype: str, rotation: int | None) -> None:
    """One weight at 2 %: against torch's scatters and against fusing LoRA in the two usual ways.

    Six weights in rotation are what a large last cache keeps for a sparse write, but not for a dense one.
    """
    slots = make_rotation([SHAPE], getattr(torch, dtype), place.device, density=0.02, rank=RANK, slots=rotation)
    slot = slots[0]
    ours = Side(apply, sparse_bytes(slot, slot.indices))
    forced = forced_backends(place, "scatter_apply", apply, ours.bytes_moved)
    sides = {
        "scatter_apply": ours,
        **forced,
        KEEPING: Side(apply_keeping, sparse_bytes(slot, slot.indices, slot.saved)),
        ADDITIVE: Side(apply_additive, sparse_bytes(slot, slot.indices)),
        "index_copy_": Side(index_copy, sparse_bytes(slot, slot.indices64)),
        "scatter_": Side(scatter, sparse_bytes(slot, slot.indices64)),
        LORA_ADDMM: Side(lora_addmm, lora_bytes(slot, passes=2)),
        LORA_MATMUL: Side(lora_matmul_add, lora_bytes(slot, passes=4)),
    }
    compare(
        sides,
        ours="scatter_apply",
        baselines=["index_copy_", "scatter_", LORA_ADDMM, LORA_MATMUL],
        slots=slots,
        check=lambda: check_switch(sides, ["scatter_apply", *forced, "scatter_"], slot),
        place=place,
        group=f"Switch one weight (4096 x 4096, 2 %, {'six weights in rotation' if rotation else 'cold'})",
        label=f"{place}, {dtype}",
        info=facts(slots, dtype, 0.02),
    )


@pytest.mark.parametrize("density", [0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("dtype", DTYPES)
def test_density(compare: Callable[..., None], place: Place, dtype: str, density: float) -> None:
    slots = make_rotation([SHAPE], getattr(torch, dtype), place.device, density=density)
    slot = slots[0]
    sides = {
        "scatter_apply": Side(apply, sparse_bytes(slot, slot.indices)),
        "index_copy_": Side(index_copy, sparse_bytes(slot, slot.indices64)),
    }
    compare(
        sides,
        ours="scatter_apply",
        baselines=["index_copy_"],
        slots=slots,
        check=lambda: check_replacing(sides, ["scatter_apply"], slot),
        place=place,
        group="Density sweep (4096 x 4096, cold)",
        label=f"{place}, {dtype}, {density:.1%}",
        info={**facts(slots, dtype, density), "sweep": "density"},
    )


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_small_call(compare: Callable[..., None], place: Place, grad_mode: Callable[[], Any]) -> None:
    """1000 entries of a warm weight: what a call costs, autograd's bookkeeping included."""
    numel = 1024 * 1024
    slots = make_rotation([(1024, 1024)], torch.float32, place.device, density=1000 / numel, slots=1)
    slot = slots[0]
    ours = Side(apply, sparse_bytes(slot, slot.indices), grad_mode)
    sides = {"scatter_apply": ours, "index_copy_": Side(index_copy, sparse_bytes(slot, slot.indices64), grad_mode)}
    compare(
        sides,
        ours="scatter_apply",
        baselines=["index_copy_"],
        slots=slots,
        check=lambda: check_replacing(sides, ["scatter_apply"], slot),
        place=place,
        group="Small call (1000 entries, float32, warm)",
        label=f"{place}, {grad_mode.__name__}",
        info=facts(slots, "float32", 1000 / numel),
        calls=200,
    )


def compare_model(
    compare: Callable[..., None], place: Place, dtype: str, shapes: list[tuple[int, int]], group: str
) -> None:
    """All weights of a model in one call, against a call for each weight."""
    slots = make_rotation(shapes, getattr(torch, dtype), place.device, density=0.02)
    slot = slots[0]
    ours = Side(apply_batched, sparse_bytes(slot, slot.indices))
    forced = forced_backends(place, "scatter_apply_batched", apply_batched, ours.bytes_moved)
    loop = f"{len(shapes)} x index_copy_"
    calls = f"{len(shapes)} x scatter_apply"
    sides = {
        "scatter_apply_batched": ours,
        **forced,
        calls: Side(apply, sparse_bytes(slot, slot.indices)),
        loop: Side(index_copy, sparse_bytes(slot, slot.indices64)),
    }
    compare(
        sides,
        ours="scatter_apply_batched",
        baselines=[calls, loop],
        slots=slots,
        check=lambda: check_replacing(sides, ["scatter_apply_batched", *forced, calls], slot, loop),
        place=place,
        group=group,
        label=f"{place}, {dtype}",
        info=facts(slots, dtype, 0.02),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_model(compare: Callable[..., None], place: Place, dtype: str) -> None:
    compare_model(compare, place, dtype, SMALL_LLAMA, "Switch a model (4 Llama layers, hidden 1024, 2 %, cold)")


@pytest.mark.parametrize("dtype", DTYPES)
def test_switch_between(compare: Callable[..., None], place: Place, dtype: str) -> None:
    """The old entries back and the new ones in, in one call for the whole model, against two."""
    density = 0.01
    slots = make_shared_rotation(
        SMALL_LLAMA, getattr(torch, dtype), place.device, density=density, granularities=(1, 1)
    )
    old, new = slots[0].lists
    lines, vectors = touched_bytes(old, new), (old.values, new.values)
    ours = Side(switch, 2 * lines + sum(v.nbytes for v in (*vectors, old.indices, new.indices, new.saved)))
    forced = forced_backends(place, "scatter_switch_batched", switch, ours.bytes_moved)
    copies, calls = f"2 x {len(SMALL_LLAMA)} x index_copy_", "2 x scatter_apply_batched"
    sides = {
        "scatter_switch_batched": ours,
        **forced,
        calls: Side(switch_in_two_calls, sparse_bytes(old, old.indices) + sparse_bytes(new, new.indices, new.saved)),
        copies: Side(switch_by_index_copy, sparse_bytes(old, old.indices64) + sparse_bytes(new, new.indices64)),
    }

    def check() -> None:
        want = outcome(sides[calls], slots[0]).lists[1]
        by_copies = outcome(sides[copies], slots[0]).lists[1]
        assert_same_bits(copies, by_copies.weights, want.weights)
        for name in ("scatter_switch_batched", *forced):
            got = outcome(sides[name], slots[0]).lists[1]
            assert_same_bits(name, [*got.weights, got.saved], [*want.weights, want.saved])

    compare(
        sides,
        ours="scatter_switch_batched",
        baselines=[calls, copies],
        slots=slots,
        check=check,
        place=place,
        group="Switch from one adapter to another (4 Llama layers, hidden 1024, 1 %, cold)",
        label=f"{place}, {dtype}",
        info={**list_facts(new, dtype, density), "touched_bytes": lines},
    )


def apply_by_eight_bytes(slot: Slot) -> None:
    for part in slot.parts:
        scatter_apply(part.flat.view(torch.int64), part.by_eight_bytes, part.values.view(torch.int64))


@pytest.mark.parametrize("granularity", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_runs(compare: Callable[..., None], place: Place, dtype: str, granularity: int) -> None:
    """Runs of neighbours against as many single entries, and against index_copy_ of the same runs.

    Aligned runs are elements of 8 bytes, and ResidentAdapters lists them so; the other variant has an index for each.
    """
    density = round(0.02 * SHAPE[0] * SHAPE[1] / 32) * 32 / (SHAPE[0] * SHAPE[1])
    slots = make_shared_rotation(
        [SHAPE], getattr(torch, dtype), place.device, density=density, granularities=(granularity, 1)
    )
    runs, single = slots[0].lists

    def of(entries: int, run: Callable[[Slot], None], indices: torch.Tensor) -> Side:
        return Side(lambda shared: run(shared.lists[entries]), sparse_bytes(slots[0].lists[entries], indices))

    ours, each = f"runs of {granularity}, by 8 bytes", f"runs of {granularity}, an index for each entry"
    singles, copies = "single entries", f"index_copy_, runs of {granularity}"
    sides = {
        ours: of(0, apply_by_eight_bytes, runs.parts[0].by_eight_bytes),
        each: of(0, apply, runs.indices),
        singles: of(1, apply, single.indices),
        copies: of(0, index_copy, runs.indices64),
    }

    def check() -> None:
        want = outcome(sides[copies], slots[0]).lists[0].weights
        for name in (ours, each):
            assert_same_bits(name, outcome(sides[name], slots[0]).lists[0].weights, want)
        assert not torch.equal(want[0], runs.weights[0])
        check_replacing(
            {"scatter_apply": Side(apply, 0), "index_copy_": Side(index_copy, 0)}, ["scatter_apply"], single
        )

    compare(
        sides,
        ours=ours,
        baselines=[singles, copies],
        slots=slots,
        check=check,
        place=place,
        group="Aligned runs (4096 x 4096, 2 %, cold)",
        label=f"{place}, {dtype}, runs of {granularity}",
        info={**list_facts(runs, dtype, density), "granularity": granularity},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("place", [Place("cuda")], ids=str, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_model(compare: Callable[..., None], place: Place, dtype: str) -> None:
    compare_model(compare, place, dtype, LLAMA_7B_PART, "Switch a model (4 layers of a 7B Llama, 2 %, cold)")
