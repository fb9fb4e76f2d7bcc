from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from backend_matrix import Backend, but_the_interpreter, each_backend_of
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bits, ulp_distance
from sparse_delta import csr, random_mask

import shira_kernels
from shira_kernels import backends


@dataclass(frozen=True)
class Way(Backend):
    """Triton, made to go one of its two ways: by tiles, or by panels, which are small here."""

    way: str = ""

    @property
    def kernel(self) -> str:
        return self.name

    @contextlib.contextmanager
    def running(self, times: int = 1) -> Iterator[None]:
        from shira_kernels.triton import _library_product, masked_grad

        other = "by_tiles" if self.way == "by_panels" else "by_panels"
        with (
            mock.patch.multiple(_library_product, PANEL_BYTES=1, PANEL_ROWS=16),
            mock.patch.multiple(masked_grad, uses_panels=lambda *_: self.way == "by_panels", ENTRIES=32),
            mock.patch.object(masked_grad, self.way, wraps=getattr(masked_grad, self.way)) as taken,
            mock.patch.object(masked_grad, other, side_effect=AssertionError(f"it went {other}")),
            super().running(times),
        ):
            yield
        assert taken.call_count <= times  # 0 where there is nothing to sum


def ways_of(parameter: Any) -> list[Any]:
    """Of a backend: itself, or where it is Triton both of its ways."""
    backend = parameter.values[0]
    if backend.name != "triton":
        return [parameter]
    return [
        pytest.param(Way("triton", backend.device, way=way), marks=parameter.marks, id=f"{parameter.id}-{way}")
        for way in ("by_tiles", "by_panels")
    ]


each_backend = pytest.mark.parametrize(
    "backend", [way for parameter in each_backend_of("masked_grad").args[1] for way in ways_of(parameter)]
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Units in the last place of the sum of the products' magnitudes. float32 sums of products, in any order.
ULP = 4.0


def check_case(
    backend: Backend,
    dtype: torch.dtype,
    tokens: tuple[int, ...],
    mask: torch.Tensor,
    row_ptr_dtype: torch.dtype = torch.int32,
    col_dtype: torch.dtype = torch.uint16,
) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = mask.shape
    g = torch.randn(*tokens, rows, generator=generator).to(dtype)
    x = torch.randn(*tokens, columns, generator=generator).to(dtype)
    row_ptr, col = csr(mask, row_ptr_dtype, col_dtype)
    arguments = [tensor.to(backend.device) for tensor in (g, x, row_ptr, col)]
    before = [bits(tensor) for tensor in arguments]
    with backend.running():
        sums = torch.ops.shira.masked_grad(*arguments)
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    assert sums.shape == (int(mask.sum()),)
    wide_g, wide_x = g.double().reshape(-1, rows), x.double().reshape(-1, columns)
    exact, scale = (wide_g.T @ wide_x)[mask], (wide_g.abs().T @ wide_x.abs())[mask]
    assert ulp_distance(sums.cpu(), exact, scale) <= ULP
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(arguments, before, strict=True))
    with backend.running():
        again = torch.ops.shira.masked_grad(*arguments)
    assert torch.equal(bits(again), bits(sums)), "the same input gives the same bits"


