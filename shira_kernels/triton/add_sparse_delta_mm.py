"""add_sparse_delta_mm in Triton; the kernels and their contracts are in _sparse_delta.py and _densified_delta.py.

out[t, r] += sum over entries e of row r of x[t, col[e]] * values[e]
"""

from __future__ import annotations

import torch

from shira_kernels.triton._densified_delta import single_product


def add_sparse_delta_mm(
    out: torch.Tensor,
    x: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
) -> None:
    single_product(out, x, row_ptr, col, values, add=True)
