"""What the demonstration found."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Results:
    """What the demonstration found."""

    bpb: dict[str, dict[str, float]]  # held-out bits per byte, by state (base or an adapter) and domain
    curves: dict[str, list[float]]  # bits per byte of each training batch, by adapter
    samples: dict[str, str]  # generated text, by state
    adapters: dict[str, str]  # what each file holds, by adapter
    switch_seconds: list[float]
    lora_fuse_seconds: list[float]
    base_bytes_equal: bool  # whether all weights had their first bytes after all training and switches
    seconds: float

    @property
    def switch_ms(self) -> float:
        return statistics.median(self.switch_seconds) * 1e3

    @property
    def lora_fuse_ms(self) -> float:
        return statistics.median(self.lora_fuse_seconds) * 1e3

    def to_dict(self) -> dict[str, object]:
        """The numbers as JSON types."""
        return {
            "bpb": self.bpb,
            "switch_ms": self.switch_ms,
            "lora_fuse_ms": self.lora_fuse_ms,
            "base_bytes_equal": self.base_bytes_equal,
            "seconds": self.seconds,
        }
