"""sparse_delta_mm_batched in plain PyTorch: the rows of one adapter after another."""

from __future__ import annotations

import torch

from shira_kernels.reference.add_sparse_delta_mm_batched import add_sparse_delta_mm_batched


def sparse_delta_mm_batched(
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    page_table: torch.Tensor | None = None,
) -> torch.Tensor:
    out = x.new_zeros((*x.shape[:-1], out_features))
    add_sparse_delta_mm_batched(out, x, token_adapter, row_ptr, col, values, page_table)
    return out
