"""What to train: which modules, which entries of their weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from shira.masks.functions import MASKS, Mask

ALL_LINEAR = "all-linear"
DEFAULT_DENSITY = 0.01
_FUNCTION_NAME = re.compile(r"[^:\s]+:[^:\s]+")
_MOST_PATTERN = 2000  # characters: compiling a longer one may take minutes, and a file may bring any
_STRUCT_OPTIONS = {"axis": 0, "offset": 0, "diagonal": True}


@dataclass(frozen=True)
class ShiraConfig:
    """Which entries of a model an adapter trains.

    At most one of `density`, `k` and `r` may be given; without any the density is 0.01.

    Attributes:
        target_modules: a list of names (a module matches if its name is one of them or ends with "." and one of them),
            a regular expression of at most 2000 characters that must match a module's whole name, or "all-linear":
            every nn.Linear but the output embedding.
        mask: a name in `shira.masks.MASKS`, or a function like those there. A function is recorded by its name,
            "module:qualname"; a config that was read from a file holds that string, and the function is imported only
            when entries are chosen with it.
        density: share of the entries, above 0 and at most 1.
        k: number of entries.
        r: r (rows + columns) entries, as many as LoRA of rank r has and as PEFT's SHiRA takes; rows are a weight's
            first dimension, columns all others.
        budget: "tensor": density, k or r hold for each weight. "model": they hold for all weights together (k is the
            number for the whole model, r sums over the weights), and wm, grad, snip and small rank the scores of all
            weights as one. Masks without scores (struct, rand, a function) then take the same share of each weight.
        seed: for masks that draw; each tensor derives its own from this and its name (docs/format.md).
        skip: entries of the ranking that are left out before the first that is taken, in each weight or in the model.
        family: number of whole budgets that are left out too: configs that differ in this alone share no entry,
            whatever the budget is.
        granularity: entries are chosen in aligned runs of that many, by the run's total score.
        axis, offset, diagonal: of mask struct, see `shira.masks.struct`.
        calibration: how the gradients of several calibration batches become the one that grad and snip rank by: "sum",
            or "abs", the sum of their absolute values.
        modules_to_save: names (as in a list above) of modules that stay trainable as a whole. They are trained with the
            values, but an adapter does not hold them.

    Raises:
        ValueError: naming the field.
    """

    target_modules: Sequence[str] | str
    mask: str | Mask = "wm"
    density: float | None = None
    k: int | None = None
    seed: int = 0
    modules_to_save: Sequence[str] = ()
    r: int | None = None
    budget: str = "tensor"
    skip: int = 0
    family: int = 0
    granularity: int = 1
    axis: int = 0
    offset: int = 0
    diagonal: bool = True
    calibration: str = "sum"

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            if len(self.target_modules) > _MOST_PATTERN:
                raise ValueError(f"target_modules: a regular expression has at most {_MOST_PATTERN} characters")
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules: {self.target_modules!r} is no regular expression: {error}") from None
        else:
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        if not self.target_modules:
            raise ValueError("target_modules must not be empty")
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))
        self._check_mask()
        self._check_budget()
        for field, least in (("skip", 0), ("family", 0), ("granularity", 1), ("offset", 0), ("seed", None)):
            self._check_whole(field, least)
        if self.calibration not in ("sum", "abs"):
            raise ValueError(f"calibration must be 'sum' or 'abs', got {self.calibration!r}")

    def _check_mask(self) -> None:
        for name, mask in MASKS.items():
            if self.mask is mask:
                object.__setattr__(self, "mask", name)
        named = isinstance(self.mask, str) and (self.mask in MASKS or _FUNCTION_NAME.fullmatch(self.mask))
        if not named and not callable(self.mask):
            known = ", ".join(sorted(MASKS))
            raise ValueError(f"mask must be one of {known}, a function, or its 'module:name', got {self.mask!r}")
        if isinstance(self.mask, functools.partial):
            raise ValueError(f"mask must have a name to be recorded by: wrap it in a function, got {self.mask!r}")
        self._check_whole("axis", 0)
        if self.axis not in (0, 1):
            raise ValueError(f"axis must be 0 (rows) or 1 (columns), got {self.axis!r}")
        if type(self.diagonal) is not bool:
            raise ValueError(f"diagonal must be True or False, got {self.diagonal!r}")
        for option, default in _STRUCT_OPTIONS.items():
            if self.mask != "struct" and getattr(self, option) != default:
                raise ValueError(f"{option} is an option of mask 'struct', not of {self.mask_name!r}")

    def _check_budget(self) -> None:
        given = [field for field in ("density", "k", "r") if getattr(self, field) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, but only one of density, k and r may be")
        if not given:
            object.__setattr__(self, "density", DEFAULT_DENSITY)
        if self.density is not None:
            is_number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
            if not is_number or not 0.0 < self.density <= 1.0:
                raise ValueError(f"density must be a number above 0 and at most 1, got {self.density!r}")
            object.__setattr__(self, "density", float(self.density))
        for field in ("k", "r"):
            if getattr(self, field) is not None:
                self._check_whole(field, 1)
        if self.budget not in ("tensor", "model"):
            raise ValueError(f"budget must be 'tensor' or 'model', got {self.budget!r}")

    def _check_whole(self, field: str, least: int | None) -> None:
        """A whole number (NumPy's too, which becomes Python's) of at least `least`."""
        value = getattr(self, field)
        if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            raise ValueError(f"{field} must be a whole number{bound}, got {value!r}")
        object.__setattr__(self, field, int(value))

    @property
    def mask_name(self) -> str:
        """The mask as an adapter records it: its name, of a function "module:qualname"."""
        if isinstance(self.mask, str):
            return self.mask
        function = self.mask if hasattr(self.mask, "__qualname__") else type(self.mask)
        return f"{function.__module__}:{function.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; a function by its name."""
        fields = {field: list(value) if isinstance(value, tuple) else value for field, value in vars(self).items()}
        return {**fields, "mask": self.mask_name}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ShiraConfig:
        """The inverse of `to_dict`. Raises ValueError naming a field that is unknown, missing or wrong."""
        if unknown := set(fields) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown field {', '.join(sorted(map(str, unknown)))}")
        if "target_modules" not in fields:
            raise ValueError("target_modules is missing")
        if "r" not in fields and fields.get("k") is not None:
            fields = {**fields, "density": None}  # where there was no r yet, k overrode the density beside it
        return cls(**fields)


def _names(field: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{field} must be a list of names, got {names!r}")
    return tuple(names)


def names_match(name: str, names: Sequence[str]) -> bool:
    """Whether a module's name is one of `names` or ends with "." and one of them."""
    return any(name == entry or name.endswith("." + entry) for entry in names)
