"""ShiraConfig: what it refuses, and its JSON form."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import shira
from shira.config import names_match


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ""}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [""]}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "a("}, "target_modules"),
        ({"mask": "nope"}, "mask"),
        ({"mask": None}, "mask"),
        ({"density": 0.0}, "density"),
        ({"density": 1.01}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": True}, "density"),
        ({"density": "0.1"}, "density"),
        ({"k": 0}, "k must"),
        ({"k": 1.5}, "k must"),
        ({"k": True}, "k must"),
        ({"seed": 1.0}, "seed"),
        ({"modules_to_save": "head"}, "modules_to_save"),
    ],
)
def test_a_wrong_field_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        shira.ShiraConfig(**{"target_modules": "all-linear", **fields})


@pytest.mark.parametrize("target_modules", ["all-linear", r".*\.q_proj", ["q_proj", "v_proj"]])
def test_json_round_trip(target_modules: str | list[str]) -> None:
    config = shira.ShiraConfig(target_modules, mask="rand", density=0.02, k=7, seed=-3, modules_to_save=["head"])
    assert shira.ShiraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(shira.ShiraConfig.from_dict(config.to_dict()))


def test_from_dict_refuses_unknown_and_missing_fields() -> None:
    with pytest.raises(ValueError, match="unknown field densty"):
        shira.ShiraConfig.from_dict({"target_modules": "all-linear", "densty": 0.1})
    with pytest.raises(ValueError, match="target_modules is missing"):
        shira.ShiraConfig.from_dict({})


def test_names_match_whole_components() -> None:
    assert names_match("layers.0.q_proj", ["q_proj"])
    assert names_match("q_proj", ["q_proj"])
    assert names_match("layers.0.q_proj", ["0.q_proj"])
    assert not names_match("layers.0.my_q_proj", ["q_proj"])
    assert not names_match("q_proj.inner", ["q_proj"])


def test_import_is_light() -> None:
    heavy = {"transformers", "peft", "matplotlib", "typer", "rich", "triton"}
    code = f"import sys, shira; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
