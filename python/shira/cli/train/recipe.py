"""How an adapter is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MOST = 10**9  # of epochs, steps, and examples in a step


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: how often each training example is seen; fractions are allowed.
        max_steps: a bound on the steps of the optimizer; 0 for none.
        batch_size: examples in a step.
        learning_rate: at its highest, after `warmup` (share of the steps) linear steps; it then falls linearly to 0.
        max_length: tokens of an example; more are cut off, or in a text file begin the next example.
        held_out: share of the examples that are not trained on, but scored before and after: at least one example,
            unless the share is 0.
        seed: for the split, the order of examples, dropout, and masks that draw.

    Raises:
        ValueError: a number that nothing can be trained with.
    """

    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_length: int = 256
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epochs <= _MOST:
            raise ValueError(f"--epochs must be above 0 and at most {_MOST}, got {self.epochs}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be finite and above 0, got {self.learning_rate}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out must be a share from 0 to below 1, got {self.held_out}")
        for option, number in (("max-steps", self.max_steps), ("batch-size", self.batch_size)):
            if number > _MOST:
                raise ValueError(f"--{option} must be at most {_MOST}, got {number}")

    def steps(self, examples: int) -> int:
        """How many steps the optimizer makes on this number of examples."""
        steps = math.ceil(self.epochs * math.ceil(examples / self.batch_size))
        return min(steps, self.max_steps or steps)
