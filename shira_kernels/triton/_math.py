"""Per-element math of the Triton kernels; the same formulas and names as csrc/shared/element.h.

Kernels get bfloat16 as int16 bits and convert here, so the result is rounded to nearest on every version and under the
interpreter. Launch with `enable_fp_fusion=False`: each operation rounds on its own.
"""

from __future__ import annotations

import os
import struct

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits

REPLACE = tl.constexpr(0)
INTERPOLATE = tl.constexpr(1)
ADD = tl.constexpr(2)


def as_kernel_type(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, flat, in the type that kernels compute from: bfloat16 as its bits."""
    return as_bits(tensor) if tensor.dtype == torch.bfloat16 else tensor.view(-1)


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def float_bits(number: float) -> int:
    """A float argument for a kernel: Triton would round it to float32, so its float64 bits travel as an int."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


@triton.jit
def widen(x):
    """To the type of arithmetic: float64 stays, all others become float32; int16 are the bits of bfloat16."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Back to `dtype`, to nearest, ties to even; int16 stands for the bits of bfloat16."""
    if dtype == tl.int16:
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits >> 16) & 0xFFFF
        rounded = ((bits + 0x7FFF + (upper & 1)) >> 16) & 0xFFFF
        return tl.where(x != x, upper | 0x40, rounded).to(tl.int16)
    else:
        return x.to(dtype)


@triton.jit
def update(w, v, alpha_bits, MODE: tl.constexpr):
    """w + alpha (v - w) or w + alpha v; v itself where entries are replaced."""
    if MODE == REPLACE:
        return v
    else:
        old = widen(w)
        new = widen(v).to(old.dtype)
        alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True).to(old.dtype)
        if MODE == INTERPOLATE:
            return narrow(old + (new - old) * alpha, w.dtype)
        else:
            return narrow(old + new * alpha, w.dtype)
