from __future__ import annotations

from typing import Any

import pytest
import sparse_delta as shared
import torch
from backend_matrix import Backend, but_the_interpreter, each_backend_of
from sparse_delta import (
    INDICES,
    PAIRS,
    SINGLE_RESULT,
    SINGLE_SHAPES,
    add_out,
    masks_with_gaps,
    random_mask,
    run_single,
    single_arguments,
)

import shira_kernels
from shira_kernels import backends

each_backend = each_backend_of("add_sparse_delta_mm")
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
        run_single(backend, True, tokens, random_mask(13, 40, 0.2), dtype, value_dtype, row_ptr_dtype, col_dtype)


@each_backend
@pytest.mark.parametrize(("tokens", "rows", "columns", "density"), SINGLE_SHAPES)
def test_shapes(backend: Backend, tokens: tuple[int, ...], rows: int, columns: int, density: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run_single(backend, True, tokens, random_mask(rows, columns, density), dtype)


@each_backend
def test_masks_with_empty_rows_and_columns(backend: Backend) -> None:
    for mask in masks_with_gaps():
        for tokens in (2, 33):
            run_single(backend, True, (tokens,), mask)


@each_backend_but_the_interpreter
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 300, 500), (5, 700, 90), (130, 90, 700), (600, 40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_layers(backend: Backend, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    run_single(backend, True, (tokens,), random_mask(rows, columns, 0.05), dtype)


@each_backend
def test_sum_is_rounded_once(backend: Backend) -> None:
    """1 + 2^-8 + 2^-16 in bfloat16: 1 if the sum of the entries were rounded before it is added."""
    x = torch.tensor([[1.0, 1.0]] * 40, dtype=torch.bfloat16)
    row_ptr, col = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.uint16)
    values = torch.tensor([2.0**-8, 2.0**-16], dtype=torch.bfloat16)
    for tokens in (1, 40):
        out = torch.ones(tokens, 1, dtype=torch.bfloat16, device=backend.device)
        with backend.running():
            operands = (tensor.to(backend.device) for tensor in (x[:tokens], row_ptr, col, values))
            torch.ops.shira.add_sparse_delta_mm(out, *operands)
        assert out.eq(1 + 2**-7).all()


def test_same_bits_at_any_number_of_threads() -> None:
    mask = random_mask(520, 900, 0.05)
    row_ptr, col = shared.csr(mask, torch.int32, torch.uint16)
    threads = torch.get_num_threads()
    for tokens in (1, 5, 200):
        x, values, base, results = torch.randn(tokens, 900), torch.randn(col.numel()), torch.randn(tokens, 520), []
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                results.append(base.clone())
                torch.ops.shira.add_sparse_delta_mm(results[-1], x, row_ptr, col, values)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
def test_bad_input_writes_nothing(backend: Backend, wrapped: bool) -> None:
    call = shira_kernels.add_sparse_delta_mm if wrapped else torch.ops.shira.add_sparse_delta_mm
    for change in (*shared.BAD_OUT, *shared.BAD_SINGLE):
        shared.check_refused(backend, call, add_out(single_arguments(backend.device)), *change)


@each_backend
def test_in_place_rules(backend: Backend) -> None:
    arguments = add_out(single_arguments(backend.device))
    shared.check_in_place_rules(backend, torch.ops.shira.add_sparse_delta_mm, arguments)
    assert arguments["out"].tolist() == (torch.tensor(SINGLE_RESULT) + 1).tolist()


@each_backend
def test_shared_memory(backend: Backend) -> None:
    op = torch.ops.shira.add_sparse_delta_mm
    shared.check_shared_memory(backend, op, add_out(single_arguments(backend.device)))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = {**single_arguments(), "x": torch.randn(2, 5, 4).to(dtype)}
        arguments["values"] = arguments["values"].to(dtype)
        torch.library.opcheck(torch.ops.shira.add_sparse_delta_mm.default, tuple(add_out(arguments).values()))


def changing(tokens: int) -> dict[str, Any]:
    return add_out({**single_arguments(), "x": torch.arange(4.0 * tokens).view(tokens, 4)})


def double(**arguments: torch.Tensor) -> torch.Tensor:
    """Adds to what was made here, and to an argument."""
    twice = arguments["x"] @ torch.ones(4, 3)
    torch.ops.shira.add_sparse_delta_mm(**{**arguments, "out": twice})
    torch.ops.shira.add_sparse_delta_mm(**arguments)
    return twice + arguments["out"]


def test_compile() -> None:
    shared.check_compiled(double, changing, ["x", "out"])


def test_export() -> None:
    shared.check_exported(double, changing, ["x", "out"])


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    if backends.reason_unavailable("add_sparse_delta_mm", "cpu"):
        fastest = "reference"
    before = backends.calls()
    shira_kernels.add_sparse_delta_mm(**add_out(single_arguments()))
    assert backends.calls() - before == {backends.active("add_sparse_delta_mm", "cpu"): 1} == {fastest: 1}
