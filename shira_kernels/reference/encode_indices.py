"""encode_indices in plain PyTorch: gaps at once, escapes by the place of their bytes."""

from __future__ import annotations

import torch

BLOCK = 4096  # entries
BORDER_BYTES = 16
FIRST_ESCAPE = 248
UNIT = 8  # of an escape
MAX_ESCAPE_BYTES = 9


def table_bytes(nnz: int) -> int:
    return max(0, (nnz - 1) // BLOCK) * BORDER_BYTES


def last_of_blocks(nnz: int, device: torch.device) -> torch.Tensor:
    """The last entry of each block but the last."""
    return torch.arange(BLOCK - 1, max(BLOCK - 1, nnz - 1), BLOCK, device=device)


def encode_indices(indices: torch.Tensor, numel: int) -> torch.Tensor:
    indices = indices.long()
    gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
    escaped = gaps >= FIRST_ESCAPE
    above = gaps - FIRST_ESCAPE
    first = torch.where(escaped, FIRST_ESCAPE + above % UNIT, gaps).to(torch.uint8)
    rest = torch.where(escaped, above // UNIT, -1)
    lengths = escaped.long()
    for i in range(1, MAX_ESCAPE_BYTES):
        lengths += rest >= 1 << (7 * i)
    ends = lengths.cumsum(0)
    escapes = first.new_empty(int(ends[-1]) if len(ends) else 0)
    for i in range(MAX_ESCAPE_BYTES):
        has = lengths > i
        more = (lengths[has] > i + 1).long() * 128
        escapes[ends[has] - lengths[has] + i] = ((rest[has] >> (7 * i)) % 128 + more).to(torch.uint8)
    last = last_of_blocks(len(indices), indices.device)
    table = torch.stack([indices[last], ends[last]], 1)
    bytes_of = (table[:, :, None] >> (8 * torch.arange(8, device=indices.device))) & 255
    return torch.cat([bytes_of.view(-1).to(torch.uint8), first, escapes])
