"""What the tests of the four products with sparse deltas share: deltas, arenas with poison around them, the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from backend_matrix import Backend
from oracle import bits

from shira_kernels import backends

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of x and of the values.
PAIRS = (*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32))
# Of row_ptr and of col.
INDICES = ((torch.int32, torch.uint16), (torch.int64, torch.int32))
KEPT = (float("nan"), -0.0, float("-inf"))  # what `out` holds where nothing may be added


def csr(mask: torch.Tensor, row_ptr: torch.dtype, col: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """row_ptr and col of the entries that a [out, in] mask holds."""
    ends = mask.sum(1).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(row_ptr), mask.nonzero()[:, 1].to(col)


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows + columns + seed)) < density


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors begin as NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def dense(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[mask] = values.double()
    return weight


def assert_sums(
    actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, added_to: torch.Tensor | float = 0.0
) -> None:
    """actual = added_to + x @ weight.T, where a sum of n terms may be off by n + 2 roundings of all magnitudes, in the
    type of the arithmetic, and is then rounded once.

    Args:
        actual: [tokens, out].
        x: [tokens, in], finite; weight: [out, in] float64, the delta; added_to: like `actual`, finite.
    """
    base = torch.as_tensor(added_to).double()
    exact = base + x.double() @ weight.T
    magnitude = base.abs() + x.double().abs() @ weight.abs().T
    compute = torch.finfo(torch.promote_types(actual.dtype, torch.float32))
    error = (weight.ne(0).sum(1) + 2) * compute.eps * magnitude
    kind = torch.finfo(actual.dtype)
    rounding = kind.eps / 2 * (exact.abs() + error) + kind.smallest_normal * kind.eps / 2
    distance = (actual.double() - exact).abs()
    assert (distance <= error + rounding).all(), f"off by {float((distance / (error + rounding)).max())} of the bound"


def run_single(
    backend: Backend,
    into: bool,
    tokens: tuple[int, ...],
    mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    value_dtype: torch.dtype | None = None,
    row_ptr_dtype: torch.dtype = torch.int32,
    col_dtype: torch.dtype = torch.uint16,
) -> None:
    """One call of sparse_delta_mm, or `into` an output, against the oracle. Columns of x without entries are NaN."""
    rows, columns = mask.shape
    row_ptr, col = csr(mask, row_ptr_dtype, col_dtype)
    values = numbers((col.numel(),), value_dtype or dtype, 1)
    x = numbers((*tokens, columns), dtype, 2)
    count = x.shape[:-1].numel()
    finite = x.clone().view(count, columns)
    x[..., ~mask.any(0)] = float("nan")
    arguments = [tensor.to(backend.device) for tensor in (x, row_ptr, col, values)]
    before = [bits(tensor) for tensor in arguments]
    weight, empty = dense(mask, values), ~mask.any(1)
    if into:
        old = numbers((*tokens, rows), dtype, 3)
        old[..., empty] = torch.tensor(KEPT, dtype=dtype)[torch.arange(int(empty.sum())) % 3]
        out = old.to(backend.device, copy=True)
        with backend.running(), poisoned_memory():
            torch.ops.shira.add_sparse_delta_mm(out, *arguments)
        actual, old = out.cpu().view(count, rows), old.view(count, rows)
        assert torch.equal(bits(actual[:, empty]), bits(old[:, empty])), "a row without entries changed"
        assert_sums(actual[:, ~empty], finite, weight[~empty], old[:, ~empty])
    else:
        with backend.running(), poisoned_memory():
            result = torch.ops.shira.sparse_delta_mm(*arguments, rows)
        assert result.shape == (*tokens, rows)
        assert result.dtype == dtype
        assert not result[..., empty].cpu().view(-1).ne(0).any(), "a row without entries is 0"
        assert_sums(result.cpu().view(count, rows), finite, weight)
    assert all(torch.equal(bits(tensor), was) for tensor, was in zip(arguments, before, strict=True))


SLOTS = (0, 2, 3)  # of five, that hold adapters; the others hold what no delta may


def arena(
    masks: list[torch.Tensor],
    value_dtype: torch.dtype,
    row_ptr_dtype: torch.dtype,
    col_dtype: torch.dtype,
    page_size: int | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """row_ptr, col, values and, with a page_size, page_table of the masks in SLOTS; and each one's values.

    Around the entries lie columns that are not there and values that are NaN; spare slots hold wild numbers.
    """
    wild = torch.Generator().manual_seed(5)
    high = torch.iinfo(row_ptr_dtype).max
    row_ptr = torch.randint(-high, high, (5, masks[0].shape[0] + 1), generator=wild).to(row_ptr_dtype)
    counts = [int(mask.sum()) for mask in masks]
    skipped = 3  # entries before the first of an adapter, in the arena or in its pages
    if page_size is None:
        col = torch.full((sum(counts) + skipped * 4,), torch.iinfo(col_dtype).max, dtype=col_dtype)
        page_table = []
    else:
        pages = [-(-(count + skipped) // page_size) for count in counts]
        table = torch.randint(-(2**31), 2**31, (5, max(pages) + 1), generator=wild).to(torch.int32)
        order = torch.randperm(sum(pages) + 2, generator=wild)
        col = torch.full((len(order), page_size), torch.iinfo(col_dtype).max, dtype=col_dtype)
        page_table = [table]
    values = torch.full(col.shape, float("nan"), dtype=value_dtype)
    columns_as = torch.int16 if col_dtype == torch.uint16 else col_dtype
    begin, used, lists = skipped, 0, []
    for i, mask in enumerate(masks):
        borders, columns = csr(mask, torch.int64, col_dtype)
        entries = numbers((counts[i],), value_dtype, 10 + i)
        lists.append(entries)
        if page_size is None:
            row_ptr[SLOTS[i]] = borders + begin
            place: Any = slice(begin, begin + counts[i])
            begin += counts[i] + skipped
        else:
            row_ptr[SLOTS[i]] = borders + skipped
            table[SLOTS[i], : pages[i]] = order[used : used + pages[i]]
            used += pages[i]
            e = torch.arange(skipped, skipped + counts[i])
            place = (table[SLOTS[i]].long()[e // page_size], e % page_size)
        # torch cannot put uint16 by index.
        col.view(columns_as)[place], values[place] = columns.view(columns_as), entries
    return [row_ptr, col, values, *page_table], lists


def run_batched(
    backend: Backend,
    into: bool,
    tokens: tuple[int, ...],
    masks: list[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    value_dtype: torch.dtype | None = None,
    row_ptr_dtype: torch.dtype = torch.int32,
    col_dtype: torch.dtype = torch.uint16,
    page_size: int | None = None,
    adapters: list[int] | None = None,
) -> None:
    """One call of sparse_delta_mm_batched, or `into` an output, against the oracle, token by token.

    Args:
        masks: one for each of SLOTS.
        adapters: of each token an index of masks, or -1; None for a mixture.
    """
    rows, columns = masks[0].shape
    x = numbers((*tokens, columns), dtype, 2)
    count = x.shape[:-1].numel()
    chosen = adapters or [(7 * t) % (len(masks) + 1) - 1 for t in range(count)]
    token_adapter = torch.tensor([SLOTS[i] if i >= 0 else -1 for i in chosen], dtype=torch.int32)
    finite, flat = x.clone().view(count, columns), x.view(count, columns)
    # By index of masks; the last one is for -1.
    unread = torch.stack([*(~mask.any(0) for mask in masks), torch.ones(columns, dtype=torch.bool)])
    unwritten = torch.stack([*(~mask.any(1) for mask in masks), torch.ones(rows, dtype=torch.bool)])
    flat[unread[chosen]] = float("nan")
    stored, lists = arena(masks, value_dtype or dtype, row_ptr_dtype, col_dtype, page_size)
    arguments = [tensor.to(backend.device) for tensor in (x, token_adapter, *stored)]
    before = [bits(tensor) for tensor in arguments]
    kept = unwritten[chosen]
    old = numbers((count, rows), dtype, 3)
    if into:
        old[kept] = torch.tensor(KEPT, dtype=dtype)[torch.arange(int(kept.sum())) % 3]
        result = old.to(backend.device, copy=True).view(*tokens, rows)
        with backend.running(), poisoned_memory():
            torch.ops.shira.add_sparse_delta_mm_batched(result, *arguments)
    else:
        with backend.running(), poisoned_memory():
            result = torch.ops.shira.sparse_delta_mm_batched(*arguments[:5], rows, *arguments[5:])
        assert result.shape == (*tokens, rows)
        assert result.dtype == dtype
    actual = result.cpu().view(count, rows)
    if into:
        assert torch.equal(bits(actual[kept]), bits(old[kept])), "a row without entries changed"
    else:
        assert not actual[kept].ne(0).any(), "a row without entries is 0"
    for i, (mask, values) in enumerate(zip(masks, lists, strict=True)):
        listed = torch.tensor(chosen).eq(i).nonzero().view(-1)
        filled = ~unwritten[i]
        base = old[listed][:, filled] if into else 0.0
        assert_sums(actual[listed][:, filled], finite[listed], dense(mask, values)[filled], base)
    assert all(torch.equal(bits(tensor), was) for tensor, was in zip(arguments, before, strict=True))


def mixed_masks(rows: int, columns: int, density: float) -> list[torch.Tensor]:
    """Masks of three adapters, the last without any entry."""
    return [
        random_mask(rows, columns, density),
        random_mask(rows, columns, density / 2, seed=1),
        torch.zeros(rows, columns, dtype=torch.bool),
    ]


def single_arguments(device: str = "cpu") -> dict[str, Any]:
    """Arguments for a delta [3, 4] with entries 1, 2, 3 at (0, 1), (0, 3), (2, 0), and two tokens."""
    return {
        "x": torch.arange(8.0, device=device).view(2, 4),
        "row_ptr": torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device),
        "col": torch.tensor([1, 3, 0], dtype=torch.int32, device=device),
        "values": torch.tensor([1.0, 2.0, 3.0], device=device),
    }


SINGLE_RESULT = [[7.0, 0.0, 0.0], [19.0, 0.0, 12.0]]


def batched_arguments(device: str = "cpu") -> dict[str, Any]:
    """Three slots, of which the first holds the delta of single_arguments and the last 5 at (1, 2), in pages of 2."""
    return {
        "x": torch.arange(12.0, device=device).view(3, 4),
        "token_adapter": torch.tensor([2, -1, 0], dtype=torch.int32, device=device),
        "row_ptr": torch.tensor([[0, 2, 2, 3], [9, -9, 9, 9], [0, 0, 1, 1]], dtype=torch.int32, device=device),
        "col": torch.tensor([[2, 7], [1, 3], [0, 7]], dtype=torch.int32, device=device),
        "values": torch.tensor([[5.0, 9.0], [1.0, 2.0], [3.0, 9.0]], device=device),
        "page_table": torch.tensor([[1, 2], [7, -7], [0, 7]], dtype=torch.int32, device=device),
    }


BATCHED_RESULT = [[0.0, 10.0, 0.0], [0.0, 0.0, 0.0], [31.0, 0.0, 24.0]]

Change = Callable[[torch.Tensor], torch.Tensor]
BAD_X: list[tuple[str, Change, str]] = [
    ("x", lambda t: t.int(), "x must be float64"),
    ("x", lambda t: t[0, 0], "x must have at least one dimension|out must be"),
    ("x", lambda t: t.to_sparse(), "x must be a strided tensor|[Ss]parse"),
    ("x", lambda t: t[:, :3], "col .*must lie in"),
]
BAD_VALUES: list[tuple[str, Change, str]] = [
    ("values", lambda t: t.double(), r"values must be torch\.float32 like x"),
    ("values", lambda t: t.bfloat16(), r"values must be torch\.float32 like x"),
    ("values", lambda t: t[:2], "values must have the shape of col"),
    ("values", lambda t: t[..., None], "values must have the shape of col"),
    ("values", lambda t: t.repeat_interleave(2, -1)[..., ::2], "values must be contiguous"),
]
BAD_SINGLE = [
    *BAD_X,
    *BAD_VALUES,
    ("row_ptr", lambda t: t.float(), "row_ptr must be int32 or int64"),
    ("row_ptr", lambda t: t.to(torch.uint16), "row_ptr must be int32 or int64, got torch.uint16"),
    ("row_ptr", lambda t: t.view(2, 2), "row_ptr must be 1-D"),
    ("row_ptr", lambda t: t[:3], "row_ptr must have one entry more than"),
    ("row_ptr", lambda t: t.repeat_interleave(2)[::2], "row_ptr must be contiguous"),
    ("row_ptr", lambda t: t - 1, "row_ptr must rise from 0"),
    ("row_ptr", lambda t: t * 2, "row_ptr must rise from 0"),
    ("row_ptr", lambda t: t.new_tensor([0, 3, 2, 3]), "row_ptr must rise from 0"),
    ("col", lambda t: t.long(), "col must be int32 or uint16"),
    ("col", lambda t: t.view(3, 1), "col must be 1-D"),
    ("col", lambda t: t.repeat_interleave(2)[::2], "col must be contiguous"),
    ("col", lambda t: t[[1, 0, 2]], "col must be sorted and unique"),
    ("col", lambda t: t[[1, 1, 2]], "col must be sorted and unique"),
    ("col", lambda t: t - 1, "col must lie in"),
    ("col", lambda t: t + 1, "col must lie in"),
]
BAD_BATCHED = [
    *BAD_X,
    *BAD_VALUES,
    ("token_adapter", lambda t: t.long(), "token_adapter must be int32"),
    ("token_adapter", lambda t: t[:2], "token_adapter must have one entry per row of x"),
    ("token_adapter", lambda t: t.view(3, 1), "token_adapter must be 1-D"),
    ("token_adapter", lambda t: t.repeat_interleave(2)[::2], "token_adapter must be contiguous"),
    ("token_adapter", lambda t: t.masked_fill(t == 2, 3), r"token_adapter must lie in \[-1, 3\), got 3"),
    ("token_adapter", lambda t: t.masked_fill(t == -1, -2), r"token_adapter must lie in \[-1, 3\), got -2"),
    ("token_adapter", lambda t: t * 0 + 1, "row_ptr of adapter 1 must rise within"),
    ("row_ptr", lambda t: t.float(), "row_ptr must be int32 or int64"),
    ("row_ptr", lambda t: t.flatten(), r"row_ptr must be \[adapters, out \+ 1\]"),
    ("row_ptr", lambda t: t[:, :3].contiguous(), r"row_ptr must be \[adapters, out \+ 1\]"),
    ("row_ptr", lambda t: t.repeat_interleave(2, 1)[:, ::2], "row_ptr must be contiguous"),
    ("row_ptr", lambda t: t - 1, "row_ptr of adapter 0 must rise within"),
    ("row_ptr", lambda t: t * 3, "row_ptr of adapter 0 must rise within"),
    ("row_ptr", lambda t: t.flip(1), "row_ptr of adapter [02] must rise within"),
    ("col", lambda t: t.long(), "col must be int32 or uint16"),
    ("col", lambda t: t.flatten(), r"col must be \[pages, page_size\] beside a page_table"),
    ("col", lambda t: t[:, :0], r"col must be \[pages, page_size\] beside a page_table"),
    ("col", lambda t: t.repeat_interleave(2, 1)[:, ::2], "col must be contiguous"),
    ("col", lambda t: t.flip(1), "col must be sorted and unique|col must lie in"),
    ("col", lambda t: t - 1, "col must lie in"),
    ("col", lambda t: t + 1, "col must lie in"),
    ("page_table", lambda t: None, "col must be 1-D unless there is a page_table"),
    ("page_table", lambda t: t.long(), "page_table must be int32"),
    ("page_table", lambda t: t[:2], r"page_table must be \[adapters, pages\] with 3 adapters"),
    ("page_table", lambda t: t.flatten(), r"page_table must be \[adapters, pages\] with 3 adapters"),
    ("page_table", lambda t: t.repeat_interleave(2, 1)[:, ::2], "page_table must be contiguous"),
    ("page_table", lambda t: t[:, :1].contiguous(), "row_ptr of adapter 0 must rise within"),
    ("page_table", lambda t: t[:, :0], "row_ptr of adapter 0 must rise within"),
    ("page_table", lambda t: t + 2, r"page_table of adapter [02] must lie in \[0, 3\) where it has entries"),
    ("page_table", lambda t: t - 2, r"page_table of adapter [02] must lie in \[0, 3\) where it has entries"),
]
BAD_OUT: list[tuple[str, Change, str]] = [
    ("out", lambda t: t.double(), r"out must be torch\.float32 like x"),
    ("out", lambda t: t[0, 0], "out must "),
    ("out", lambda t: t[:1], r"out must be \[\.\.\., out\] beside x"),
    ("out", lambda t: t[None], r"out must be \[\.\.\., out\] beside x"),
    ("out", lambda t: t.t().contiguous().t(), "out must be contiguous"),
    ("out", lambda t: t.repeat_interleave(2, 1)[:, ::2], "out must be contiguous"),
    ("out", lambda t: t[:1].expand(len(t), -1), "out must be contiguous"),
    ("out", lambda t: t[:, :2].contiguous(), "row_ptr must (have one entry more than|be)"),
    ("out", lambda t: torch._neg_view(t), "must not be lazily"),
]


def add_out(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the op that adds: `out` of ones first."""
    x = arguments["x"]
    return {"out": torch.ones(*x.shape[:-1], 3, device=x.device, dtype=x.dtype), **arguments}


