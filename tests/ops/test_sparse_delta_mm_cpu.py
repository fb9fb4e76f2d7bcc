"""What is special in the C++ kernels of sparse_delta_mm and its forms: borders of blocks, pages, threads."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from backend_matrix import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bits, ulp_distance

from shira_kernels import backends

ops = torch.ops.shira
ISAS = backends.extension.runnable_isas() if backends.extension else []
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Units in the last place of the sum of the products' magnitudes: as for masked_grad, and one rounding.
ULP = {torch.float64: 0.0, torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
POISON = -7.0

pytestmark = pytest.mark.skipif(not ISAS, reason="C++ extension not built")
each_isa = pytest.mark.parametrize("isa", ISAS)


def csr(mask: torch.Tensor, row_ptr: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
    """row_ptr and col of the entries that a [out, in] mask holds."""
    ends = mask.sum(1).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(row_ptr), mask.nonzero()[:, 1].to(torch.uint16)


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def case(
    tokens: int, mask: torch.Tensor, dtype: torch.dtype, value_dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, row_ptr, col and values."""
    generator = torch.Generator().manual_seed(seed)
    row_ptr, col = csr(mask)
    x = torch.randn(tokens, mask.shape[1], generator=generator, dtype=torch.float64).to(dtype)
    return x, row_ptr, col, torch.randn(col.numel(), generator=generator, dtype=torch.float64).to(value_dtype or dtype)


def dense(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[mask] = values.double()
    return weight


def check(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, old: torch.Tensor | None = None) -> None:
    exact, scale = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if old is not None:
        exact, scale = exact + old.double(), scale + old.double().abs()
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    else:
        assert ulp_distance(actual, exact, scale) <= ULP[actual.dtype]


def add_within_canaries(isa: str, old: torch.Tensor, call: Any) -> torch.Tensor:
    """`call(out)` on a copy of `old` in the midst of poison, which must stay."""
    room = torch.full((old.numel() + 200,), POISON, dtype=old.dtype)
    out = room[100:-100].view(old.shape)
    out.copy_(old)
    with Backend("cpu", isa=isa).running():
        call(out)
    assert (room[:100] == POISON).all()
    assert (room[-100:] == POISON).all()
    return out


def check_all(isa: str, tokens: int, mask: torch.Tensor, dtype: torch.dtype, values: torch.dtype | None = None) -> None:
    x, row_ptr, col, entries = case(tokens, mask, dtype, values)
    weight = dense(mask, entries)
    with Backend("cpu", isa=isa).running():
        check(ops.sparse_delta_mm(x, row_ptr, col, entries, len(mask)), x, weight)
    old = torch.randn(tokens, len(mask), generator=torch.Generator().manual_seed(1)).to(dtype)
    out = add_within_canaries(isa, old, lambda out: ops.add_sparse_delta_mm(out, x, row_ptr, col, entries))
    check(out, x, weight, old)
    assert torch.equal(out[:, ~mask.any(1)], old[:, ~mask.any(1)])


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_tokens_at_the_borders_of_blocks(isa: str, dtype: torch.dtype) -> None:
    mask = random_mask(37, 53, 0.2)
    mask[20] = False
    for tokens in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 150):
        check_all(isa, tokens, mask, dtype)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_at_the_borders_of_vectors(isa: str, dtype: torch.dtype) -> None:
    for rows, columns in ((0, 5), (5, 0), (1, 1), (2, 3), (15, 16), (16, 15), (17, 33), (32, 31), (64, 65), (65, 64)):
        for tokens in (1, 6, 20, 70):
            check_all(isa, tokens, random_mask(rows, columns, 0.4), dtype)


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_values(isa: str, dtype: torch.dtype) -> None:
    for tokens in (1, 8, 16, 40, 130):
        check_all(isa, tokens, random_mask(40, 200, 0.1), dtype, torch.float32)


