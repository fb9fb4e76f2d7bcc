"""masked_grad against the dense gradient and a gather of its entries.

Random entries, sorted and unique; operands are rotated, so that every side meets them cold. The work is products, not
bytes: the share of the byte bound is small, and only says that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from harness.compare import Place, Side
from harness.rotation import cold_slots, random_indices

SHAPES = [(1024, 1024), (4096, 4096), (4096, 11008)]
DENSE = "dense gradient, gather"
MAX_SLOTS = 8


@dataclass(frozen=True)
class Slot:
    """Operands [tokens, out] and [tokens, in] of one layer, and its entries as CSR and as flat positions."""

    grad_output: torch.Tensor
    x: torch.Tensor
    row_ptr: torch.Tensor
    col: torch.Tensor
    indices: torch.Tensor


def make_slots(shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: str, density: float) -> list[Slot]:
    rows, columns = shape
    generator = torch.Generator(device).manual_seed(0)
    operand_bytes = tokens * (rows + columns) * dtype.itemsize
    count = min(MAX_SLOTS, cold_slots(device, operand_bytes))
    slots = []
    for _ in range(count):
        indices = random_indices(rows * columns, round(density * rows * columns), generator)
        row_ptr = torch.searchsorted(indices, torch.arange(rows + 1, device=device) * columns)
        slots.append(
            Slot(
                torch.randn(tokens, rows, generator=generator, device=device).to(dtype),
                torch.randn(tokens, columns, generator=generator, device=device).to(dtype),
                row_ptr.int(),
                (indices % columns).to(torch.uint16),
                indices,
            )
        )
    return slots


def sampled(slot: Slot) -> torch.Tensor:
    return torch.ops.shira.masked_grad(slot.grad_output, slot.x, slot.row_ptr, slot.col)


def dense(slot: Slot) -> torch.Tensor:
    return (slot.grad_output.t() @ slot.x).view(-1)[slot.indices]


def check(slot: Slot) -> None:
    ours, theirs = sampled(slot), dense(slot)
    # Both are sums in float32, in another order; the dense gradient is then rounded to its dtype.
    atol = 2 * torch.finfo(torch.float32).eps * len(slot.x)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2 * torch.finfo(theirs.dtype).eps, atol=atol)
    assert ours.abs().max() > 1


@pytest.mark.parametrize("density", [0.02, 0.01])
@pytest.mark.parametrize("tokens", [512, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_grad(
    compare: Callable[..., None], place: Place, dtype: str, shape: tuple[int, int], tokens: int, density: float
) -> None:
    slots = make_slots(shape, tokens, getattr(torch, dtype), place.device, density)
    slot = slots[0]
    operands = slot.grad_output.nbytes + slot.x.nbytes
    nnz = slot.col.numel()
    sides = {
        "masked_grad": Side(sampled, operands + slot.col.nbytes + slot.row_ptr.nbytes + 4 * nnz),
        DENSE: Side(dense, operands + slot.indices.nbytes + slot.x.element_size() * (math.prod(shape) + nnz)),
    }
    compare(
        sides,
        ours="masked_grad",
        baselines=[DENSE],
        slots=slots,
        check=lambda: check(slot),
        place=place,
        group=f"Gradient at the entries, {dtype}",
        label=f"{place}, {shape[0]} x {shape[1]}, {tokens} tokens, {density:.0%}",
        info={"dtype": dtype, "nnz": nnz, "density": density, "tokens": tokens},
    )
