"""The product with one sparse delta of many entries at many tokens: by the library, with the delta written out dense.

    out[t, r] = or += sum over entries e of row r of x[t, col[e]] * values[e]

Shapes: out [tokens, rows], x [tokens, columns], row_ptr [rows + 1], col and values [nnz]. A panel of rows of the delta
is filled in a buffer of zeros (scatter_kernel: a program owns one row's, up to ENTRIES), torch multiplies x by its
transpose into sums, which are added to out and rounded once (finish_kernel: a program owns TOKENS x ROWS of them), and
the entries are zeros again. Panel and sums stay in the L2 cache. Sums are in float32: no atomics, no race,
deterministic. With `add`, rows without entries are not written. Ends of rows are clamped, and columns outside left out:
nothing outside the operands is read or written, whatever they hold; of repeated columns one counts.

Zeros of the panel times an infinity or NaN of x are NaN, in sums that have no such term. So sums that are not finite
are made again from the entries alone, by finish_kernel; if one is finite, then so was every factor.

2048 tokens of bfloat16, 4096 x 4096, on an H100, beside the base product's 100 us: the floor is that product again,
100 us; about 200 us are expected, limited by the tensor cores, and then by sums and out going through the L2 cache,
whatever the density. prefill_kernel's time grows with the entries: 1 % take it 165 us, 2 % 320 us. All are estimates.

The other way to one dense product, entries written into the weight and taken back after it, needs the weight, which
the ops do not get, and which other threads, streams and graphs may read meanwhile. float32 multiplies on CUDA cores,
1400 us here; float32 values beside 16-bit x would be rounded: both keep prefill_kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.triton._library_product import entries_of_row, is_exact, multiply, panel_rows
from shira_kernels.triton._math import as_kernel_type, widen
from shira_kernels.triton._sparse_delta import entries_at, product, rows_of, write

ENTRIES = 1024  # of a row, by one program: more than rows of most masks have
TOKENS, ROWS = 16, 32  # of the sums that one program finishes; with 64 rows it spills registers on triton 3.6


@triton.jit
def scatter_kernel(panel, row_ptr, col, values, first_row, columns, nnz, CLEAR: tl.constexpr, ENTRIES: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    e, c, there = entries_of_row(row_ptr, col, first_row + r, columns, nnz, ENTRIES)
    if CLEAR:
        v = tl.zeros([ENTRIES], panel.dtype.element_ty)
    else:
        v = tl.load(values + e, mask=there, other=0)
    tl.store(panel + r * columns + c, v, mask=there)


@triton.jit
def finish_kernel(
    out,
    sums,
    x,
    row_ptr,
    col,
    values,
    first_row,
    height,
    tokens,
    rows,
    columns,
    nnz,
    ADD: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    i = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS], of the panel
    r = first_row + i
    inside = (t < tokens)[:, None] & (i < height)[None, :]
    begin, end, most = rows_of(row_ptr, 0, r, i < height, rows, columns, nnz)
    s = tl.load(sums + t[:, None] * height + i[None, :], mask=inside, other=0)
    again = s - s != 0  # NaN or infinite
    terms = tl.max(tl.max(again.to(tl.int32), axis=1), axis=0) * most
    exact = tl.zeros([TOKENS, ROWS], tl.float32)
    for k in range(terms):
        e = begin[None, :] + k  # [1, ROWS]
        c, v, listed = entries_at(col, values, row_ptr, 0, e, e < end[None, :], columns, 0, 0, 0)
        some = again & listed
        factor = widen(tl.load(x + t[:, None] * columns + c, mask=some, other=0))
        exact += tl.where(some, factor * v, 0.0)
    s = tl.where(again, exact, s)
    filled = end > begin if ADD else i < height
    write(out + t[:, None] * rows + r[None, :], s, inside & filled[None, :], ADD)


def is_densified(tokens: int, rows: int, columns: int, nnz: int) -> bool:
    """Whether the product takes less time dense. Estimates for 16-bit operands on an H100, in us."""
    sparse = 2 * tokens * nnz / 4.5e6 + 4 * tokens * columns / 2.5e6
    dense = 2 * tokens * rows * columns / 600e6 + (12 * tokens * rows + 2 * rows * columns) / 3e6
    panels = triton.cdiv(rows, panel_rows(rows, 4 * tokens))
    return dense + 20 * panels < sparse and max(tokens, rows, columns) < 2**31


def single_product(
    out: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, *, add: bool
) -> None:
    """Fills `out` [.., rows], or adds to it, for the ops with one adapter for all tokens."""
    tokens, rows, columns = x.shape[:-1].numel(), out.shape[-1], x.shape[-1]
    narrow = x.dtype in (torch.bfloat16, torch.float16) and values.dtype == x.dtype
    if out.numel() and narrow and is_densified(tokens, rows, columns, col.numel()) and is_exact(x):
        densified_product(out, x, row_ptr, col, values, add=add)
    else:
        product(out, x, row_ptr, col, values, add=add)


def densified_product(
    out: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, *, add: bool
) -> None:
    """Does what `product` does, for operands of 16 bits, by dense products."""
    tokens, rows, columns = x.shape[:-1].numel(), out.shape[-1], x.shape[-1]
    x = x.resolve_neg().contiguous().view(tokens, columns)
    most = panel_rows(rows, 4 * tokens)
    panel = x.new_zeros(most, columns)
    sums = x.new_empty(tokens * most, dtype=torch.float32)
    stored = (row_ptr, col, as_kernel_type(values.resolve_neg()))
    for first in range(0, rows, most):
        number = min(most, rows - first)
        grid = (number, triton.cdiv(columns, ENTRIES))
        some = (as_kernel_type(panel), *stored, first, columns, col.numel())
        scatter_kernel[grid](*some, CLEAR=False, ENTRIES=ENTRIES)
        multiply(x, panel[:number].t(), out=sums[: tokens * number].view(tokens, number))
        finish_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(number, ROWS))](
            as_kernel_type(out),
            sums,
            as_kernel_type(x),
            *stored,
            first,
            number,
            tokens,
            rows,
            columns,
            col.numel(),
            ADD=add,
            TOKENS=TOKENS,
            ROWS=ROWS,
            enable_fp_fusion=True,
        )
        if first + most < rows:
            scatter_kernel[grid](*some, CLEAR=True, ENTRIES=ENTRIES)
