from __future__ import annotations

import math

import pytest
import torch
from any_bits import ANY_DTYPES, random_bits
from backend_matrix import BACKENDS, Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits

import shira_kernels

OP = "extract_changed"
each_backend = each_backend_of(OP)


def oracle(base: torch.Tensor, tuned: torch.Tensor) -> list[int]:
    """Positions whose bytes differ, one by one, in Python."""
    size = base.element_size()
    old, new = (bytes(bits(tensor.contiguous()).tolist()) for tensor in (base, tuned))
    return [i for i in range(base.numel()) if old[i * size : (i + 1) * size] != new[i * size : (i + 1) * size]]


def check(backend: Backend, base: torch.Tensor, tuned: torch.Tensor) -> None:
    with backend.running():
        indices, values = torch.ops.shira.extract_changed(base.to(backend.device), tuned.to(backend.device))
    expected = oracle(base, tuned)
    assert indices.dtype == torch.int32
    assert indices.device.type == values.device.type == backend.device
    assert indices.tolist() == expected
    assert values.dtype == tuned.dtype
    wanted = bits(tuned.contiguous()).view(-1, tuned.element_size())[expected]
    assert torch.equal(bits(values).view(-1, tuned.element_size()), wanted)


def changed(base: torch.Tensor, share: float, seed: int = 1) -> torch.Tensor:
    """A copy in which about so many elements differ in one bit."""
    generator = torch.Generator().manual_seed(seed)
    tuned = base.clone().contiguous()
    size = tuned.element_size()
    for i in (torch.rand(base.numel(), generator=generator) < share).nonzero().view(-1).tolist():
        bit = 0 if base.dtype == torch.bool else int(torch.randint(8, (1,), generator=generator))
        tuned.view(-1).view(torch.uint8)[i * size + i % size] ^= 1 << bit
    return tuned


@each_backend
@pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
def test_random_changes(backend: Backend, dtype: torch.dtype) -> None:
    base = random_bits(dtype, 4099)
    for share in (0, 0.01, 0.5, 1):
        check(backend, base, changed(base, share))


