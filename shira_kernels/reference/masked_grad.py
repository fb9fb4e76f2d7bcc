"""masked_grad in plain PyTorch: gathers the columns of both operands, a part of the entries at a time."""

from __future__ import annotations

import torch

from shira_kernels.dtypes import compute_dtype

_PART_BYTES = 1 << 26  # of gathered columns held at a time


def masked_grad(grad_output: torch.Tensor, x: torch.Tensor, row_ptr: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    compute = compute_dtype(x.dtype)
    tokens = x.shape[:-1].numel()
    g = grad_output.reshape(tokens, grad_output.shape[-1]).to(compute)
    inputs = x.reshape(tokens, x.shape[-1]).to(compute)
    rows = torch.repeat_interleave(
        torch.arange(row_ptr.numel() - 1, device=col.device), row_ptr.diff().long(), output_size=col.numel()
    )
    col = col.long()
    part = max(1, _PART_BYTES // (compute.itemsize * max(1, len(g))))
    sums = [
        (g[:, rows[start : start + part]] * inputs[:, col[start : start + part]]).sum(0)
        for start in range(0, col.numel(), part)
    ]
    return torch.cat(sums) if sums else g.new_zeros(0)
