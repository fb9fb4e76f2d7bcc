"""sparse_delta_mm in Triton; the kernels and their contracts are in _sparse_delta.py and _densified_delta.py.

result[t, r] = sum over entries e of row r of x[t, col[e]] * values[e]
"""

from __future__ import annotations

import torch

from shira_kernels.triton._densified_delta import single_product


def sparse_delta_mm(
    x: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], out_features))
    single_product(out, x, row_ptr, col, values, add=False)
    return out
