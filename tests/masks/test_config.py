"""ShiraConfig: what it refuses, and its JSON form."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

import shira
from shira.masks.config import names_match


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
        ({"r": 0}, "r must"),
        ({"r": 2.0}, "r must"),
        ({"density": 0.01, "k": 5}, "density and k are given"),
        ({"k": 5, "r": 2}, "k and r are given"),
        ({"density": 0.01, "k": 5, "r": 2}, "density and k and r are given"),
        ({"budget": "layer"}, "budget must"),
        ({"skip": -1}, "skip must"),
        ({"family": 0.5}, "family must"),
        ({"granularity": 0}, "granularity must"),
        ({"axis": 1}, "axis is an option of mask 'struct', not of 'wm'"),
        ({"mask": "struct", "axis": 2}, "axis must"),
        ({"mask": "struct", "axis": True}, "axis must"),
        ({"mask": "struct", "diagonal": 0}, "diagonal must"),
        ({"mask": "struct", "offset": -1}, "offset must"),
        ({"calibration": "mean"}, "calibration must"),
        ({"mask": "a:"}, "mask must"),
        ({"mask": 7}, "mask must"),
        ({"seed": 1.0}, "seed"),
        ({"modules_to_save": "head"}, "modules_to_save"),
    ],
)
def test_a_wrong_field_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        shira.ShiraConfig(**{"target_modules": "all-linear", **fields})


@pytest.mark.parametrize("target_modules", ["all-linear", r".*\.q_proj", ["q_proj", "v_proj"]])
def test_json_round_trip(target_modules: str | list[str]) -> None:
    config = shira.ShiraConfig(target_modules, mask="rand", k=7, seed=-3, modules_to_save=["head"])
    assert shira.ShiraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(shira.ShiraConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize("budget", [{}, {"density": 0.5}, {"k": 3}, {"r": 2}])
def test_every_field_survives_json(budget: dict) -> None:
    others = {"budget": "model", "skip": 4, "family": 2, "granularity": 8, "axis": 1, "offset": 3, "diagonal": False}
    config = shira.ShiraConfig("all-linear", mask="struct", **budget, **others, calibration="abs")
    assert shira.ShiraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.density == (0.01 if not budget else budget.get("density"))


def test_a_config_of_before_there_was_r_still_loads() -> None:
    old = {"target_modules": ["q"], "mask": "wm", "density": 0.01, "k": 7, "seed": 0, "modules_to_save": []}
    config = shira.ShiraConfig.from_dict(old)
    assert (config.k, config.density) == (7, None)
    assert shira.ShiraConfig.from_dict({**old, "k": None}).density == 0.01


def test_a_function_is_recorded_by_its_name() -> None:
    config = shira.ShiraConfig("all-linear", mask=own_mask)
    assert config.mask is own_mask
    assert config.to_dict()["mask"] == f"{__name__}:own_mask"
    assert shira.ShiraConfig.from_dict(config.to_dict()).mask == f"{__name__}:own_mask"
    assert shira.ShiraConfig("all-linear", mask=shira.masks.snip).mask == "snip"
    loaded = shira.ShiraConfig.from_dict({"target_modules": "all-linear", "mask": "no.such_module:function"})
    assert loaded.mask_name == "no.such_module:function"


def own_mask(weight, density, **arguments):
    return shira.masks.wm(weight, density, **arguments)


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


def test_numpy_numbers_become_pythons() -> None:
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    made = shira.ShiraConfig("all-linear", density=np.float64(0.1), seed=np.int64(3))
    assert (made.density, made.seed) == (0.1, 3)
    assert (type(made.density), type(made.seed)) == (float, int)


def test_a_mask_function_needs_a_name() -> None:
    with pytest.raises(ValueError, match="mask must have a name"):
        shira.ShiraConfig("all-linear", mask=functools.partial(shira.masks.wm))
