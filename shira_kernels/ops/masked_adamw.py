"""masked_adamw: one step of AdamW on the listed entries of several weights, read, updated and written in one pass.

For w = weight.view(-1)[indices] (or the master), g its gradient, m = exp_avg and v = exp_avg_sq, in this order:

    w <- w (1 - lr weight_decay)
    m <- m + (1 - beta1) (g - m)                       (beta1 <= 1/2: g - beta1 (g - m), as torch.lerp has it)
    v <- v beta2 + ((1 - beta2) g) g
    w <- w + (-lr / (1 - beta1^step) m) / (sqrt(v) / sqrt(1 - beta2^step) + eps)

This is the order of operations of torch.optim.AdamW. Arithmetic is in float32 (float64 for float64 weights), each
operation rounded on its own; torch contracts the second line on some processors and takes roots that are one bit off,
so its bits may differ. Numbers that are the same for all entries are computed in float64, powers by squaring, and
rounded once. So every backend, on every device, gives the same bits; only for float64 weights the reference, whose
roots are torch's, may differ in the last.
"""

from __future__ import annotations

import functools
import math

import torch

from shira_kernels.dtypes import ARITHMETIC, compute_dtype
from shira_kernels.ops import _checks
from shira_kernels.ops._library import define
from shira_kernels.reference import masked_adamw as reference

OP = "masked_adamw"


