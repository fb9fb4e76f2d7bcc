"""masked_adamw against what trainers do without it: torch's fused AdamW on the compact vector and a write-back, and
masking the dense gradient before a dense fused AdamW step.

Random sorted unique indices, int32 for ours and int64 for index_copy_. Weights, entries, gradients and moments are all
rotated, so every side meets all of its inputs cold. Masters are float32; the weights get them rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from harness.compare import Place, Side
from harness.rotation import Slot, make_rotation, touched_bytes
from harness.scatter import SHAPE, SMALL_LLAMA, facts, forced_backends

OP = "masked_adamw"
masked_adamw = torch.ops.shira.masked_adamw
DTYPES = ["float32", "bfloat16"]
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
SLOTS_DENSE = 10  # each holds five tensors of the weight's size, which a step touches: more than a cache
COMPACT, MASKED = "fused AdamW on the vector, index_copy_", "gradient masked, dense fused AdamW"


@dataclass(frozen=True)
class Training:
    """A slot of the rotation, its masters, moments and gradient; for the dense way a gradient, moments and a mask."""

    slot: Slot
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grads: list[torch.Tensor]
    grad: torch.Tensor
    step: torch.Tensor
    dense_grad: torch.Tensor | None = None
    dense_exp_avg: torch.Tensor | None = None
    dense_exp_avg_sq: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def copy(self) -> Training:
        own = {f.name: v.clone() for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return replace(self, slot=self.slot.copy(), **own)

    def entries(self) -> torch.Tensor:
        return torch.cat([part.flat[part.indices64] for part in self.slot.parts])


def training(slot: Slot, device: str, dense: bool) -> Training:
    nnz = slot.indices.numel()
    grad = torch.randn(nnz, device=device)
    common = {
        "slot": slot,
        "master": torch.cat([part.flat[part.indices64] for part in slot.parts]).float(),
        "exp_avg": torch.zeros(nnz, device=device),
        "exp_avg_sq": torch.zeros(nnz, device=device),
        "grads": list(grad.split([part.indices.numel() for part in slot.parts])),
        "grad": grad,
        "step": torch.ones((), device=device),
    }
    if not dense:
        return Training(**common)
    weight = slot.weights[0]
    mask = torch.zeros_like(weight)
    mask.view(-1)[slot.indices64] = 1
    return Training(
        **common,
        dense_grad=torch.randn(weight.shape, device=device).to(weight.dtype),
        dense_exp_avg=torch.zeros_like(weight),
        dense_exp_avg_sq=torch.zeros_like(weight),
        mask=mask,
    )


def ours(t: Training, op: Callable[..., None] = masked_adamw) -> None:
    s, numbers = t.slot, (LR, BETA1, BETA2, EPS, DECAY)
    op(s.weights, s.offsets, s.indices, t.grads, t.exp_avg, t.exp_avg_sq, t.master, t.step, *numbers)


def ours_dense(t: Training, op: Callable[..., None] = masked_adamw) -> None:
    s, numbers = t.slot, (LR, BETA1, BETA2, EPS, DECAY)
    op(s.weights, s.offsets, s.indices, [t.dense_grad], t.exp_avg, t.exp_avg_sq, t.master, t.step, *numbers)


def fused(parameter: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: torch.Tensor) -> None:
    numbers = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY, "eps": EPS}
    torch._fused_adamw_([parameter], [grad], [m], [v], [], [step], amsgrad=False, maximize=False, **numbers)


def fused_and_write(t: Training) -> None:
    fused(t.master, t.grad, t.exp_avg, t.exp_avg_sq, t.step)
    values = t.master.to(t.slot.weights[0].dtype)
    borders = t.slot.offsets.tolist()
    for part, begin, end in zip(t.slot.parts, borders[:-1], borders[1:], strict=True):
        part.flat.index_copy_(0, part.indices64, values[begin:end])


def masked_and_dense(t: Training) -> None:
    # The decay of the entries that are not listed is left in: this is the plain way, and stopping it would cost more.
    fused(t.slot.weights[0], t.dense_grad.mul_(t.mask), t.dense_exp_avg, t.dense_exp_avg_sq, t.step)


def moved_bytes(t: Training, indices: torch.Tensor) -> int:
    """Bytes of one call: it reads and writes touched lines, masters and moments, and reads indices and gradients."""
    arenas = 2 * (t.master.nbytes + t.exp_avg.nbytes + t.exp_avg_sq.nbytes)
    return 2 * touched_bytes(t.slot) + arenas + t.grad.nbytes + indices.nbytes


def outcome(run: Callable[[Training], object], t: Training) -> Training:
    result = t.copy()
    run(result)
    return result


def assert_same(got: Training, want: Training) -> None:
    """Results agree with torch to rounding, since torch contracts an operation; weights are the rounded masters."""
    torch.testing.assert_close(got.master, want.master, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got.exp_avg, want.exp_avg, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got.exp_avg_sq, want.exp_avg_sq, rtol=1e-6, atol=1e-12)
    for result in (got, want):
        assert torch.equal(result.entries(), result.master.to(result.slot.weights[0].dtype))
    assert not torch.equal(got.master, got.exp_avg)


def case(compare: Callable[..., None], place: Place, dtype: str, shapes: list[tuple[int, int]], group: str) -> None:
    slots = make_rotation(shapes, getattr(torch, dtype), place.device, density=0.02)
    trainings = [training(slot, place.device, dense=False) for slot in slots]
    t = trainings[0]
    side = Side(ours, moved_bytes(t, t.slot.indices))
    sides = {
        OP: side,
        **forced_backends(place, OP, ours, side.bytes_moved),
        COMPACT: Side(fused_and_write, moved_bytes(t, t.slot.indices64)),
    }

    def check() -> None:
        want = outcome(fused_and_write, t)
        assert not torch.equal(want.master, t.master)
        for name, side in sides.items():
            if name != COMPACT:
                assert_same(outcome(side.run, t), want)

    compare(
        sides,
        ours=OP,
        baselines=[COMPACT],
        slots=trainings,
        check=check,
        place=place,
        group=group,
        label=f"{place}, {dtype}",
        info=facts(slots, dtype, 0.02),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight(compare: Callable[..., None], place: Place, dtype: str) -> None:
    case(compare, place, dtype, [SHAPE], "A step of one weight (4096 x 4096, 2 %, cold)")


@pytest.mark.parametrize("dtype", DTYPES)
def test_model(compare: Callable[..., None], place: Place, dtype: str) -> None:
    case(compare, place, dtype, SMALL_LLAMA, "A step of a model (4 Llama layers, hidden 1024, 2 %, cold)")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_gradient(compare: Callable[..., None], place: Place, dtype: str) -> None:
    """A dense gradient: read at the entries, against masking it and stepping all weights with dense moments."""
    slots = make_rotation([SHAPE], getattr(torch, dtype), place.device, density=0.02)[:SLOTS_DENSE]
    trainings: list[Any] = [training(slot, place.device, dense=True) for slot in slots]
    t = trainings[0]
    weight, touched = t.slot.weights[0], touched_bytes(t.slot)
    side = Side(ours_dense, moved_bytes(t, t.slot.indices) - t.grad.nbytes + touched)
    sides = {
        OP: side,
        **forced_backends(place, OP, ours_dense, side.bytes_moved),
        MASKED: Side(masked_and_dense, 11 * weight.nbytes),
    }

    def check() -> None:
        """On the listed entries alone: the dense step lets others decay."""
        copy = replace(t.copy(), grad=t.dense_grad.view(-1)[t.slot.indices64].float())
        fused_and_write(copy)
        assert_same(outcome(ours_dense, t), copy)
        dense = outcome(masked_and_dense, t)
        torch.testing.assert_close(dense.entries(), copy.entries())

    compare(
        sides,
        ours=OP,
        baselines=[MASKED],
        slots=trainings,
        check=check,
        place=place,
        group="A step with a dense gradient (4096 x 4096, 2 %, cold)",
        label=f"{place}, {dtype}",
        info=facts(slots, dtype, 0.02),
    )
