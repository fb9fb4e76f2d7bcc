from __future__ import annotations

from typing import Any

import pytest
import sparse_delta as shared
import torch
from backend_matrix import Backend, but_the_interpreter, each_backend_of
from sparse_delta import (
    BATCHED_RESULT,
    BATCHED_SHAPES,
    INDICES,
    PAGES,
    PAIRS,
    TOKEN_ADAPTERS,
    add_out,
    batched_arguments,
    changing_batched,
    mixed_masks,
    run_batched,
)
from torch.utils._python_dispatch import TorchDispatchMode

import shira_kernels
from shira_kernels import backends
from shira_kernels.ops.sparse_delta_mm_batched import check_adapter_contents
from shira_kernels.reference import add_sparse_delta_mm_batched as reference

each_backend = each_backend_of("add_sparse_delta_mm_batched")
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
        run_batched(backend, True, tokens, masks, dtype, value_dtype, row_ptr_dtype, col_dtype, page_size)


@each_backend
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize(("tokens", "rows", "columns", "density"), BATCHED_SHAPES)
def test_shapes(
    backend: Backend, tokens: tuple[int, ...], rows: int, columns: int, density: float, page_size: int | None
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run_batched(backend, True, tokens, mixed_masks(rows, columns, density), dtype, page_size=page_size)


@each_backend
@pytest.mark.parametrize("adapters", TOKEN_ADAPTERS, ids=lambda adapters: f"{len(adapters)}-{sum(adapters)}")
def test_tokens_of_any_adapters(backend: Backend, adapters: list[int]) -> None:
    run_batched(backend, True, (len(adapters),), mixed_masks(7, 20, 0.3), page_size=16, adapters=adapters)


@each_backend_but_the_interpreter
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(8, 300, 500), (130, 90, 700), (600, 40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [None, 64])
def test_larger_layers(
    backend: Backend, dtype: torch.dtype, tokens: int, rows: int, columns: int, page_size: int | None
) -> None:
    run_batched(backend, True, (tokens,), mixed_masks(rows, columns, 0.05), dtype, page_size=page_size)


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
def test_bad_input_writes_nothing(backend: Backend, wrapped: bool) -> None:
    call = shira_kernels.add_sparse_delta_mm_batched if wrapped else torch.ops.shira.add_sparse_delta_mm_batched
    for change in (*shared.BAD_OUT, *shared.BAD_BATCHED):
        shared.check_refused(backend, call, add_out(batched_arguments(backend.device)), *change)


@each_backend
def test_in_place_rules(backend: Backend) -> None:
    arguments = add_out(batched_arguments(backend.device))
    shared.check_in_place_rules(backend, torch.ops.shira.add_sparse_delta_mm_batched, arguments)
    assert arguments["out"].tolist() == (torch.tensor(BATCHED_RESULT) + 1).tolist()


@each_backend
def test_shared_memory(backend: Backend) -> None:
    op = torch.ops.shira.add_sparse_delta_mm_batched
    shared.check_shared_memory(backend, op, add_out(batched_arguments(backend.device)))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = {**batched_arguments(), "x": torch.randn(3, 4).to(dtype)}
        arguments["values"] = arguments["values"].to(dtype)
        torch.library.opcheck(torch.ops.shira.add_sparse_delta_mm_batched.default, tuple(add_out(arguments).values()))


def changing(tokens: int) -> dict[str, Any]:
    return add_out(changing_batched(tokens))


def double(**arguments: torch.Tensor) -> torch.Tensor:
    """Adds to what was made here, and to an argument."""
    twice = arguments["x"] @ torch.ones(4, 3)
    torch.ops.shira.add_sparse_delta_mm_batched(**{**arguments, "out": twice})
    torch.ops.shira.add_sparse_delta_mm_batched(**arguments)
    return twice + arguments["out"]


def test_compile() -> None:
    shared.check_compiled(double, changing, ["x", "out", "token_adapter"])


def test_export() -> None:
    shared.check_exported(double, changing, ["x", "out", "token_adapter"])


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    if backends.reason_unavailable("add_sparse_delta_mm_batched", "cpu"):
        fastest = "reference"
    before = backends.calls()
    shira_kernels.add_sparse_delta_mm_batched(**add_out(batched_arguments()))
    assert backends.calls() - before == {backends.active("add_sparse_delta_mm_batched", "cpu"): 1} == {fastest: 1}


class NoIndexingOfUint16(TorchDispatchMode):
    """As a device whose torch has no kernel for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexing = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)
        assert not (indexing and args[0].dtype == torch.uint16)
        return func(*args, **(kwargs or {}))


def test_the_reference_indexes_no_uint16() -> None:
    arguments = add_out(batched_arguments())
    narrow = {**arguments, "col": arguments["col"].to(torch.uint16)}
    contents = [narrow[name] for name in ("token_adapter", "row_ptr", "col", "page_table")]
    with NoIndexingOfUint16():
        reference.add_sparse_delta_mm_batched(**narrow)
        check_adapter_contents("op", 4, *contents)
    assert narrow["out"].tolist() == (torch.tensor(BATCHED_RESULT) + 1).tolist()


@pytest.mark.skipif(bool(Backend("triton").missing("add_sparse_delta_mm_batched")), reason="Triton in its interpreter")
@pytest.mark.parametrize("tokens", [5, 40])
def test_triton_touches_nothing_outside_whatever_the_entries(tokens: int) -> None:
    shared.check_nothing_outside("cpu", tokens)