def form(
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
    for argument, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (math.isfinite(number) and number >= 0):
            _checks.fail(OP, argument, f"must be finite and not negative, got {number}")
    for argument, number in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= number < 1:
            _checks.fail(OP, argument, f"must lie in [0, 1), got {number}")
    _checks.check_offsets(OP, offsets, len(weights), weights)
    if len(grads) != len(weights):
        _checks.fail(OP, "grads", f"must be as many as weights ({len(weights)}), got {len(grads)}")
    like = weights[0] if weights else indices
    _checks.check_indices(OP, indices, like)
    for i, weight in enumerate(weights):
        _check_weight(f"weights[{i}]", weight, weights[0])
        _check_grad(f"grads[{i}]", grads[i], weight, grads[0])
    states = [("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)] + ([] if master is None else [("master", master)])
    for argument, tensor in states:
        if weights and tensor.dtype != (compute := compute_dtype(like.dtype)):
            _checks.fail(OP, argument, f"must be {compute} for {like.dtype} weights, got {tensor.dtype}")
        _checks.check_vector(OP, argument, tensor, like, indices.shape[0])
    if step.dtype != torch.float32 or step.dim() != 0:
        _checks.fail(OP, "step", f"must be a 0-d float32 tensor, got {step.dtype} of shape {tuple(step.shape)}")
    if step.device.type != "cpu" and step.device != like.device:
        _checks.fail(OP, "step", f"must be on the CPU or on {like.device}, got {step.device}")


def _check_weight(argument: str, weight: torch.Tensor, first: torch.Tensor) -> None:
    if weight.dtype not in ARITHMETIC:
        _checks.fail(OP, argument, f"must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dtype != first.dtype:
        _checks.fail(OP, argument, f"must be {first.dtype} like weights[0], got {weight.dtype}")
    if weight.device != first.device:
        _checks.fail(OP, argument, f"must be on {first.device} like weights[0], got {weight.device}")
    _checks.check_memory(OP, argument, weight)


def _check_grad(argument: str, grad: torch.Tensor, weight: torch.Tensor, first: torch.Tensor) -> None:
    if grad.dtype not in (weight.dtype, torch.float32):
        _checks.fail(OP, argument, f"must be {weight.dtype} like the weights or float32, got {grad.dtype}")
    if grad.dtype != first.dtype:
        _checks.fail(OP, argument, f"must be {first.dtype} like grads[0], got {grad.dtype}")
    if grad.device != weight.device:
        _checks.fail(OP, argument, f"must be on {weight.device} like the weight, got {grad.device}")
    if grad.shape != weight.shape and grad.dim() != 1:
        _checks.fail(
            OP,
            argument,
            f"must have the weight's shape {tuple(weight.shape)} or be 1-D with one entry per index, "
            f"got shape {tuple(grad.shape)}",
        )
    _checks.check_memory(OP, argument, grad)


def _check_step(step: torch.Tensor) -> None:
    number = float(step)
    if not (number >= 1 and number.is_integer()):
        _checks.fail(OP, "step", f"must be a whole number of at least 1, got {number}")
    if number >= 2**63:
        _checks.fail(OP, "step", f"must be below 2^63, got {number}")


def _check_lengths(
    weights: list[torch.Tensor], offsets: torch.Tensor, indices: torch.Tensor, grads: list[torch.Tensor]
) -> list[int]:
    """Checks that offsets rise, and that each compact gradient is as long as its weight's part. Returns the offsets."""
    borders = _checks.check_offset_contents(OP, offsets, indices.numel())
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        count = borders[i + 1] - borders[i]
        if grad.shape != weight.shape and grad.numel() != count:
            _checks.fail(
                OP,
                f"grads[{i}]",
                f"must have the weight's shape {tuple(weight.shape)} or be 1-D with one entry per index ({count}), "
                f"got shape {tuple(grad.shape)}",
            )
    return borders


def check_contents(
    weights: list[torch.Tensor],
    offsets: torch.Tensor,
    indices: torch.Tensor,
    grads: list[torch.Tensor],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    step: torch.Tensor,
    *_: float,
    wait: bool,
) -> None:
    """Checks what tensors hold. Without `wait` indices stay unread, and what else a GPU holds."""
    if wait or step.is_cpu:
        _check_step(step)
    if not (wait or offsets.is_cpu):
        return
    borders = _check_lengths(weights, offsets, indices, grads)
    for i, weight in enumerate(weights if wait else ()):
        part = indices[borders[i] : borders[i + 1]]
        _checks.check_index_contents(f"{OP}: weights[{i}]", part, weight.numel())


define(
    f"{OP}(Tensor(a!)[] weights, Tensor offsets, Tensor indices, Tensor[] grads, Tensor(b!) exp_avg, "
    "Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    form=form,
    contents=functools.partial(check_contents, wait=True),
    host_contents=functools.partial(check_contents, wait=False),
    reference=reference.masked_adamw,
    host="Tensor",
)


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
    """AdamW on the listed entries of several weights, in place: the same as `torch.ops.shira.masked_adamw`.

    Args:
        weights: n tensors of any shapes, contiguous, on one device and of one dtype: float64, float32, bfloat16 or
            float16.
        offsets: [n + 1] int64, on the CPU or on the weights' device, rising from 0 to nnz.
        indices: [nnz] int32 or int64; entries offsets[i] to offsets[i+1] are flat positions in weights[i], sorted and
            unique there.
        grads: n tensors, contiguous, all in the weights' dtype or all float32. Each has its weight's shape, and is read
            at the indices, or is 1-D with one entry per index of its weight.
        exp_avg, exp_avg_sq: [nnz] float32 (float64 for float64 weights), the moments; zeros before the first call.
        master: [nnz] in the dtype of the moments, the true values of the entries: they are updated, and the weights get
            them rounded. None: the weights themselves are updated, in float32, and rounded once.
        step: 0-d float32, on the CPU or on the weights' device, the number of this step: 1 at the first call. It is not
            written; a GPU kernel reads it where it is, so a captured graph may be replayed with another step.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.

    Raises:
        RuntimeError: naming the argument, before anything is written: wrong dtype, shape, device or number, shared
            memory, an argument that requires grad outside `no_grad`, torch.func transforms; on the CPU, and on a GPU in
            checked mode, also indices that are unsorted, repeated or outside their weight. A GPU kernel otherwise skips
            indices outside.
    """
    torch.ops.shira.masked_adamw(
        weights, offsets, indices, grads, exp_avg, exp_avg_sq, master, step, lr, beta1, beta2, eps, weight_decay
    )
