"""fuse_adapters against adding dense deltas.

"dense add_" is what one does without this op: the deltas are dense tensors in the dtype of the values, made beforehand,
and are added with their weights into dense float32 zeros. "index_add_, nonzero" adds the entries into dense float32
zeros and then looks for what is not zero, which gives the indices back. Both leave float32 sums; ours rounds its result
to the dtype of the values. The dense sum stays dense: where indices are wanted that side does less than ours. torch
adds bfloat16 into float32 slowly; so there is also a dense sum in bfloat16, rounded after each addition: not the same
result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness.compare import Place, Side
from harness.rotation import cold_slots, random_indices

from shira_kernels import backends

SHAPE = (4096, 11008)
NUMEL = math.prod(SHAPE)
STRENGTHS = [0.7, 0.3, 0.5, -0.25]
DENSE, INDEXED = "dense add_", "index_add_, nonzero"
ROUNDED = "dense add_, rounded each time"


@dataclass(frozen=True)
class Slot:
    """Four adapters of one weight; `dense` is shared by all slots, since it is larger than any cache."""

    indices: list[torch.Tensor]
    indices64: list[torch.Tensor]
    values: list[torch.Tensor]
    weights: torch.Tensor
    dense: list[torch.Tensor]


def make_slots(dtype: torch.dtype, device: str, density: float, numel: int = NUMEL) -> list[Slot]:
    generator = torch.Generator(device).manual_seed(0)
    nnz = round(density * numel)
    bytes_of_a_slot = len(STRENGTHS) * nnz * (4 + dtype.itemsize)
    slots: list[Slot] = []
    for _ in range(cold_slots(device, bytes_of_a_slot)):
        indices64 = [random_indices(numel, nnz, generator) for _ in STRENGTHS]
        values = [torch.randn(nnz, generator=generator, device=device).to(dtype) for _ in STRENGTHS]
        dense = slots[0].dense if slots else [
            torch.zeros(numel, dtype=dtype, device=device).index_copy_(0, *pair)
            for pair in zip(indices64, values, strict=True)
        ]  # fmt: skip
        indices = [positions.int() for positions in indices64]
        slots.append(Slot(indices, indices64, values, torch.tensor(STRENGTHS, device=device), dense))
    return slots


def fused(slot: Slot, policy: str = "sum") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.shira.fuse_adapters(slot.indices, slot.values, slot.weights, policy)


def dense_sum(slot: Slot, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    total = torch.zeros_like(slot.dense[0], dtype=dtype)
    for delta, strength in zip(slot.dense, STRENGTHS, strict=True):
        total.add_(delta, alpha=strength)
    return total


def indexed_sum(slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros_like(slot.dense[0], dtype=torch.float32)
    for positions, values, strength in zip(slot.indices64, slot.values, STRENGTHS, strict=True):
        total.index_add_(0, positions, values.float(), alpha=strength)
    union = total.nonzero().view(-1)
    return union, total[union]


def check(slot: Slot) -> None:
    """Asserts that the sums agree, but for torch's contracted operations and our last rounding."""
    union, values = fused(slot)
    total = dense_sum(slot)
    rounding = torch.finfo(values.dtype).eps
    torch.testing.assert_close(values.float(), total[union.long()], rtol=rounding, atol=1e-6)
    assert torch.equal(union.long(), torch.cat(slot.indices64).unique())
    total[union.long()] = 0
    assert not total.any()
    torch.testing.assert_close(indexed_sum(slot)[1], dense_sum(slot)[indexed_sum(slot)[0]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.01, 0.001])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fuse(compare: Callable[..., None], place: Place, dtype: str, density: float) -> None:
    slots = make_slots(getattr(torch, dtype), place.device, density)
    first = slots[0]
    read = sum(tensor.nbytes for tensor in (*first.indices, *first.values))
    union, values = fused(first)
    moved = read + union.nbytes + values.nbytes
    dense_bytes = sum(delta.nbytes for delta in first.dense) + (2 * len(STRENGTHS) + 1) * 4 * NUMEL
    sides = {
        "fuse_adapters": Side(fused, moved),
        **{f"policy {policy}": Side(partial(fused, policy=policy), moved) for policy in ("mean", "last", "ties")},
        DENSE: Side(dense_sum, dense_bytes),
        INDEXED: Side(indexed_sum, read + 3 * 4 * NUMEL),
    }
    baselines = [DENSE, INDEXED]
    if dtype != "float32":
        narrow = getattr(torch, dtype)
        sides[ROUNDED] = Side(partial(dense_sum, dtype=narrow), (3 * len(STRENGTHS) + 1) * narrow.itemsize * NUMEL)
        baselines.append(ROUNDED)
    if place.device == "cpu" and backends.extension is not None:
        for isa in ("base", "avx2"):
            if isa in backends.extension.runnable_isas():
                sides[f"fuse_adapters, {isa}"] = Side(fused, moved, partial(backends.use, "cpu", isa))
    compare(
        sides,
        ours="fuse_adapters",
        baselines=baselines,
        slots=slots,
        check=lambda: check(first),
        place=place,
        group=f"Fuse {len(STRENGTHS)} adapters of one weight, {SHAPE[0]} x {SHAPE[1]}",
        label=f"{place}, {dtype}, {density:.1%}",
        info={"dtype": dtype, "density": density, "nnz": sum(map(len, first.indices))},
    )
