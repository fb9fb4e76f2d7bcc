from __future__ import annotations

import importlib
import math

import pytest
import torch
from backend_matrix import BACKENDS, Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st

import shira_kernels
from shira_kernels import backends

OP = "topk_indices"
each_backend = each_backend_of(OP)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, 6e-8, -6e-8, 65504.0]


def oracle(score: torch.Tensor, k: int) -> list[int]:
    """By a stable sort, which keeps the lower index first, in Python, for which -0 equals 0."""
    numbers = score.double().flatten().tolist()
    return sorted(sorted(range(len(numbers)), key=lambda i: -numbers[i])[:k])


def check(backend: Backend, score: torch.Tensor, k: int) -> None:
    with backend.running():
        indices = torch.ops.shira.topk_indices(score.to(backend.device), k)
    assert indices.dtype == torch.int32
    assert indices.device.type == backend.device
    assert indices.tolist() == oracle(score, k)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_scores(backend: Backend, dtype: torch.dtype) -> None:
    score = torch.randn(97, 101, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for k in (0, 1, 98, 4900, score.numel() - 1, score.numel()):
        check(backend, score, k)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_go_by_index(backend: Backend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    score = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (5000,), generator=generator)].to(dtype)
    for k in (1, 250, 2500, 4999):
        check(backend, score, k)
    check(backend, torch.zeros(5000, dtype=dtype), 4097)
    check(backend, torch.full((100,), -math.inf, dtype=dtype), 7)
    check(backend, torch.tensor([-0.0, 0.0, -0.0, 0.0], dtype=dtype), 2)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(backend: Backend, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[~numbers.isnan()]
    check(backend, numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))], 30_000)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_that_differ_in_the_last_bits_only(backend: Backend, dtype: torch.dtype) -> None:
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    one = torch.tensor(1.0, dtype=dtype).view(integers)
    score = (one + torch.randperm(3000, generator=torch.Generator().manual_seed(0)).to(integers)).view(dtype)
    check(backend, torch.cat([score, -score]), 1000)
    check(backend, torch.cat([score, -score]), 4000)


@each_backend
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 4), (33,)])
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    score = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for k in range(score.numel() + 1):
        check(backend, score, k)


@each_backend
def test_positions_are_those_of_the_shape_whatever_the_strides(backend: Backend) -> None:
    score = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    check(backend, score.to(memory_format=torch.channels_last), 31)
    check(backend, score.transpose(0, 2), 31)
    check(backend, score[:, :, ::2, 1:], 7)
    check(backend, score[0, 0, 0].expand(6, 5), 9)
    check(backend, torch._neg_view(score), 31)


