"""The products with sparse deltas in Triton: a kernel for few tokens, and one for many.

    out[t, r] = or += sum over entries e of row r of adapter a of x[t, col[e]] * values[e],   a = token_adapter[t]

Shapes: out [tokens, rows], x [tokens, columns], row_ptr [adapters, rows + 1], col and values [nnz] or, beside a
page_table [adapters, pages_of_one], [pages, PAGE]; one adapter for all tokens where not BATCHED. Each element of out
has one program, which sums in a fixed order: no atomics, no race, deterministic. Sums are in float32 (float64 for
float64), products fused into them as on the CPU, added to out there and rounded once; with ADD, rows without entries
and tokens without an adapter are not written. Adapters, pages and columns that are not there are left out, and ends of
rows clamped: nothing outside the operands is read or written, whatever they hold.

decode_kernel: a program owns ROWS rows of one token, gathers x at ENTRIES entries of each row at a time, and sums them.
One token of bfloat16 and 1 % of 4096 x 4096 on an H100: 0.7 MB of entries take 0.2 us, the floor; about 5 us are
expected with the launch, for borders, columns, and x are loads that wait for each other, three times for 41 entries.
prefill_kernel: a program owns ROWS rows of TOKENS tokens. transpose_kernel copies x first, so that what an entry
multiplies is one contiguous vector. Tokens are sorted by adapter, on the device and with fixed shapes, so that the call
can be captured in a graph; a block of tokens goes through its adapters in turn.
2048 tokens of the same: each entry's vector of x comes from the L2 cache, 690 MB in all, 125 us at 5.5 TB/s, which is
this kernel's floor; with the copy about 165 us are expected. All of these are estimates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.triton._math import as_kernel_type, narrow, widen

FEW_TOKENS = 16  # up to here the decode kernel runs
DECODE_ROWS, DECODE_ENTRIES = 32, 16  # more entries at a time spill registers on sm_80
ROWS = 8  # of a tile: what is written for one token is a vector of 16 bytes of bfloat16
TOKENS, WIDE_TOKENS = 64, 256  # of a tile of 4 warps, and of 8, whose threads each have a vector of 8 tokens
MANY_TOKENS = 512  # of one adapter: from here tiles are wide
UNROLLED = 4  # entries of each row whose loads are in flight at once
ALIGNED = 16  # tokens: rows of the transposed x begin at multiples of it, so that its loads are vectors
SQUARE = 64  # tokens and columns that a program transposes


@triton.jit
def rows_of(row_ptr, a, r, inside, rows, columns, room):
    """Where the entries of rows r of adapter a begin and end, in [0, room], and the largest number of any."""
    borders = row_ptr + a * (rows + 1) + r
    begin = tl.load(borders, mask=inside, other=0).to(tl.int64)
    end = tl.load(borders + 1, mask=inside, other=0).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), room)
    begin = tl.minimum(tl.maximum(begin, 0), end)
    return begin, end, tl.minimum(tl.max(end - begin, axis=0), columns).to(tl.int32)


@triton.jit
def entries_at(col, values, page_table, a, e, inside, columns, pages, pages_of_one, PAGE: tl.constexpr):
    """Columns and values of entries e of adapter a, and which of them are there; the others are 0."""
    if PAGE:
        page = tl.load(page_table + a * pages_of_one + e // PAGE, mask=inside, other=-1).to(tl.int64)
        inside = inside & (page >= 0) & (page < pages)
        e = page * PAGE + e % PAGE
    c = tl.load(col + e, mask=inside, other=0).to(tl.int64)
    inside = inside & (c >= 0) & (c < columns)
    return c, widen(tl.load(values + e, mask=inside, other=0)), inside


@triton.jit
def write(out, sums, inside, ADD: tl.constexpr):
    """Sums to, or added to, where the pointers point; one rounding."""
    if ADD:
        sums = widen(tl.load(out, mask=inside, other=0)) + sums
    tl.store(out, narrow(sums, out.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    out,
    x,
    token_adapter,
    row_ptr,
    col,
    values,
    page_table,
    rows,
    columns,
    adapters,
    room,
    pages,
    pages_of_one,
    BATCHED: tl.constexpr,
    PAGE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    t = tl.program_id(1).to(tl.int64)
    if BATCHED:
        a = tl.load(token_adapter + t).to(tl.int64)
    else:
        a = t * 0
    compute: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    own = a + tl.zeros([ROWS], tl.int64)  # the interpreter makes no mask of a scalar and a block
    inside = (r < rows) & (own >= 0) & (own < adapters)
    if ADD:
        old = widen(tl.load(out + t * rows + r, mask=inside, other=0))  # arrives while the sums are made
    begin, end, most = rows_of(row_ptr, a, r, inside, rows, columns, room)
    sums = tl.zeros([ROWS], compute)
    for start in range(0, most, ENTRIES):
        e = begin[:, None] + start + tl.arange(0, ENTRIES)[None, :]  # [ROWS, ENTRIES]
        c, v, listed = entries_at(col, values, page_table, a, e, e < end[:, None], columns, pages, pages_of_one, PAGE)
        sums += tl.sum(widen(tl.load(x + t * columns + c, mask=listed, other=0)) * v, axis=1)
    if ADD:
        write(out + t * rows + r, old + sums, (r < rows) & (end > begin), False)
    else:
        write(out + t * rows + r, sums, r < rows, False)


@triton.jit
def tile_of(
    out,
    x_t,
    row_ptr,
    col,
    values,
    page_table,
    a,
    r,
    i,
    t,
    mine,
    stride,
    rows,
    columns,
    room,
    pages,
    pages_of_one,
    PAGE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """Rows r of adapter a for columns i of x_t, which are tokens t; written for those that are its own."""
    compute: tl.constexpr = tl.float64 if x_t.dtype.element_ty == tl.float64 else tl.float32
    begin, end, most = rows_of(row_ptr, a, r, r < rows, rows, columns, room)
    sums = tl.zeros([ROWS, TOKENS], compute)
    for start in range(0, most, UNROLLED):
        for k in tl.static_range(UNROLLED):
            e = begin + start + k  # [ROWS]
            c, v, listed = entries_at(col, values, page_table, a, e, e < end, columns, pages, pages_of_one, PAGE)
            there = listed[:, None] & (i < stride)[None, :]
            sums += widen(tl.load(x_t + c[:, None] * stride + i[None, :], mask=there, other=0)) * v[:, None]
    filled = end > begin if ADD else r < rows
    write(out + t[None, :] * rows + r[:, None], sums, filled[:, None] & mine[None, :], ADD)


@triton.jit
def transpose_kernel(x, order, x_t, tokens, columns, stride, BATCHED: tl.constexpr, SQUARE: tl.constexpr):
    """x_t [columns, stride] of the tokens in their order, and of zeros behind them."""
    c = tl.program_id(0).to(tl.int64) * SQUARE + tl.arange(0, SQUARE)  # [SQUARE]
    i = tl.program_id(1).to(tl.int64) * SQUARE + tl.arange(0, SQUARE)  # [SQUARE]
    t = tl.load(order + i, mask=i < tokens, other=0) if BATCHED else i
    there = (i < tokens)[:, None] & (c < columns)[None, :]
    square = tl.load(x + t[:, None] * columns + c[None, :], mask=there, other=0)
    inside = (c < columns)[:, None] & (i < stride)[None, :]
    tl.store(x_t + c[:, None] * stride + i[None, :], tl.trans(square), mask=inside)


@triton.jit
def prefill_kernel(
    out,
    x_t,
    token_adapter,
    order,
    row_ptr,
    col,
    values,
    page_table,
    tokens,
    stride,
    rows,
    columns,
    adapters,
    room,
    pages,
    pages_of_one,
    BATCHED: tl.constexpr,
    PAGE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    i = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    inside = i < tokens
    if BATCHED:
        t = tl.load(order + i, mask=inside, other=0)
        own = tl.load(token_adapter + i, mask=inside, other=-1).to(tl.int64)
        own = tl.where((own >= 0) & (own < adapters), own, adapters)
        a = tl.min(own, axis=0)
        while a < adapters:
            tile_of(
                out, x_t, row_ptr, col, values, page_table, a, r, i, t, own == a, stride, rows, columns, room, pages,
                pages_of_one, PAGE, ADD, ROWS, TOKENS, UNROLLED,
            )  # fmt: skip
            a = tl.min(tl.where(own > a, own, adapters), axis=0)
    else:
        a = tl.program_id(0).to(tl.int64) * 0
        tile_of(
            out, x_t, row_ptr, col, values, page_table, a, r, i, i, inside, stride, rows, columns, room, pages,
            pages_of_one, PAGE, ADD, ROWS, TOKENS, UNROLLED,
        )  # fmt: skip


def product(
    out: torch.Tensor,
    x: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    token_adapter: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    *,
    add: bool,
) -> None:
    """Fills `out`, or adds to it, whichever of the four ops it is for."""
    rows, columns, tokens = out.shape[-1], x.shape[-1], x.shape[:-1].numel()
    if out.numel() == 0:
        return
    inputs = x.resolve_neg().contiguous().view(tokens, columns)
    page = 0 if page_table is None else col.shape[1]
    pages_of_one = 0 if page_table is None else page_table.shape[1]
    numbers = (
        rows,
        columns,
        1 if token_adapter is None else row_ptr.shape[0],
        col.numel() if page_table is None else page * pages_of_one,
        0 if page_table is None else col.shape[0],
        pages_of_one,
    )
    stored = (row_ptr, col, as_kernel_type(values.resolve_neg()), row_ptr if page_table is None else page_table)
    form = {"BATCHED": token_adapter is not None, "PAGE": page, "ADD": add}
    if tokens <= FEW_TOKENS:
        decode_kernel[(triton.cdiv(rows, DECODE_ROWS), tokens)](
            as_kernel_type(out),
            as_kernel_type(inputs),
            row_ptr if token_adapter is None else token_adapter,
            *stored,
            *numbers,
            **form,
            ROWS=DECODE_ROWS,
            ENTRIES=DECODE_ENTRIES,
            enable_fp_fusion=True,
        )
        return
    adapters = order = row_ptr
    if token_adapter is not None:
        adapters, order = token_adapter.sort(stable=True)
        if not add:
            out.zero_()  # for tokens without an adapter
    stride = triton.cdiv(tokens, ALIGNED) * ALIGNED
    x_t = inputs.new_empty(columns, stride)
    transpose_kernel[(triton.cdiv(columns, SQUARE), triton.cdiv(stride, SQUARE))](
        as_kernel_type(inputs),
        order,
        as_kernel_type(x_t),
        tokens,
        columns,
        stride,
        BATCHED=token_adapter is not None,
        SQUARE=SQUARE,
    )
    wide = tokens >= MANY_TOKENS * (1 if token_adapter is None else row_ptr.shape[0])
    block = WIDE_TOKENS if wide else TOKENS
    # The second is at most 65535 on NVIDIA GPUs, 4 million tokens; the other way round the kernel spills registers.
    prefill_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(tokens, block))](
        as_kernel_type(out),
        as_kernel_type(x_t),
        adapters,
        order,
        *stored,
        tokens,
        stride,
        *numbers,
        **form,
        ROWS=ROWS,
        TOKENS=block,
        UNROLLED=UNROLLED,
        num_warps=8 if wide else 4,
        enable_fp_fusion=True,
    )
