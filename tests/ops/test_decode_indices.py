from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from backend_matrix import Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st
from index_code import encode, lists, rising

import shira_kernels
from shira_kernels import backends

OP = "decode_indices"
each_backend = each_backend_of(OP)


def decoded(backend: Backend, code: bytes, nnz: int, numel: int) -> torch.Tensor:
    tensor = torch.tensor(list(code), dtype=torch.uint8, device=backend.device)
    with backend.running():
        return torch.ops.shira.decode_indices(tensor, nnz, numel)


@each_backend
@pytest.mark.parametrize("name", lists())
def test_lists(backend: Backend, name: str) -> None:
    indices, numel = lists()[name]
    for size in {numel, min(numel + 1, 2**62), 2**62}:
        found = decoded(backend, encode(indices), len(indices), size)
        assert found.dtype == (torch.int32 if size < 2**31 else torch.int64)
        assert found.tolist() == indices


@given(gaps=st.lists(st.one_of(st.integers(0, 260), st.integers(0, 5000), st.integers(0, 2**40)), max_size=60))
@each_backend
def test_any_list(gaps: list[int], backend: Backend) -> None:
    indices = rising(gaps)
    assert decoded(backend, encode(indices), len(indices), 2**60).tolist() == indices


LONG = rising([300, 5] * 5000)  # three blocks
BORDERS = [(LONG[4095], 2048), (LONG[8191], 4096)]


def long_code(table: list[tuple[int, int]]) -> bytes:
    whole = encode(LONG)
    rows = b"".join(number.to_bytes(8, "little", signed=True) for row in table for number in row)
    return rows + whole[32:]


# code, nnz, numel: all that the two implementations say is "damaged" or "must hold".
DAMAGED: dict[str, tuple[bytes, int, int]] = {
    "too few bytes": (b"\1\1", 3, 99),
    "no bytes": (b"", 1, 99),
    "bytes where there is no index": (b"\1", 0, 99),
    "a byte left over": (b"\1\1\1", 2, 99),
    "outside by a gap": (b"\1\1\x5f", 3, 99),
    "an escape is missing": (b"\1\xf8", 2, 999),
    "one escape of two is missing": (b"\xf8\xf9\1", 2, 9999),
    "an escape left over": (b"\1\xf8\1\1", 2, 9999),
    "an escape is cut": (b"\1\xf8\x81", 2, 9999),
    "an escape longer than it need be": (b"\1\xf8\x81\0", 2, 9999),
    "an escape of ten bytes": (b"\xf8" + b"\xff" * 9 + b"\1", 1, 2**62),
    "an escape of nine bytes": (b"\xf8" + b"\xff" * 8 + b"\x7f", 1, 2**62),
    "two that exceed 64 bits": (b"\xf8" * 2 + (b"\xff" * 8 + b"\x0f") * 2, 2, 2**62),
    "sixteen that exceed 64 bits": (b"\xf8" * 16 + (b"\xff" * 8 + b"\x0f") * 16, 16, 2**62),
    "two that exceed 32 bits": (b"\xf8" * 2 + b"\xff\xff\xff\x7f" * 2, 2, 2**31 - 1),
    "outside by an escape": (b"\xf8\x10", 1, 248 + 128),
    "the table is missing": (encode(LONG)[32:], len(LONG), 2**30),
    "an index of the table is too low": (long_code([(LONG[4095] - 1, 2048), BORDERS[1]]), len(LONG), 2**30),
    "an index of the table is too high": (long_code([BORDERS[0], (LONG[8191] + 1, 4096)]), len(LONG), 2**30),
    "an index of the table is negative": (long_code([(-5, 2048), BORDERS[1]]), len(LONG), 2**30),
    "an index of the table is huge": (long_code([(2**63 - 1, 2048), BORDERS[1]]), len(LONG), 2**30),
    "the table falls": (long_code(BORDERS[::-1]), len(LONG), 2**30),
    "a place of the table is too low": (long_code([(LONG[4095], 2047), BORDERS[1]]), len(LONG), 2**30),
    "a place of the table is too high": (long_code([BORDERS[0], (LONG[8191], 4097)]), len(LONG), 2**30),
    "a place of the table is negative": (long_code([(LONG[4095], -1), BORDERS[1]]), len(LONG), 2**30),
    "a place of the table is huge": (long_code([BORDERS[0], (LONG[8191], 2**62)]), len(LONG), 2**30),
    "the last block leaves the tensor": (encode(LONG), len(LONG), LONG[-1]),
}


