"""Calls of all ops that meet each branch of their Triton launchers, and the kernels that they launch.

A kernel is another one for each type of its arguments, for each constant, for sizes above 2^31 and sizes of 1, and for
what is a multiple of 16 among addresses and sizes. `variants` makes the calls on a GPU that is not there and notes what
Triton would compile, so nothing here describes a kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pretended_gpu import PretendedGpu, Variant
from triton.backends.compiler import GPUTarget

from shira_kernels.dtypes import ARITHMETIC, compute_dtype

INDICES = (torch.int32, torch.int64)
HALVES = (torch.bfloat16, torch.float16)
BITS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# Of the scatter ops: dtypes of weights and values, alpha, additive.
REPLACED = [(kind, kind, 1.0, False) for kind in BITS]
COMBINED = [
    *((kind, kind, 0.5, False) for kind in ARITHMETIC),
    *((kind, kind, 0.5, True) for kind in ARITHMETIC),
    *((kind, torch.float32, 0.5, True) for kind in (torch.float64, *HALVES)),
]
NOTHING = [(torch.bfloat16, torch.bfloat16, 0.0, False), (torch.bfloat16, torch.float32, 0.0, True)]  # alpha 0 is int32


KEPT = ((torch.int32, False), (torch.int32, True), (torch.int64, True))  # indices, and whether old entries are kept


class Call(NamedTuple):
    """One call: `make(gpu)` gives the op's arguments."""

    op: str
    make: Callable[[PretendedGpu], tuple[Any, ...]]

    def run(self, gpu: PretendedGpu) -> None:
        arguments = self.make(gpu)
        with gpu, torch.no_grad():
            getattr(torch.ops.shira, self.op)(*arguments)


class Form(NamedTuple):
    """What a kernel is specialised for beside types and constants."""

    entries: int
    shape: tuple[int, ...]  # of weights
    shift: int = 0  # elements by which vectors of entries begin late: not at a multiple of 16 bytes
    weight_shift: int = 0


USUAL = Form(1003, (64, 48))  # whole lists are aligned, their lengths are any
SLICE = Form(1003, (64, 48), shift=1)  # one tensor's part of an arena
EVEN = Form(1008, (64, 48))
ODD = Form(1003, (61, 47), shift=1, weight_shift=1)
ONE = Form(1, (1,))
HUGE = Form(1003, (2**31 + 16,))
LONG = Form(2**31 + 16, (64, 48))
NONE = Form(0, (64, 48))


