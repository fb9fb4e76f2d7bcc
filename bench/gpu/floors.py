"""The cases that a short time on a GPU is spent on, by value, and the floor of each: figures.py times them.

The floor is the time in which an H100 moves the bytes that no kernel can leave out, at 3.0 TB/s (bytes read plus bytes
written), or does the products that are counted, whichever is longer. Of a weight each 32-byte sector with a listed
entry is read and written once; at density d and n entries a sector, 1 - (1 - d)^n of all sectors are touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import (
    bench_extract_changed,
    bench_fuse_adapters,
    bench_masked_adamw,
    bench_masked_grad,
    bench_topk_indices,
)
from harness import scatter as ways
from harness.compare import assert_same_bits
from harness.rotation import cold_slots, make_rotation, make_shared_rotation, random_indices
from torch.nn import functional

BYTES_PER_SECOND = 3.0e12  # a copy on an H100, read plus written
TENSOR_CORES = 800e12  # FLOP/s of a large bfloat16 product on an H100
FLOAT32 = 67e12  # FLOP/s of float32 without TF32, by the data sheet
SECTOR = 32  # bytes
BF16, F32 = torch.bfloat16, torch.float32

Shape = tuple[int, int]
Op = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """A case's inputs and sides.

    `run` calls our op, given as a callable, once on a slot; `check` asserts that the op computes what the baselines
    compute, through torch.ops, so that `backends.use` decides on which backend.
    """

    run: Callable[[Op, Any], object]
    baselines: dict[str, Callable[[Any], object]]
    slots: Sequence[Any]
    check: Callable[[], None]


@dataclass(frozen=True)
class Case:
    """`bytes_moved` and `flop` are what no kernel can leave out; `make` makes the inputs on a device."""

    op: str
    name: str
    bytes_moved: float
    make: Callable[[str], Job]
    flop: float = 0.0
    flop_per_second: float = TENSOR_CORES

    @property
    def floor_us(self) -> float:
        return max(self.bytes_moved / BYTES_PER_SECOND, self.flop / self.flop_per_second) * 1e6

    @property
    def counted(self) -> str:
        """What the floor is made of."""
        if self.flop / self.flop_per_second > self.bytes_moved / BYTES_PER_SECOND:
            return f"{self.flop / 1e9:.0f} GFLOP"
        return f"{self.bytes_moved / 1e6:.1f} MB"


@dataclass(frozen=True)
class Sizes:
    """The shapes and counts of all cases."""

    square: Shape = (4096, 4096)
    wide: Shape = (4096, 11008)
    model: tuple[Shape, ...] = tuple(ways.SMALL_LLAMA)
    large: tuple[Shape, ...] = tuple(ways.LLAMA_7B_PART)
    scores: int = bench_topk_indices.NUMEL
    tokens: int = 4096  # of a training step
    prefill: int = 2048
    batch: int = 512


TINY = Sizes((64, 96), (96, 64), ((64, 96), (32, 48)), ((64, 96),) * 3, 5000, 48, 40, 24)


def touched(shapes: Sequence[Shape], density: float, itemsize: int) -> float:
    """Bytes of the sectors that hold a listed entry, read and written."""
    share = 1 - (1 - density) ** (SECTOR // itemsize)
    return 2 * share * sum(map(math.prod, shapes)) * itemsize


def count(shapes: Sequence[Shape], density: float) -> int:
    return sum(round(density * math.prod(shape)) for shape in shapes)


def scatter(name: str, shape: Shape, dtype: torch.dtype, keep: bool) -> Case:
    nnz = count([shape], 0.02)
    moved = touched([shape], 0.02, dtype.itemsize) + nnz * (4 + dtype.itemsize * (2 if keep else 1))

    def run(op: Op, slot: Any) -> None:
        part = slot.parts[0]
        op(part.weight, part.indices, part.values, 1.0, False, slot.saved if keep else None)

    def make(device: str) -> Job:
        slots = make_rotation([shape], dtype, device, density=0.02)
        slot = slots[0]
        baselines = {"index_copy_": ways.index_copy, "scatter_": ways.scatter}

        def check() -> None:
            got, want = slot.copy(), slot.copy()
            run(torch.ops.shira.scatter_apply, got)
            ways.index_copy(want)
            assert_same_bits("scatter_apply", got.weights, want.weights)
            assert not torch.equal(want.weights[0], slot.weights[0])
            if keep:
                assert_same_bits("saved", [got.saved], [slot.parts[0].flat[slot.indices64]])

        return Job(run, baselines, slots, check)

    return Case("scatter_apply", name, moved, make)


def batched_scatter(name: str, shapes: Sequence[Shape]) -> Case:
    moved = touched(shapes, 0.02, 2) + count(shapes, 0.02) * 6

    def make(device: str) -> Job:
        slots = make_rotation(shapes, BF16, device, density=0.02)

        def check() -> None:
            got, want = slots[0].copy(), slots[0].copy()
            ways.apply_batched(got)
            ways.index_copy(want)
            assert_same_bits("scatter_apply_batched", got.weights, want.weights)

        baselines = {f"{len(shapes)} x index_copy_": ways.index_copy}
        return Job(lambda op, slot: ways.apply_batched(slot, op), baselines, slots, check)

    return Case("scatter_apply_batched", name, moved, make)


def switch(name: str, shapes: Sequence[Shape]) -> Case:
    density = 0.01
    moved = touched(shapes, 1 - (1 - density) ** 2, 2) + count(shapes, density) * 14

    def make(device: str) -> Job:
        slots = make_shared_rotation(shapes, BF16, device, density=density, granularities=(1, 1))

        def check() -> None:
            got, want = slots[0].copy(), slots[0].copy()
            ways.switch(got)
            ways.switch_by_index_copy(want)
            assert_same_bits("switch", got.lists[1].weights, want.lists[1].weights)

        baselines = {f"2 x {len(shapes)} x index_copy_": ways.switch_by_index_copy}
        return Job(lambda op, slot: ways.switch(slot, op), baselines, slots, check)

    return Case("scatter_switch_batched", name, moved, make)


def adamw(name: str, shapes: Sequence[Shape]) -> Case:
    # Indices and gradients are read; masters and both moments, float32, read and written.
    moved = touched(shapes, 0.02, 2) + count(shapes, 0.02) * (4 + 4 + 3 * 8)

    def make(device: str) -> Job:
        slots = make_rotation(shapes, BF16, device, density=0.02)
        trainings = [bench_masked_adamw.training(slot, device, dense=False) for slot in slots]

        def check() -> None:
            got, want = trainings[0].copy(), trainings[0].copy()
            bench_masked_adamw.ours(got)
            bench_masked_adamw.fused_and_write(want)
            bench_masked_adamw.assert_same(got, want)

        baselines = {bench_masked_adamw.COMPACT: bench_masked_adamw.fused_and_write}
        return Job(lambda op, slot: bench_masked_adamw.ours(slot, op), baselines, trainings, check)

    return Case("masked_adamw", name, moved, make)


def masked_grad(name: str, shape: Shape, tokens: int, dtype: torch.dtype) -> Case:
    nnz = count([shape], 0.02)
    operands = tokens * sum(shape) * dtype.itemsize
    moved = operands + 6 * nnz  # uint16 columns, float32 sums

    def make(device: str) -> Job:
        slots = bench_masked_grad.make_slots(shape, tokens, dtype, device, 0.02)
        return Job(
            lambda op, slot: op(slot.grad_output, slot.x, slot.row_ptr, slot.col),
            {bench_masked_grad.DENSE: bench_masked_grad.dense},
            slots,
            partial(bench_masked_grad.check, slots[0]),
        )

    flop = 2.0 * tokens * math.prod(shape)
    return Case("masked_grad", name, moved, make, flop, TENSOR_CORES if dtype == BF16 else FLOAT32)


def topk(name: str, numel: int, dtype: torch.dtype) -> Case:
    k = numel // 100
    moved = 2 * numel * dtype.itemsize + 4 * k  # what the threshold is must be known before the first index is written

    def make(device: str) -> Job:
        generator = torch.Generator(device).manual_seed(0)
        score = torch.randn(numel, generator=generator, device=device).abs_().to(dtype)
        return Job(
            lambda op, slot: op(slot, k),
            {"torch.topk": lambda slot: slot.topk(k, sorted=False)},
            [score] * cold_slots(device, score.nbytes),
            lambda: bench_topk_indices.check(score, k),
        )

    return Case("topk_indices", name, moved, make)


def extract(name: str, numel: int) -> Case:
    moved = 2 * numel * 2 + numel // 100 * 6

    def make(device: str) -> Job:
        generator = torch.Generator(device).manual_seed(0)
        base = torch.rand(numel, generator=generator, device=device).add_(1).to(BF16)
        differs = torch.rand(numel, generator=generator, device=device) < 0.01
        pair = (base, torch.where(differs, -base, base))
        return Job(
            lambda op, slot: op(*slot),
            {"(a != b).nonzero() and a gather": bench_extract_changed.by_nonzero},
            [pair] * cold_slots(device, 2 * base.nbytes),
            lambda: bench_extract_changed.check(pair),
        )

    return Case("extract_changed", name, moved, make)


def fuse(name: str, shape: Shape) -> Case:
    numel, lists = math.prod(shape), len(bench_fuse_adapters.STRENGTHS)
    moved = 6 * (lists * count([shape], 0.01) + numel * (1 - 0.99**lists))  # the lists, and their union

    def make(device: str) -> Job:
        slots = bench_fuse_adapters.make_slots(BF16, device, 0.01, numel)
        baselines = {
            bench_fuse_adapters.DENSE: bench_fuse_adapters.dense_sum,
            bench_fuse_adapters.INDEXED: bench_fuse_adapters.indexed_sum,
        }
        return Job(
            lambda op, slot: op(slot.indices, slot.values, slot.weights, "sum"),
            baselines,
            slots,
            partial(bench_fuse_adapters.check, slots[0]),
        )

    return Case("fuse_adapters", name, moved, make)


@dataclass(frozen=True)
class Layer:
    """A weight [out, in], tokens, and sparse deltas of the weight: as CSR in one arena, and dense [adapters, out, in].

    Token t has adapter t // (tokens / adapters).
    """

    weight: torch.Tensor
    x: torch.Tensor
    token_adapter: torch.Tensor
    row_ptr: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor
    dense: torch.Tensor

    @property
    def grouped(self) -> torch.Tensor:
        """x as [adapters, tokens of each, in]."""
        return self.x.view(len(self.dense), -1, self.x.shape[-1])


DELTA_DENSITY = 0.01


def layers(shape: Shape, tokens: int, adapters: int, device: str, transposed: bool = False) -> list[Layer]:
    """Makes as many layers as cold needs. With `transposed` the tokens are [tokens, out]."""
    rows, columns = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(0.02).to(BF16)

    made = []
    for _ in range(cold_slots(device, 2 * rows * columns)):
        nnz = count([shape], DELTA_DENSITY)
        lists = [random_indices(rows * columns, nnz, generator) for _ in range(adapters)]
        starts = torch.arange(rows + 1, device=device) * columns
        borders = [torch.searchsorted(positions, starts) + i * nnz for i, positions in enumerate(lists)]
        values = random(adapters * nnz)
        dense = torch.zeros(adapters, rows * columns, dtype=BF16, device=device)
        for i, positions in enumerate(lists):
            dense[i, positions] = values[i * nnz : (i + 1) * nnz]
        token_adapter = torch.arange(tokens, device=device) // (tokens // adapters)
        made.append(
            Layer(
                random(rows, columns),
                random(tokens, rows if transposed else columns),
                token_adapter.int(),
                torch.stack(borders).int(),
                (torch.cat(lists) % columns).to(torch.uint16),
                values,
                dense.view(adapters, rows, columns),
            )
        )
    return made


def near(got: torch.Tensor, exact: torch.Tensor, unit: torch.Tensor) -> None:
    """The error is small beside the delta's product, and that is not nothing."""
    error = (got.float() - exact).norm()
    assert unit.norm() > 0
    assert error < 0.1 * unit.norm(), f"an error of {float(error / unit.norm()):.1%} of the delta's product"


