"""Per-element math of the Triton kernels; the same formulas and names as csrc/shared/element.h and
adamw.h.

Kernels get bfloat16 as int16 bits and convert here, so the result is rounded to nearest on every version and under the
interpreter. Launch with `enable_fp_fusion=False`: each operation rounds on its own.
"""

from __future__ import annotations

import ctypes
import os
import struct

import torch
import triton
import triton.language as tl

from shira_kernels.bits import as_bits, flat

REPLACE = tl.constexpr(0)
INTERPOLATE = tl.constexpr(1)
ADD = tl.constexpr(2)


def as_kernel_type(tensor: torch.Tensor) -> torch.Tensor:
    """Gives the tensor's memory, flat, in the type that kernels compute from: bfloat16 as its bits."""
    return as_bits(tensor) if tensor.dtype == torch.bfloat16 else flat(tensor)


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def number_bits(numbers: list[float], dtype: torch.dtype) -> tuple[int, ...]:
    """Float arguments for a kernel, rounded to a floating-point type: its bits as ints, which `number_of` reads."""
    if dtype == torch.float64:
        return tuple(map(float_bits, numbers))
    return struct.unpack(f"<{len(numbers)}i", b"".join(bytes(ctypes.c_float(number)) for number in numbers))


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


@triton.jit
def float_of(bits):
    """The float64 whose bits `float_bits` gave."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def square_root(x):
    """Rounded to nearest; the float32 `tl.sqrt` is an approximation on some GPUs."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Rounded to nearest; the float32 `/` is an approximation on some GPUs."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def power(beta, step):
    """beta^step by squaring: multiplications round alike on every device, which pow does not."""
    result = tl.full([], 1.0, tl.float64)
    while step > 0:
        result = tl.where((step & 1) != 0, result * beta, result)
        beta = beta * beta
        step = step >> 1
    return result


@triton.jit
def number_of(bits, dtype: tl.constexpr):
    """The float64 or float32 whose bits `number_bits` gave."""
    if dtype == tl.float64:
        return float_of(bits)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def adamw_corrections(lr, beta1, beta2, step, dtype: tl.constexpr):
    """What depends on the step, from float64 numbers: bias_correction2_sqrt and negative_step_size."""
    bias_correction2_sqrt = tl.sqrt(1.0 - power(beta2, step)).to(dtype)
    negative_step_size = (-(lr / (1.0 - power(beta1, step)))).to(dtype)
    return bias_correction2_sqrt, negative_step_size


@triton.jit
def adamw(w, g, m, v, decay, lerp, beta2, one_minus_beta2, eps, bias_correction2_sqrt, negative_step_size):
    """AdamW on entries w with gradients g, m = exp_avg and v = exp_avg_sq; gives back w, m, v. All are of one type."""
    from_old = lerp < 0.5
    lerp = tl.where(from_old, lerp, lerp - 1.0)
    w = w * decay
    m = tl.where(from_old, m, g) + (g - m) * lerp
    v = v * beta2 + g * one_minus_beta2 * g
    denom = divide(square_root(v), tl.broadcast_to(bias_correction2_sqrt, v.shape)) + eps
    w = w + divide(m * negative_step_size, denom)
    return w, m, v
