"""masked_grad in Triton: tiles of the dense gradient, of which only the listed entries leave the program.

result[e] = sum over tokens t of grad_output[t, row(e)] * x[t, col[e]]

Shapes: grad_output [tokens, out], x [tokens, in], row_ptr [out + 1], col and result [nnz]. A program owns a tile of
ROWS x COLUMNS of the gradient: it forms the tile as a matrix product over all tokens, so that tensor cores do the
work, finds each row's entries in the tile by binary search, and stores those alone, picked from the tile by column. An
entry lies in one tile: no atomics, no race, deterministic. Sums are in float32 without TF32 (float64 for float64).
Positions outside col and columns outside the tile are clamped: nothing outside is read or written.

Why not sampled products: neighbouring entries of a row are far apart in x, so without a transposed copy of both
operands each product would load a whole sector for one element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.triton._math import as_kernel_type, interprets, widen

ROWS, COLUMNS = 64, 64
TOKENS = {2: 32, 4: 16, 8: 16}  # of one step, by the size of an element: more spills registers on sm_80
PICKED = 16  # entries of each row that are stored at a time


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
    for _ in tl.static_range(STEPS):
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


def masked_grad(grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    rows, columns = grad_output.shape[-1], x.shape[-1]
    sums = x.new_zeros(col.numel(), dtype=torch.promote_types(x.dtype, torch.float32))
    if col.numel() == 0 or x.numel() == 0:
        return sums
    grad_output, x = grad_output.contiguous(), x.contiguous()
    masked_grad_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        as_kernel_type(grad_output),
        as_kernel_type(x),
        row_ptr,
        col,
        sums,
        x.numel() // columns,
        rows,
        columns,
        col.numel(),
        STEPS=columns.bit_length() + 1,
        WIDEN=interprets() and x.dtype == torch.bfloat16,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        TOKENS=TOKENS[x.element_size()],
        PICKED=PICKED,
    )
    return sums
