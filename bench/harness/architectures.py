"""The linear layers of models, by shape, and the rank of their adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, int]]  # name of a linear layer -> [out, in]


@dataclass(frozen=True)
class Architecture:
    """The linear layers that are adapted, and the rank of the adapters."""

    title: str
    shapes: Shapes
    rank: int

    @property
    def numel(self) -> int:
        return sum(n * m for n, m in self.shapes.values())

    @property
    def nnz(self) -> int:
        """Numbers in an adapter, of either kind."""
        return sum(self.rank * (n + m) for n, m in self.shapes.values())

    @property
    def density(self) -> float:
        return self.nnz / self.numel

    @property
    def targets(self) -> list[str]:
        return sorted({name.rsplit(".", 1)[1] for name in self.shapes})

    def facts(self, dtype: str) -> dict[str, Any]:
        """What a report says of a case over this model in the dtype, cold."""
        return {
            "dtype": dtype,
            "nnz": self.nnz,
            "density": self.density,
            "rank": self.rank,
            "weights": len(self.shapes),
            "weight_bytes": self.numel * getattr(torch, dtype).itemsize,
            "cold": True,
        }

    def __str__(self) -> str:
        return f"{self.title}, {self.density:.2%}"


def llama_shapes(hidden: int, intermediate: int, layers: int) -> Shapes:
    """All seven projections of each layer."""
    projections = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden)),
        **dict.fromkeys(("gate_proj", "up_proj"), (intermediate, hidden)),
        "down_proj": (hidden, intermediate),
    }
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in projections.items()}


def sdxl_attention_shapes() -> Shapes:
    """All attention projections of SDXL's UNet: 560 weights, 955 million numbers.

    Transformer blocks: 10 of width 640 (2 x 2 on the way down, 3 x 2 up) and 60 of width 1280 (2 x 10 down, 10 in the
    middle, 3 x 10 up). Each attends to itself (attn1) and to the text (attn2), whose width is 2048.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for width, blocks in ((640, 10), (1280, 60)):
        for i in range(blocks):
            for attention, context in (("attn1", width), ("attn2", 2048)):
                prefix = f"width_{width}.{i}.{attention}."
                shapes |= {prefix + "to_q": (width, width), prefix + "to_out": (width, width)}
                shapes |= {prefix + "to_k": (width, context), prefix + "to_v": (width, context)}
    return shapes


SMALL_LLAMA = Architecture("4 Llama layers, hidden 1024", llama_shapes(1024, 2816, 4), rank=7)
LLAMA_7B_PART = Architecture("2 layers of a 7B Llama", llama_shapes(4096, 11008, 2), rank=26)
LLAMA_7B_QUARTER = Architecture("8 of 32 layers of a 7B Llama", llama_shapes(4096, 11008, 8), rank=26)
SDXL_ATTENTION = Architecture("SDXL's UNet attention", sdxl_attention_shapes(), rank=7)
