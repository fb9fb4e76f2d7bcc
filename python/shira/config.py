"""What to train: which modules, which entries of their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shira.masks import MASKS

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class ShiraConfig:
    """Which entries of a model an adapter trains.

    Attributes:
        target_modules: a list of names (a module matches if its name is one of them or ends with "." and one of them),
            a regular expression that must match a module's whole name, or "all-linear": every nn.Linear but the
            output embedding.
        mask: a name in `shira.masks.MASKS`.
        density: share of each weight's entries, above 0 and at most 1.
        k: entries of each weight, instead of a density.
        seed: for masks that draw; each tensor derives its own from this and its name (docs/format.md).
        modules_to_save: names (as in a list above) of modules that stay trainable as a whole. They are trained with the
            values, but an adapter does not hold them.

    Raises:
        ValueError: naming the field.
    """

    target_modules: Sequence[str] | str
    mask: str = "wm"
    density: float = 0.01
    k: int | None = None
    seed: int = 0
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules: {self.target_modules!r} is no regular expression: {error}") from None
        else:
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        if not self.target_modules:
            raise ValueError("target_modules must not be empty")
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))
        if not isinstance(self.mask, str) or self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(sorted(MASKS))}, got {self.mask!r}")
        if type(self.density) not in (int, float) or not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be a number above 0 and at most 1, got {self.density!r}")
        if self.k is not None and (type(self.k) is not int or self.k < 1):
            raise ValueError(f"k must be a whole number of at least 1, or None, got {self.k!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {field: list(value) if isinstance(value, tuple) else value for field, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ShiraConfig:
        """The inverse of `to_dict`. Raises ValueError naming a field that is unknown, missing or wrong."""
        if unknown := set(fields) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown field {', '.join(sorted(map(str, unknown)))}")
        if "target_modules" not in fields:
            raise ValueError("target_modules is missing")
        return cls(**fields)


def _names(field: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{field} must be a list of names, got {names!r}")
    return tuple(names)


def names_match(name: str, names: Sequence[str]) -> bool:
    """Whether a module's name is one of `names` or ends with "." and one of them."""
    return any(name == entry or name.endswith("." + entry) for entry in names)
