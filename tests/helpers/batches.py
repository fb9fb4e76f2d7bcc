"""Banks of random adapters over small models, batches beside what each row gives alone, and what a batch must leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import shira
from shira.adapter import checksum_of

Row = Any  # a name, strengths by name, or None
# Logits of a batch beside those of each row fused, as a share of the largest logit. float32: the same sum in another
# order, in a few layers. In bfloat16 rows are compared with a float32 model: see `test_bfloat16_rounds_a_little_more`.
FLOAT32_SHARE = 1e-5


def projections(model: nn.Module) -> list[str]:
    """Weights of linear layers that share theirs with none."""
    return [n for n, p in model.named_parameters() if p.dim() == 2 and not any(k in n for k in ("wte", "wpe", "embed"))]


def make(
    model: nn.Module,
    seed: int,
    names: list[str] | None = None,
    density: float = 0.15,
    kind: str = "replace",
    std: float = 0.3,
) -> shira.Adapter:
    """An adapter of random entries for a model that holds its base."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, name in enumerate(projections(model) if names is None else names):
        weight = model.get_parameter(name).detach()
        nnz = max(1, int(weight.numel() * density))
        indices = torch.randperm(weight.numel(), generator=generator)[:nnz].sort().values
        indices = indices.int() if i % 2 else indices
        base = weight.reshape(-1)[indices.long()]
        change = (torch.randn(nnz, generator=generator) * std).to(weight.dtype)
        values = change if kind == "add" else base + change
        tensors[name] = shira.AdapterTensor(indices, values, tuple(weight.shape), weight.dtype, kind, checksum_of(base))
    return shira.Adapter(tensors)


def alone(bank: shira.ResidentAdapters, rows: list[Row], run: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    """What `run(i)` gives for each row with its adapter fused."""
    results = []
    for i, row in enumerate(rows):
        with bank.using(row), torch.no_grad():
            results.append(run(i))
    return results


def close(got: torch.Tensor, want: torch.Tensor, share: float = FLOAT32_SHARE) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.abs().max()))


def shape_of(model: nn.Module) -> list[Any]:
    """What must not change: modules, their classes, attributes and hooks, and the bits of the weights."""
    return [
        (name, module, type(module), {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")})
        for name, module in model.named_modules()
    ]


def weight_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    before, weights = shape_of(model), weight_bits(model)
    yield
    assert str(shape_of(model)) == str(before)
    assert all(torch.equal(bits, weights[name]) for name, bits in weight_bits(model).items())
    assert not any(hasattr(p, "_shira_owner") for p in model.parameters())


class Small(nn.Module):
    """Layers of all kinds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(12, 20, dtype=dtype)
        self.twin = nn.Linear(12, 20, bias=False, dtype=dtype)
        self.twin.weight = self.first.weight
        self.second = Conv1D(7, 20).to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x) + self.twin(x)))


NAMES = ["first.weight", "second.weight"]


def small_bank(model: nn.Module, count: int = 3, **options: Any) -> shira.ResidentAdapters:
    bank = shira.ResidentAdapters(model, **options)
    for i in range(count):
        bank.add(f"a{i}", make(model, i, NAMES[: 1 + i % 2], kind=("replace", "add")[i % 3 == 1]))
    return bank


def check_rows(bank: shira.ResidentAdapters, model: nn.Module, rows: list[Row], x: torch.Tensor) -> None:
    want = torch.cat(alone(bank, rows, lambda i: model(x[i : i + 1])))
    with left_alone(model), torch.no_grad(), bank.batch(rows, mode="unfused"):
        close(model(x), want)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def in_another_thread(action: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


def enter(context: Any) -> None:
    with context:
        pass


def in_use(bank: shira.ResidentAdapters) -> int:
    """Bytes of all tensors that unfused adapters have on the device."""
    found = bank._batches.pages
    tensors = [t for pool in found.pools.values() for t in (pool.col, pool.values)]
    tensors += [t for table in found.tables.values() for t in (table.row_ptr, table.page_table)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def check_pages(bank: shira.ResidentAdapters) -> None:
    """Every page and slot has one owner or is free."""
    found = bank._batches.pages
    slots = [slot.number for slot in found.residents.values()] + found._free_slots
    assert sorted(slots) == list(range(len(slots)))
    for key, pool in found.pools.items():
        owned = [page for slot in found.residents.values() for page in slot.pages.get(key, [])]
        assert sorted(owned + pool.free) == list(range(pool.col.shape[0]))
    assert bank.stats.unfused_bytes == in_use(bank)
    assert found.budget is None or in_use(bank) <= found.budget
