"""The labels of a sequence classifier's rows."""

from __future__ import annotations

import math
from typing import Any

REGRESSION, ONE_OF_MANY, ANY_OF_MANY = "regression", "single_label_classification", "multi_label_classification"


def problem_of(config: Any) -> str:
    """What kind of labels a classifier learns: transformers' `problem_type`, where none is given by how many it has."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else ONE_OF_MANY)


def label_of(value: Any, config: Any, where: str) -> int | float | list[float]:
    """A row's label as the model takes it: a class, or a number for each of the model's labels.

    Raises:
        ValueError: it is not a label of this model.
    """
    problem = problem_of(config)
    if problem == ONE_OF_MANY:
        if isinstance(value, list):
            raise ValueError(
                f'{where}: a list of labels needs a model with "problem_type": "{ANY_OF_MANY}" in its config.json'
            )
        return _class(value, config, where)
    count = config.num_labels
    if problem == ANY_OF_MANY:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            held = {_class(item, config, where) for item in value}
            return [float(i in held) for i in range(count)]
        if (
            isinstance(value, list)
            and len(value) == count
            and all(_is_number(item) and item in (0, 1) for item in value)
        ):
            return [float(item) for item in value]
        raise ValueError(
            f'{where}: "label" must be a list, of names of labels or of {count} zeros and ones, got {value!r:.60}; '
            f"the model has {_known(config)}"
        )
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) != count or not all(_is_number(item) for item in numbers):
        wanted = "a finite number" if count == 1 else f"a list of {count} finite numbers"
        raise ValueError(f'{where}: "label" must be {wanted}, which the model learns to tell, got {value!r:.60}')
    return float(numbers[0]) if count == 1 else [float(item) for item in numbers]


def _class(value: Any, config: Any, where: str) -> int:
    number = config.label2id.get(value) if isinstance(value, str) else value
    if type(number) is int and 0 <= number < config.num_labels:
        return number
    raise ValueError(f"{where}: the model has no class {value!r:.40}; it has {_known(config)}")


def _known(config: Any) -> str:
    names = sorted(config.label2id)
    more = ", ..." if len(names) > 8 else ""
    return f"{config.num_labels}: {', '.join(map(str, names[:8]))}{more}"


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer above all floats
        return False
