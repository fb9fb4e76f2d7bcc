"""Figure 7 of the paper: overwriting 2 % of one square weight against fusing LoRA into it, over the weight's size.

The figure says neither density nor rank: 2 % and rank 64 are those of the paper's vision models. As there, ten random
weights take turns, or more where ten would stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness.compare import Place, Side, assert_same_bits
from harness.rotation import Slot, make_rotation
from harness.scatter import (
    LORA_ADDMM,
    LORA_MATMUL,
    RANK,
    apply,
    facts,
    lora_addmm,
    lora_bytes,
    lora_matmul_add,
    outcome,
    scatter,
    sparse_bytes,
)

DENSITY, WEIGHTS = 0.02, 10


def check(sides: dict[str, Side], slot: Slot) -> None:
    """Both scatters leave the same bits, and those are other ones; both ways to fuse LoRA agree up to rounding."""
    ours, torchs, fused, summed = (
        outcome(sides[name], slot).weights[0] for name in ("scatter_apply", "scatter_", LORA_ADDMM, LORA_MATMUL)
    )
    assert not torch.equal(ours, slot.weights[0])
    assert_same_bits("scatter_apply", [ours], [torchs])
    assert not torch.equal(fused, slot.weights[0])
    torch.testing.assert_close(fused, summed)


@pytest.mark.parametrize("dim", [512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dimension(compare: Callable[..., None], place: Place, dtype: str, dim: int) -> None:
    slots = make_rotation(
        [(dim, dim)], getattr(torch, dtype), place.device, density=DENSITY, rank=RANK, at_least=WEIGHTS
    )
    slot = slots[0]
    sides = {
        "scatter_apply": Side(apply, sparse_bytes(slot, slot.indices)),
        "scatter_": Side(scatter, sparse_bytes(slot, slot.indices64)),
        LORA_ADDMM: Side(lora_addmm, lora_bytes(slot, passes=2)),
        LORA_MATMUL: Side(lora_matmul_add, lora_bytes(slot, passes=4)),
    }
    compare(
        sides,
        ours="scatter_apply",
        baselines=["scatter_", LORA_ADDMM, LORA_MATMUL],
        slots=slots,
        check=lambda: check(sides, slot),
        place=place,
        group="Switch one weight over its size (Figure 7, 2 %, cold)",
        label=f"{place}, {dtype}, {dim} x {dim}",
        info={**facts(slots, dtype, DENSITY), "sweep": "dim", "dim": dim},
    )
