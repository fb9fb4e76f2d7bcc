"""torch's dense product, where its sums are those that an op promises: in float32 (float64 for float64), not rounded to
fewer bits on the way, and of the same bits from call to call.

cuBLAS is deterministic for given shapes on a given GPU, because torch gives each stream a workspace of its own. What
it computes depends on settings of the whole process, which a call may not change, for other threads multiply
meanwhile: so they are read, and where they allow less than that, callers run a kernel of their own.
"""

from __future__ import annotations

import os

import torch

_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # of CUBLAS_WORKSPACE_CONFIG, without which torch may refuse to multiply


def is_exact(x: torch.Tensor) -> bool:
    """Whether `multiply` keeps that promise for operands of the dtype and on the device of x."""
    if not x.is_cuda:
        return True  # the interpreter's operands
    # torch has no product of 16-bit numbers with a float32 result on AMD GPUs, whose float32 products may use atomics.
    if torch.version.hip is not None or torch.cuda.get_device_capability(x.device)[0] < 8:
        return False
    if (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
        and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _DETERMINISTIC_WORKSPACES
    ):
        return False
    settings = torch.backends.cuda.matmul
    if x.dtype == torch.float32:
        return settings.fp32_precision in ("none", "ieee")  # not TF32
    return x.dtype != torch.float16 or not settings.allow_fp16_accumulation


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a b, for operands for which `is_exact`. Autocast leaves alone what is written to an `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
