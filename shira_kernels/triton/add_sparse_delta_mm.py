"""add_sparse_delta_mm in Triton; the kernels and their contract are in _sparse_delta.py.

out[t, r] += sum over entries e of row r of x[t, col[e]] * values[e]
"""

from __future__ import annotations

import torch

from shira_kernels.triton._sparse_delta import product


def add_sparse_delta_mm(
    out: torch.Tensor,
    x: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
) -> None:
    product(out, x, row_ptr, col, values, add=True)
