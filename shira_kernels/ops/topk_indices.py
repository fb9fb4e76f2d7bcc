"""topk_indices: where the k largest scores are.

    result = the positions i of the k largest score.view(-1)[i], sorted; of equal scores the lower positions

-0 and +0 are equal, and infinities are ordinary scores. Positions are row-major in the score's shape, whatever its
strides. NaN is refused.
"""

from __future__ import annotations

import torch

from shira_kernels.dtypes import ARITHMETIC, index_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import topk_indices as reference

OP = "topk_indices"


def form(score: torch.Tensor, k: int) -> None:
    if score.dtype not in ARITHMETIC:
        _checks.fail(OP, "score", f"must be float64, float32, bfloat16 or float16, got {score.dtype}")
    if not 0 <= k <= score.numel():
        _checks.fail(OP, "k", f"must lie in [0, {score.numel()}], the number of scores, got {k}")


def contents(score: torch.Tensor, k: int) -> None:
    if bool(score.isnan().any()):
        _checks.fail(OP, "score", "must not hold NaN: NaN scores are refused")


define(
    f"{OP}(Tensor score, int k) -> Tensor",
    form=form,
    fake=lambda score, k: score.new_empty(k, dtype=index_dtype(score.numel())),
    contents=contents,
    allows_grad=True,
    reference=reference.topk_indices,
)


def topk_indices(score: torch.Tensor, k: int) -> torch.Tensor:
    """The sorted flat positions of the k largest scores: the same as `torch.ops.shira.topk_indices`.

    Args:
        score: any shape and strides; float64, float32, bfloat16 or float16. It may require grad; the result does not.
        k: from 0 to the number of scores.

    Returns:
        [k] row-major positions in `score`, sorted; int32 for scores below 2^31 elements, else int64. Of equal scores
        (-0 equals +0) the ones of lower position are taken. The time is linear in the number of scores.

    Raises:
        RuntimeError: naming the argument: wrong dtype, k out of range; on the CPU, and on a GPU in checked mode, also
            NaN among the scores. A GPU kernel otherwise ranks NaN above all other scores, as torch.topk does.
    """
    return torch.ops.shira.topk_indices(score, k)
