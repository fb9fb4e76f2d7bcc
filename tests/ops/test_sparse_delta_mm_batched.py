from __future__ import annotations

import pytest
import sparse_delta as shared
import torch
from backend_matrix import Backend, but_the_interpreter, each_backend_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_delta import (
    BATCHED_RESULT,
    BATCHED_SHAPES,
    INDICES,
    PAGES,
    PAIRS,
    SLOTS,
    TOKEN_ADAPTERS,
    batched_arguments,
    changing_batched,
    mixed_masks,
    run_batched,
)

import shira_kernels
from shira_kernels import backends

each_backend = each_backend_of("sparse_delta_mm_batched")
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
    for tokens, page_size in (((5,), None), ((4,), 7), ((2, 20), 7)):
        masks = mixed_masks(9, 30, 0.2)
        run_batched(backend, False, tokens, masks, dtype, value_dtype, row_ptr_dtype, col_dtype, page_size)


@each_backend
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize(("tokens", "rows", "columns", "density"), BATCHED_SHAPES)
def test_shapes(
    backend: Backend, tokens: tuple[int, ...], rows: int, columns: int, density: float, page_size: int | None
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run_batched(backend, False, tokens, mixed_masks(rows, columns, density), dtype, page_size=page_size)


@each_backend
@pytest.mark.parametrize("page_size", [None, 1, 2, 16, 300])
def test_pages_of_any_size(backend: Backend, page_size: int | None) -> None:
    for tokens in (4, 40):
        run_batched(backend, False, (tokens,), mixed_masks(9, 40, 0.2), page_size=page_size)


@each_backend
@pytest.mark.parametrize("adapters", TOKEN_ADAPTERS, ids=lambda adapters: f"{len(adapters)}-{sum(adapters)}")
def test_tokens_of_any_adapters(backend: Backend, adapters: list[int]) -> None:
    run_batched(backend, False, (len(adapters),), mixed_masks(7, 20, 0.3), adapters=adapters)


@each_backend_but_the_interpreter
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(8, 300, 500), (130, 90, 700), (600, 40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [None, 64])
def test_larger_layers(
    backend: Backend, dtype: torch.dtype, tokens: int, rows: int, columns: int, page_size: int | None
) -> None:
    run_batched(backend, False, (tokens,), mixed_masks(rows, columns, 0.05), dtype, page_size=page_size)


@settings(max_examples=60)
@given(
    adapters=st.lists(st.integers(-1, 2), max_size=40),
    rows=st.integers(0, 12),
    columns=st.integers(1, 40),
    density=st.floats(0, 1),
    pair=st.sampled_from(PAIRS),
    page_size=st.none() | st.integers(1, 50),
    into=st.booleans(),
    isa=st.sampled_from(backends.extension.runnable_isas() if backends.extension else [""]),
)
def test_any_adapters(
    adapters: list[int],
    rows: int,
    columns: int,
    density: float,
    pair: tuple[torch.dtype, torch.dtype],
    page_size: int | None,
    into: bool,
    isa: str,
) -> None:
    backend = Backend("cpu", isa=isa)
    if not isa or backend.missing("sparse_delta_mm_batched"):
        backend = Backend("reference")
    masks = mixed_masks(rows, columns, density)
    run_batched(backend, into, (len(adapters),), masks, *pair, page_size=page_size, adapters=adapters)


@each_backend
def test_each_row_is_what_its_adapter_alone_gives(backend: Backend) -> None:
    """Not to the bit: a kernel may sum in another order where there are more tokens."""
    arguments = batched_arguments(backend.device)
    with backend.running():
        result = torch.ops.shira.sparse_delta_mm_batched(
            **{name: tensor for name, tensor in arguments.items() if name != "page_table"},
            out_features=3,
            page_table=arguments["page_table"],
        )
    assert result.tolist() == BATCHED_RESULT


@each_backend
@pytest.mark.parametrize("tokens", [4, 40])
def test_the_same_input_gives_the_same_bits(backend: Backend, tokens: int) -> None:
    stored, _ = shared.arena(mixed_masks(9, 60, 0.5), torch.float32, torch.int32, torch.uint16, 16)
    token_adapter = torch.tensor(SLOTS, dtype=torch.int32)[torch.arange(tokens) % 3]
    row_ptr, col, values, table = (tensor.to(backend.device) for tensor in stored)
    x, token_adapter = torch.randn(tokens, 60, device=backend.device), token_adapter.to(backend.device)
    with backend.running(times=2):
        first, again = (
            torch.ops.shira.sparse_delta_mm_batched(x, token_adapter, row_ptr, col, values, 9, table) for _ in range(2)
        )
    assert torch.equal(first, again)


def test_same_bits_at_any_number_of_threads() -> None:
    stored, _ = shared.arena(mixed_masks(400, 500, 0.05), torch.float32, torch.int32, torch.uint16, 256)
    row_ptr, col, values, table = stored
    threads = torch.get_num_threads()
    for tokens in (1, 8, 200):
        token_adapter = torch.tensor([-1, *SLOTS], dtype=torch.int32)[torch.arange(tokens) * 7 % 4]
        x, results = torch.randn(tokens, 500), []
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                results.append(
                    torch.ops.shira.sparse_delta_mm_batched(x, token_adapter, row_ptr, col, values, 400, table)
                )
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
def test_bad_input(backend: Backend, wrapped: bool) -> None:
    call = shira_kernels.sparse_delta_mm_batched if wrapped else torch.ops.shira.sparse_delta_mm_batched
    arguments = {**batched_arguments(backend.device), "out_features": 3}
    for change in (*shared.BAD_BATCHED, ("out_features", lambda _: 4, "row_ptr must be .* with out 4")):
        shared.check_refused(backend, call, arguments, *change)


@each_backend
def test_inference_mode(backend: Backend) -> None:
    arguments = {**batched_arguments(backend.device), "out_features": 3}
    with torch.inference_mode(), backend.running():
        assert torch.ops.shira.sparse_delta_mm_batched(**arguments).tolist() == BATCHED_RESULT


@each_backend
def test_its_forward_runs_beside_parameters_and_its_backward_is_refused(backend: Backend) -> None:
    arguments = {**batched_arguments(backend.device), "out_features": 3}
    for name in ("x", "values"):
        changed = {**arguments, name: arguments[name].clone().requires_grad_()}
        with backend.running():
            result = torch.ops.shira.sparse_delta_mm_batched(**changed)
        assert result.tolist() == BATCHED_RESULT
        with pytest.raises(RuntimeError, match=r"sparse_delta_mm_batched: is not differentiable.*shira\.attach"):
            result.sum().backward()


def test_opcheck() -> None:
    x, token_adapter, row_ptr, col, values, page_table = batched_arguments().values()
    op = torch.ops.shira.sparse_delta_mm_batched.default
    torch.library.opcheck(op, (x, token_adapter, row_ptr, col, values, 3, page_table))
    flat = torch.tensor([[0, 2, 2, 3]], dtype=torch.int64), torch.tensor([1, 3, 0], dtype=torch.int32), torch.randn(3)
    adapters = torch.tensor([0, -1, 0, 0, 0, -1], dtype=torch.int32)
    torch.library.opcheck(op, (torch.randn(2, 3, 4).bfloat16(), adapters, flat[0], flat[1], flat[2], 3))


def double(**arguments: torch.Tensor) -> torch.Tensor:
    return 2 * torch.ops.shira.sparse_delta_mm_batched(**arguments, out_features=3)


def test_compile() -> None:
    shared.check_compiled(double, changing_batched, ["x", "token_adapter"])


def test_export() -> None:
    shared.check_exported(double, changing_batched, ["x", "token_adapter"])


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    if backends.reason_unavailable("sparse_delta_mm_batched", "cpu"):
        fastest = "reference"
    before = backends.calls()
    shira_kernels.sparse_delta_mm_batched(**batched_arguments(), out_features=3)
    assert backends.calls() - before == {backends.active("sparse_delta_mm_batched", "cpu"): 1} == {fastest: 1}


@each_backend
def test_a_negative_number_of_rows_is_refused(backend: Backend) -> None:
    x, indices = torch.zeros(1, 4, device=backend.device), torch.zeros(0, dtype=torch.int32, device=backend.device)
    arguments = x, indices.new_zeros(1), indices.new_zeros(1, 0), indices, x.new_zeros(0), -1
    with backend.running(times=0), pytest.raises(RuntimeError, match="out_features must not be negative, got -1"):
        torch.ops.shira.sparse_delta_mm_batched(*arguments)