@each_isa
def test_wide_layers_take_narrow_panels(isa: str) -> None:
    for columns in (6_000, 12_000, 30_000, 65_000):
        check_all(isa, 70, random_mask(3, columns, 0.01), torch.bfloat16)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 140),
    rows=st.integers(0, 40),
    columns=st.integers(0, 80),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS or [""]),
)
def test_any_shape(tokens: int, rows: int, columns: int, density: float, dtype: torch.dtype, isa: str) -> None:
    check_all(isa, tokens, random_mask(rows, columns, density), dtype)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_entries_keeps_its_bits(isa: str, dtype: torch.dtype) -> None:
    mask = torch.zeros(40, 20, dtype=torch.bool)
    mask[5], mask[38, 3] = True, True
    x, row_ptr, col, values = case(9, mask, dtype)
    odd = torch.tensor([-0.0, float("nan"), float("inf")], dtype=dtype)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    infinity = odd[2:].view(integer)
    odd = torch.cat([odd, (odd[1:2].view(integer) + 1).view(dtype), (infinity + 1).view(dtype)])  # NaNs with payloads
    for tokens in (1, 2, 8, 9):
        old = odd.repeat(40)[:40].repeat(tokens, 1)
        out = add_within_canaries(
            isa, old, lambda out, n=tokens: ops.add_sparse_delta_mm(out, x[:n], row_ptr, col, values)
        )
        kept = ~mask.any(1)
        assert torch.equal(bits(out[:, kept]), bits(old[:, kept]))


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_whose_products_are_all_minus_zero_has_entries(isa: str, dtype: torch.dtype) -> None:
    """Kernels tell rows without entries by a sum of -0; here are rows of each length, as many as a square has."""
    lengths = torch.tensor([0, 1, 15, 16, 17, 32, 48, 64, 65, 1024]).repeat_interleave(16)
    _, row_ptr, col, values = case(1, torch.arange(1024) < lengths[:, None], dtype)
    for tokens in (1, 2, 8, 16):
        out = torch.full((tokens, len(lengths)), -0.0, dtype=dtype)
        with Backend("cpu", isa=isa).running():
            ops.add_sparse_delta_mm(out, torch.zeros(tokens, 1024, dtype=dtype), row_ptr, col, -values.abs())
        assert torch.equal(out.signbit(), (lengths == 0).expand_as(out))


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_token(isa: str, dtype: torch.dtype) -> None:
    mask = torch.ones(20, 20, dtype=torch.bool)
    for tokens in (3, 16, 130):
        x, row_ptr, col, values = case(tokens, mask, dtype)
        x[1, 4], x[tokens - 1, 7] = float("nan"), float("inf")
        with Backend("cpu", isa=isa).running():
            out = ops.sparse_delta_mm(x, row_ptr, col, values, 20)
        finite = out.isfinite().all(1)
        assert out[1].isnan().all()
        assert out[tokens - 1].isinf().all()
        assert finite.sum() == tokens - 2


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_beside_any_others(isa: str, dtype: torch.dtype) -> None:
    mask = random_mask(50, 300, 0.1)
    x, row_ptr, col, values = case(150, mask, dtype)
    with Backend("cpu", isa=isa).running(4):
        together = ops.sparse_delta_mm(x, row_ptr, col, values, 50)
        for first, last in ((0, 2), (30, 38), (100, 140)):
            assert torch.equal(ops.sparse_delta_mm(x[first:last], row_ptr, col, values, 50), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype) -> None:
    mask = random_mask(1500, 700, 0.05)
    x, row_ptr, col, values = case(200, mask, dtype)
    adapters = torch.arange(200, dtype=torch.int32) % 4 - 1
    stacked = torch.stack([row_ptr] * 3)
    threads = torch.get_num_threads()
    for tokens in (1, 8, 70, 200):
        results = []
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                results.append(ops.sparse_delta_mm(x[:tokens], row_ptr, col, values, 1500))
                batched = ops.sparse_delta_mm_batched(x[:tokens], adapters[:tokens], stacked, col, values, 1500)
                assert torch.equal(batched[adapters[:tokens] >= 0], results[-1][adapters[:tokens] >= 0])
                assert not batched[adapters[:tokens] < 0].any()
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


