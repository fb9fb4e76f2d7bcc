"""What the ways by one dense product share: the entries of a panel's rows, and torch's product where its sums are those
that an op promises: in float32 (float64 for float64), not rounded to fewer bits on the way, and of the same bits from
call to call.

cuBLAS is deterministic for given shapes on a given GPU, because torch gives each stream a workspace of its own. What
it computes depends on settings of the whole process, which a call may not change, for other threads multiply
meanwhile: so they are read, and where they allow less than that, callers run a kernel of their own.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# What stays in the L2 cache: one wave of the library's tiles, 128 x 256 of float32 on each of the 132 multiprocessors
# of an H100, whose cache is three times as large.
PANEL_BYTES = 132 * 128 * 256 * 4
PANEL_ROWS = 128  # a panel's rows are a multiple of it, as the library's tiles are

# Of CUBLAS_WORKSPACE_CONFIG. Without them torch may refuse to multiply where deterministic algorithms are demanded.
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


def is_exact(x: torch.Tensor) -> bool:
    """Whether `multiply` keeps that promise for operands of the dtype and on the device of x."""
    if not x.is_cuda:
        return True  # the interpreter's operands
    # torch has no product of 16-bit numbers with a float32 result on AMD GPUs, whose float32 products may use atomics.
    if torch.version.hip is not None or torch.cuda.get_device_capability(x.device)[0] < 8:
        return False
    if (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
        and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _DETERMINISTIC_WORKSPACES
    ):
        return False
    settings = torch.backends.cuda.matmul
    if x.dtype == torch.float32:
        return settings.fp32_precision in ("none", "ieee")  # not TF32
    return x.dtype != torch.float16 or not settings.allow_fp16_accumulation


def panel_rows(rows: int, row_bytes: int) -> int:
    """Says how many of `rows` are multiplied at once, where each gives `row_bytes` bytes of sums."""
    return min(rows, max(PANEL_ROWS, PANEL_BYTES // row_bytes // PANEL_ROWS * PANEL_ROWS))


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a b, for operands for which `is_exact`. Autocast leaves alone what is written to an `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


@triton.jit
def entries_of_row(row_ptr, col, row, columns, nnz, ENTRIES: tl.constexpr):
    """A program's entries of a panel's row, ENTRIES for each number of its second axis: their places in the list, their
    columns, and which of them are there. The ends of rows are clamped, and columns outside are left out."""
    begin = tl.load(row_ptr + row).to(tl.int64)
    end = tl.load(row_ptr + row + 1).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), nnz)
    begin = tl.minimum(tl.maximum(begin, 0), end)
    e = begin + tl.program_id(1).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)  # [ENTRIES]
    c = tl.load(col + e, mask=e < end, other=0).to(tl.int64)
    return e, c, (e < end) & (c >= 0) & (c < columns)
