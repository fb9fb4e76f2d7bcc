from __future__ import annotations

from typing import Any

import pytest
import sparse_delta as shared
import torch
from backend_matrix import Backend, but_the_interpreter, each_backend_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_delta import (
    DTYPES,
    INDICES,
    PAIRS,
    SINGLE_RESULT,
    SINGLE_SHAPES,
    csr,
    masks_with_gaps,
    random_mask,
    run_single,
    single_arguments,
)

import shira_kernels
from shira_kernels import backends

each_backend = each_backend_of("sparse_delta_mm")
each_backend_but_the_interpreter = but_the_interpreter(each_backend)


@each_backend
@pytest.mark.parametrize(("row_ptr_dtype", "col_dtype"), INDICES, ids=str)
@pytest.mark.parametrize(("dtype", "value_dtype"), PAIRS, ids=str)
def test_entries(
    backend: Backend,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    row_ptr_dtype: torch.dtype,
    col_dtype: torch.dtype,
) -> None:
    for tokens in ((3,), (2, 20)):
        run_single(backend, False, tokens, random_mask(13, 40, 0.2), dtype, value_dtype, row_ptr_dtype, col_dtype)


@each_backend
@pytest.mark.parametrize(("tokens", "rows", "columns", "density"), SINGLE_SHAPES)
def test_shapes(backend: Backend, tokens: tuple[int, ...], rows: int, columns: int, density: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run_single(backend, False, tokens, random_mask(rows, columns, density), dtype)


@each_backend
def test_masks_with_empty_rows_and_columns(backend: Backend) -> None:
    for mask in masks_with_gaps():
        for tokens in (2, 33):
            run_single(backend, False, (tokens,), mask)


@each_backend_but_the_interpreter
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 300, 500), (5, 700, 90), (130, 90, 700), (600, 40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_layers(backend: Backend, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    run_single(backend, False, (tokens,), random_mask(rows, columns, 0.05), dtype)


@each_backend_but_the_interpreter
def test_wide_layers(backend: Backend) -> None:
    """uint16 columns reach to 65 535; wider layers take int32."""
    mask = torch.zeros(2, 70_000, dtype=torch.bool)
    mask[0, [0, 32_767, 32_768, 65_535]] = True
    for tokens in (1, 40):
        run_single(backend, False, (tokens,), mask)
    mask[1, [65_536, 69_999]] = True
    for tokens in (1, 40):
        run_single(backend, False, (tokens,), mask, col_dtype=torch.int32)


@each_backend
def test_x_may_have_any_strides(backend: Backend) -> None:
    mask = random_mask(6, 8, 0.4)
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    values = shared.numbers((col.numel(),), torch.float32, 1)
    operands = [tensor.to(backend.device) for tensor in (row_ptr, col, values)]
    for x in (torch.randn(8, 5).t(), torch.randn(5, 16)[:, ::2], torch.randn(8).expand(5, 8), torch.randn(9, 8)[::2]):
        with backend.running():
            result = torch.ops.shira.sparse_delta_mm(x.to(backend.device), *operands, 6)
        shared.assert_sums(result.cpu(), x, shared.dense(mask, values))
    lazy = torch._neg_view(torch.randn(5, 8))
    with backend.running():
        result = torch.ops.shira.sparse_delta_mm(lazy.to(backend.device), *operands, 6)
    shared.assert_sums(result.cpu(), lazy.resolve_neg(), shared.dense(mask, values))


@each_backend
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_sums(backend: Backend, dtype: torch.dtype, tokens: int) -> None:
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 4] = False
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    values, x = torch.ones(59, dtype=dtype), torch.ones(tokens, 20, dtype=dtype)
    values[-1], x[1, 4] = float("inf"), float("nan")
    with backend.running():
        result = torch.ops.shira.sparse_delta_mm(*(t.to(backend.device) for t in (x, row_ptr, col, values)), 3)
    expected = torch.tensor([20, 19, float("inf")]).repeat(tokens, 1)
    expected[1, 0] = expected[1, 2] = float("nan")
    assert torch.equal(result.cpu().float().nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    rows=st.integers(0, 12),
    columns=st.integers(1, 40),
    density=st.floats(0, 1),
    pair=st.sampled_from(PAIRS),
    into=st.booleans(),
    isa=st.sampled_from(backends.extension.runnable_isas() if backends.extension else [""]),
)
def test_any_shape(
    tokens: int, rows: int, columns: int, density: float, pair: tuple[torch.dtype, torch.dtype], into: bool, isa: str
) -> None:
    backend = Backend("cpu", isa=isa)
    if not isa or backend.missing("sparse_delta_mm"):
        backend = Backend("reference")
    run_single(backend, into, (tokens,), random_mask(rows, columns, density), *pair)


@each_backend
@pytest.mark.parametrize("tokens", [3, 40])
def test_the_same_input_gives_the_same_bits(backend: Backend, tokens: int) -> None:
    mask = random_mask(9, 60, 0.5)
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    x, values = torch.randn(tokens, 60), torch.randn(col.numel())
    arguments = [tensor.to(backend.device) for tensor in (x, row_ptr, col, values)]
    with backend.running(times=2):
        first, again = (torch.ops.shira.sparse_delta_mm(*arguments, 9) for _ in range(2))
    assert torch.equal(first, again)


def test_same_bits_at_any_number_of_threads() -> None:
    mask = random_mask(520, 900, 0.05)
    row_ptr, col = csr(mask, torch.int32, torch.uint16)
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 5, 200):
            x, values, results = torch.randn(tokens, 900).to(dtype), torch.randn(col.numel()).to(dtype), []
            try:
                for number in (1, 2, 3, 7):
                    torch.set_num_threads(number)
                    results.append(torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, 520))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(result, results[0]) for result in results)


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
def test_bad_input(backend: Backend, wrapped: bool) -> None:
    call = shira_kernels.sparse_delta_mm if wrapped else torch.ops.shira.sparse_delta_mm
    arguments = {**single_arguments(backend.device), "out_features": 3}
    for change in (*shared.BAD_SINGLE, ("out_features", lambda _: 4, r"row_ptr must have .* out_features \(5\)")):
        shared.check_refused(backend, call, arguments, *change)


