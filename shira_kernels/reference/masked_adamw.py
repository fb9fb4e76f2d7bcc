"""masked_adamw in plain PyTorch: gather, compute, index_copy_. Each operation is a call of its own: none is contracted.

The numbers that are the same for all entries are computed in float64 and rounded once to the type of the arithmetic.
Powers are computed by squaring, since multiplications round alike everywhere and `pow` does not.
"""

from __future__ import annotations

import math

import torch


def power(beta: float, step: int) -> float:
    """beta ** step, in the order of multiplications that every backend has."""
    result = 1.0
    while step > 0:
        if step & 1:
            result *= beta
        beta *= beta
        step >>= 1
    return result


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
    borders = offsets.tolist()
    count = int(step)
    bias_correction2_sqrt = math.sqrt(1 - power(beta2, count))
    step_size = lr / (1 - power(beta1, count))
    for i, weight in enumerate(weights):
        part = slice(borders[i], borders[i + 1])
        index, compute = indices[part].long(), exp_avg.dtype
        flat, grad = weight.view(-1), grads[i].view(-1)
        g = (grad[index] if grads[i].shape == weight.shape else grad).to(compute)
        w = (flat[index] if master is None else master[part]).to(compute)
        m, v = exp_avg[part], exp_avg_sq[part]

        w = w * (1 - lr * weight_decay)
        lerp = torch.tensor(1 - beta1, dtype=compute, device="cpu")
        # As torch.lerp, which starts from the nearer end.
        new_m = m + (g - m) * lerp if lerp < 0.5 else g + (g - m) * (lerp - 1)
        new_v = v * beta2 + g * (1 - beta2) * g
        # torch's square root is not always the nearest number; a float32 rounded from float64 is. A float64 may be one
        # unit off.
        root = new_v.double().sqrt().to(compute)
        denom = root / torch.full_like(root, bias_correction2_sqrt) + eps
        w = w + new_m * -step_size / denom

        m.copy_(new_m)
        v.copy_(new_v)
        if master is not None:
            master[part] = w
        flat.index_copy_(0, index, w.to(weight.dtype))
