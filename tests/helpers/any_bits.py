"""Elements of every dtype that ops copy, of any bits."""

from __future__ import annotations

import torch

from shira_kernels.dtypes import ARITHMETIC, COPIED

ANY_DTYPES = (*ARITHMETIC, *COPIED, torch.float8_e4m3fnuz, torch.complex64)


def random_bits(dtype: torch.dtype, shape: int | tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits: with numbers of every kind, -0 and NaNs of many payloads among them."""
    shape = (shape,) if isinstance(shape, int) else shape
    numel = torch.Size(shape).numel()
    draw = torch.Generator().manual_seed(seed)
    data = torch.randint(2 if dtype == torch.bool else 256, (numel * dtype.itemsize,), generator=draw)
    return data.byte().view(dtype).view(shape)
