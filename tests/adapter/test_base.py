"""A base by canonical name: what is read, when, and under which name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shira
from shira.adapter.base import BaseTensors


class Tied(nn.Module):
    """Two names of one parameter, a buffer, and state that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(3))

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Unread(Mapping[str, torch.Tensor]):
    """A base whose tensors must not be read."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_names_cost_no_reading() -> None:
    base = BaseTensors(Unread("base_model.model.a.base_layer.weight", "b"))
    assert list(base) == ["a.weight", "b"]
    assert "a.weight" in base
    assert "c" not in base
    assert base.own_name("a.weight") == "base_model.model.a.base_layer.weight"
    assert base.find("_orig_mod.a.weight") == "a.weight"
    assert base.aliases() == {}
    base.check_names()
    with pytest.raises(ValueError, match=r"^x\.c: the base has no tensor of this name$"):
        base.find("x.c")


def test_a_tied_parameter_of_a_model_has_the_name_of_its_first_use() -> None:
    model = Tied()
    base = BaseTensors(model)
    assert set(base) == {"embed.weight", "head.weight", "count"}
    assert base.find("base_model.model.head.weight") == "embed.weight"
    assert base["head.weight"].data_ptr() == model.embed.weight.data_ptr()
    assert not base["head.weight"].requires_grad
    assert base.aliases() == {"head.weight": "embed.weight"}
    assert base.find("count") == "count", "a buffer"
    with pytest.raises(ValueError, match=r"^the model has no parameter or buffer 'none\.weight'$"):
        base.find("none.weight")


def test_state_that_is_not_a_tensor_is_left_alone() -> None:
    model, tuned = Tied(), Tied()
    with torch.no_grad():
        tuned.embed.weight.copy_(model.embed.weight)
        tuned.embed.weight[0, 0] += 1
    adapter = shira.diff(model, tuned)
    assert list(adapter) == ["embed.weight"]
    assert list(shira.fuse([(adapter, 1.0)], base=model)) == ["embed.weight"]


def test_a_file_is_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0), "b": torch.zeros(2)}, tmp_path / "base")
    base = BaseTensors(tmp_path / "base")
    assert base["a"].tolist() == [0, 1, 2]
    assert base.aliases() == {}
    with pytest.raises(ValueError, match=r"^tuned must be a model, its state dict or the path of safetensors, got 3$"):
        BaseTensors(3, "tuned")  # type: ignore[arg-type]