def sampled_positions(numel: int, sample: int) -> torch.Tensor:
    """Where the Triton kernel looks first."""
    j = torch.arange(sample)
    begin = j * numel // sample
    width = (j + 1) * numel // sample - begin
    mixed = j * 0x9E3779B1 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77 % 2**32
    return begin + ((mixed >> 16) * width >> 16)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_misleads(backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Triton kernel looks, scores are larger, or smaller, than all others: it must look again."""
    sample, numel = 1024, 40_000
    if backend.name == "triton":
        monkeypatch.setattr(importlib.import_module("shira_kernels.triton.topk_indices"), "SAMPLE", sample)
    score = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = sampled_positions(numel, sample)
    assert len(set(places.tolist())) == sample
    for shift in (20, -20):
        shifted = score.index_add(0, places, torch.full((sample,), shift, dtype=torch.float64)).to(dtype)
        with backends.use("reference"):
            expected = torch.ops.shira.topk_indices(shifted, 4000)
        threshold = shifted[expected.long()].min()
        assert (shifted[places] > threshold).all() if shift > 0 else (shifted[places] < threshold).all()
        with backend.running():
            assert torch.equal(torch.ops.shira.topk_indices(shifted.to(backend.device), 4000).cpu(), expected)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_scores_in_several_programs(backend: Backend, dtype: torch.dtype) -> None:
    """Few and many of them, cut in the middle of a word, also where almost all are taken."""
    generator = torch.Generator().manual_seed(2)
    score = torch.randn(40_000, generator=generator).to(dtype)
    few, many = score.clone(), score.clone()
    few[torch.randint(40_000, (1200,), generator=generator)] = 2.0
    many[torch.rand(40_000, generator=generator) < 0.9] = 0.25
    above = [int((scores > tied).sum()) for scores, tied in ((few, 2.0), (many, 0.25))]
    for scores, k in ((few, above[0] + 701), (many, above[1] + 20_011), (many, above[1] + 3), (many, 39_000)):
        with backends.use("reference"):
            expected = torch.ops.shira.topk_indices(scores, k)
        with backend.running():
            assert torch.equal(torch.ops.shira.topk_indices(scores.to(backend.device), k).cpu(), expected)


TRITON = [
    pytest.param(backend, id=backend.device, marks=[pytest.mark.gpu] if backend.device == "cuda" else [])
    for backend in BACKENDS
    if backend.name == "triton" and not backend.missing(OP)
]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_ranks_first_where_it_is_not_refused(backend: Backend, dtype: torch.dtype) -> None:
    """Of either sign and any payload, above infinity; of several NaNs the first."""
    launch = importlib.import_module("shira_kernels.triton.topk_indices").topk_indices
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    infinity = torch.tensor(math.inf, dtype=dtype).view(integers)
    nans = torch.stack([infinity + 1, (infinity + 1) ^ torch.iinfo(integers).min, infinity + 5, ~(infinity * 0)]).view(
        dtype
    )
    assert nans.isnan().all()
    score = torch.randn(9000, generator=torch.Generator().manual_seed(3)).to(dtype)
    score[5], score[8000] = math.inf, -math.inf
    places = torch.tensor([7, 100, 101, 8999])
    score[places] = nans
    numbers = torch.where(score.isnan(), 0, score).double()
    for k in (1, 3, 4, 5, 40, 9000):
        others = numbers.sort(descending=True, stable=True).indices.tolist()
        expected = sorted([*places.tolist(), *(i for i in others if i not in places.tolist())][:k])
        assert launch(score.to(backend.device), k).tolist() == expected
    assert launch(torch.full((9000,), math.nan, dtype=dtype, device=backend.device), 5000).tolist() == list(range(5000))


@given(
    numbers=st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=80),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from([b for b in BACKENDS if b.device == "cpu" and b.name != "triton" and not b.missing(OP)]),
)
def test_any_scores(numbers: list[float], share: float, dtype: torch.dtype, backend: Backend) -> None:
    check(backend, torch.tensor(numbers, dtype=torch.float64).to(dtype), round(share * len(numbers)))


CPP = [b for b in BACKENDS if b.isa and not b.missing(OP)]


@pytest.mark.parametrize("backend", CPP, ids=lambda backend: backend.kernel)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_with_a_bound_from_a_sample(backend: Backend, dtype: torch.dtype) -> None:
    """Above 2^20 scores the C++ kernel skips what a sample says is too small; also where the sample misleads."""
    numel = 2**20 + 77
    score = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    misleading = torch.zeros(numel, dtype=dtype)
    misleading[: numel // 1000] = score[: numel // 1000]
    for scores, k in ((score, numel // 100), (score, numel // 3), (misleading, numel // 100), (misleading, 50)):
        with backends.use("reference"):
            expected = torch.ops.shira.topk_indices(scores, k)
        with backend.running():
            assert torch.equal(torch.ops.shira.topk_indices(scores, k), expected)


@pytest.mark.parametrize("backend", CPP, ids=lambda backend: backend.kernel)
def test_a_bound_that_too_few_scores_reach_is_dropped(backend: Backend) -> None:
    """Large scores where the sample looks, whose positions are those of the kernel's generator, and nowhere else."""
    stride, sample, random = 64, 2**15, 0
    score = torch.rand(stride * sample, generator=torch.Generator().manual_seed(0))
    for i in range(sample):
        random = (random * 6364136223846793005 + 1442695040888963407) % 2**64
        score[i * stride + (random >> 33) % stride] += 10
    k = sample + 1000  # 1.6 %: the sample's bound lies above 10, and only 2^15 scores do
    with backends.use("reference"):
        expected = torch.ops.shira.topk_indices(score, k)
    with backend.running():
        assert torch.equal(torch.ops.shira.topk_indices(score, k), expected)


@pytest.mark.skipif(not CPP, reason="C++ extension not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_result_at_any_number_of_threads(dtype: torch.dtype) -> None:
    score = torch.randn(600_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    score[::3] = 1.0  # ties in every thread's share
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(torch.ops.shira.topk_indices(score, 200_000))
    finally:
        torch.set_num_threads(threads)
    with backends.use("reference"):
        expected = torch.ops.shira.topk_indices(score, 200_000)
    assert all(torch.equal(result, expected) for result in results)


def bad_inputs(device: str = "cpu") -> dict[str, tuple[dict, str]]:
    """name -> (arguments that differ from good ones, what the error says)"""
    nan = torch.tensor([1.0, math.nan, 2.0], device=device)
    return {
        "int scores": ({"score": torch.arange(3, device=device)}, "score must be float64.*got torch.int64"),
        "sparse scores": ({"score": torch.eye(3, device=device).to_sparse()}, "score must be a strided tensor|sparse"),
        "k below 0": ({"k": -1}, r"k must lie in \[0, 3\].*got -1"),
        "k too large": ({"k": 4}, r"k must lie in \[0, 3\].*got 4"),
        "NaN": ({"score": nan}, "score must not hold NaN: NaN scores are refused"),
        "negative NaN": ({"score": torch.tensor([1.0, 5.0, -math.nan], device=device)}, "score must not hold NaN"),
        "NaN, k = 0": ({"score": nan, "k": 0}, "score must not hold NaN"),
        "bfloat16 NaN": ({"score": nan.bfloat16()}, "score must not hold NaN"),
        "NaN of the least payload": (
            {"score": torch.tensor([0x7F800001, 0, 0], dtype=torch.int32, device=device).view(torch.float32)},
            "score must not hold NaN",
        ),
    }


@each_backend
@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument(backend: Backend, case: str, call: str) -> None:
    function = torch.ops.shira.topk_indices if call == "torch.ops" else shira_kernels.topk_indices
    changes, message = bad_inputs(backend.device)[case]
    good = {"score": torch.tensor([1.0, 2.0, 3.0], device=backend.device), "k": 2}
    with backends.checked(), pytest.raises((RuntimeError, NotImplementedError), match=message):  # noqa: SIM117
        with backend.running(times=0):
            function(**{**good, **changes})


@pytest.mark.parametrize("backend", CPP, ids=lambda backend: backend.kernel)
def test_a_single_nan_is_found_anywhere(backend: Backend) -> None:
    for dtype in DTYPES:
        for place in (0, 31, 32, 2**20 + 500, 2**20 + 900):
            score = torch.zeros(2**20 + 901, dtype=dtype)
            score[place] = -math.nan if place % 2 else math.nan
            with pytest.raises(RuntimeError, match="NaN scores are refused"), backend.running(times=0):
                torch.ops.shira.topk_indices(score, 5)


@each_backend
def test_autograd_and_inference_mode(backend: Backend) -> None:
    score = torch.tensor([1.0, 3.0, 2.0], device=backend.device, requires_grad=True)
    version = score._version
    with backend.running(times=2):
        indices = torch.ops.shira.topk_indices(score * 2, 2)
        assert torch.ops.shira.topk_indices(score, 2).tolist() == [1, 2]
    assert indices.tolist() == [1, 2]
    assert not indices.requires_grad
    assert score._version == version
    with torch.inference_mode(), backend.running():
        assert torch.ops.shira.topk_indices(score, 1).tolist() == [1]


def test_opcheck() -> None:
    for score in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(5, requires_grad=True), torch.zeros(0)):
        torch.library.opcheck(torch.ops.shira.topk_indices.default, (score, score.numel() // 2))


def test_compile_and_export() -> None:
    def choose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.ops.shira.topk_indices(x.abs(), 3)
        return indices, x.view(-1)[indices]

    x = torch.randn(4, 5)
    expected = choose(x)
    for run in (torch.compile(choose, fullgraph=True, backend="aot_eager"), exported(choose, x)):
        assert all(torch.equal(a, b) for a, b in zip(run(x), expected, strict=True))


def exported(function, *arguments: torch.Tensor):
    class Module(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor):
            return function(*arguments)

    return torch.export.export(Module(), arguments).module()


def test_many_scores_give_int64() -> None:
    assert torch.ops.shira.topk_indices(torch.empty(2**31, device="meta"), 3).dtype == torch.int64
    assert torch.ops.shira.topk_indices(torch.empty(2**31 - 1, device="meta"), 3).dtype == torch.int32
