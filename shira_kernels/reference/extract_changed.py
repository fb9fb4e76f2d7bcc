"""extract_changed in plain PyTorch: a comparison of the bits, and a gather."""

from __future__ import annotations

import torch

from shira_kernels.bits import as_bits
from shira_kernels.dtypes import index_dtype


def extract_changed(base: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    base, tuned = (tensor.resolve_conj().resolve_neg().contiguous() for tensor in (base, tuned))
    indices = (as_bits(base) != as_bits(tuned)).nonzero().view(-1)
    values = as_bits(tuned)[indices].view(tuned.dtype)
    return indices.to(index_dtype(base.numel())), values
