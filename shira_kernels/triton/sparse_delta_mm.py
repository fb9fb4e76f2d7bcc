"""sparse_delta_mm in Triton; the kernels and their contract are in _sparse_delta.py.

result[t, r] = sum over entries e of row r of x[t, col[e]] * values[e]
"""

from __future__ import annotations

import torch

from shira_kernels.triton._sparse_delta import product


def sparse_delta_mm(
    x: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], out_features))
    product(out, x, row_ptr, col, values, add=False)
    return out
