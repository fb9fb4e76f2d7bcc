"""decode_indices in plain PyTorch: escapes by their groups of bytes, then one prefix sum."""

from __future__ import annotations

from typing import NoReturn

import torch

from shira_kernels.dtypes import index_dtype
from shira_kernels.reference.encode_indices import (
    FIRST_ESCAPE,
    MAX_ESCAPE_BYTES,
    UNIT,
    last_of_blocks,
    table_bytes,
)


def decode_indices(code: torch.Tensor, nnz: int, numel: int) -> torch.Tensor:
    dtype = index_dtype(numel)
    if not nnz:
        return torch.empty(0, dtype=dtype, device=code.device)
    begin = table_bytes(nnz)
    gaps, escapes = code[begin : begin + nnz].long(), code[begin + nnz :].long()
    values, ends = _escapes(escapes)
    escaped = (gaps >= FIRST_ESCAPE).nonzero().view(-1)
    if len(values) != len(escaped):
        _fail(f"has {len(values)} escapes, but {len(escaped)} gaps ask for one")
    # In float64 first: a sum that is too large for int64 is found whatever its bits would be.
    if bool((values > numel // UNIT).any()) or float(values.double().sum()) * UNIT > numel * (1 + 2**-20):
        _fail("has an index outside the tensor")
    gaps[escaped] += values * UNIT
    indices = (gaps + 1).cumsum(0) - 1
    if int(indices[-1]) >= numel:
        _fail("has an index outside the tensor")
    places = torch.arange(8, device=code.device)
    table = (code[:begin].long().view(-1, 2, 8) << (8 * places)).sum(2)
    last = last_of_blocks(nnz, code.device)
    counts = torch.searchsorted(escaped, last, right=True)  # of escapes up to each block's end
    before = torch.cat([ends.new_zeros(1), ends])[counts]
    if not torch.equal(table, torch.stack([indices[last], before], 1)):
        _fail("has a table that disagrees with its blocks")
    return indices.to(dtype)


def _escapes(escapes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers that they are, and where the bytes of each end."""
    is_end = escapes < 128
    ends = is_end.nonzero().view(-1) + 1
    if len(escapes) and (not len(ends) or int(ends[-1]) != len(escapes)):
        _fail("ends within an escape")
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    if bool(((escapes[ends - 1] == 0) & (lengths > 1)).any()) or bool((lengths > MAX_ESCAPE_BYTES).any()):
        _fail("has an escape that is longer than it need be")
    number = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), lengths)
    place = torch.arange(len(escapes), device=ends.device) - (ends - lengths)[number]
    values = torch.zeros(len(ends), dtype=torch.int64, device=ends.device)
    return values.index_add_(0, number, (escapes % 128) << (7 * place)), ends


def _fail(message: str) -> NoReturn:
    raise RuntimeError(f"shira::decode_indices: code is damaged: it {message}")
