"""One adapter beside the base product: what add_sparse_delta_mm adds to the time of `F.linear`, and what others add.

Layers are rotated, so that every side meets weights and entries cold; inputs and outputs are warm, as in a model. All
sides hold equally many numbers: 1 % random entries, LoRA factors of the rank that comes closest from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from harness.compare import Place, Side
from harness.machine import cache_bytes
from harness.rotation import CACHE_TURNS, random_indices
from torch.nn import functional

DENSITY = 0.01
TOKENS = (1, 8, 128, 512, 2048)
MOST_TOKENS_OF_A_WIDE_LAYER = 512  # of more, the base product takes seconds
MOST_TOKENS_OF_COO = 128  # with more it takes more than ten times as long as the base product
BASE = "base alone"
OURS = "base, add_sparse_delta_mm"
LORA = "base, LoRA"
PEFT = "PEFT SHiRA"
CSR = "base, torch.sparse CSR"
COO = "base, torch.sparse COO"


@dataclass(frozen=True)
class Layer:
    """A weight [out, in], a sparse delta of it as each side takes it, and LoRA factors B [out, r] and A [r, in]."""

    weight: torch.Tensor
    row_ptr: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor  # int32 [2, nnz], as PEFT has them
    csr: torch.Tensor
    coo: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Slot:
    layer: Layer
    x: torch.Tensor


@lru_cache(maxsize=1)  # one layer's cases follow each other
def make_layers(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Layer]:
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    nnz = round(DENSITY * rows * columns)
    rank = nnz // (rows + columns)
    layers = []
    for _ in range(1 + math.ceil(CACHE_TURNS * cache_bytes(device) / (rows * columns * dtype.itemsize))):
        indices = random_indices(rows * columns, nnz, generator)
        row_ptr = torch.searchsorted(indices, torch.arange(rows + 1) * columns).int().to(device)
        row, col = indices // columns, (indices % columns).to(device)
        values = torch.randn(nnz, generator=generator).mul_(0.02).to(device, dtype)
        positions = torch.stack([row.to(device), col])
        b, a = (
            torch.randn(size, generator=generator).mul_(0.02).to(device, dtype)
            for size in ((rows, rank), (rank, columns))
        )
        layers.append(
            Layer(
                torch.randn(shape, generator=generator).mul_(0.02).to(device, dtype),
                row_ptr,
                col.to(torch.uint16),
                values,
                positions.int(),
                torch.sparse_csr_tensor(row_ptr, col.int(), values, shape),
                torch.sparse_coo_tensor(positions, values, shape, is_coalesced=True),
                (b, a),
            )
        )
    return layers


def base(slot: Slot) -> torch.Tensor:
    return functional.linear(slot.x, slot.layer.weight)


def ours(slot: Slot) -> torch.Tensor:
    out = base(slot)
    torch.ops.shira.add_sparse_delta_mm(out, slot.x, slot.layer.row_ptr, slot.layer.col, slot.layer.values)
    return out


def lora(slot: Slot) -> torch.Tensor:
    b, a = slot.layer.factors
    return base(slot).addmm_(slot.x @ a.t(), b.t())


def peft(slot: Slot) -> torch.Tensor:
    """What `peft.tuners.shira.layer.Linear.forward` does, without the module around it."""
    layer = slot.layer
    weight = layer.weight.clone()
    weight += torch.sparse_coo_tensor(layer.positions, layer.values * 1.0, weight.shape)
    return functional.linear(slot.x, weight)


def sparse_csr(slot: Slot) -> torch.Tensor:
    return base(slot).add_(torch.sparse.mm(slot.layer.csr, slot.x.t()).t())


def sparse_coo(slot: Slot) -> torch.Tensor:
    return base(slot).add_(torch.sparse.mm(slot.layer.coo, slot.x.t()).t())


def check(slot: Slot, sides: list[Callable[[Slot], torch.Tensor]]) -> None:
    """All but LoRA: what they add to the base product is the delta's product, but for roundings of the dtype."""
    layer, x = slot.layer, slot.x.float()
    dense = torch.zeros(layer.weight.shape, device=x.device).index_put_(
        tuple(layer.positions.long()), layer.values.float()
    )
    product, delta = x @ layer.weight.float().t(), x @ dense.t()
    for side in sides:
        error = side(slot).float() - product - delta
        assert error.norm() < (1e-4 if slot.x.dtype == torch.float32 else 0.1) * delta.norm(), side.__name__


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 11008), (11008, 4096)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
def test_one_adapter(
    compare: Callable[..., None], place: Place, shape: tuple[int, int], dtype: str, tokens: int
) -> None:
    if tokens > MOST_TOKENS_OF_A_WIDE_LAYER and max(shape) > 4096 and place.device == "cpu":
        pytest.skip(f"more than {MOST_TOKENS_OF_A_WIDE_LAYER} tokens of a wide layer take seconds a product")
    layers = make_layers(shape, getattr(torch, dtype), place.device)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(
        place.device, getattr(torch, dtype)
    )
    slots = [Slot(layer, x) for layer in layers]
    layer = layers[0]
    product = layer.weight.nbytes + x.nbytes + tokens * shape[0] * x.element_size()
    entries = layer.row_ptr.nbytes + layer.col.nbytes + layer.values.nbytes
    sides = {
        BASE: Side(base, product),
        OURS: Side(ours, product + entries),
        LORA: Side(lora, product + sum(factor.nbytes for factor in layer.factors)),
        PEFT: Side(peft, product + 2 * layer.weight.nbytes + layer.positions.nbytes + layer.values.nbytes),
    }
    exact = [ours, peft]
    if tokens <= MOST_TOKENS_OF_COO:
        sides[COO] = Side(sparse_coo, product + 2 * layer.positions.nbytes + layer.values.nbytes)
        exact.append(sparse_coo)
    if dtype == "float32":  # there is no product of CSR and bfloat16 on the CPU
        sides[CSR] = Side(sparse_csr, product + 4 * layer.col.numel() + layer.row_ptr.nbytes + layer.values.nbytes)
        exact.append(sparse_csr)
    with torch.no_grad():
        compare(
            sides,
            ours=OURS,
            baselines=[name for name in sides if name not in (BASE, OURS)],
            slots=slots,
            check=lambda: check(slots[0], exact),
            place=place,
            group=f"One adapter beside the base product, {dtype}",
            label=f"{place}, {shape[0]} x {shape[1]}, {tokens} token{'s' if tokens > 1 else ''}",
            info={"dtype": dtype, "nnz": layer.col.numel(), "density": DENSITY, "tokens": tokens, "floor": BASE},
        )
