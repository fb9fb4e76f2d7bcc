"""The demonstration's base model: a byte-level Llama (token = byte), shipped as package data, and how to score it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

BASE_FOLDER = Path(__file__).parent / "base_model"
CONTEXT = 256  # bytes


def load_base() -> nn.Module:
    """The shipped model in float32 (its file holds bfloat16, so every weight is a bfloat16 value)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        BASE_FOLDER, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()


def windows(data: torch.Tensor) -> torch.Tensor:
    """`data` (uint8, 1-D) as int64 [n, CONTEXT], side by side; a rest shorter than a window is left out."""
    return data[: data.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT).long()


def random_windows(data: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` windows of `data` at random places, as int64 [count, CONTEXT]."""
    starts = torch.randint(data.numel() - CONTEXT + 1, (count, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT)].long()


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: torch.Tensor, batch: int = 32) -> float:
    """Mean of -log2 p over all bytes but the first of each window; a byte is predicted from those before it there.

    Raises ValueError if `data` is shorter than one window.
    """
    rows = windows(data)
    if not len(rows):
        raise ValueError(f"data must hold at least {CONTEXT} bytes, got {data.numel()}")
    nats = sum(model(input_ids=ids, labels=ids).loss.double() * len(ids) for ids in rows.split(batch))
    return float(nats) / len(rows) / math.log(2)