def products(layer: Layer) -> torch.Tensor:
    """The deltas' products of all tokens in float32, [tokens, out]."""
    return torch.bmm(layer.grouped.float(), layer.dense.float().mT).flatten(0, 1)


def delta(op: str, name: str, shape: Shape, tokens: int) -> Case:
    """sparse_delta_mm and its transposed form: the delta's product alone."""
    rows, columns = shape
    nnz, transposed = count([shape], DELTA_DENSITY), op.endswith("transposed")
    moved = 2 * tokens * (rows + columns) + 4 * nnz + 4 * rows

    def run(call: Op, layer: Layer) -> torch.Tensor:
        return call(layer.x, layer.row_ptr[0], layer.col, layer.values, columns if transposed else rows)  # type: ignore[no-any-return]

    def dense(layer: Layer) -> torch.Tensor:
        return layer.x @ (layer.dense[0] if transposed else layer.dense[0].t())

    def make(device: str) -> Job:
        slots = layers(shape, tokens, 1, device, transposed)
        slot = slots[0]

        def check() -> None:
            weight = slot.dense[0].float()
            exact = slot.x.float() @ (weight if transposed else weight.t())
            near(run(getattr(torch.ops.shira, op), slot), exact, exact)

        return Job(run, {"dense product": dense}, slots, check)

    return Case(op, name, moved, make)


