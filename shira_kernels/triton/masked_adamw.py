"""masked_adamw in Triton: one launch for all weights.

w = master[i] or weight[indices[i]], g = grad[indices[i]] or grad[i - begin];
_math.adamw(w, g, exp_avg[i], exp_avg_sq[i])

A table [4, n] int64 holds each weight's address and number of elements, its gradient's address, and the gradient's
length (-1: it has the weight's shape); offsets [n + 1] cut the arena. A program owns BLOCK neighbours of the arena and
finds their weights by binary search, as scatter_apply_batched does. No two entries are the same place: no atomics, no
race, deterministic. float32 arithmetic (float64 for float64), rounded once. Entries whose index lies outside their
weight are skipped.

`step` is read by the kernel if it is on the device, and what depends on it is computed by each program: a captured
graph may be replayed with another step. Else the host computes it, and no float64 work is left for float32 arithmetic.
The table is kept for the next calls; one with other addresses makes a new one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from shira_kernels.reference.masked_adamw import power
from shira_kernels.triton import _batch
from shira_kernels.triton._batch import on_device, parts_of
from shira_kernels.triton._launch import blocks, launch
from shira_kernels.triton._math import (
    adamw,
    adamw_corrections,
    as_kernel_type,
    float_bits,
    float_of,
    narrow,
    number_bits,
    number_of,
    widen,
)
from shira_kernels.triton.scatter_apply_batched import entries_of

BLOCK = 512  # entries of a program; 4 for each of its 128 threads


NUMBERS = (
    *("count", "nnz", "decay", "lerp", "beta2", "one_minus_beta2", "eps"),
    *("bias_correction2_sqrt", "negative_step_size", "lr_bits", "beta1_bits", "beta2_bits"),
)


@triton.jit(do_not_specialize=NUMBERS)
def masked_adamw_kernel(
    table,
    offsets,
    indices,
    exp_avg,
    exp_avg_sq,
    master,
    step,
    element,  # any pointers of the weights' and the gradients' type: only their types are used
    grad_element,
    count: tl.int32,
    nnz: tl.int64,
    decay: tl.int64,  # from here on bits: of the type of arithmetic
    lerp: tl.int64,
    beta2: tl.int64,
    one_minus_beta2: tl.int64,
    eps: tl.int64,
    bias_correction2_sqrt: tl.int64,  # these two only where the host knows the step
    negative_step_size: tl.int64,
    lr_bits: tl.int64,  # of float64
    beta1_bits: tl.int64,
    beta2_bits: tl.int64,
    MASTER: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < nnz
    # All of these come from memory while the search goes on.
    index = tl.load(indices + i, mask=inside, other=-1).to(tl.int64)
    m = tl.load(exp_avg + i, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + i, mask=inside, other=0.0)
    if MASTER:
        w = tl.load(master + i, mask=inside, other=0.0)
    parts, _, _ = parts_of(offsets, i, first, tl.minimum(first + BLOCK, nnz) - 1, count, BLOCK)
    weights, inside = entries_of(table, element, index, parts, count)
    length = tl.load(table + 3 * count + parts)
    at = tl.where(length < 0, index, i - tl.load(offsets + parts))
    inside = inside & (at >= 0) & ((length < 0) | (at < length))
    grads = tl.load(table + 2 * count + parts).to(grad_element.dtype) + at
    g = widen(tl.load(grads, mask=inside, other=0)).to(m.dtype)
    if not MASTER:
        w = widen(tl.load(weights, mask=inside, other=0))
    if STEP_ON_DEVICE:
        correction, step_size = adamw_corrections(
            float_of(lr_bits), float_of(beta1_bits), float_of(beta2_bits), tl.load(step).to(tl.int64), m.dtype
        )
    else:
        correction, step_size = number_of(bias_correction2_sqrt, m.dtype), number_of(negative_step_size, m.dtype)
    w, m, v = adamw(
        w,
        g,
        m,
        v,
        number_of(decay, m.dtype),
        number_of(lerp, m.dtype),
        number_of(beta2, m.dtype),
        number_of(one_minus_beta2, m.dtype),
        number_of(eps, m.dtype),
        correction,
        step_size,
    )
    tl.store(exp_avg + i, m, mask=inside)
    tl.store(exp_avg_sq + i, v, mask=inside)
    if MASTER:
        tl.store(master + i, w, mask=inside)
    tl.store(weights, narrow(w, element.dtype.element_ty), mask=inside)


def numbers_of(
    dtype: torch.dtype, step: int | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[int, ...]:
    """The kernel's numbers from `decay` on, as AdamW::of has them; the step's are 0 where only the GPU knows it."""
    correction, step_size = 0.0, 0.0
    if step is not None:
        correction, step_size = math.sqrt(1 - power(beta2, step)), -(lr / (1 - power(beta1, step)))
    rounded = [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, correction, step_size]
    return (*number_bits(rounded, dtype), float_bits(lr), float_bits(beta1), float_bits(beta2))


def stays_on_device(step: torch.Tensor) -> bool:
    """Whether the kernel reads the step; under the interpreter, where all is on the CPU, it never does."""
    return not step.is_cpu


def table_of(weights: list[torch.Tensor], offsets: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    """On the CPU, as this file's kernel reads it, and the offsets."""
    addresses, numels = [weight.data_ptr() for weight in weights], [weight.numel() for weight in weights]
    lengths = [-1 if g.shape == w.shape else g.numel() for w, g in zip(weights, grads, strict=True)]
    return _batch.table_of([addresses, numels, [grad.data_ptr() for grad in grads], lengths], (offsets,))


def masked_adamw(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    grads: list[torch.Tensor],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    step: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *,
    table: torch.Tensor | None = None,
) -> None:
    nnz = indices.numel()
    if nnz == 0:
        return
    table = table_of(weights, offsets, grads) if table is None else table
    table, offsets = on_device(indices.device, table, 4, len(weights), (offsets,))
    step_on_device = stays_on_device(step)
    count = None if step_on_device else int(step)
    launch(
        masked_adamw_kernel,
        blocks(nnz, BLOCK),
        (
            table,
            offsets,
            indices,
            exp_avg,
            exp_avg_sq,
            exp_avg if master is None else master,
            step if step_on_device else exp_avg,
            as_kernel_type(weights[0]),
            as_kernel_type(grads[0]),
        ),
        (len(weights), nnz, *numbers_of(exp_avg.dtype, count, lr, beta1, beta2, eps, weight_decay)),
        (master is not None, step_on_device, BLOCK),
    )
