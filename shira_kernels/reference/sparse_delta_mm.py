"""sparse_delta_mm in plain PyTorch: gathers columns of x, and sums them by row, a part of the entries at a time."""

from __future__ import annotations

import torch

from shira_kernels.dtypes import compute_dtype

_PART_BYTES = 1 << 26  # of gathered columns held at a time


def sparse_delta_mm(
    x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor, out_features: int
) -> torch.Tensor:
    return delta(x, row_ptr, col, values).to(x.dtype).view(*x.shape[:-1], out_features)


def delta(x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[tokens, out], not rounded to the dtype of x. Entries may begin anywhere in col and values."""
    compute = compute_dtype(x.dtype)
    inputs = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(compute)
    borders = row_ptr.long()
    rows = torch.repeat_interleave(torch.arange(row_ptr.numel() - 1, device=col.device), borders.diff())
    sums = inputs.new_zeros(len(inputs), row_ptr.numel() - 1)
    first, last = int(borders[0]), int(borders[-1])
    col, values = col[first:last].long(), values[first:last].to(compute)
    part = max(1, _PART_BYTES // (compute.itemsize * max(1, len(inputs))))
    for start in range(0, last - first, part):
        some = slice(start, start + part)
        terms = inputs[:, col[some]] * values[some]
        if terms.is_cuda:  # slower, but index_add_ adds in any order there
            sums.t().index_put_((rows[some],), terms.t(), accumulate=True)
        else:
            sums.index_add_(1, rows[some], terms)
    return sums
