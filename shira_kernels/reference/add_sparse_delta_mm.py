"""add_sparse_delta_mm in plain PyTorch."""

from __future__ import annotations

import torch

from shira_kernels.reference.sparse_delta_mm import delta


def add_sparse_delta_mm(
    out: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor, values: torch.Tensor
) -> None:
    added = delta(x, row_ptr, col, values)
    wide = out.to(added.dtype).view_as(added) + added
    out.copy_(torch.where(row_ptr.diff() > 0, wide.to(out.dtype), out.view_as(added)).view_as(out))