def pages_of(
    masks: list[torch.Tensor], values: list[torch.Tensor], size: int, first: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_ptr, col, values and page_table of adapters whose own entries begin at `first`, in shuffled pages; what no
    adapter lists is poison."""
    pointers, columns = zip(*(csr(mask) for mask in masks), strict=True)
    row_ptr = torch.stack(pointers) + first
    per_adapter = -(-int(row_ptr.max()) // size) + 1
    number = per_adapter * len(masks) + 1
    order = torch.randperm(number, generator=torch.Generator().manual_seed(2)).int()
    table = torch.full((len(masks), per_adapter), -5, dtype=torch.int32)
    col = torch.full((number, size), 65_535, dtype=torch.int32)
    arena = torch.full((number, size), float("nan"), dtype=values[0].dtype)
    for a, (column, entries) in enumerate(zip(columns, values, strict=True)):
        for e in range(column.numel()):
            page, at = divmod(first + e, size)
            table[a, page] = order[a * per_adapter + page]
            col[table[a, page], at] = int(column[e])
            arena[table[a, page], at] = entries[e]
    return row_ptr, col.to(torch.uint16), arena, table


@each_isa
@pytest.mark.parametrize("size", [1, 3, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [[1, 0, -1, 1, 2, 1, 0] + [1] * 20, [2, -1, 0, 1], [1, 0, 1]], ids=str)
def test_pages(isa: str, size: int, dtype: torch.dtype, adapters: list[int]) -> None:
    masks = [random_mask(30, 40, 0.05, seed=1), random_mask(30, 40, 0.2, seed=2), torch.zeros(30, 40, dtype=torch.bool)]
    masks[0][-4:], masks[1][:3] = False, False
    entries = [case(1, mask, dtype)[3] for mask in masks]
    token_adapter = torch.tensor(adapters, dtype=torch.int32)
    x = torch.randn(len(adapters), 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    old = torch.randn(len(adapters), 30, generator=torch.Generator().manual_seed(4)).to(dtype)
    for first in (0, 5):
        row_ptr, col, arena, table = pages_of(masks, entries, size, first)
        with Backend("cpu", isa=isa).running():
            result = ops.sparse_delta_mm_batched(x, token_adapter, row_ptr, col, arena, 30, table)
        arguments = {"row_ptr": row_ptr, "col": col, "values": arena, "page_table": table}
        add = partial(ops.add_sparse_delta_mm_batched, x=x, token_adapter=token_adapter, **arguments)
        out = add_within_canaries(isa, old, add)
        for t, adapter in enumerate(token_adapter.tolist()):
            if adapter < 0:
                assert not result[t].any()
                assert torch.equal(out[t], old[t])
            else:
                weight = dense(masks[adapter], entries[adapter])
                check(result[t], x[t], weight)
                check(out[t], x[t], weight, old[t])


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_length_for_a_token_that_is_alone(isa: str, dtype: torch.dtype) -> None:
    """In pages or not they have the same bits, however many rows are taken at a time."""
    columns = 3000
    for lengths in (
        [0],
        [0, 1, 15, 16],
        [5, 17, 31, 32],
        [0, 33, 47, 48],
        [49, 64, 0, 63, 50],
        [0, 65, 80, 70, 1],
        [130, 0, 100, 5, 0, 0, 200],
        [1023, 0, 1024, 1025, 2, 2048, 2049, 3000],
    ):
        mask = torch.zeros(35, columns, dtype=torch.bool)
        for row in range(len(mask)):
            length = lengths[row % len(lengths)]
            mask[row, torch.randperm(columns, generator=torch.Generator().manual_seed(row))[:length]] = True
        x, row_ptr, col, values = case(1, mask, dtype)
        check_all(isa, 1, mask, dtype)
        with Backend("cpu", isa=isa).running(3):
            whole = ops.sparse_delta_mm(x, row_ptr, col, values, len(mask))
            assert not whole[:, ~mask.any(1)].signbit().any()
            for size in (7, 1000):
                pages = -(-col.numel() // size)
                table = torch.arange(pages, dtype=torch.int32).flip(0)
                paged = [torch.nn.functional.pad(each, (0, pages * size - len(each))) for each in (col.int(), values)]
                column, entries = (each.view(pages, size).flip(0).contiguous() for each in paged)
                result = ops.sparse_delta_mm_batched(
                    x,
                    torch.zeros(1, dtype=torch.int32),
                    row_ptr[None],
                    column.to(torch.uint16),
                    entries,
                    len(mask),
                    table[None],
                )
                assert torch.equal(result, whole)


@each_isa
def test_many_rows_of_tokens_that_are_alone(isa: str) -> None:
    """More sums than are kept from call to call; then few again."""
    for rows in (300_000, 40):
        mask = torch.zeros(rows, 8, dtype=torch.bool)
        mask[:: rows // 20, 3] = mask[-1, 5] = True
        x, row_ptr, col, values = case(5, mask, torch.bfloat16)
        with Backend("cpu", isa=isa).running(5):
            result = ops.sparse_delta_mm_batched(
                x, torch.arange(5, dtype=torch.int32), row_ptr.repeat(5, 1), col, values, rows
            )
            check(result, x, dense(mask, values))
            alone = [ops.sparse_delta_mm(x[t : t + 1], row_ptr, col, values, rows)[0] for t in range(4)]
            assert torch.equal(result[:4], torch.stack(alone))


def paged_arguments() -> dict[str, Any]:
    masks = [random_mask(30, 40, density, seed=seed) for seed, density in ((1, 0.1), (2, 0.2), (3, 0.1))]
    row_ptr, col, values, table = pages_of(masks, [case(1, mask, torch.float32)[3] for mask in masks], 16, 0)
    return {
        "out": torch.zeros(3, 30),
        "x": torch.ones(3, 40),
        "token_adapter": torch.tensor([1, -1, 1], dtype=torch.int32),
        "row_ptr": row_ptr,
        "col": col,
        "values": values,
        "page_table": table,
    }


@each_isa
@pytest.mark.parametrize("col_dtype", [torch.uint16, torch.int32], ids=str)
@pytest.mark.parametrize("adapters", [[1, -1, 1], [1, -1, 0], [1, -1, 2]], ids=str)
def test_bad_contents_are_found_wherever_they_are(isa: str, col_dtype: torch.dtype, adapters: list[int]) -> None:
    """Each entry made wrong in turn, in and between pages; nothing is written."""
    with backends.use("cpu", isa=isa):
        good = paged_arguments()
        good["token_adapter"] = torch.tensor(adapters, dtype=torch.int32)
        row_ptr, table, size = good["row_ptr"][1], good["page_table"][1], good["col"].shape[1]
        ops.add_sparse_delta_mm_batched(**good)
        assert good["out"][0].any()
        assert not good["out"][1].any()
        good["out"].zero_()
        begins = set(row_ptr.tolist())
        for e in range(int(row_ptr[-1])):
            arguments = dict(good)
            place = int(table[e // size]), e % size
            wide = good["col"].int()
            last_of_row = e + 1 in begins
            wrong = [(40, "must lie in" if last_of_row else "col must be")]
            if e not in begins:
                before = int(wide[int(table[(e - 1) // size]), (e - 1) % size])
                wrong.append((before, "must be sorted and unique"))
            if col_dtype == torch.int32 and e in begins:
                wrong.append((-1, r"col must lie in \[0, 40\), got -1"))
            for column, message in wrong:
                changed = wide.clone()
                changed[place] = column
                arguments["col"] = changed.to(col_dtype)
                with pytest.raises(RuntimeError, match=message):
                    ops.add_sparse_delta_mm_batched(**arguments)
        for r in range(31):
            changed = good["row_ptr"].clone()
            changed[1, r] = -1 if r == 0 else changed[1, r - 1] - 1 if r < 30 else 10_000
            with pytest.raises(RuntimeError, match="row_ptr of adapter 1 must rise within"):
                ops.add_sparse_delta_mm_batched(**{**good, "row_ptr": changed})
        for page in range(-(-int(row_ptr[-1]) // size)):
            for number in (-1, len(good["col"])):
                changed = good["page_table"].clone()
                changed[1, page] = number
                with pytest.raises(RuntimeError, match="page_table of adapter 1 must lie in"):
                    ops.add_sparse_delta_mm_batched(**{**good, "page_table": changed})
        for adapter in (-2, 3):
            changed = good["token_adapter"].clone()
            changed[2] = adapter
            with pytest.raises(RuntimeError, match=rf"token_adapter must lie in \[-1, 3\), got {adapter}"):
                ops.add_sparse_delta_mm_batched(**{**good, "token_adapter": changed})
        assert not good["out"].any()


@each_isa
def test_a_long_list_is_checked_to_its_end(isa: str) -> None:
    """Columns are checked in blocks, by vectors, and by threads; for one token while its sums are formed."""
    mask = random_mask(100, 3000, 0.2)
    mask[40:50] = True
    x, row_ptr, col, values = case(2, mask, torch.float32)
    begins = set(row_ptr.tolist())
    generator = torch.Generator().manual_seed(5)
    with backends.use("cpu", isa=isa):
        # A row of 3000 entries goes 1024 at a time.
        joints = [int(row_ptr[44]) + e for e in (1023, 1024, 1025, 2048)]
        for e in joints + torch.randint(1, col.numel(), (60,), generator=generator).tolist():
            if e in begins:
                continue
            wrong = col.to(torch.int32)
            wrong[e] = wrong[e - 1]
            for dtype in (torch.int32, torch.uint16):
                for tokens in (1, 2):
                    with pytest.raises(RuntimeError, match="col must be sorted and unique"):
                        ops.sparse_delta_mm(x[:tokens], row_ptr, wrong.to(dtype), values, 100)
        for tokens in (1, 2):
            with pytest.raises(RuntimeError, match=r"col must lie in \[0, 2900\)"):
                ops.sparse_delta_mm(x[:tokens, :2900], row_ptr, col, values, 100)


@each_isa
def test_columns_do_not_fit_a_layer_without_any(isa: str) -> None:
    _, row_ptr, col, values = case(1, torch.ones(3, 1, dtype=torch.bool), torch.float32)
    with backends.use("cpu", isa=isa):
        for tokens in (1, 2):
            with pytest.raises(RuntimeError, match=r"col must lie in \[0, 0\), got 0"):
                ops.sparse_delta_mm(torch.zeros(tokens, 0), row_ptr, col, values, 3)


# One token is alone with its adapter, and its sums need 32 MB; the panel of the other five is 256 MB.
LITTLE_MEMORY = """
import mmap, resource
from pathlib import Path
import torch, shira_kernels

def in_use():
    size, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(size) * mmap.PAGESIZE, int(resident) * mmap.PAGESIZE

torch.set_num_threads(1)  # a thread's stack is memory, too
x, out = torch.ones(6, 2**23), torch.full((6, 2**23), 0.0)  # all in memory, as zeros may not be
token_adapter, row_ptr = torch.tensor([0, 1, 1, 1, 1, 1]), torch.ones(2, 2**23 + 1, dtype=torch.int32)
row_ptr[0, 0], row_ptr[1, 1:] = 0, 2  # an entry for row 0 of each
entries = [token_adapter.int(), row_ptr, torch.zeros(2, dtype=torch.int32), torch.ones(2)]
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
size, resident = in_use()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, hard))
try:
    torch.ops.shira.add_sparse_delta_mm_batched(out, x, *entries)
except MemoryError:
    assert not out.any(), "half applied"
else:
    raise AssertionError("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
torch.ops.shira.add_sparse_delta_mm_batched(out, x, *entries)
assert out[:, 0].eq(1).all() and not out[:, 1:].any()
assert in_use()[1] < resident + 2**24, "much is kept"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is in use")
def test_no_memory_writes_nothing_and_much_is_not_kept() -> None:
    """In a new process: in this one, earlier tests may leave free memory in which the panel finds room."""
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_isa
def test_adapters_without_tokens_are_not_read(isa: str) -> None:
    arguments = paged_arguments()
    arguments["row_ptr"][0] = torch.arange(31, dtype=torch.int32).flip(0) * 10**6
    arguments["page_table"][0] = 10**6
    with backends.use("cpu", isa=isa):
        ops.add_sparse_delta_mm_batched(**arguments)
    assert arguments["out"][0].any()
