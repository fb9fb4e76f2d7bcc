"""Warnings of this package point at the line that called it, and errors know the arguments that they name."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shira
from shira.files.errors import AdapterFormatError, Argument, ArgumentError

NAME = "0.weight"


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False))


def unknown(kind: str = "replace") -> shira.Adapter:
    """An adapter without a checksum."""
    tensor = shira.AdapterTensor(torch.tensor([1, 4, 9]), torch.ones(3), (5, 6), torch.float32, kind)
    return shira.Adapter({NAME: tensor})


def base_file(folder: Path) -> Path:
    save_file(make_model().state_dict(), folder / "base")
    return folder / "base"


def supertuning(folder: Path) -> Path:
    """A folder of PEFT without positions."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SUPERTUNING", "sparsity": 0.9}))
    save_file({"base_model.model.0.supertuning_values": torch.ones(2)}, folder / "adapter_model.safetensors")
    return folder


# Each on a line of its own.
CALLS: dict[str, Callable[[Path], object]] = {
    "diff": lambda _: shira.diff({"w": torch.zeros(9)}, {"w": torch.ones(9)}),
    "fuse": lambda _: shira.fuse([(unknown(), 1.0)], base=make_model()),
    "awom": lambda _: shira.awom(unknown(), unknown("add"), make_model()),
    "read": lambda folder: shira.convert.read(supertuning(folder), make_model()),
    "write patch": lambda folder: shira.convert.write(unknown(), folder / "a", "patch", make_model()),
    "write peft-shira": lambda folder: shira.convert.write(unknown(), folder / "a", "peft-shira", make_model()),
    "merge_checkpoint": lambda folder: shira.merge_checkpoint(base_file(folder), [(unknown(), 1.0)], folder / "out"),
    "attach": lambda _: shira.attach(make_model(), unknown()),
    "bank.add": lambda _: shira.ResidentAdapters(make_model()).add("a", unknown()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_points_at_the_line_that_called(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        CALLS[name](tmp_path)
    assert [warning.category for warning in seen] == [shira.ShiraWarning] * len(seen) != []
    line = CALLS[name].__code__.co_firstlineno
    assert {(warning.filename, warning.lineno) for warning in seen} == {(__file__, line)}


def in_words_of_a_form(argument: Argument) -> str:
    return f"the field {argument.name.upper()}"


def test_errors_know_the_arguments_that_they_name(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as raised:
        shira.fuse([(unknown(), 1.0)])
    assert raised.value.pieces[0] == Argument("adapters", 0)
    assert raised.value.pieces[-1] == Argument("base")
    assert str(raised.value).startswith("adapters[0]: 0.weight: a part of kind")
    assert str(raised.value).endswith("give `base`")
    assert raised.value.said(in_words_of_a_form).endswith("give the field BASE")
    config = shira.ShiraConfig("all-linear")
    with pytest.raises(ArgumentError, match=r"recomputed from the base: give `base`$"):
        shira.Adapter(unknown(), config).save(tmp_path / "a", indices=False)
    handle = shira.attach(model := make_model(), config)
    handle.adapter().save(tmp_path / "`base`", indices=False, base=make_model())
    handle.detach()
    with pytest.raises(AdapterFormatError) as refused:
        shira.Adapter.load(tmp_path / "`base`")
    # The name of the file is not an argument.
    assert refused.value.said(in_words_of_a_form).startswith(f"{tmp_path}/`base`: indices that are left out")
    assert refused.value.said(in_words_of_a_form).endswith("give the field BASE")
    assert shira.Adapter.load(tmp_path / "`base`", base=model).nnz


def test_an_error_can_be_pickled() -> None:
    error = ArgumentError(("a: ", Argument("adapters", 1)), ": give ", Argument("base"))
    assert str(error) == "a: adapters[1]: give `base`"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.pieces, str(again)) == (ArgumentError, error.pieces, str(error))


def test_an_adapter_format_error_takes_any_message() -> None:
    assert str(AdapterFormatError("a: damaged")) == "a: damaged"
    assert str(AdapterFormatError(3)) == "3"  # type: ignore[arg-type]
