from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_matrix import Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st
from index_code import encode, lists, rising

import shira_kernels
from shira_kernels import backends
from shira_kernels.ops.encode_indices import MAX_NUMEL

OP = "encode_indices"
each_backend = each_backend_of(OP)


def coded(backend: Backend, indices: list[int], numel: int, dtype: torch.dtype = torch.int64) -> bytes:
    with backend.running():
        code = torch.ops.shira.encode_indices(torch.tensor(indices, dtype=dtype, device=backend.device), numel)
    assert code.dtype == torch.uint8
    return bytes(code.tolist())


@each_backend
@pytest.mark.parametrize("name", lists())
def test_lists(backend: Backend, name: str) -> None:
    indices, numel = lists()[name]
    assert coded(backend, indices, numel) == encode(indices)
    if numel <= 2**31:
        assert coded(backend, indices, numel, torch.int32) == encode(indices)


each_gap = st.one_of(st.integers(0, 260), st.integers(0, 5000), st.integers(0, 2**40))


@given(gaps=st.lists(each_gap, max_size=60))
@each_backend
def test_any_list(gaps: list[int], backend: Backend) -> None:
    indices = rising(gaps)
    assert coded(backend, indices, indices[-1] + 1 if indices else 0) == encode(indices)


def test_same_bytes_at_any_number_of_threads() -> None:
    indices = torch.arange(100_000, dtype=torch.int32).mul_(257)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        found.append(torch.ops.shira.encode_indices(indices, 2**25))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


BAD: list[tuple[Any, int, str]] = [
    (torch.tensor([1.0]), 9, r"indices must be int32 or int64, got torch\.float32"),
    (torch.tensor([[1]]), 9, "indices must be 1-D"),
    (torch.arange(8)[::2], 9, "indices must be contiguous"),
    (torch.tensor([2, 1]), 9, "indices must be sorted and unique"),
    (torch.tensor([1, 1]), 9, "indices must be sorted and unique"),
    (torch.arange(5000).index_fill_(0, torch.tensor([4096]), 4095), 9999, "indices must be sorted and unique"),
    (torch.tensor([-1, 1]), 9, r"indices must lie in \[0, 9\), got -1"),
    (torch.tensor([1, 9]), 9, r"indices must lie in \[0, 9\), got 9"),
    (torch.tensor([1]), -1, r"numel must lie in \[0, 2\^62\], got -1"),
    (torch.tensor([1]), MAX_NUMEL + 1, r"numel must lie in \[0, 2\^62\]"),
]


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
@pytest.mark.parametrize(("indices", "numel", "message"), BAD)
def test_bad_input(backend: Backend, wrapped: bool, indices: torch.Tensor, numel: int, message: str) -> None:
    call = shira_kernels.encode_indices if wrapped else torch.ops.shira.encode_indices
    before = backends.calls()
    with pytest.raises(RuntimeError, match=message), backend.running(times=0):
        call(indices.to(backend.device), numel)
    assert backends.calls() == before


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.shira.encode_indices.default, (torch.tensor([1, 5, 700]), 1000))


def test_compile() -> None:
    def there_and_back(indices: torch.Tensor) -> torch.Tensor:
        return torch.ops.shira.decode_indices(torch.ops.shira.encode_indices(indices, 5000), 3, 5000) + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
        assert compiled(torch.tensor([1, 5, 4000])).tolist() == [2, 6, 4001]


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    before = backends.calls()
    shira_kernels.encode_indices(torch.tensor([1]), 2)
    assert backends.calls() - before == {backends.active(OP, "cpu"): 1} == {fastest: 1}