@each_backend
def test_inference_mode(backend: Backend) -> None:
    with torch.inference_mode(), backend.running():
        result = torch.ops.shira.sparse_delta_mm(**single_arguments(backend.device), out_features=3)
    assert result.tolist() == SINGLE_RESULT


def test_opcheck() -> None:
    for x in (torch.randn(2, 4), torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(4)):
        arguments = {**single_arguments(), "x": x}
        arguments["values"] = arguments["values"].to(x.dtype)
        torch.library.opcheck(torch.ops.shira.sparse_delta_mm.default, (*arguments.values(), 3))
    x, row_ptr, col, values = gradient_arguments(torch.float32, (2, 3), torch.float32)
    torch.library.opcheck(torch.ops.shira.sparse_delta_mm.default, (x, row_ptr, col, values, 7))


def mask_of_gradients() -> torch.Tensor:
    """With an empty row and an empty column."""
    mask = random_mask(7, 9, 0.4)
    mask[3], mask[:, 5] = False, False
    return mask


def gradient_arguments(dtype: torch.dtype, tokens: tuple[int, ...], value_dtype: torch.dtype) -> list[torch.Tensor]:
    row_ptr, col = csr(mask_of_gradients(), torch.int32, torch.uint16)
    x, values = shared.numbers((*tokens, 9), dtype, 1), shared.numbers((col.numel(),), value_dtype, 2)
    return [x.requires_grad_(), row_ptr, col, values.requires_grad_()]


@each_backend
def test_gradients_are_those_of_differences(backend: Backend) -> None:
    if backend.name == "triton" and backend.device == "cpu":
        tokens: tuple[int, ...] = (1,)  # the interpreter is slow
    else:
        tokens = (2, 3)
    x, row_ptr, col, values = (t.detach().to(backend.device) for t in gradient_arguments(DTYPES[0], tokens, DTYPES[0]))

    def product(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with backends.use(backend.name, isa=backend.isa):
            return torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, 7)

    for x_needed, values_needed in ((True, True), (False, True), (True, False)):
        inputs = x.clone().requires_grad_(x_needed), values.clone().requires_grad_(values_needed)
        assert torch.autograd.gradcheck(product, inputs, fast_mode=True)


