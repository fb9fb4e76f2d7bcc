"""The settings, the methods, and which of their runs are there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import study
from studies.quality import texts

PROBE = "linear probe"


@dataclass(frozen=True)
class Settings:
    """What a results.json belongs to."""

    seeds: tuple[int, ...] = (0, 1, 2)
    per_package: tuple[tuple[str, int], ...] = (("train", 300), ("validation", 50), ("test", 100))
    subset: int = 200  # texts of each package that a seed draws from the training part
    tokens: int = 32
    frozen_layers: int = 3  # of six, from below: computed once, so that there is time for more steps
    steps: int = 320
    batch: int = 8
    warmup: float = 0.1  # of the steps; then linearly to zero
    head_lr: float = 2e-3
    rank: int = 4
    full_probe_steps: int = 300  # of the linear probe, on features that are computed once
    probe_steps: int = 40  # of the head with which the other methods begin
    probe_lr: float = 3e-3
    probe_batch: int = 64
    calibration_batches: int = 4
    calibration_batch: int = 32


FULL = Settings()
QUICK = Settings(
    seeds=(0, 1),
    per_package=(("train", 8), ("validation", 4), ("test", 4)),
    subset=6,
    steps=2,
    batch=4,
    full_probe_steps=8,
    probe_steps=4,
    probe_batch=16,
    calibration_batches=2,
    calibration_batch=4,
)


@dataclass(frozen=True)
class Method:
    """A way to train: `kind` is probe, lora, dora, full or shira; the learning rates to try are of the encoder's."""

    name: str
    kind: str
    learning_rates: tuple[float, ...]
    mask: str = ""
    granularity: int = 1


LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SHIRA_RATES = (2e-3, 6e-3, 1.8e-2, 5.4e-2)
METHODS = (
    Method(PROBE, "probe", LORA_RATES),
    Method("full", "full", (6e-5, 2e-4, 6e-4, 2e-3)),
    Method("LoRA", "lora", LORA_RATES),
    Method("DoRA", "dora", LORA_RATES),
    *(
        Method(
            f"SHiRA {mask}" + (f", runs of {granularity}" if granularity > 1 else ""),
            "shira",
            SHIRA_RATES,
            mask,
            granularity,
        )
        for mask, granularity in [
            *((mask, 1) for mask in ("struct", "rand", "wm", "grad", "snip", "small")),
            *((mask, granularity) for mask in ("wm", "rand", "grad", "snip", "small") for granularity in (8, 32)),
        ]
    ),
)


@dataclass(frozen=True)
class Planned:
    """A run to be done; lr is None where the method's best one is not known yet."""

    method: Method
    seed: int
    lr: float | None

    @property
    def label(self) -> str:
        return f"{self.method.name}, seed {self.seed}"


class Results(study.Runs):
    """Runs of the methods with their learning rates and seeds."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.settings = settings
        self.methods = METHODS
        self.left_out: list[str] = []  # names of methods
        versions = {"torch": torch.__version__, "peft": study.version("peft"), **texts.versions()}
        super().__init__(path, {"settings": asdict(settings), "versions": versions})

    def run_of(self, method: Method, seed: int, lr: float) -> dict[str, Any] | None:
        return self.find(method=method.name, seed=seed, lr=lr)

    def best_lr(self, method: Method) -> float | None:
        """The learning rate of the highest validation accuracy on the first seed, the lowest of equals; None while
        runs are missing."""
        tried = [self.run_of(method, self.settings.seeds[0], lr) for lr in method.learning_rates]
        if any(run is None for run in tried):
            return None
        return max(tried, key=lambda run: run["validation"])["lr"]  # type: ignore[index]

    def missing(self) -> list[Planned]:
        """Runs to be done, in order; those with the best learning rate follow when it is known."""
        return [planned for method in self.methods for planned in self.missing_of(method)]

    def missing_of(self, method: Method) -> list[Planned]:
        first, *others = self.settings.seeds
        planned = [Planned(method, first, lr) for lr in method.learning_rates if not self.run_of(method, first, lr)]
        best = self.best_lr(method)
        return planned + [
            Planned(method, seed, best) for seed in others if best is None or not self.run_of(method, seed, best)
        ]

    def leave_out_unfinished_runs(self) -> None:
        """Methods that train runs of entries, and are not finished, are left to `left_out`; no other needs them."""
        self.left_out = [m.name for m in self.methods if m.granularity > 1 and self.missing_of(m)]
        self.methods = tuple(method for method in self.methods if method.name not in self.left_out)