@each_backend
@pytest.mark.parametrize("row_ptr_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("col_dtype", [torch.int32, torch.uint16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries(backend: Backend, dtype: torch.dtype, col_dtype: torch.dtype, row_ptr_dtype: torch.dtype) -> None:
    check_case(backend, dtype, (3, 23), random_mask(70, 97, 0.1), row_ptr_dtype, col_dtype)


@each_backend
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "density"),
    [
        ((1,), 1, 1, 1.0),
        ((), 5, 7, 0.5),  # one token, no leading dimension
        ((0,), 5, 7, 0.5),
        ((4, 0), 5, 7, 0.5),
        ((9,), 5, 7, 0.0),
        ((9,), 6, 7, 1.0),
        ((2, 3, 4), 33, 65, 0.2),
        ((129,), 3, 40, 0.3),  # more than one block of tokens of float32
        ((300,), 130, 4, 0.3),  # of bfloat16
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(
    backend: Backend, dtype: torch.dtype, tokens: tuple[int, ...], rows: int, columns: int, density: float
) -> None:
    check_case(backend, dtype, tokens, random_mask(rows, columns, density))


@each_backend
def test_masks_with_empty_rows_and_columns(backend: Backend) -> None:
    rows = torch.zeros(140, 90, dtype=torch.bool)
    rows[::40] = True
    columns = torch.zeros(70, 140, dtype=torch.bool)
    columns[:, 130] = True
    for mask in (rows, columns, torch.eye(140, 90, dtype=torch.bool)):
        check_case(backend, torch.float32, (5,), mask)


each_backend_but_the_interpreter = but_the_interpreter(each_backend)


@each_backend_but_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_panels_of_columns(backend: Backend, dtype: torch.dtype) -> None:
    for rows, columns in ((2, 2048), (2, 2049), (150, 4200)):
        check_case(backend, dtype, (3,), random_mask(rows, columns, 0.02))
    last = torch.zeros(70, 4100, dtype=torch.bool)
    last[:, 4097] = True  # nothing in the first panels
    check_case(backend, dtype, (3,), last)


@each_backend_but_the_interpreter
def test_wide_layers(backend: Backend) -> None:
    """uint16 columns reach to 65 535; wider layers take int32."""
    mask = torch.zeros(2, 70_000, dtype=torch.bool)
    mask[0, [0, 32_767, 32_768, 65_535]] = True
    check_case(backend, torch.float32, (2,), mask)
    mask[1, [65_536, 69_999]] = True
    check_case(backend, torch.float32, (2,), mask, col_dtype=torch.int32)


@each_backend
def test_operands_may_have_any_strides(backend: Backend) -> None:
    mask = random_mask(6, 8, 0.4)
    row_ptr, col = (tensor.to(backend.device) for tensor in csr(mask, torch.int32, torch.uint16))
    g = torch.randn(6, 10, device=backend.device).t()
    x = torch.randn(10, 16, device=backend.device)[:, ::2]
    expanded = torch.ones((), device=backend.device).expand(10, 6)
    for operand in (g, expanded):
        with backend.running():
            sums = torch.ops.shira.masked_grad(operand, x, row_ptr, col)
        torch.testing.assert_close(sums.cpu(), (operand.T @ x).cpu()[mask])


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_entries(backend: Backend, dtype: torch.dtype) -> None:
    """Also beside the zeros that fill up a block."""
    mask = torch.ones(5, 20, dtype=torch.bool)
    g, x = torch.ones(7, 5, dtype=dtype), torch.ones(7, 20, dtype=dtype)
    g[3, 1], x[2, 4], x[6, 19] = float("nan"), float("inf"), float("-inf")
    arguments = [tensor.to(backend.device) for tensor in (g, x, *csr(mask, torch.int32, torch.uint16))]
    with backend.running():
        sums = torch.ops.shira.masked_grad(*arguments).cpu().view(5, 20)
    expected = torch.full((5, 20), 7.0, dtype=sums.dtype)
    expected[:, 4], expected[:, 19] = float("inf"), float("-inf")
    expected[1] = float("nan")
    assert torch.equal(sums.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(backends.extension.runnable_isas() if backends.extension else [""]),
)
def test_any_shape(tokens: int, rows: int, columns: int, density: float, dtype: torch.dtype, isa: str) -> None:
    backend = Backend("cpu", isa=isa) if isa else Backend("reference")
    check_case(backend, dtype, (tokens,), random_mask(rows, columns, density))


def test_same_bits_at_any_number_of_threads() -> None:
    mask = random_mask(520, 2500, 0.02)
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        g, x = torch.randn(200, 520).to(dtype), torch.randn(200, 2500).to(dtype)
        results = []
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                results.append(torch.ops.shira.masked_grad(g, x, row_ptr, col))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


def test_the_way_is_chosen_by_what_it_costs() -> None:
    pytest.importorskip("triton")
    from shira_kernels.triton.masked_grad import uses_panels

    assert uses_panels(4096, 4096, 4096, 2**24 // 50)
    assert uses_panels(4096, 4096, 11008, 4096 * 11008 // 100)
    assert uses_panels(16, 4096, 4096, 2**24 // 50)
    assert not uses_panels(15, 4096, 4096, 2**24 // 50), "launches cost more than so few products"
    assert not uses_panels(4096, 4096, 4096, 500), "tiles that hold entries are an eighth of all"
    assert not uses_panels(2**31, 4096, 4096, 2**24 // 50), "the library counts in 32 bits"


@pytest.mark.skipif(bool(Backend("triton").missing("masked_grad")), reason="Triton in its interpreter")
def test_triton_goes_the_way_that_is_chosen() -> None:
    """Large enough for panels."""
    from shira_kernels.triton import masked_grad

    mask = random_mask(64, 4096, 0.02)
    g, x = torch.randn(2**10, 64, dtype=torch.float64), torch.randn(2**10, 4096, dtype=torch.float64)
    arguments = g, x, *csr(mask, torch.int32, torch.uint16)
    expected = torch.ops.shira.masked_grad(*arguments)
    for way, exact in (("by_panels", True), ("by_tiles", False)):
        with (
            mock.patch.object(masked_grad, "is_exact", return_value=exact),
            mock.patch.object(masked_grad, way, wraps=getattr(masked_grad, way)) as taken,
            Backend("triton").running(),
        ):
            torch.testing.assert_close(torch.ops.shira.masked_grad(*arguments), expected)
        assert taken.call_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_settings_that_would_round_have_another_kernel_run() -> None:
    from shira_kernels.triton._library_product import is_exact

    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision, settings.allow_fp16_accumulation
    wide, half = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.float16)
    try:
        settings.fp32_precision, settings.allow_fp16_accumulation = "ieee", False
        assert is_exact(wide)
        assert is_exact(half)
        settings.fp32_precision, settings.allow_fp16_accumulation = "tf32", True
        assert not is_exact(wide)
        assert not is_exact(half)
        assert is_exact(half.double())
        assert is_exact(half.bfloat16())
    finally:
        settings.fp32_precision, settings.allow_fp16_accumulation = before


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(bool(Backend("triton").missing("masked_grad")), reason="no Triton")
        ),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
@pytest.mark.parametrize("way", ["by_tiles", "by_panels"])
def test_triton_touches_nothing_outside_whatever_the_entries(way: str, device: str) -> None:
    """Triton kernels check no contents on a GPU. Around operands lies NaN, which would show if it were read."""
    from shira_kernels.triton import _library_product, masked_grad

    def guarded(tensor: torch.Tensor, poison: float) -> torch.Tensor:
        around = torch.full((tensor.numel() + 20000,), poison, dtype=tensor.dtype, device=device)
        around[10000:-10000] = tensor.flatten().to(device)
        return around[10000:-10000].view(tensor.shape)

    generator = torch.Generator().manual_seed(0)

    def wild(*shape: int) -> torch.Tensor:
        """Half of them far outside, half near 0."""
        far = torch.randint(-(2**31), 2**31, shape, generator=generator)
        near = torch.randint(-20, 60, shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, far, near).to(device, torch.int32)

    for row_ptr in (wild(6), torch.arange(6, device=device, dtype=torch.int32) * 10):
        g, x = guarded(torch.ones(4, 5), float("nan")), guarded(torch.ones(4, 9), float("nan"))
        col, sums = guarded(wild(48), 3), guarded(torch.zeros(48), 7.0)
        small = mock.patch.multiple(_library_product, PANEL_BYTES=1, PANEL_ROWS=2)
        with small, mock.patch.multiple(masked_grad, ENTRIES=16):
            getattr(masked_grad, way)(g, x, row_ptr, col, sums)
        assert sums.isfinite().all()
        assert sums.new_empty(0).set_(sums.untyped_storage()).eq(7).sum() >= 20000
        if way == "by_panels":
            assert sums[(col < 0) | (col >= 9)].eq(0).all()
    assert sums.eq(4).any(), "entries that are there are summed"


def good_arguments(device: str = "cpu") -> dict[str, Any]:
    """Of a weight [3, 4] with entries (0, 1), (0, 3), (2, 0), and two tokens."""
    return {
        "grad_output": torch.arange(6.0, device=device).view(2, 3),
        "x": torch.arange(8.0, device=device).view(2, 4),
        "row_ptr": torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device),
        "col": torch.tensor([1, 3, 0], dtype=torch.int32, device=device),
    }


BAD = [
    ("x", lambda t: t.int(), "x must be float64"),
    ("x", lambda t: t[0, 0], "x must have at least one dimension"),
    ("x", lambda t: t[0], "grad_output must be .* beside x"),
    ("x", lambda t: t[:1], "grad_output must be .* beside x"),
    ("x", lambda t: t.to_sparse(), "x must be a strided tensor|[Ss]parse"),
    ("x", lambda t: t[:, :3], "col must lie in"),
    ("grad_output", lambda t: t.double(), r"grad_output must be torch\.float32 like x"),
    ("grad_output", lambda t: t[:, :2], "row_ptr must have one entry more than grad_output has columns"),
    ("row_ptr", lambda t: t.float(), "row_ptr must be int32 or int64"),
    ("row_ptr", lambda t: t.view(2, 2), "row_ptr must be 1-D"),
    ("row_ptr", lambda t: t.repeat_interleave(2)[::2], "row_ptr must be contiguous"),
    ("row_ptr", lambda t: t - 1, "row_ptr must rise from 0"),
    ("row_ptr", lambda t: t * 2, "row_ptr must rise from 0"),
    ("row_ptr", lambda t: t.new_tensor([0, 3, 2, 3]), "row_ptr must rise from 0"),
    ("col", lambda t: t.long(), "col must be int32 or uint16"),
    ("col", lambda t: t.view(3, 1), "col must be 1-D"),
    ("col", lambda t: t.repeat_interleave(2)[::2], "col must be contiguous"),
    ("col", lambda t: t[:2], "row_ptr must rise from 0"),
    ("col", lambda t: t[[1, 0, 2]], "col must be sorted and unique"),
    ("col", lambda t: t[[1, 1, 2]], "col must be sorted and unique"),
    ("col", lambda t: t - 1, "col must lie in"),
    ("col", lambda t: t + 1, "col must lie in"),
]


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
@pytest.mark.parametrize(("argument", "change", "message"), BAD)
def test_bad_input(backend: Backend, wrapped: bool, argument: str, change: Any, message: str) -> None:
    arguments = good_arguments(backend.device)
    arguments[argument] = change(arguments[argument])
    call = shira_kernels.masked_grad if wrapped else torch.ops.shira.masked_grad
    with (
        pytest.raises((RuntimeError, NotImplementedError), match=message),
        backends.checked(),
        backend.running(times=0),
    ):
        call(**arguments)


@pytest.mark.parametrize("argument", ["grad_output", "x"])
@each_backend
def test_it_is_not_differentiable(backend: Backend, argument: str) -> None:
    arguments = good_arguments(backend.device)
    arguments[argument].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{argument} requires grad"), backend.running(times=0):
        torch.ops.shira.masked_grad(**arguments)
    with torch.no_grad(), backend.running():
        assert torch.ops.shira.masked_grad(**arguments).tolist() == [15.0, 21.0, 20.0]


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.shira.masked_grad.default, tuple(good_arguments().values()))


def test_compile_and_export() -> None:
    def double(**arguments: torch.Tensor) -> torch.Tensor:
        return 2 * torch.ops.shira.masked_grad(**arguments)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=True)
    assert compiled(**good_arguments()).tolist() == [30.0, 42.0, 40.0]

    class Double(torch.nn.Module):
        def forward(self, **arguments: torch.Tensor) -> torch.Tensor:
            return double(**arguments)

    exported = torch.export.export(Double(), (), good_arguments()).module()
    assert exported(**good_arguments()).tolist() == [30.0, 42.0, 40.0]


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    before = backends.calls()
    shira_kernels.masked_grad(**good_arguments())
    assert backends.calls() - before == {backends.active("masked_grad", "cpu"): 1} == {fastest: 1}
