"""The settings, the methods, and which of their runs are there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import study

DOMAINS = ("cpp", "prose")


@dataclass(frozen=True)
class Settings:
    """What a results.json belongs to."""

    seeds: tuple[int, ...] = (0, 1, 2)
    train_bytes: int = 4_000_000  # read at most, of each domain
    validation_bytes: int = 32_768  # the end of what is read for training, and not trained on
    test_bytes: int = 32_768  # of held-out documents, evenly spread over them
    steps: int = 40
    batch: int = 8  # windows of 256 bytes
    warmup: float = 0.1  # of the steps; then linearly to zero
    betas: tuple[float, float] = (0.9, 0.99)
    rank: int = 2
    calibration_batches: int = 4
    strengths: tuple[float, ...] = (0.5, 0.7, 1.0)  # of both adapters in one model; the last is what table 4 does


FULL = Settings()
QUICK = Settings(
    seeds=(0, 1),
    train_bytes=40_000,
    validation_bytes=1024,
    test_bytes=1024,
    steps=2,
    batch=2,
    calibration_batches=1,
    strengths=(0.5, 1.0),
)


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made; an empty mask is LoRA."""

    mask: str = ""
    family: int = 0
    offset: int = 0

    @property
    def name(self) -> str:
        place = f", next {self.family}" * (self.family > 0) + f", offset {self.offset}" * (self.offset > 0)
        return (f"SHiRA {self.mask}" if self.mask else "LoRA") + place

    @property
    def learning_rates(self) -> tuple[float, ...]:
        return SHIRA_RATES if self.mask else LORA_RATES


LORA_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
SHIRA_RATES = (7e-3, 2e-2, 6e-2, 2e-1)


@dataclass(frozen=True)
class Method:
    """Two adapters that are fused, in the order of DOMAINS."""

    name: str
    recipes: tuple[Recipe, Recipe]


METHODS = (
    Method("LoRA", (Recipe(), Recipe())),
    Method("SHiRA wm, overlapping", (Recipe("wm"), Recipe("wm"))),
    Method("SHiRA wm, non-overlapping", (Recipe("wm"), Recipe("wm", family=1))),
    Method("SHiRA struct", (Recipe("struct"), Recipe("struct", offset=1))),
    Method("SHiRA snip", (Recipe("snip"), Recipe("snip"))),
)


@dataclass(frozen=True)
class Base:
    """To be done: score the base."""

    label = "base"


@dataclass(frozen=True)
class Trial:
    """To be done: try a learning rate."""

    recipe: Recipe
    domain: str
    lr: float

    @property
    def label(self) -> str:
        return f"{self.recipe.name} on {self.domain}, {self.lr:g}"


@dataclass(frozen=True)
class Pair:
    """To be done: train two adapters and score them, alone and together."""

    method: Method
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method.name}, seed {self.seed}"


class Results(study.Runs):
    """The base's score, trials of learning rates, and pairs."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.settings = settings
        self.methods = METHODS
        versions = {name: study.version(name) for name in ("torch", "peft", "transformers")}
        super().__init__(path, {"settings": asdict(settings), "versions": versions})

    @property
    def base(self) -> dict[str, float]:
        """The base's bits per byte by domain; it must have been scored."""
        run = self.find(method="base")
        assert run is not None
        return run["scores"]

    def trials(self, recipe: Recipe, domain: str) -> dict[float, float | None]:
        """Learning rate -> bits per byte on the domain's validation part, None where it was not tried."""
        found = {lr: self.find(recipe=recipe.name, domain=domain, lr=lr) for lr in recipe.learning_rates}
        return {lr: run and run["validation"] for lr, run in found.items()}

    def best_lr(self, recipe: Recipe, domain: str) -> float | None:
        """The learning rate of the fewest bits per byte, the lowest of equals; None while trials are missing."""
        tried = self.trials(recipe, domain)
        if None in tried.values():
            return None
        return min(tried, key=lambda lr: tried[lr])  # type: ignore[arg-type, return-value]

    def best_rates(self, method: Method) -> dict[str, float | None]:
        """The best learning rate of each domain's adapter, by domain."""
        return {d: self.best_lr(recipe, d) for recipe, d in zip(method.recipes, DOMAINS, strict=True)}

    def pair(self, method: Method, seed: int) -> dict[str, Any] | None:
        """The run with the best learning rates."""
        return self.find(method=method.name, seed=seed, lr=self.best_rates(method))

    def missing(self) -> list[Any]:
        planned: list[Any] = [] if self.find(method="base") else [Base()]
        for method in self.methods:
            for recipe, domain in zip(method.recipes, DOMAINS, strict=True):
                trials = [Trial(recipe, domain, lr) for lr, tried in self.trials(recipe, domain).items() if not tried]
                planned += [trial for trial in trials if trial not in planned]
        pairs = [Pair(method, seed) for seed in self.settings.seeds for method in self.methods]
        return planned + [pair for pair in pairs if not self.pair(pair.method, pair.seed)]
