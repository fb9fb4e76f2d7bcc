"""Ways to write sparse entries, or LoRA's product, into the weights of a slot, and the bytes that each moves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.architectures import llama_shapes
from harness.compare import Place, Side
from harness.rotation import SharedSlot, Slot, expected_touched_bytes, touched_bytes

from shira_kernels import backends

scatter_apply = torch.ops.shira.scatter_apply
scatter_apply_batched = torch.ops.shira.scatter_apply_batched
scatter_switch_batched = torch.ops.shira.scatter_switch_batched

SHAPE = (4096, 4096)
RANK = 64
LORA_ADDMM, LORA_MATMUL = f"LoRA addmm_, rank {RANK}", f"LoRA W += B @ A, rank {RANK}"
# [out, in] of all layers
SMALL_LLAMA = list(llama_shapes(1024, 2816, layers=4).values())
LLAMA_7B_PART = list(llama_shapes(4096, 11008, layers=4).values())


def apply(slot: Slot, op: Callable[..., None] = scatter_apply) -> None:
    for part in slot.parts:
        op(part.weight, part.indices, part.values)


def apply_batched(slot: Slot, op: Callable[..., None] = scatter_apply_batched) -> None:
    op(slot.weights, slot.offsets, slot.indices, slot.values)


def index_copy(slot: Slot) -> None:
    for part in slot.parts:
        part.flat.index_copy_(0, part.indices64, part.values)


# From the adapter of a shared slot's first list to that of the second; what the first saved is any numbers, its values.
def switch(slot: SharedSlot, op: Callable[..., None] = scatter_switch_batched) -> None:
    old, new = slot.lists
    op(old.weights, old.offsets, old.indices, old.values, new.offsets, new.indices, new.values, new.saved)


def switch_by_index_copy(slot: SharedSlot) -> None:
    # The old entries are not kept: left out, in favour of the baseline.
    for entries in slot.lists:
        index_copy(entries)


def scatter(slot: Slot) -> None:
    for part in slot.parts:
        part.flat.scatter_(0, part.indices64, part.values)


def lora_addmm(slot: Slot) -> None:
    for weight, (b, a) in zip(slot.weights, slot.lora, strict=True):
        weight.addmm_(b, a)


def lora_matmul_add(slot: Slot) -> None:
    # PEFT also multiplies the product by its scaling: left out, in favour of the baseline.
    for weight, (b, a) in zip(slot.weights, slot.lora, strict=True):
        weight += b @ a


def sparse_bytes(slot: Slot, *vectors: torch.Tensor) -> int:
    """Bytes of one call: each touched line read and written, the values read, each of `vectors` read or written."""
    return 2 * touched_bytes(slot) + slot.values.nbytes + sum(vector.nbytes for vector in vectors)


def lora_bytes(slot: Slot, passes: int) -> int:
    """Bytes of fusing LoRA: `passes` over the whole weights, and the factors."""
    return passes * sum(weight.nbytes for weight in slot.weights) + sum(b.nbytes + a.nbytes for b, a in slot.lora)


def list_facts(slot: Slot, dtype: str, density: float) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "nnz": slot.indices.numel(),
        "density": density,
        "weights": len(slot.weights),
        "weight_bytes": sum(weight.nbytes for weight in slot.weights),
        "touched_bytes": touched_bytes(slot),
    }


def facts(slots: list[Slot], dtype: str, density: float) -> dict[str, Any]:
    return {**list_facts(slots[0], dtype, density), "expected_touched_bytes": expected_touched_bytes(slots[0])}


def forced_backends(place: Place, op: str, run: Callable[..., None], bytes_moved: int) -> dict[str, Side]:
    """On a GPU, a side for each backend that can run the op there; elsewhere none."""
    forced = {}
    for backend in ("triton", "cuda") if place.device == "cuda" else ():
        try:
            kernel = backends.kernel(op, backend)
        except RuntimeError:
            continue
        forced[f"{op} ({backend})"] = Side(partial(run, op=kernel), bytes_moved)
    return forced


def outcome(side: Side, slot: Any) -> Any:
    """A copy of the slot after one call."""
    result = slot.copy()
    with side.context():
        side.run(result)
    return result
