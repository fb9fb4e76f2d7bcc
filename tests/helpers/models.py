"""Models that more than one room's tests use."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def mlp(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(inplace=True), nn.Linear(8, 5, bias=bias)).to(dtype)


def tiny_llama(tied: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)