def empty(gpu: PretendedGpu, shape: int | tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> torch.Tensor:
    """On the GPU, zeros; above a size never touched."""
    shape = (shape,) if isinstance(shape, int) else shape
    count = torch.Size(shape).numel()
    make = torch.zeros if count < 2**24 else torch.empty
    return gpu.tensor(make(count + shift, dtype=dtype)[shift:].view(shape))


def calls() -> Iterator[Call]:
    yield from scatter_calls()
    yield from scatter_batched_calls()
    yield from switch_calls()
    yield from adamw_calls()
    yield from extract_calls()
    yield from topk_calls()
    yield from fuse_calls()
    yield from masked_grad_calls()
    yield from product_calls()


def variants(target: GPUTarget, every: bool = True) -> list[Variant]:
    """What the calls launch on a target, each once, in the order of first launches.

    Without `every` only the first for each set of constants and element types, whatever the types of indices and sizes
    and the alignment.
    """
    found: dict[Any, Variant] = {}
    for call in calls():
        gpu = PretendedGpu(target)
        call.run(gpu)
        for variant in gpu.variants:
            found.setdefault(variant.key if every else variant.main_key, variant)
    return list(found.values())


def scatter_calls() -> Iterator[Call]:
    def make(form: Form, how: tuple, index: torch.dtype, keep: bool) -> Call:
        weight, value, alpha, additive = how

        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            saved = empty(gpu, form.entries, weight, form.shift) if keep else None
            target = empty(gpu, form.shape, weight, form.weight_shift)
            indices, values = (empty(gpu, form.entries, kind, form.shift) for kind in (index, value))
            return target, indices, values, alpha, additive, saved

        return Call("scatter_apply", arguments)

    for how, (index, keep) in itertools.product(REPLACED + COMBINED, KEPT):
        yield make(SLICE, how, index, keep)
    for how in REPLACED + COMBINED:
        yield make(EVEN, how, torch.int32, True)
    for how, form in itertools.product((REPLACED[1], COMBINED[2]), (ODD, ONE, USUAL, HUGE, LONG, NONE)):
        yield make(form, how, torch.int64 if form is HUGE else torch.int32, True)
    for how in NOTHING:
        yield make(SLICE, how, torch.int32, True)


def arena(gpu: PretendedGpu, form: Form, count: int, on_gpu: bool = False) -> torch.Tensor:
    """Offsets of a list that is cut into `count` parts."""
    offsets = torch.linspace(0, form.entries, count + 1, dtype=torch.float64).long()
    return gpu.tensor(offsets) if on_gpu else offsets


def scatter_batched_calls() -> Iterator[Call]:
    def make(form: Form, how: tuple, index: torch.dtype, keep: bool, count: int = 28, on_gpu: bool = True) -> Call:
        weight, value, alpha, additive = how

        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            weights = [empty(gpu, form.shape, weight, form.weight_shift) for _ in range(count)]
            indices, values = (empty(gpu, form.entries, kind, form.shift) for kind in (index, value))
            saved = empty(gpu, form.entries, weight, form.shift) if keep else None
            return weights, arena(gpu, form, count, on_gpu), indices, values, alpha, additive, saved

        return Call("scatter_apply_batched", arguments)

    for how, (index, keep) in itertools.product(REPLACED + COMBINED, KEPT):
        yield make(USUAL, how, index, keep)
    for how, form in itertools.product((REPLACED[1], COMBINED[2]), (EVEN, ODD, ONE, LONG, NONE)):
        yield make(form, how, torch.int32, True, count=1)
    for count in (2, 224, 560):
        yield make(USUAL, COMBINED[2], torch.int32, True, count, on_gpu=False)
    for how in NOTHING:
        yield make(USUAL, how, torch.int32, True)


def switch_calls() -> Iterator[Call]:
    def make(
        form: Form, how: tuple, old_index: torch.dtype, index: torch.dtype, count: int = 28, old_form: Form = EVEN
    ) -> Call:
        weight, value, alpha, additive = how

        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            weights = [empty(gpu, form.shape, weight, form.weight_shift) for _ in range(count)]
            old = arena(gpu, old_form, count), empty(gpu, old_form.entries, old_index, old_form.shift)
            old_saved = empty(gpu, old_form.entries, weight, old_form.shift)
            indices, values, saved = (empty(gpu, form.entries, kind, form.shift) for kind in (index, value, weight))
            offsets = arena(gpu, form, count, on_gpu=True)
            return weights, *old, old_saved, offsets, indices, values, saved, alpha, additive

        return Call("scatter_switch_batched", arguments)

    for how, index in itertools.product(REPLACED + COMBINED, INDICES):
        yield make(USUAL, how, index, index, old_form=USUAL)
    for how in (*REPLACED[1:3], *COMBINED[1:3]):
        yield make(USUAL, how, torch.int64, torch.int32)
    for how, form in itertools.product((REPLACED[1], COMBINED[2]), (EVEN, ODD, ONE, NONE)):
        yield make(form, how, torch.int32, torch.int64, 1, form)
    for count in (2, 224):
        yield make(USUAL, REPLACED[1], torch.int32, torch.int32, count)
    yield make(LONG, REPLACED[1], torch.int32, torch.int32, old_form=LONG)
    for how in NOTHING:
        yield make(USUAL, how, torch.int32, torch.int32)


def adamw_calls() -> Iterator[Call]:
    def make(
        form: Form, kinds: tuple, index: torch.dtype, master: bool, step_on_gpu: bool, count: int = 28,
        lr: float = 1e-3, decay: float = 0.01,
    ) -> Call:  # fmt: skip
        weight, grad = kinds
        compute = compute_dtype(weight)

        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            weights = [empty(gpu, form.shape, weight, form.weight_shift) for _ in range(count)]
            compact = arena(gpu, form, count).diff().tolist()
            grads = [empty(gpu, number if i % 2 else form.shape, grad) for i, number in enumerate(compact)]
            first, second, third = (empty(gpu, form.entries, compute, form.shift) for _ in range(3))
            step = torch.ones((), dtype=torch.float32)
            lists = arena(gpu, form, count, step_on_gpu), empty(gpu, form.entries, index, form.shift)
            states = first, second, third if master else None, gpu.tensor(step) if step_on_gpu else step
            return weights, *lists, grads, *states, lr, 0.9, 0.999, 1e-8, decay

        return Call("masked_adamw", arguments)

    same = [(kind, kind) for kind in (torch.float64, torch.float32, *HALVES)]
    mixed = [(torch.float64, torch.float32), *((kind, torch.float32) for kind in HALVES)]
    for kinds, index, master in itertools.product(same + mixed, INDICES, (False, True)):
        yield make(USUAL, kinds, index, master, step_on_gpu=master)
    for kinds in (same[1], mixed[1]):
        yield make(USUAL, kinds, torch.int32, True, step_on_gpu=False)
        yield make(USUAL, kinds, torch.int32, False, step_on_gpu=True)
        yield make(USUAL, kinds, torch.int32, True, step_on_gpu=True, lr=0.0, decay=0.0)
        yield make(USUAL, kinds, torch.int32, True, step_on_gpu=True, decay=0.0)
        for form in (EVEN, ODD, ONE, NONE):
            yield make(form, kinds, torch.int32, True, step_on_gpu=True, count=1)
    yield make(LONG, mixed[1], torch.int32, True, step_on_gpu=True)


def extract_calls() -> Iterator[Call]:
    def make(dtype: torch.dtype, shape: tuple[int, ...], shift: int) -> Call:
        return Call("extract_changed", lambda gpu: tuple(empty(gpu, shape, dtype, shift) for _ in range(2)))

    for dtype in BITS:
        yield make(dtype, (64, 48), 0)
        yield make(dtype, (61, 47), 1)
    for dtype in (torch.uint8, torch.int16):
        yield make(dtype, (2**31 + 16,), 0)
    for size in (0, 1):
        yield make(torch.int16, (size,), 0)


def topk_calls() -> Iterator[Call]:
    def make(dtype: torch.dtype, shape: tuple[int, ...], k: int, shift: int = 0) -> Call:
        return Call("topk_indices", lambda gpu: (empty(gpu, shape, dtype, shift), k))

    for dtype in ARITHMETIC:
        yield make(dtype, (256, 96), 160)
        yield make(dtype, (61, 47), 33, shift=1)
    for dtype in HALVES:
        yield make(dtype, (2**31 + 16,), 5)
    for size in (0, 1):
        yield make(torch.float32, (size,), size)


def fuse_calls() -> Iterator[Call]:
    def make(policy: str, dtype: torch.dtype, index: torch.dtype, entries: tuple[int, ...], shift: int = 0) -> Call:
        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            # Both the same and other entries in the lists, so that their union has a size that is no list's.
            lists = [torch.arange(shift * k, number + shift * k, dtype=index) for k, number in enumerate(entries)]
            values = [empty(gpu, number, dtype, shift) for number in entries]
            return [gpu.tensor(part) for part in lists], values, empty(gpu, len(entries), torch.float32), policy

        return Call("fuse_adapters", arguments)

    for policy, dtype, index in itertools.product(("sum", "mean", "ties", "last"), ARITHMETIC, INDICES):
        if index == torch.int64 and dtype not in (torch.float64, torch.bfloat16):
            continue
        if policy != "last" or dtype != torch.float16:  # the same bits as bfloat16
            yield make(policy, dtype, index, (1008, 1008) if index == torch.int32 else (1003, 1003, 1003))
    for policy in ("sum", "last"):
        yield make(policy, torch.bfloat16, torch.int32, (1003, 700), shift=1)
        yield make(policy, torch.bfloat16, torch.int32, (1,))
    yield make("sum", torch.bfloat16, torch.int32, (0, 0))


def masked_grad_calls() -> Iterator[Call]:
    def make(dtype: torch.dtype, row: torch.dtype, column: torch.dtype, tokens: int, size: int, nnz: int) -> Call:
        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            grad, x = (empty(gpu, (tokens, size), dtype, size % 2) for _ in range(2))
            return grad, x, empty(gpu, size + 1, row), empty(gpu, nnz, column, size % 2)

        return Call("masked_grad", arguments)

    for dtype, row, column in itertools.product(ARITHMETIC, INDICES, (torch.uint16, torch.int32)):
        yield make(dtype, row, column, 256, 256, 1003)
    for dtype, row in itertools.product(ARITHMETIC, INDICES):
        yield make(dtype, row, torch.int32 if row == torch.int64 else torch.uint16, 4096, 256, 1003)
    few = ((1, 1, 1), (7, 61, 33), (7, 61, 0), (16, 64, 48), (1, 4096, 4096), (4099, 511, 1003))
    for dtype, (tokens, size, nnz) in itertools.product((torch.float32, torch.bfloat16), few):
        yield make(dtype, torch.int32, torch.uint16, tokens, size, nnz)


def product_calls() -> Iterator[Call]:
    """The four products with sparse deltas, and the one with a transposed delta."""

    def make(
        op: str,
        kinds: tuple,
        row: torch.dtype,
        column: torch.dtype,
        tokens: int,
        size: int,
        page: int = 0,
        nnz: int = 1003,
    ) -> Call:
        def arguments(gpu: PretendedGpu) -> tuple[Any, ...]:
            dtype, value = kinds
            shift, adapters = size % 2, 3
            x, out = (empty(gpu, (tokens, size), dtype, shift) for _ in range(2))
            width = (nnz // page + 1, page) if page else nnz
            entries = empty(gpu, width, column, shift), empty(gpu, width, value, shift)
            first = (out, x) if op.startswith("add") else (x,)
            last = () if op.startswith("add") else (size,)
            if "batched" not in op:
                return (*first, empty(gpu, size + 1, row), *entries, *last)
            table = (empty(gpu, (adapters, 5), torch.int32),) if page else ()
            rows = empty(gpu, (adapters, size + 1), row)
            return (*first, empty(gpu, tokens, torch.int32), rows, *entries, *last, *table)

        return Call(op, arguments)

    kinds = [*((kind, kind) for kind in ARITHMETIC), *((kind, torch.float32) for kind in HALVES)]
    ops = [("sparse_delta_mm", 0), ("sparse_delta_mm_batched", 0), ("sparse_delta_mm_batched", 4096)]
    ops += [(f"add_{op}", page) for op, page in ops]
    stored = itertools.cycle(itertools.product(INDICES, (torch.uint16, torch.int32)))
    for (op, page), kind, tokens in itertools.product(ops, kinds, (8, 512)):
        if kind in (kinds[2], kinds[4]) or (op, page) in (ops[2], ops[3]):
            yield make(op, kind, *next(stored), tokens, 256, page)
    # The usual types in all forms of storage, and sizes.
    for (op, page), tokens in itertools.product(ops, (1, 17)):
        yield make(op, kinds[2], torch.int32, torch.uint16, tokens, 61, page)
    for row, column, tokens in itertools.product(INDICES, (torch.uint16, torch.int32), (8, 512)):
        yield make("add_sparse_delta_mm_batched", kinds[2], row, column, tokens, 256, 4096)
    # Dense products of two panels each: the first one's entries are cleared.
    for op, kind, row, column in itertools.product(
        ("sparse_delta_mm", "add_sparse_delta_mm"), kinds[2:4], INDICES, (torch.uint16, torch.int32)
    ):
        yield make(op, kind, row, column, 8192, 1024, nnz=100_000)
    yield make("add_sparse_delta_mm", kinds[2], torch.int32, torch.uint16, 8191, 1023, nnz=100_001)
    for tokens in (0, 1, 20):
        yield make("add_sparse_delta_mm", kinds[2], torch.int32, torch.uint16, tokens, 1, nnz=1)
    yield make("sparse_delta_mm_transposed", kinds[1], torch.int32, torch.int32, 8, 64)
