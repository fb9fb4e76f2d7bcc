"""What comes of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import shira


@dataclass(frozen=True)
class Training:
    """What came of it; losses are means in nats, of tokens or of texts.

    Attributes:
        losses: the loss of each step.
        held_out_before, held_out_after: `loss` on held-out examples, and `accuracy` where classes are learned; empty
            without such examples.
    """

    adapter: shira.Adapter
    task: str
    examples: int
    held_out_examples: int
    losses: list[float]
    held_out_before: dict[str, float]
    held_out_after: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types."""
        numbers = {name: value for name, value in self.__dict__.items() if name != "adapter"}
        return {"entries": self.adapter.nnz, "density": self.adapter.density, **numbers}