@each_backend
@pytest.mark.parametrize(("dtype", "value_dtype"), PAIRS, ids=str)
def test_gradients(backend: Backend, dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    leaves = [t.detach().to(backend.device) for t in gradient_arguments(dtype, (2, 3), value_dtype)]
    x, row_ptr, col, values = leaves
    x.requires_grad_(), values.requires_grad_()
    with backend.running(times=3):  # the product, and masked_grad and the transposed product
        result = torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, out_features=7)
        assert result.requires_grad
        grad = shared.numbers((7, 2, 3), dtype, 4).to(backend.device).permute(1, 2, 0)
        result.backward(grad)
    mask = mask_of_gradients()
    wide = [x.detach().double().cpu(), shared.dense(mask, values.detach().cpu()), grad.double().cpu()]
    grad_x = wide[2] @ wide[1]
    grad_values = (wide[2].reshape(6, 7).T @ wide[0].reshape(6, 9))[mask]
    for leaf, expected in ((x, grad_x), (values, grad_values)):
        assert leaf.grad.dtype == leaf.dtype
        tolerance = 4 * torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(leaf.grad.double().cpu(), expected, rtol=tolerance, atol=4 * tolerance)


@each_backend
def test_gradients_stay_on_the_backend_that_was_forced(backend: Backend) -> None:
    x, row_ptr, col, values = (t.detach().to(backend.device) for t in gradient_arguments(DTYPES[1], (2,), DTYPES[1]))
    with backends.use(backend.name, isa=backend.isa):
        result = torch.ops.shira.sparse_delta_mm(x.requires_grad_(), row_ptr, col, values.requires_grad_(), 7)
    before = backends.calls()
    result.sum().backward()
    assert backends.calls() - before == {backend.kernel: 2}


def test_a_gradient_is_not_differentiable() -> None:
    x, row_ptr, col, values = gradient_arguments(torch.float32, (2,), torch.float32)
    result = torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, 7)
    for leaf in (x, values):
        with pytest.raises(RuntimeError, match="requires grad"):
            torch.autograd.grad(result.square().sum(), leaf, create_graph=True)


def test_without_gradients_nothing_is_kept() -> None:
    x, row_ptr, col, values = gradient_arguments(torch.float32, (2,), torch.float32)
    with torch.no_grad():
        assert torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values, 7).grad_fn is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        torch.ops.shira.sparse_delta_mm(x, row_ptr, col, values.detach(), 7)
    assert x.data_ptr() not in kept, "x is only needed for the gradient of the values"


@pytest.mark.parametrize("requires", ["x", "values", "both"])
def test_compiled_gradients(requires: str) -> None:
    compiled = torch.compile(
        lambda *arguments: torch.ops.shira.sparse_delta_mm(*arguments, 7).square().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for tokens in ((4,), (6,)):
        results = []
        for function in (lambda *a: torch.ops.shira.sparse_delta_mm(*a, 7).square().sum(), compiled):
            x, row_ptr, col, values = gradient_arguments(torch.float32, tokens, torch.float32)
            x.requires_grad_(requires != "values"), values.requires_grad_(requires != "x")
            before = backends.calls()
            function(x, row_ptr, col, values).backward()
            assert sum((backends.calls() - before).values()) == (3 if requires == "both" else 2)
            results.append((x.grad, values.grad))
        for eager, got in zip(*results, strict=True):
            assert eager is got is None or torch.equal(eager, got)


def changing(tokens: int) -> dict[str, Any]:
    return {**single_arguments(), "x": torch.arange(4.0 * tokens).view(tokens, 4)}


def double(**arguments: torch.Tensor) -> torch.Tensor:
    return 2 * torch.ops.shira.sparse_delta_mm(**arguments, out_features=3)


def test_compile() -> None:
    shared.check_compiled(double, changing, ["x"])


def test_export() -> None:
    shared.check_exported(double, changing, ["x"])


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    if backends.reason_unavailable("sparse_delta_mm", "cpu"):
        fastest = "reference"
    before = backends.calls()
    shira_kernels.sparse_delta_mm(**single_arguments(), out_features=3)
    assert backends.calls() - before == {backends.active("sparse_delta_mm", "cpu"): 1} == {fastest: 1}


@each_backend
def test_a_negative_number_of_rows_is_refused(backend: Backend) -> None:
    x, indices = torch.zeros(1, 4, device=backend.device), torch.zeros(0, dtype=torch.int32, device=backend.device)
    with backend.running(times=0), pytest.raises(RuntimeError, match="out_features must not be negative, got -1"):
        torch.ops.shira.sparse_delta_mm(x, indices, indices, x.new_zeros(0), -1)