@each_backend
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_code_is_refused(backend: Backend, name: str) -> None:
    code, nnz, numel = DAMAGED[name]
    with pytest.raises(RuntimeError, match=r"shira::decode_indices: code (is damaged|must hold)"):
        decoded(backend, code, nnz, numel)


def test_the_message_says_which_block() -> None:
    if backends.extension is None:
        pytest.skip("C++ extension not built")
    code = bytearray(encode(LONG))
    code[32 + 5000] ^= 1
    with pytest.raises(RuntimeError, match="block 1 does not end at the index that the table says"):
        shira_kernels.decode_indices(torch.tensor(list(code), dtype=torch.uint8), len(LONG), 2**30)


@each_backend
def test_any_change_gives_another_list_or_is_refused(backend: Backend) -> None:
    """A code of its own for each list; what is refused, or not, is the same on all backends: there is one result."""
    draw = random.Random(1)
    indices = rising([draw.choice([0, 3, 90, 247, 248, 255, 256, 1300, 20_000]) for _ in range(60)])
    whole, numel, accepted = encode(indices), 2**31 - 1, 0
    for _ in range(400):
        code = bytearray(whole)
        code[draw.randrange(len(code))] ^= 1 << draw.randrange(8)
        try:
            found = decoded(backend, bytes(code), len(indices), numel).tolist()
        except RuntimeError:
            continue
        accepted += 1
        assert found != indices
        assert all(a < b for a, b in zip([-1, *found], [*found, numel], strict=False))
        assert encode(found) == bytes(code)
    assert accepted > 100


def test_same_indices_at_any_number_of_threads() -> None:
    indices = torch.arange(100_000, dtype=torch.int32).mul_(257)
    code = torch.ops.shira.encode_indices(indices, 2**25)
    before = torch.get_num_threads()
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(torch.ops.shira.decode_indices(code, len(indices), 2**25), indices)
    torch.set_num_threads(before)


def code_of(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


BAD: list[tuple[Any, int, int, str]] = [
    (torch.ones(2, dtype=torch.int8), 2, 9, r"code must be uint8, got torch\.int8"),
    (code_of(1, 1)[None], 2, 9, "code must be 1-D"),
    (code_of(1, 1, 1, 1)[::2], 2, 9, "code must be contiguous"),
    (code_of(1), -1, 9, r"nnz must lie in \[0, 9\], got -1"),
    (code_of(1), 10, 9, r"nnz must lie in \[0, 9\], got 10"),
    (code_of(1), 1, -1, r"numel must lie in \[0, 2\^62\], got -1"),
    (code_of(1), 1, 2**62 + 1, r"numel must lie in \[0, 2\^62\]"),
    (code_of(1), 2**50, 2**60, r"code must hold the code of 1125899906842624 indices, got 1 bytes"),
]


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
@pytest.mark.parametrize(("code", "nnz", "numel", "message"), BAD)
def test_bad_input(backend: Backend, wrapped: bool, code: torch.Tensor, nnz: int, numel: int, message: str) -> None:
    call = shira_kernels.decode_indices if wrapped else torch.ops.shira.decode_indices
    before = backends.calls()
    with pytest.raises(RuntimeError, match=message), backend.running(times=0):
        call(code.to(backend.device), nnz, numel)
    assert backends.calls() == before


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.shira.decode_indices.default, (code_of(1, 0, 7), 3, 100))


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    before = backends.calls()
    shira_kernels.decode_indices(code_of(1), 1, 2)
    assert backends.calls() - before == {backends.active(OP, "cpu"): 1} == {fastest: 1}