def check_refused(
    backend: Backend, call: Callable[..., Any], arguments: dict[str, Any], argument: str, change: Change, message: str
) -> None:
    """A changed argument is refused with a message, and nothing is written."""
    arguments = {**arguments, argument: change(arguments[argument])}
    tensors = [tensor for tensor in arguments.values() if isinstance(tensor, torch.Tensor)]
    strided = [tensor.resolve_neg() for tensor in tensors if tensor.layout == torch.strided]
    before = [bits(tensor) for tensor in strided]
    refused = pytest.raises((RuntimeError, NotImplementedError), match=message)
    with refused, backends.checked(), backend.running(times=0):
        call(**arguments)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(strided, before, strict=True))


def check_in_place_rules(backend: Backend, op: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Autograd is told what an op writes; what requires grad, is shared or lazy is refused before it is written."""
    expected = arguments["out"].clone()
    out, version = arguments["out"], arguments["out"]._version
    others = {name: tensor._version for name, tensor in arguments.items() if isinstance(tensor, torch.Tensor)}
    with backend.running():
        op(**arguments)
    assert out._version > version
    assert all(arguments[name]._version == number for name, number in others.items() if name != "out")
    result = out.clone()
    assert not torch.equal(result, expected)

    leaf = torch.ones_like(out, requires_grad=True)
    base = expected.clone()
    product = leaf * base  # saves the base for backward
    with backend.running():
        op(**{**arguments, "out": base})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()

    for name in ("out", "x", "values"):
        for is_leaf in (True, False):
            tensor = (expected if name == "out" else arguments[name]).clone().requires_grad_()
            changed = {**arguments, "out": expected.clone(), name: tensor if is_leaf else tensor * 1}
            with pytest.raises(RuntimeError, match=f"{name} requires grad"), backend.running(times=0):
                op(**changed)
            assert torch.equal(changed["out"].detach(), expected)
            with torch.no_grad(), backend.running():
                op(**changed)
            assert torch.equal(changed["out"].detach(), result)

    with torch.inference_mode(), backend.running():
        base = expected.clone()
        op(**{**arguments, "out": base})
    assert torch.equal(base, result)
    with pytest.raises(RuntimeError, match="out must not be an inference tensor"), backend.running(times=0):
        op(**{**arguments, "out": base})

    def total(scale: torch.Tensor) -> torch.Tensor:
        out = expected * scale
        op(**{**arguments, "out": out})
        return out.sum()

    with pytest.raises(RuntimeError, match=r"torch\.func transforms|requires grad"), backend.running(times=0):
        torch.func.grad(total)(torch.tensor(2.0, device=out.device))


def check_shared_memory(backend: Backend, op: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """`out` may share memory with no argument that a kernel reads; where that is a copy, it may."""
    out = arguments["out"]
    size = max(out.numel(), arguments["x"].numel()) * 2
    memory = torch.ones(size, device=out.device)
    inside = memory[: out.numel()].view_as(out)
    for name in ("x", "values"):
        shared = memory[: arguments[name].numel()].view_as(arguments[name])
        refused = pytest.raises(RuntimeError, match=f"(out|{name}) must not share memory with ({name}|out)")
        with refused, backend.running(times=0):
            op(**{**arguments, "out": inside, name: shared})
    assert memory.eq(1).all()

    strided = memory.as_strided(arguments["x"].shape, (0, 3))  # reads what is written for other tokens
    copied = {**arguments, "x": strided.clone(), "out": inside.clone()}
    with backend.running(times=2):
        op(**copied)
        op(**{**arguments, "x": strided, "out": inside})
    assert torch.equal(inside, copied["out"])


def check_compiled(
    function: Callable[..., Any], arguments: Callable[[int], dict[str, Any]], dynamic: list[str]
) -> None:
    """`function(**arguments(tokens))` compiles once for all numbers of tokens, and gives what eager mode gives."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for tokens in (5, 3, 8, 2):
        changed = arguments(tokens)
        for name in dynamic:
            torch._dynamo.mark_dynamic(changed[name], 0)
        assert torch.equal(compiled(**changed), function(**arguments(tokens)))
    assert counter.frame_count == 1


def check_exported(
    function: Callable[..., Any], arguments: Callable[[int], dict[str, Any]], dynamic: list[str]
) -> None:
    """`function` exports with its number of tokens left open."""

    class Module(torch.nn.Module):
        def forward(self, arguments: dict[str, Any]) -> torch.Tensor:
            return function(**arguments)

    tokens = torch.export.Dim("tokens", min=2, max=1000)
    example = arguments(4)
    shapes = {name: {0: tokens} if name in dynamic else None for name in example}
    program = torch.export.export(Module(), (example,), dynamic_shapes=(shapes,)).module()
    for number in (4, 9):
        assert torch.equal(program(arguments(number)), function(**arguments(number)))


def check_nothing_outside(device: str, tokens: int) -> None:
    """Triton kernels check no contents on a GPU. Around operands lies NaN, which would show if it were read."""
    from shira_kernels.triton import _sparse_delta

    def guarded(tensor: torch.Tensor, poison: float) -> torch.Tensor:
        around = torch.full((tensor.numel() + 2000,), poison, dtype=tensor.dtype, device=device)
        around[1000:-1000] = tensor.flatten().to(device)
        return around[1000:-1000].view(tensor.shape)

    generator = torch.Generator().manual_seed(0)

    def wild(*shape: int) -> torch.Tensor:
        """Half of them far outside, half near 0."""
        far = torch.randint(-(2**31), 2**31, shape, generator=generator)
        near = torch.randint(-20, 60, shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, far, near).to(device, torch.int32)

    x, out = guarded(torch.ones(tokens, 9), float("nan")), guarded(torch.ones(tokens, 5), 7.0)
    token_adapter, row_ptr, table = wild(tokens), wild(3, 6), guarded(wild(3, 4), 2)
    token_adapter[: tokens // 2] = torch.arange(tokens // 2, device=device) % 3
    whole = out.untyped_storage()
    for page_table in (table, None):
        shape = (6, 8) if page_table is not None else (48,)
        col, values = guarded(wild(*shape), 3), guarded(torch.ones(shape), float("nan"))
        _sparse_delta.product(out, x, row_ptr, col, values, token_adapter, page_table, add=True)
    assert out.isfinite().all()
    assert not out.eq(1).all(), "entries that are there are added"
    assert out.new_empty(0).set_(whole).eq(7).sum() >= 2000


# (shape of the tokens, rows, columns, density)
SINGLE_SHAPES = [
    ((1,), 1, 1, 1.0),
    ((), 5, 7, 0.5),  # one token, no leading dimension
    ((0,), 5, 7, 0.5),
    ((4, 0), 5, 7, 0.5),
    ((3,), 0, 7, 0.5),  # no rows
    ((3,), 5, 0, 0.5),  # no columns
    ((3,), 9, 1, 0.5),
    ((9,), 5, 7, 0.0),
    ((9,), 6, 7, 1.0),
    ((17,), 3, 40, 0.3),
    ((2, 3, 11), 13, 33, 0.2),
    ((130,), 7, 19, 0.3),
    ((1,), 40, 130, 0.9),  # rows of more than a hundred entries
]
BATCHED_SHAPES = [
    ((1,), 1, 1, 1.0),
    ((), 5, 7, 0.5),  # one token, no leading dimension
    ((0,), 5, 7, 0.5),
    ((4, 0), 5, 7, 0.5),
    ((3,), 0, 7, 0.5),  # no rows
    ((3,), 5, 0, 0.5),  # no columns
    ((3,), 9, 1, 0.5),
    ((9,), 5, 7, 0.0),
    ((9,), 6, 7, 1.0),
    ((17,), 3, 40, 0.3),
    ((2, 3, 11), 10, 33, 0.2),
    ((130,), 5, 19, 0.3),
    ((2,), 20, 130, 0.9),  # rows of more than a hundred entries
]
PAGES = (None, 7)  # sizes, None for no pages
TOKEN_ADAPTERS = [[-1] * 4, [0] * 4, [1, 1, 1, 0], [-1, 0, -1, 1], [2, 2], [-1] * 40, [1] * 40, [1] * 37 + [0, -1, 0]]


def masks_with_gaps() -> list[torch.Tensor]:
    """Few full rows, one full column, a diagonal."""
    rows = torch.zeros(35, 20, dtype=torch.bool)
    rows[::13] = True
    columns = torch.zeros(10, 60, dtype=torch.bool)
    columns[:, 57] = True
    return [rows, columns, torch.eye(20, 15, dtype=torch.bool)]


def changing_batched(tokens: int) -> dict[str, Any]:
    """Other adapters, too, with other numbers of tokens."""
    adapters = torch.tensor([2, -1, 0], dtype=torch.int32)[torch.arange(tokens) * tokens % 3]
    return {**batched_arguments(), "x": torch.arange(4.0 * tokens).view(tokens, 4), "token_adapter": adapters}