def batched_delta(name: str, shape: Shape, tokens: int, adapters: int) -> Case:
    rows, columns = shape
    nnz = adapters * count([shape], DELTA_DENSITY)
    moved = 2 * tokens * (rows + columns) + 4 * nnz + 4 * adapters * rows

    def run(call: Op, layer: Layer) -> torch.Tensor:
        return call(layer.x, layer.token_adapter, layer.row_ptr, layer.col, layer.values, rows)  # type: ignore[no-any-return]

    def make(device: str) -> Job:
        slots = layers(shape, tokens, adapters, device)

        def check() -> None:
            exact = products(slots[0])
            near(run(torch.ops.shira.sparse_delta_mm_batched, slots[0]), exact, exact)

        return Job(run, {"dense products": lambda s: torch.bmm(s.grouped, s.dense.mT)}, slots, check)

    return Case("sparse_delta_mm_batched", name, moved, make)


def base(layer: Layer) -> torch.Tensor:
    return functional.linear(layer.x, layer.weight)


def added_delta(name: str, shape: Shape, tokens: int, adapters: int = 1, batched: bool = False) -> Case:
    """The base product, and the deltas' products added to it."""
    rows, columns = shape
    nnz = adapters * count([shape], DELTA_DENSITY)
    moved = 2 * rows * columns + 2 * tokens * (rows + columns) + 4 * nnz + 4 * adapters * rows
    op = "add_sparse_delta_mm_batched" if batched else "add_sparse_delta_mm"

    def run(call: Op, layer: Layer) -> torch.Tensor:
        out = base(layer)
        if batched:
            call(out, layer.x, layer.token_adapter, layer.row_ptr, layer.col, layer.values)
        else:
            call(out, layer.x, layer.row_ptr[0], layer.col, layer.values)
        return out

    def dense(layer: Layer) -> torch.Tensor:
        out = base(layer)
        if batched:
            return out.view(adapters, -1, rows).baddbmm_(layer.grouped, layer.dense.mT)
        return out.addmm_(layer.x, layer.dense[0].t())

    def make(device: str) -> Job:
        slots = layers(shape, tokens, adapters, device)

        def check() -> None:
            unit = products(slots[0])
            exact = slots[0].x.float() @ slots[0].weight.float().t() + unit
            near(run(getattr(torch.ops.shira, op), slots[0]), exact, unit)

        return Job(run, {"base product, dense product" + "s" * batched: dense}, slots, check)

    return Case(op, name, moved, make, 2.0 * tokens * rows * columns)


