from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import sparse_delta as shared
import torch
from backend_matrix import Backend, each_backend_of
from sparse_delta import INDICES, PAIRS, csr, random_mask, single_arguments

import shira_kernels
from shira_kernels.ops import sparse_delta_mm_transposed as op

each_backend = each_backend_of("sparse_delta_mm_transposed")


def check_case(
    backend: Backend,
    tokens: tuple[int, ...],
    mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    value_dtype: torch.dtype | None = None,
    row_ptr_dtype: torch.dtype = torch.int32,
    col_dtype: torch.dtype = torch.uint16,
) -> None:
    rows, columns = mask.shape
    row_ptr, col = csr(mask, row_ptr_dtype, col_dtype)
    values, x = shared.numbers((col.numel(),), value_dtype or dtype, 1), shared.numbers((*tokens, rows), dtype, 2)
    arguments = [tensor.to(backend.device) for tensor in (x, row_ptr, col, values)]
    for _ in range(2):  # with the index made, and with it kept
        with backend.running(), shared.poisoned_memory():
            result = torch.ops.shira.sparse_delta_mm_transposed(*arguments, columns)
        assert result.shape == (*tokens, columns)
        assert result.dtype == dtype
        count = x.shape[:-1].numel()
        shared.assert_sums(result.cpu().view(count, columns), x.view(count, rows), shared.dense(mask, values).T)


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
    check_case(backend, (2, 3), random_mask(30, 21, 0.2), dtype, value_dtype, row_ptr_dtype, col_dtype)


@each_backend
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "density"),
    [
        ((1,), 1, 1, 1.0),
        ((), 5, 7, 0.5),
        ((0,), 5, 7, 0.5),
        ((3,), 0, 7, 0.5),
        ((3,), 5, 0, 0.5),
        ((9,), 5, 7, 0.0),
        ((40,), 20, 9, 0.1),
    ],
)
def test_shapes(backend: Backend, tokens: tuple[int, ...], rows: int, columns: int, density: float) -> None:
    check_case(backend, tokens, random_mask(rows, columns, density))


def test_wide_layers() -> None:
    """The transposed index has columns of 16 bits up to 65 536 rows."""
    for rows in (2**16, 2**16 + 1):
        mask = torch.zeros(rows, 3, dtype=torch.bool)
        mask[[0, 2**15 - 1, 2**15, rows - 1], [1, 0, 1, 1]] = True
        check_case(Backend("reference"), (2,), mask)
        row_ptr, col = csr(mask, torch.int32, torch.uint16)
        assert op.build(row_ptr, col, 3).col.dtype == (torch.uint16 if rows == 2**16 else torch.int32)


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
def test_bad_input(backend: Backend, wrapped: bool) -> None:
    call = shira_kernels.sparse_delta_mm_transposed if wrapped else torch.ops.shira.sparse_delta_mm_transposed
    arguments = {**single_arguments(backend.device), "in_features": 4}
    arguments["x"] = arguments["x"][:, :3].contiguous()
    changes = [change for change in shared.BAD_SINGLE if change[0] != "x" or "col" not in change[2]]
    for change in (*changes, ("in_features", lambda _: 3, r"col must lie in \[0, 3\), got 3")):
        shared.check_refused(backend, call, arguments, *change)
    for name in ("x", "values"):
        with pytest.raises(RuntimeError, match=f"transposed: {name} requires grad"), backend.running(times=0):
            call(**{**arguments, name: arguments[name].clone().requires_grad_()})


def test_opcheck() -> None:
    arguments = {**single_arguments(), "x": torch.randn(2, 2, 3)}
    torch.library.opcheck(torch.ops.shira.sparse_delta_mm_transposed.default, (*arguments.values(), 4))


def changing(tokens: int) -> dict[str, Any]:
    return {**single_arguments(), "x": torch.arange(3.0 * tokens).view(tokens, 3)}


def double(**arguments: torch.Tensor) -> torch.Tensor:
    return 2 * torch.ops.shira.sparse_delta_mm_transposed(**arguments, in_features=4)


def test_compile_and_export() -> None:
    shared.check_compiled(double, changing, ["x"])
    shared.check_exported(double, changing, ["x"])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each index that is built, its number of entries."""
    made: list[int] = []
    build = op.build

    def counted(row_ptr: torch.Tensor, col: torch.Tensor, in_features: int) -> op.Index:
        made.append(col.numel())
        return build(row_ptr, col, in_features)

    monkeypatch.setattr(op, "build", counted)
    return made


def test_an_index_is_built_once(built: list[int]) -> None:
    """Also where each call makes its own views, from any thread; and again after a write that torch sees."""
    mask = random_mask(6, 8, 0.5)
    row_ptr, col = csr(mask, torch.int32, torch.int32)
    arena = torch.cat([col, col])
    x, values = torch.randn(2, 6), torch.randn(col.numel())

    def run(begin: int = 0) -> torch.Tensor:
        part = arena[begin : begin + col.numel()].detach()
        return torch.ops.shira.sparse_delta_mm_transposed(x, row_ptr[:], part, values, 8)

    first = run()
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    run(col.numel())
    assert len(built) == 2, "another part of the same memory"

    arena[: col.numel()] = csr(mask.flip(1), torch.int32, torch.int32)[1]
    again = run()
    assert len(built) == 3
    torch.testing.assert_close(first, x @ shared.dense(mask, values).float())
    torch.testing.assert_close(again, x @ shared.dense(mask.flip(1), values).float())
    assert torch.equal(run(), again)
    assert len(built) == 3


def test_an_index_goes_with_its_tensors(built: list[int]) -> None:
    arguments = {**single_arguments(), "x": torch.randn(2, 3), "in_features": 4}
    torch.ops.shira.sparse_delta_mm_transposed(**arguments)
    kept = weakref.ref(op.transposed(arguments["row_ptr"], arguments["col"], 4).order)
    assert len(built) == 1
    assert kept() is not None
    before = len(op._kept)
    del arguments["col"]
    gc.collect()
    assert kept() is None
    assert len(op._kept) == before - 1


def test_inference_tensors_have_no_version_so_nothing_is_kept(built: list[int]) -> None:
    with torch.inference_mode():
        arguments = {**single_arguments(), "x": torch.randn(2, 3), "in_features": 4}
        for _ in range(2):
            torch.ops.shira.sparse_delta_mm_transposed(**arguments)
    assert len(built) == 2
