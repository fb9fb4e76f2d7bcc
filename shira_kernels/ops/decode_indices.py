"""decode_indices: the sorted list of indices that a code stands for: the inverse of `encode_indices`.

    index[i] = index[i - 1] + 1 + gap[i],   index[-1] = -1,   gap = byte, plus 8 times the next escape where byte >= 248

The code is not trusted: one that `encode_indices` would not have made is refused, and nothing is computed or kept
beyond 8 times its size. The op is for the host: it has no kernels for GPUs.
"""

from __future__ import annotations

import torch

from shira_kernels.dtypes import index_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.ops.encode_indices import check_numel
from shira_kernels.reference import decode_indices as reference
from shira_kernels.reference.encode_indices import table_bytes

OP = "decode_indices"


def form(code: torch.Tensor, nnz: int, numel: int) -> None:
    if code.dtype != torch.uint8:
        _checks.fail(OP, "code", f"must be uint8, got {code.dtype}")
    _checks.check_vector(OP, "code", code, code)
    check_numel(OP, numel)
    if not 0 <= nnz <= numel:
        _checks.fail(OP, "nnz", f"must lie in [0, {numel}], got {nnz}")


def contents(code: torch.Tensor, nnz: int, *_: int) -> None:
    """The code's size, which is not known where it is traced; what it holds is checked where it is decoded."""
    if code.numel() < table_bytes(nnz) + nnz or (nnz == 0 and code.numel()):
        _checks.fail(OP, "code", f"must hold the code of {nnz} indices, got {code.numel()} bytes")


define(
    f"{OP}(Tensor code, int nnz, int numel) -> Tensor",
    form=form,
    fake=lambda code, nnz, numel: code.new_empty(nnz, dtype=index_dtype(numel)),
    contents=contents,
    reference=reference.decode_indices,
)


def decode_indices(code: torch.Tensor, nnz: int, numel: int) -> torch.Tensor:
    """The indices of a code: the same as `torch.ops.shira.decode_indices`.

    Args:
        code: [bytes] uint8, as `encode_indices` gives it.
        nnz: how many indices it stands for.
        numel: elements of the tensor that they belong to, at most 2^62.

    Returns:
        [nnz] flat positions, sorted and unique; int32 for tensors below 2^31 elements, else int64.

    Raises:
        RuntimeError: naming the argument: wrong dtype or shape, a code that is damaged (bytes missing or left over, a
            table that disagrees with its blocks, an escape longer than it need be), an index outside [0, numel).
    """
    return torch.ops.shira.decode_indices(code, nnz, numel)
