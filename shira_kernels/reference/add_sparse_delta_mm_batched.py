"""add_sparse_delta_mm_batched in plain PyTorch: the rows of one adapter after another."""

from __future__ import annotations

import torch

from shira_kernels.reference.add_sparse_delta_mm import add_sparse_delta_mm


def add_sparse_delta_mm_batched(
    out: torch.Tensor,
    x: torch.Tensor,
    token_adapter: torch.Tensor,
    row_ptr: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor | None = None,
) -> None:
    tokens_of_all = x.shape[:-1].numel()
    outputs = out.view(tokens_of_all, out.shape[-1])
    inputs = x.contiguous().view(tokens_of_all, x.shape[-1])  # a copy where out may share memory with x
    if page_table is not None:
        col = col.to(torch.int32)  # torch does not index uint16 on every device
    for adapter in token_adapter.unique().tolist():
        if adapter < 0:
            continue
        tokens = (token_adapter == adapter).nonzero().view(-1)
        borders = row_ptr[adapter]
        columns, entries = col, values
        if page_table is not None:
            first, last = int(borders[0]), int(borders[-1])
            place = torch.arange(first, last, device=col.device)
            pages = page_table[adapter].long()[place // col.shape[1]]
            columns, entries = col[pages, place % col.shape[1]], values[pages, place % col.shape[1]]
            borders = borders - first
        part = outputs[tokens]
        add_sparse_delta_mm(part, inputs[tokens], borders, columns, entries)
        outputs[tokens] = part
