"""masked_grad in Triton: the dense gradient in panels by the library, or in tiles, of which the entries are kept.

result[e] = sum over tokens t of grad_output[t, row(e)] * x[t, col[e]]

Shapes: grad_output [tokens, out], x [tokens, in], row_ptr [out + 1], col and result [nnz]. Sums are in float32 without
TF32 (float64 for float64). One program writes an entry: no atomics, no race, deterministic. Ends of rows and columns
are clamped or left out: nothing outside the operands is read or written, whatever they hold.

By panels, wherever `uses_panels` and the library's sums are exact enough: torch multiplies rows of grad_output's
transpose by x into a panel of the dense gradient that stays in the L2 cache, and gather_kernel picks its entries there:
a program owns one row's, up to ENTRIES. 4096 tokens of bfloat16, 4096 x 4096, on an H100: the product takes 172 us at
800 TFLOP/s, which is the floor; beside it each of 4 panels costs about 10 us of launches, half-empty waves and the
gather: about 230 us, limited by tensor cores. float32, on CUDA cores at 50 TFLOP/s: 2.7 ms, which is its floor.
Shapes alone fix the launches, so a call can be captured in a graph.

By tiles: a program owns a tile of ROWS x COLUMNS of the gradient: it finds each row's entries in the tile by binary
search, forms the tile as a matrix product over all tokens, and stores its entries alone, picked by column. It needs no
memory, and skips tiles without entries; but it multiplies at a tenth of the library's speed (about 1500 us).

Why no sampled products: neighbouring entries of a row are far apart in x, so without a transposed copy of both
operands each product would load a whole sector for one element. Times are estimates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.dtypes import compute_dtype
from shira_kernels.triton._library_product import entries_of_row, is_exact, multiply, panel_rows
from shira_kernels.triton._math import as_kernel_type, interprets, widen

ENTRIES = 1024  # of a row, by one program: more than rows of most masks have
ROWS, COLUMNS = 64, 64  # of a tile
TOKENS = {2: 32, 4: 16, 8: 16}  # of one step, by the size of an element; twice as many do not spill either, untimed
PICKED = 4  # entries of each row that are stored at a time


@triton.jit
def operand(x, WIDEN: tl.constexpr):
    """What tl.dot takes: int16 are the bits of bfloat16. The interpreter has no bfloat16 product, so it widens."""
    if WIDEN:
        return widen(x)
    elif x.dtype == tl.int16:
        return x.to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def first_at_least(col, low, high, column, STEPS: tl.constexpr):
    """The first position in [low, high) of a column that is not below the given one, or high."""
    for _ in range(STEPS):  # unrolled, it spills registers on triton 3.6
        middle = (low + high) >> 1
        found = tl.load(col + middle, mask=low < high, other=0).to(tl.int32)
        below = (low < high) & (found < column)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def masked_grad_kernel(
    grad_output,
    x,
    row_ptr,
    col,
    sums,
    tokens,
    rows,
    columns,
    nnz,
    STEPS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PICKED: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    r = first_row + tl.arange(0, ROWS)  # [ROWS]
    c = first_column + tl.arange(0, COLUMNS)  # [COLUMNS]
    begin = tl.load(row_ptr + r, mask=r < rows, other=0).to(tl.int64)
    end = tl.load(row_ptr + r + 1, mask=r < rows, other=0).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), nnz)
    begin = tl.minimum(tl.maximum(begin, 0), end)
    begin = first_at_least(col, begin, end, first_column.to(tl.int32), STEPS)
    end = first_at_least(col, begin, end, (first_column + COLUMNS).to(tl.int32), STEPS)
    most = tl.max(end - begin, axis=0)
    if most > 0:
        accumulate: tl.constexpr = tl.float64 if sums.dtype.element_ty == tl.float64 else tl.float32
        tile = tl.zeros([ROWS, COLUMNS], accumulate)
        for start in range(0, tokens, TOKENS):
            t = start + tl.arange(0, TOKENS).to(tl.int64)  # [TOKENS]
            g = tl.load(
                grad_output + t[:, None] * rows + r[None, :], mask=(t < tokens)[:, None] & (r < rows)[None, :], other=0
            )
            inputs = tl.load(
                x + t[:, None] * columns + c[None, :], mask=(t < tokens)[:, None] & (c < columns)[None, :], other=0
            )
            tile = tl.dot(
                tl.trans(operand(g, WIDEN)), operand(inputs, WIDEN), tile, input_precision="ieee", out_dtype=accumulate
            )
        for start in range(0, most.to(tl.int32), PICKED):
            e = begin[:, None] + start + tl.arange(0, PICKED)[None, :]  # [ROWS, PICKED]
            inside = e < end[:, None]
            place = tl.load(col + e, mask=inside, other=0).to(tl.int32) - first_column.to(tl.int32)
            place = tl.where(inside, tl.minimum(tl.maximum(place, 0), COLUMNS - 1), 0)
            tl.store(sums + e, tl.gather(tile, place, axis=1), mask=inside)


@triton.jit
def gather_kernel(panel, row_ptr, col, sums, first_row, columns, nnz, ENTRIES: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    e, c, there = entries_of_row(row_ptr, col, first_row + r, columns, nnz, ENTRIES)
    tl.store(sums + e, tl.load(panel + r * columns + c, mask=there), mask=there)


def uses_panels(tokens: int, rows: int, columns: int, nnz: int) -> bool:
    """Whether the library's product of everything takes less time than tiles where entries are. Estimates.

    Tiles multiply at an eighth of the library's speed or less, and there are at most as many as entries. What they
    multiply has to outweigh the launches for the panels: 2^28 products take a GPU's tiles about 7 us.
    """
    tiles = min(triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS), nnz) * ROWS * COLUMNS
    return tokens * tiles >= 2**28 and 8 * tiles >= rows * columns and max(tokens, rows, columns) < 2**31


def masked_grad(grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    rows, columns = grad_output.shape[-1], x.shape[-1]
    sums = x.new_zeros(col.numel(), dtype=compute_dtype(x.dtype))
    if col.numel() == 0 or x.numel() == 0:
        return sums
    tokens = x.numel() // columns
    grad_output, x = grad_output.contiguous().view(tokens, rows), x.contiguous().view(tokens, columns)
    if uses_panels(tokens, rows, columns, col.numel()) and is_exact(x):
        by_panels(grad_output, x, row_ptr, col, sums)
    else:
        by_tiles(grad_output, x, row_ptr, col, sums)
    return sums


def by_panels(
    grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, sums: torch.Tensor
) -> None:
    """Fills sums [nnz]; grad_output [tokens, out] and x [tokens, in] are contiguous."""
    rows, columns = grad_output.shape[1], x.shape[1]
    most = panel_rows(rows, columns * sums.element_size())
    panel = sums.new_empty(most, columns)
    for first in range(0, rows, most):
        some = grad_output[:, first : first + most].t()
        multiply(some, x, out=panel[: len(some)])
        gather_kernel[(len(some), triton.cdiv(columns, ENTRIES))](
            panel, row_ptr, col, sums, first, columns, col.numel(), ENTRIES=ENTRIES
        )


def by_tiles(
    grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, sums: torch.Tensor
) -> None:
    """As by_panels."""
    (tokens, rows), columns = grad_output.shape, x.shape[1]
    masked_grad_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        as_kernel_type(grad_output),
        as_kernel_type(x),
        row_ptr,
        col,
        sums,
        tokens,
        rows,
        columns,
        col.numel(),
        STEPS=columns.bit_length() + 1,
        WIDEN=interprets() and x.dtype == torch.bfloat16,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        TOKENS=TOKENS[x.element_size()],
        PICKED=PICKED,
        num_warps=8 if x.element_size() > 2 else 4,  # or it spills registers
        enable_fp_fusion=True,
    )
