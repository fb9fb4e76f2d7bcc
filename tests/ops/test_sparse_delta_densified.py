"""The way that the products with one adapter go in Triton where many entries meet many tokens: written out dense."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import sparse_delta as shared
import torch
from backend_matrix import Backend, each_backend_of
from oracle import bits
from sparse_delta import INDICES, csr, random_mask, run_single

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from shira_kernels.triton import _densified_delta, _library_product, _sparse_delta


@dataclass(frozen=True)
class Densified(Backend):
    """Triton, made to go this way, in small panels."""

    @contextlib.contextmanager
    def running(self, times: int = 1) -> Iterator[None]:
        with (
            mock.patch.multiple(_library_product, PANEL_BYTES=1, PANEL_ROWS=16),
            mock.patch.multiple(_densified_delta, is_densified=lambda *_: True, ENTRIES=16, TOKENS=16, ROWS=16),
            mock.patch.object(_densified_delta, "densified_product", wraps=_densified_delta.densified_product) as taken,
            mock.patch.object(_densified_delta, "product", side_effect=AssertionError("it went the sparse way")),
            super().running(times),
        ):
            yield
        assert taken.call_count == times


each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(Densified("triton", parameter.values[0].device), marks=parameter.marks, id=parameter.id)
        for parameter in each_backend_of("sparse_delta_mm").args[1]
        if parameter.values[0].name == "triton"
    ],
)
NARROW = (torch.bfloat16, torch.float16)


@each_backend
@pytest.mark.parametrize(("row_ptr_dtype", "col_dtype"), INDICES, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("into", [False, True], ids=["product", "added"])
def test_entries(
    backend: Backend, into: bool, dtype: torch.dtype, row_ptr_dtype: torch.dtype, col_dtype: torch.dtype
) -> None:
    mask = random_mask(39, 40, 0.2)
    mask[::7], mask[3] = False, True  # rows without entries, and one in which every column has its entry
    run_single(backend, into, (2, 20), mask, dtype, dtype, row_ptr_dtype, col_dtype)


@each_backend
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "density"),
    [
        ((1,), 1, 1, 1.0),
        ((), 5, 7, 0.5),
        ((3,), 17, 1, 0.5),
        ((9,), 32, 7, 0.0),
        ((9,), 33, 7, 1.0),
        ((3, 11), 16, 33, 0.9),
        ((65,), 7, 19, 0.3),
    ],
)
@pytest.mark.parametrize("into", [False, True], ids=["product", "added"])
def test_shapes(backend: Backend, into: bool, tokens: tuple[int, ...], rows: int, columns: int, density: float) -> None:
    run_single(backend, into, tokens, random_mask(rows, columns, density), torch.bfloat16)


@each_backend
def test_larger_layers(backend: Backend) -> None:
    if backend.device == "cpu":
        pytest.skip("takes the interpreter too long")
    for rows, columns, dtype in ((300, 500, torch.bfloat16), (90, 1300, torch.float16)):
        mask = random_mask(rows, columns, 0.05)
        mask[0] = True
        run_single(backend, True, (300,), mask, dtype)


@each_backend
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_are_the_library_s_unless_they_are_not_finite(backend: Backend, dtype: torch.dtype) -> None:
    """Token 1 is infinite where row 0 has no entry and row 1 has one, token 2 a NaN where no row has one."""
    mask = random_mask(20, 30, 0.5)
    mask[0, 4], mask[1, 4], mask[:, 7] = False, True, False
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    values = torch.ones(col.numel(), dtype=dtype)
    x = torch.ones(20, 30, dtype=dtype)
    x[1, 4], x[2, 7] = float("inf"), float("nan")
    operands = [tensor.to(backend.device) for tensor in (x, row_ptr, col, values)]

    def elsewhere(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        _library_product.multiply(a, b, out)
        out.add_(100)

    with backend.running(), mock.patch.object(_densified_delta, "multiply", elsewhere):
        result = torch.ops.shira.sparse_delta_mm(*operands, 20).cpu().float()
    counts = mask.sum(1).float()
    expected = (counts + 100).repeat(20, 1)
    expected[1] = torch.where(mask[:, 4], float("inf"), counts)
    expected[2] = counts
    assert torch.equal(result, expected.to(dtype).float())


@each_backend
@pytest.mark.parametrize("into", [False, True], ids=["product", "added"])
def test_values_that_are_not_finite_stay_in_their_rows(backend: Backend, into: bool) -> None:
    mask = torch.ones(18, 20, dtype=torch.bool)
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    values, x = torch.ones(360, dtype=torch.bfloat16), torch.ones(5, 20, dtype=torch.bfloat16)
    values[25], values[50], x[3, 5], x[3, 10] = float("inf"), float("nan"), 0.0, -1.0
    operands = [tensor.to(backend.device) for tensor in (x, row_ptr, col, values)]
    out = torch.zeros(5, 18, dtype=torch.bfloat16, device=backend.device)
    with backend.running():
        if into:
            torch.ops.shira.add_sparse_delta_mm(out, *operands)
        else:
            out = torch.ops.shira.sparse_delta_mm(*operands, 18)
    expected = (x.double() @ values.view(18, 20).double().T).float()
    assert torch.equal(out.cpu().float().nan_to_num(nan=-7), expected.nan_to_num(nan=-7))


@each_backend
def test_the_same_input_gives_the_same_bits(backend: Backend) -> None:
    row_ptr, col = csr(random_mask(40, 60, 0.5), torch.int32, torch.uint16)
    x, values = torch.randn(40, 60).bfloat16(), torch.randn(col.numel()).bfloat16()
    operands = [tensor.to(backend.device) for tensor in (x, row_ptr, col, values)]
    with backend.running(times=2):
        first, again = (torch.ops.shira.sparse_delta_mm(*operands, 40) for _ in range(2))
    assert torch.equal(bits(first), bits(again))


def test_the_way_is_chosen_by_what_it_costs() -> None:
    is_densified = _densified_delta.is_densified
    entries = 4096 * 4096 // 100
    assert is_densified(2048, 4096, 4096, 2 * entries)
    assert is_densified(8192, 4096, 11008, 5 * entries)
    assert not is_densified(2048, 4096, 4096, entries), "1 % takes less time sparse"
    assert not is_densified(256, 4096, 4096, 2 * entries), "a panel is filled for too few tokens"
    assert not is_densified(2**31, 4096, 4096, 2 * entries), "the library counts in 32 bits"


@pytest.mark.skipif(bool(Backend("triton").missing("sparse_delta_mm")), reason="Triton in its interpreter")
@pytest.mark.parametrize(
    ("dtype", "value_dtype", "exact", "dense"),
    [
        (torch.bfloat16, torch.bfloat16, True, True),
        (torch.bfloat16, torch.bfloat16, False, False),
        (torch.bfloat16, torch.float32, True, False),  # values would be rounded
        (torch.float32, torch.float32, True, False),  # CUDA cores multiply
        (torch.float64, torch.float64, True, False),
    ],
    ids=str,
)
def test_only_what_the_library_multiplies_exactly_goes_this_way(
    dtype: torch.dtype, value_dtype: torch.dtype, exact: bool, dense: bool
) -> None:
    row_ptr, col = csr(random_mask(5, 9, 0.5), torch.int32, torch.uint16)
    x, values = torch.randn(3, 9).to(dtype), torch.randn(col.numel()).to(value_dtype)
    with (
        mock.patch.multiple(_densified_delta, is_densified=lambda *_: True, is_exact=lambda _: exact),
        mock.patch.object(_densified_delta, "densified_product", wraps=_densified_delta.densified_product) as taken,
        Backend("triton").running(2),
    ):
        result = torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, 5)
        torch.ops.shira.add_sparse_delta_mm(result, x, row_ptr, col, values)
    assert taken.call_count == (2 if dense else 0)


@each_backend
def test_nothing_outside_is_touched_whatever_the_entries(backend: Backend) -> None:
    """Triton kernels check no contents on a GPU. Around operands lies NaN, which would show if it were read."""
    generator = torch.Generator().manual_seed(0)

    def guarded(tensor: torch.Tensor, poison: float) -> torch.Tensor:
        around = torch.full((tensor.numel() + 2000,), poison, dtype=tensor.dtype, device=backend.device)
        around[1000:-1000] = tensor.flatten().to(backend.device)
        return around[1000:-1000].view(tensor.shape)

    def wild(*shape: int) -> torch.Tensor:
        """Half of them far outside, half near 0."""
        far = torch.randint(-(2**31), 2**31, shape, generator=generator)
        near = torch.randint(-20, 60, shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, far, near).to(torch.int32)

    for row_ptr in (wild(6), torch.arange(6, dtype=torch.int32) * 9):
        x, out = torch.ones(7, 9, dtype=torch.bfloat16), torch.ones(7, 5, dtype=torch.bfloat16)
        x[1, 2] = float("inf")
        x, out = guarded(x, float("nan")), guarded(out, 7.0)
        col, values = guarded(wild(48), 3), guarded(torch.ones(48, dtype=torch.bfloat16), float("nan"))
        with mock.patch.multiple(_library_product, PANEL_BYTES=1, PANEL_ROWS=2):
            _densified_delta.densified_product(out, x, row_ptr.to(backend.device), col, values, add=True)
        assert out[[0, 2, 3, 4, 5, 6]].isfinite().all()
        assert not out.isnan().any()
        assert out.new_empty(0).set_(out.untyped_storage()).eq(7).sum() >= 2000
    there = [set(columns) & set(range(9)) for columns in col.cpu()[:45].view(5, 9).tolist()]
    assert out[0].tolist() == [1 + len(columns) for columns in there] != [1] * 5


@pytest.mark.parametrize("into", [False, True], ids=["product", "added"])
@pytest.mark.parametrize(("dtype", "value_dtype"), shared.PAIRS, ids=str)
@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize(
    "backend", [p for p in each_backend_of("sparse_delta_mm_batched").args[1] if p.values[0].name == "triton"]
)
def test_wide_tiles(
    backend: Backend, page_size: int | None, dtype: torch.dtype, value_dtype: torch.dtype, into: bool
) -> None:
    """Which the sparse way has for many tokens of few adapters."""
    launched: list[int] = []

    def spy(**constants: Any) -> None:
        launched.append(constants["TOKENS"])

    widths = {"MANY_TOKENS": 8, "WIDE_TOKENS": 32, "TOKENS": 16}
    with mock.patch.multiple(_sparse_delta, **widths), recorded(_sparse_delta, "prefill_kernel", spy):
        masks = shared.mixed_masks(9, 30, 0.2)
        shared.run_batched(backend, into, (43,), masks, dtype, value_dtype, page_size=page_size)
        run_single(backend, into, (43,), masks[0], dtype, value_dtype)
        run_single(backend, into, (17,), masks[0], dtype, value_dtype)
    assert launched == [32, 32, 32]
    with (
        mock.patch.multiple(_sparse_delta, **{**widths, "MANY_TOKENS": 9}),
        recorded(_sparse_delta, "prefill_kernel", spy),
    ):
        shared.run_batched(backend, into, (43,), masks, dtype, value_dtype, page_size=page_size)
    assert launched[3:] == [16], "43 tokens are few for five slots"


@contextlib.contextmanager
def recorded(module: Any, name: str, spy: Any) -> Iterator[None]:
    """Calls `spy` with the keyword arguments of a kernel's launches."""
    kernel = getattr(module, name)

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> Any:
                spy(**kwargs)
                return kernel[grid](*args, **kwargs)

            return launch

    with mock.patch.object(module, name, Launched()):
        yield
