"""masked_adamw in Triton: one launch for all weights.

w = master[i] or weight[indices[i]], g = grad[indices[i]] or grad[i - begin];
_math.adamw(w, g, exp_avg[i], exp_avg_sq[i])

A table [4, n] int64 holds each weight's address and number of elements, its gradient's address, and the gradient's
length (-1: it has the weight's shape); offsets [n + 1] cut the arena. A program owns BLOCK neighbours of the arena and
finds each one's weight by binary search. No two entries are the same place: no atomics, no race, deterministic. float32
arithmetic (float64 for float64), rounded once. Entries whose index lies outside their weight are skipped.

`step` is read by the kernel if it is on the device, and what depends on it is computed by each program: a captured
graph may be replayed with another step. The table is kept for the next calls; one with other addresses makes a new one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shira_kernels.triton._batch import offsets_on, on_device, part_of
from shira_kernels.triton._math import adamw, as_kernel_type, float_bits, narrow, widen

BLOCK = 512  # entries of a program; 4 for each of its 128 threads


@triton.jit(
    do_not_specialize=[
        "count",
        "step_count",
        "lr_bits",
        "beta1_bits",
        "beta2_bits",
        "eps_bits",
        "weight_decay_bits",
    ]
)
def masked_adamw_kernel(
    table,
    offsets,
    indices,
    exp_avg,
    exp_avg_sq,
    master,
    step,
    step_count,
    element,  # any pointers of the weights' and the gradients' type: only their types are used
    grad_element,
    count,
    nnz,
    lr_bits,
    beta1_bits,
    beta2_bits,
    eps_bits,
    weight_decay_bits,
    STEPS: tl.constexpr,
    MASTER: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < nnz
    part = part_of(offsets, i, count, STEPS)
    numel = tl.load(table + count + part)
    length = tl.load(table + 3 * count + part)
    index = tl.load(indices + i, mask=inside, other=-1).to(tl.int64)
    at = tl.where(length < 0, index, i - tl.load(offsets + part))
    inside = inside & (index >= 0) & (index < numel) & (at >= 0) & ((length < 0) | (at < length))
    weights = tl.load(table + part).to(element.dtype) + index
    grads = tl.load(table + 2 * count + part).to(grad_element.dtype) + at

    m = tl.load(exp_avg + i, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + i, mask=inside, other=0.0)
    g = widen(tl.load(grads, mask=inside, other=0)).to(m.dtype)
    if MASTER:
        w = tl.load(master + i, mask=inside, other=0.0)
    else:
        w = widen(tl.load(weights, mask=inside, other=0))
    if STEP_ON_DEVICE:
        step_number = tl.load(step).to(tl.int64)
    else:
        step_number = step_count.to(tl.int64)
    w, m, v = adamw(w, g, m, v, step_number, lr_bits, beta1_bits, beta2_bits, eps_bits, weight_decay_bits)
    tl.store(exp_avg + i, m, mask=inside)
    tl.store(exp_avg_sq + i, v, mask=inside)
    if MASTER:
        tl.store(master + i, w, mask=inside)
    tl.store(weights, narrow(w, element.dtype.element_ty), mask=inside)


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
) -> None:
    nnz = indices.numel()
    if nnz == 0:
        return
    device = indices.device
    pairs = list(zip(weights, grads, strict=True))
    table = on_device(
        device,
        (
            *(weight.data_ptr() for weight in weights),
            *(weight.numel() for weight in weights),
            *(grad.data_ptr() for grad in grads),
            *(-1 if grad.shape == weight.shape else grad.numel() for weight, grad in pairs),
        ),
    )
    step_on_device = step.device == device
    masked_adamw_kernel[(triton.cdiv(nnz, BLOCK),)](
        table,
        offsets_on(device, offsets),
        indices,
        exp_avg,
        exp_avg_sq,
        exp_avg if master is None else master,
        step if step_on_device else exp_avg,
        0 if step_on_device else int(step),
        as_kernel_type(weights[0]),
        as_kernel_type(grads[0]),
        len(weights),
        nnz,
        float_bits(lr),
        float_bits(beta1),
        float_bits(beta2),
        float_bits(eps),
        float_bits(weight_decay),
        STEPS=len(weights).bit_length(),
        MASTER=master is not None,
        STEP_ON_DEVICE=step_on_device,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )
