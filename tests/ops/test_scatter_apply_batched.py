from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from any_bits import ANY_DTYPES, random_bits
from backend_matrix import Backend, each_backend
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits, sorted_indices

import shira_kernels
from shira_kernels import backends

OP = "scatter_apply_batched"
SHAPES = ((7, 9), (), (40, 30), (0,), (5,), (300,))
COUNTS = (20, 1, 700, 0, 0, 300)


def arena(
    dtype: torch.dtype, index_dtype: torch.dtype = torch.int32, value_dtype: torch.dtype | None = None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of many shapes, with empty parts, offsets, indices and values."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    offsets = torch.tensor([0, *itertools.accumulate(COUNTS)])
    indices = torch.cat(
        [sorted_indices(w.numel(), n, index_dtype, i) for i, (w, n) in enumerate(zip(weights, COUNTS, strict=True))]
    )
    values = torch.randn(sum(COUNTS), generator=generator, dtype=torch.float64).to(value_dtype or dtype)
    return weights, offsets, indices, values


@each_backend
@pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
def test_replace_copies_bits_of_any_dtype(backend: Backend, dtype: torch.dtype) -> None:
    before = [random_bits(dtype, (37, 27), 1), random_bits(dtype, (), 2), random_bits(dtype, (0, 3))]
    indices = torch.cat([sorted_indices(999, 300, torch.int32), torch.zeros(1, dtype=torch.int32)])
    offsets, values = torch.tensor([0, 300, 301, 301]), random_bits(dtype, 301, 3)
    expected = bits(before[0]).view(999, -1)
    old = torch.cat([expected[indices[:300].long()].view(-1), bits(before[1])])
    expected[indices[:300].long()] = bits(values[:300]).view(300, -1)
    weights = [weight.to(backend.device, copy=True) for weight in before]
    saved = torch.zeros_like(bits(values)).view(dtype).to(backend.device)
    arguments = offsets, indices.to(backend.device)
    with backend.running():
        torch.ops.shira.scatter_apply_batched(weights, *arguments, values.to(backend.device), 1.0, False, saved)
    assert torch.equal(bits(weights[0]), expected.view(-1))
    assert torch.equal(bits(weights[1]), bits(values[300:]))
    assert torch.equal(bits(saved), old)
    with backend.running():
        torch.ops.shira.scatter_apply_batched(weights, *arguments, saved)
    assert all(torch.equal(bits(weight), bits(b)) for weight, b in zip(weights, before, strict=True))


@each_backend
@pytest.mark.parametrize(("alpha", "additive"), [(1.0, False), (0.3, False), (1.0, True), (-0.4, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_one_call_for_each_weight(backend: Backend, dtype: torch.dtype, alpha: float, additive: bool) -> None:
    index_dtypes = (torch.int32, torch.int64)
    for index_dtype, value_dtype in itertools.product(index_dtypes, {dtype, torch.float32} if additive else {dtype}):
        before, offsets, indices, values = arena(dtype, index_dtype, value_dtype)
        expected = [weight.clone() for weight in before]
        with backends.use("reference"):
            for i, weight in enumerate(expected):
                part = slice(offsets[i], offsets[i + 1])
                shira_kernels.scatter_apply(weight, indices[part], values[part], alpha, additive)
        for offsets_device in {"cpu", backend.device}:
            weights = [weight.to(backend.device, copy=True) for weight in before]
            saved = torch.full(values.shape, float("nan"), dtype=dtype, device=backend.device)
            arguments = (offsets.to(offsets_device), indices.to(backend.device), values.to(backend.device))
            with backend.running():
                torch.ops.shira.scatter_apply_batched(weights, *arguments, alpha, additive, saved)
            for weight, right in zip(weights, expected, strict=True):
                assert torch.equal(bits(weight), bits(right))
            with backend.running():
                torch.ops.shira.scatter_apply_batched(weights, *arguments[:2], saved)
            for weight, old in zip(weights, before, strict=True):
                assert torch.equal(bits(weight), bits(old)), "reverting gives every bit back"


@each_backend
def test_empty_lists(backend: Backend) -> None:
    none = torch.empty(0, device=backend.device)
    indices = torch.empty(0, dtype=torch.int32, device=backend.device)
    torch.ops.shira.scatter_apply_batched([], torch.zeros(1, dtype=torch.int64), indices, none)
    weight = torch.ones(3, device=backend.device)
    torch.ops.shira.scatter_apply_batched([weight, weight[:0]], torch.zeros(3, dtype=torch.int64), indices, none)
    assert weight.tolist() == [1, 1, 1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**31))
def test_any_arena(counts: list[int], seed: int) -> None:
    before = [torch.full((40,), float(i)) for i in range(len(counts))]
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    indices = torch.cat([sorted_indices(40, n, torch.int64, seed + i) for i, n in enumerate(counts)])
    values = torch.arange(100.0, 100.0 + sum(counts))
    weights = [weight.clone() for weight in before]
    torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values)
    for i, (weight, old) in enumerate(zip(weights, before, strict=True)):
        part = slice(offsets[i], offsets[i + 1])
        old[indices[part]] = values[part]
        assert torch.equal(weight, old)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_split_the_whole_arena(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60_000, (9,), generator=generator).tolist()
    counts = [max(1, size // 2) for size in sizes]
    before = [torch.zeros(size) for size in sizes]
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    indices = torch.cat(
        [sorted_indices(size, n, torch.int32, i) for i, (size, n) in enumerate(zip(sizes, counts, strict=True))]
    )
    values = torch.arange(1.0, 1.0 + sum(counts))
    number = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights, saved = [weight.clone() for weight in before], torch.ones_like(values)
        torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values, 1.0, False, saved)
    finally:
        torch.set_num_threads(number)
    assert not saved.any()
    for i, weight in enumerate(weights):
        part = slice(offsets[i], offsets[i + 1])
        expected = before[i].clone()
        expected[indices[part].long()] = values[part]
        assert torch.equal(weight, expected)


def bad_inputs(device: str) -> dict[str, tuple[dict, str]]:
    def numbers(*items: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(items, dtype=dtype, device=device)

    shared = torch.zeros(12, device=device)
    return {
        "offsets do not begin at 0": ({"offsets": torch.tensor([1, 2, 3])}, "offsets must rise from 0 to the number"),
        "offsets fall": ({"offsets": torch.tensor([0, 4, 3])}, "offsets must rise"),
        "offsets end early": ({"offsets": torch.tensor([0, 1, 2])}, r"offsets must rise .* \(3\)"),
        "offsets end late": ({"offsets": torch.tensor([0, 1, 4])}, r"offsets must rise .* \(3\)"),
        "too few offsets": ({"offsets": torch.tensor([0, 3])}, r"offsets must have one entry more .* \(3\), got 2"),
        "int32 offsets": ({"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)}, "offsets must be int64"),
        "2-D offsets": ({"offsets": torch.tensor([[0, 2, 3]])}, "offsets must be 1-D"),
        "mixed dtypes": (
            {"weights": [torch.zeros(6, device=device), torch.zeros(6, device=device).double()]},
            r"weights\[1\] must be torch.float32 like weights\[0\], got torch.float64",
        ),
        "a strided weight": (
            {"weights": [torch.zeros(6, device=device), torch.zeros(4, 6, device=device).t()]},
            r"weights\[1\] must be contiguous",
        ),
        "the same weight twice": (
            {"weights": [shared, shared]},
            r"weights\[0\] must not share memory with weights\[1\]",
        ),
        "overlapping weights": ({"weights": [shared[:7], shared[6:]]}, r"weights\[0\] must not share memory"),
        "values of another dtype": ({"values": numbers(1, 2, 3, dtype=torch.float64)}, "values must be torch.float32"),
        "too few values": (
            {"values": numbers(1, 2, dtype=torch.float32)},
            r"values must have one entry .* \(3\), got 2",
        ),
        "short saved": ({"saved": torch.zeros(2, device=device)}, "saved must have one entry per index"),
        "saved in a weight": (
            {"weights": [torch.zeros(6, device=device), shared], "saved": shared[1:4]},
            "saved must not",
        ),
        "index beyond its weight": ({"indices": numbers(0, 6, 1)}, r"indices must (lie in \[0, 6\)|be sorted).*"),
        "index before its weight": ({"indices": numbers(0, 1, -1)}, "indices must"),
        "unsorted part": ({"indices": numbers(3, 1, 2)}, "indices must be sorted"),
        "repeated in a part": ({"indices": numbers(3, 3, 2)}, "indices must be sorted"),
    }


NEEDS_CONTENTS = ("index beyond its weight", "index before its weight", "unsorted part", "repeated in a part")


@each_backend
@pytest.mark.parametrize("case", bad_inputs("cpu"))
@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument_and_writes_nothing(backend: Backend, case: str, call: str) -> None:
    function = torch.ops.shira.scatter_apply_batched if call == "torch.ops" else shira_kernels.scatter_apply_batched
    changes, message = bad_inputs(backend.device)[case]
    device = backend.device
    arguments = {
        "weights": [torch.zeros(6, device=device), torch.zeros(6, device=device)],
        "offsets": torch.tensor([0, 2, 3]),
        "indices": torch.tensor([1, 5, 0], device=device),
        "values": torch.tensor([1.0, 2.0, 3.0], device=device),
        **changes,
    }
    if device == "cuda" and case in NEEDS_CONTENTS:
        message = "indices must"
    with (
        backends.checked(),
        pytest.raises(RuntimeError, match=f"(?s)shira::{OP}.*{message}"),
        backend.running(times=0),
    ):
        function(**arguments)
    assert not any(weight.any() for weight in arguments["weights"])


@each_backend
def test_autograd_is_told(backend: Backend) -> None:
    weights = [torch.zeros(6, device=backend.device) for _ in range(2)]
    offsets, saved = torch.tensor([0, 2, 3]), torch.ones(3, device=backend.device)
    indices = torch.tensor([1, 5, 0], device=backend.device)
    values = torch.ones(3, device=backend.device)
    versions = [tensor._version for tensor in (*weights, saved)]
    with backend.running():
        torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values, 1.0, False, saved)
    assert all(tensor._version > old for tensor, old in zip((*weights, saved), versions, strict=True))
    parameter = torch.nn.Parameter(weights[1].clone())
    for leaf in (parameter, parameter * 1):
        with pytest.raises(RuntimeError, match=r"weights\[1\] requires grad"), backend.running(times=0):
            torch.ops.shira.scatter_apply_batched([weights[0], leaf], offsets, indices, values)
    with pytest.raises(RuntimeError, match="values requires grad"), backend.running(times=0):
        torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values.clone().requires_grad_())
    with torch.no_grad(), backend.running():
        torch.ops.shira.scatter_apply_batched([weights[0], parameter], offsets, indices, values)
    assert parameter[0] == 1


def test_opcheck() -> None:
    for alpha, keep in itertools.product((1.0, 0.5), (False, True)):
        weights, offsets, indices, values = arena(torch.float32)
        saved = torch.zeros_like(values) if keep else None
        arguments = (weights, offsets, indices, values, alpha, False, saved)
        torch.library.opcheck(torch.ops.shira.scatter_apply_batched.default, arguments)


def test_compile() -> None:
    def switch(weights: list[torch.Tensor], *rest: torch.Tensor) -> torch.Tensor:
        torch.ops.shira.scatter_apply_batched(weights, *rest)
        return torch.stack([weight.sum() for weight in weights])

    weights, *rest = arena(torch.float32)
    expected = [weight.clone() for weight in weights]
    sums = switch(expected, *rest)
    assert torch.equal(torch.compile(switch, fullgraph=True, backend="aot_eager")(weights, *rest), sums)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_the_reference_writes_nothing_where_memory_ends_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("shira_kernels.reference.scatter_apply_batched")
    real, calls = module.changes, itertools.count()

    def fail(*arguments: object) -> object:
        if next(calls) == 1:
            raise torch.OutOfMemoryError
        return real(*arguments)

    monkeypatch.setattr(module, "changes", fail)
    weights, saved = [torch.zeros(4), torch.zeros(4)], torch.full((4,), 7.0)
    offsets, indices = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 1, 2])
    with backends.use("reference"), pytest.raises(torch.OutOfMemoryError):
        shira_kernels.scatter_apply_batched(weights, offsets, indices, torch.ones(4), saved=saved)
    assert not any(weight.any() for weight in weights)
    assert (saved == 7).all()
