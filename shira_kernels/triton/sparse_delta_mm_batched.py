"""sparse_delta_mm_batched in Triton; the kernels and their contract are in _sparse_delta.py.

result[t, r] = sum over entries e of row r of adapter token_adapter[t] of x[t, col[e]] * values[e]
"""

from __future__ import annotations

import torch

from shira_kernels.triton._sparse_delta import product


def sparse_delta_mm_batched(
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], out_features))
    product(out, x, row_ptr, col, values, token_adapter, page_table, add=False)
    return out