@each_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_few_and_many_changes_side_by_side(backend: Backend, dtype: torch.dtype) -> None:
    """The Triton kernel writes many changes in another way than few."""
    base = random_bits(dtype, 50_003)
    generator = torch.Generator().manual_seed(4)
    share = torch.full((50_003,), 0.01)
    share[17_000:40_000] = 0.6
    differs = torch.rand(50_003, generator=generator) < share
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tuned = (base.view(integer) ^ differs.to(integer)).view(dtype)
    with backend.running():
        indices, values = torch.ops.shira.extract_changed(base.to(backend.device), tuned.to(backend.device))
    assert torch.equal(indices.cpu().long(), differs.nonzero().view(-1))
    assert torch.equal(bits(values), bits(tuned[differs]))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_compared_not_numbers(backend: Backend, dtype: torch.dtype) -> None:
    """-0 against +0 is a change, one NaN against itself is none, against another it is."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    nan = torch.tensor(math.nan, dtype=dtype).view(integers)
    base = torch.tensor([0.0, -0.0, 0.0, math.nan, math.nan, math.inf, 1.0], dtype=dtype)
    tuned = torch.tensor([-0.0, 0.0, 0.0, math.nan, math.nan, -math.inf, 1.0], dtype=dtype)
    tuned.view(integers)[4] = nan + 1
    with backend.running():
        indices, _ = torch.ops.shira.extract_changed(base.to(backend.device), tuned.to(backend.device))
    assert indices.tolist() == [0, 1, 4, 5]
    check(backend, base, tuned)


@each_backend
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 4), (31,), (32,), (33,), (64,), (65,)])
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check(backend, base, base.clone())
    check(backend, base, -base)
    if base.numel():
        for at in {0, base.numel() - 1}:
            tuned = base.clone()
            tuned.view(-1)[at] += 1
            check(backend, base, tuned)


@each_backend
def test_positions_are_those_of_the_shape_whatever_the_strides(backend: Backend) -> None:
    base = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    tuned = torch.where(base > 1, base + 1, base)
    check(backend, base.to(memory_format=torch.channels_last), tuned)
    check(backend, base.transpose(0, 2), tuned.transpose(0, 2))
    check(backend, base[:, :, ::2, 1:], tuned[:, :, ::2, 1:])
    check(backend, base, torch._neg_view(-tuned))
    check(backend, base[0, 0, 0].expand(6, 5), tuned[:1, 0, 0].expand(6, 5))


@given(
    old=st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0]), max_size=80),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]),
    backend=st.sampled_from([b for b in BACKENDS if b.device == "cpu" and b.name != "triton" and not b.missing(OP)]),
)
def test_any_tensors(old: list[float], seed: int, dtype: torch.dtype, backend: Backend) -> None:
    base = torch.tensor(old, dtype=torch.float64).to(dtype)
    check(backend, base, base[torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))])


CPP = [b for b in BACKENDS if b.isa and not b.missing(OP)]


@pytest.mark.parametrize("backend", CPP, ids=lambda backend: backend.kernel)
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_large_tensors_on_any_number_of_threads(backend: Backend, share: float) -> None:
    """Larger than the C++ kernel's first buffers, and cut for several threads."""
    base = torch.randn(400_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    differs = torch.rand(base.numel(), generator=torch.Generator().manual_seed(1)) < share
    tuned = torch.where(differs, (base.view(torch.int16) ^ 1).view(torch.bfloat16), base)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            with backend.running():
                indices, values = torch.ops.shira.extract_changed(base, tuned)
            assert torch.equal(indices.long(), differs.nonzero().view(-1))
            assert torch.equal(bits(values), bits(tuned[differs]))
    finally:
        torch.set_num_threads(threads)


def test_applying_the_changes_gives_the_tuned_tensor() -> None:
    base = random_bits(torch.bfloat16, 5000)
    tuned = changed(base, 0.1)
    shira_kernels.scatter_apply(base, *shira_kernels.extract_changed(base, tuned))
    assert torch.equal(bits(base), bits(tuned))


def bad_inputs(device: str = "cpu") -> dict[str, tuple[dict, str]]:
    """name -> (arguments that differ from good ones, what the error says)"""
    wide = torch.zeros(3, dtype=torch.complex128, device=device)
    return {
        "elements of 16 bytes": (
            {"base": wide, "tuned": wide},
            "base must have elements of 1, 2, 4 or 8 bytes.*complex128",
        ),
        "another dtype": (
            {"tuned": torch.zeros(3, device=device, dtype=torch.float64)},
            "tuned must be torch.float32 like base, got torch.float64",
        ),
        "same size, another dtype": (
            {"tuned": torch.zeros(3, device=device, dtype=torch.int32)},
            "tuned must be torch.float32 like base, got torch.int32",
        ),
        "another length": (
            {"tuned": torch.zeros(4, device=device)},
            r"tuned must have the shape of base, \(3,\), got \(4,\)",
        ),
        "another shape": ({"tuned": torch.zeros(3, 1, device=device)}, r"tuned must have the shape of base.*\(3, 1\)"),
        "another device": (
            {"tuned": torch.zeros(3, device="meta")},
            "tuned must be on .* like base|device of base|meta",
        ),
        "sparse": ({"base": torch.zeros(3, device=device).to_sparse()}, "base must be a strided tensor|sparse|Sparse"),
        "grad of base": ({"base": torch.zeros(3, device=device, requires_grad=True)}, "base requires grad"),
        "grad": ({"tuned": torch.zeros(3, device=device, requires_grad=True)}, "tuned requires grad"),
    }


@each_backend
@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument(backend: Backend, case: str, call: str) -> None:
    function = torch.ops.shira.extract_changed if call == "torch.ops" else shira_kernels.extract_changed
    changes, message = bad_inputs(backend.device)[case]
    good = {"base": torch.zeros(3, device=backend.device), "tuned": torch.ones(3, device=backend.device)}
    with pytest.raises((RuntimeError, NotImplementedError), match=message), backend.running(times=0):
        function(**{**good, **changes})


@each_backend
def test_autograd_and_inference_mode(backend: Backend) -> None:
    base = torch.zeros(3, device=backend.device, requires_grad=True)
    tuned = torch.tensor([0.0, 1.0, 0.0], device=backend.device, requires_grad=True)
    with torch.no_grad(), backend.running():
        assert torch.ops.shira.extract_changed(base, tuned)[0].tolist() == [1]
    assert base._version == tuned._version == 0
    with torch.inference_mode(), backend.running():
        assert torch.ops.shira.extract_changed(base, tuned)[1].tolist() == [1.0]


def test_opcheck() -> None:
    base = torch.randn(3, 4)
    for tuned in (base + (base > 0), base.clone(), base + 1):
        torch.library.opcheck(torch.ops.shira.extract_changed.default, (base, tuned))
    torch.library.opcheck(torch.ops.shira.extract_changed.default, (torch.zeros(0), torch.zeros(0)))


def test_compile_and_export() -> None:
    def again(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
        indices, values = torch.ops.shira.extract_changed(base, tuned)
        return base.view(-1).index_put((indices.long(),), values)

    class Module(torch.nn.Module):
        def forward(self, base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
            return again(base, tuned)

    base = torch.randn(4, 5)
    tuned = torch.where(base > 0, base * 2, base)
    for run in (
        torch.compile(again, fullgraph=True, backend="aot_eager"),
        torch.export.export(Module(), (base, tuned)).module(),
    ):
        assert torch.equal(run(base, tuned), tuned.view(-1))


def test_many_elements_give_int64() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        for numel, dtype in ((2**31, torch.int64), (2**31 - 1, torch.int32)):
            tensor = torch.empty(numel, dtype=torch.uint8)
            assert torch.ops.shira.extract_changed(tensor, tensor)[0].dtype == dtype
