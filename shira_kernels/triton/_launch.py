"""Launches at less than half of the host time: Triton is asked once for each kind of call which kernel it needs."""

from __future__ import annotations

from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}


def blocks(entries: int, block: int) -> int:
    """Says how many programs of `block` entries own all of them; triton.cdiv costs 2 us."""
    return -(-entries // block)


def launch(
    kernel: Any, programs: int, tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...], constants: tuple[Any, ...]
) -> None:
    """kernel[(programs,)](*tensors, *numbers, *constants, enable_fp_fusion=False), on the tensors' device.

    The kernel annotates its numbers with their types and specialises none of them. So what Triton compiles depends on
    nothing but what is in the key here: the constants, the tensors' types, and which of them are aligned to 16 bytes.
    For AMD GPUs it also depends on the sizes of tensors; there Triton is asked each time.
    """
    aligned = [tensor.data_ptr() % 16 == 0 for tensor in tensors]
    key = (id(kernel), tensors[0].device, constants, *[tensor.dtype for tensor in tensors], *aligned)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*tensors, *numbers, *constants)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, *constants, enable_fp_fusion=False)
    # The interpreter gives back nothing.
    if compiled is not None and compiled.metadata.target.backend == "cuda":
        _compiled[key] = compiled
