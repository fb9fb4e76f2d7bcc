"""Models that more than one room's tests use."""

from __future__ import annotations

import torch
from torch import nn


def mlp(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(inplace=True), nn.Linear(8, 5, bias=bias)).to(dtype)
