"""encode_indices: a sorted list of indices as bytes, about one each, for a file.

    gap[i] = index[i] - index[i - 1] - 1,   index[-1] = -1
    code   = a table of 16 bytes for each block of 4096 entries but the first: the index before it, and how many bytes
             of escapes come before it, both int64, little-endian;
             a byte for each entry: the gap, of gaps from 248 on 248 + (gap - 248) % 8;
             for each of these an escape: (gap - 248) // 8 in groups of 7 bits, the lowest first, each with its highest
             bit set where more follow

A list has one code: equal lists have equal bytes. docs/format.md says why, with an example. The op is for the host: it
has no kernels for GPUs.
"""

from __future__ import annotations

import functools

import torch

from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import encode_indices as reference

OP = "encode_indices"
MAX_NUMEL = 2**62


def check_numel(op: str, numel: int) -> None:
    if not 0 <= numel <= MAX_NUMEL:
        _checks.fail(op, "numel", f"must lie in [0, 2^62], got {numel}")


def form(indices: torch.Tensor, numel: int) -> None:
    _checks.check_indices(OP, indices, indices)
    check_numel(OP, numel)


def fake(indices: torch.Tensor, numel: int) -> torch.Tensor:
    return indices.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


define(
    f"{OP}(Tensor indices, int numel) -> Tensor",
    form=form,
    fake=fake,
    contents=functools.partial(_checks.check_index_contents, OP),
    reference=reference.encode_indices,
)


def encode_indices(indices: torch.Tensor, numel: int) -> torch.Tensor:
    """The code of a sorted list: the same as `torch.ops.shira.encode_indices`.

    Args:
        indices: [nnz] int32 or int64, flat positions, sorted and unique.
        numel: elements of the tensor that they belong to, at most 2^62. The code does not depend on it.

    Returns:
        [bytes] uint8: of nnz indices at least nnz bytes and at most 11 nnz.

    Raises:
        RuntimeError: naming the argument: wrong dtype or shape, indices that are unsorted, repeated or outside
            [0, numel).
    """
    return torch.ops.shira.encode_indices(indices, numel)
