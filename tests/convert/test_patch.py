"""Sparse weight patches of every dtype, and of nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from any_bits import random_bits
from oracle import bits
from safetensors.torch import load_file, save_file

import shira
from shira import convert
from shira.adapter import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:not sparse")


def test_a_patch_of_every_dtype_there_and_back(tmp_path: Path) -> None:
    base = {str(dtype)[6:]: random_bits(dtype, (9, 8), 1) for dtype in DTYPES}
    base |= {f"{name}.n": random_bits(tensor.dtype, ()) for name, tensor in base.items()}
    tuned = {name: random_bits(tensor.dtype, tuple(tensor.shape), 2) for name, tensor in base.items()}
    save_file(base, tmp_path / "base")
    adapter = shira.diff(base, tuned)
    convert.write(adapter, tmp_path / "patch", "patch", tmp_path / "base")
    arrays = load_file(tmp_path / "patch")
    for name, tensor in adapter.items():
        assert torch.equal(bits(arrays[f"{name}.values"]), bits(tensor.values))
    again = convert.read(tmp_path / "patch", tmp_path / "base", trust_base=True)
    assert set(again) == set(adapter)
    for name, tensor in adapter.items():
        assert torch.equal(again[name].indices, tensor.indices)
        assert torch.equal(bits(again[name].values), bits(tensor.values))
        assert (again[name].dtype, again[name].checksum) == (tensor.dtype, tensor.checksum)
    shira.merge_checkpoint(tmp_path / "base", [(again, 1.0)], tmp_path / "out")
    assert len(shira.diff(tmp_path / "out", tuned)) == 0
    shuffled = {}
    for name in adapter:
        order = torch.randperm(adapter[name].nnz, generator=torch.Generator().manual_seed(0))
        values = arrays[f"{name}.values"]
        values = bits(values).view(-1, values.itemsize)[order].view(-1).view(values.dtype)
        shuffled |= {f"{name}.indices": arrays[f"{name}.indices"][order], f"{name}.values": values}
    save_file(shuffled, tmp_path / "shuffled")
    for name, tensor in convert.read(tmp_path / "shuffled", base).items():
        assert torch.equal(bits(tensor.values), bits(adapter[name].values))


@pytest.mark.parametrize("form", ["shira", "patch"])
def test_an_adapter_that_changes_nothing_is_read_back(tmp_path: Path, form: str) -> None:
    base = {"w": torch.zeros(4)}
    convert.write(shira.diff(base, base), tmp_path / "none", form)
    assert convert.format_of(tmp_path / "none") == form
    adapter = convert.read(tmp_path / "none", base)
    assert len(adapter) == 0
    convert.write(adapter, tmp_path / "again", form)
    assert len(convert.read(tmp_path / "again", base)) == 0


def test_a_tensor_of_which_nothing_changes_is_read_back(tmp_path: Path) -> None:
    for dtype in DTYPES:
        base = {"w": torch.empty(2, 3, dtype=dtype)}
        none = shira.AdapterTensor(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=dtype), (2, 3), dtype)
        convert.write(shira.Adapter({"w": none}), tmp_path / str(dtype), "patch")
        assert convert.read(tmp_path / str(dtype), base)["w"].nnz == 0


def test_an_adapter_that_changes_nothing_is_not_one_of_peft(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the adapter changes nothing, and PEFT loads no adapter without layers"):
        convert.write(shira.Adapter({}), tmp_path / "peft", "peft-shira")
    assert not (tmp_path / "peft").exists()


def test_what_peft_cannot_hold_is_named(tmp_path: Path) -> None:
    base = {"q.weight": torch.zeros(4, 4, dtype=torch.int8)}
    adapter = shira.diff(base, {"q.weight": torch.eye(4).char()})
    with pytest.raises(ValueError, match=r"q\.weight: it is torch\.int8, whose entries can be replaced"):
        convert.write(adapter, tmp_path / "peft", "peft-shira", base)
    assert not (tmp_path / "peft").exists()


def test_wrong_patches(tmp_path: Path) -> None:
    flags = torch.tensor([0, 2], dtype=torch.uint8).view(torch.bool)
    for base, values, message in (
        (
            torch.zeros(4, dtype=torch.complex64),
            torch.ones(2),
            "w: the base's tensor is torch.comp",
        ),
        (
            torch.zeros(4, dtype=torch.int8),
            torch.ones(2, dtype=torch.uint8),
            "w.values are torch.uint8, but torch.int8",
        ),
        (torch.zeros(4, dtype=torch.bool), flags, "w: values must be False or True, bytes of 0 or 1"),
    ):
        save_file({"w.indices": torch.tensor([0, 3]), "w.values": values}, tmp_path / "patch")
        with pytest.raises(ValueError, match=message):
            convert.read(tmp_path / "patch", {"w": base})