def cases(sizes: Sizes | None = None) -> list[Case]:
    """All, the first of each op the one that stands for it."""
    s = sizes or Sizes()
    return [
        scatter("scatter, bf16", s.square, BF16, keep=False),
        scatter("scatter, fp32", s.square, F32, keep=False),
        scatter("scatter, bf16, old values kept", s.square, BF16, keep=True),
        batched_scatter("scatter, 4 layers of a 7B", s.large),
        switch("switch A to B, small Llama", s.model),
        adamw("AdamW, one weight", [s.square]),
        adamw("AdamW, small Llama", s.model),
        masked_grad("gradient, bf16", s.square, s.tokens, BF16),
        masked_grad("gradient, fp32", s.square, s.tokens, F32),
        topk("top 1 %, bf16", s.scores, BF16),
        topk("top 1 %, fp32", s.scores, F32),
        extract("changed entries", s.scores),
        fuse("fuse 4 adapters", s.wide),
        delta("sparse_delta_mm", "delta, 512 tokens", s.square, s.batch),
        delta("sparse_delta_mm_transposed", "delta transposed, 512 tokens", s.square, s.batch),
        added_delta("layer, 1 token", s.square, 1),
        added_delta("layer, 8 tokens", s.square, 8),
        added_delta("layer, 2048 tokens", s.square, s.prefill),
        batched_delta("deltas, 8 tokens, 8 adapters", s.square, 8, 8),
        added_delta("layer, 8 tokens, 8 adapters", s.square, 8, 8, batched=True),
        added_delta("layer, 2048 tokens, 8 adapters", s.square, s.prefill, 8, batched=True),
    ]
