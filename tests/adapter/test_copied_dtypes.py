"""Tensors of dtypes that are only replaced: files, `shira.diff`, `shira.fuse`, `shira.merge_checkpoint`, metrics."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from any_bits import random_bits
from fuzz_adapter_file import to_bytes
from independent_reader import read
from oracle import bits
from safetensors.torch import load_file, save_file
from torch import nn

import shira
from shira.adapter import DTYPES, checksum_of
from shira.adapter.checksum import bytes_of
from shira_kernels.dtypes import ARITHMETIC, COPIED

State = dict[str, torch.Tensor]
DENSE = pytest.mark.filterwarnings("ignore:not sparse")
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def make_state(seed: int = 0, dtypes: tuple[torch.dtype, ...] = DTYPES) -> State:
    """Of each dtype a matrix, a single number, and a tensor without elements."""
    state = {}
    for place, dtype in enumerate(dtypes):
        for shape, what in (((12, 24), "weight"), ((), "count"), ((0, 3), "none")):
            state[f"{NAMES[dtype]}.{what}"] = random_bits(dtype, shape, 100 * seed + place)
    return state


def tuned_of(state: State) -> State:
    """Every 11th element in other bits: the lowest of a matrix, all of a single number."""
    tuned = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in tuned.values():
        data = tensor.view(-1).view(torch.uint8).view(-1, tensor.itemsize)
        data[::11, 0] ^= 1
    return tuned


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor)), name


def test_a_difference_of_every_dtype_is_exact_on_disk_and_back(tmp_path: Path) -> None:
    base, tuned = make_state(), tuned_of(make_state())
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a single number is not called "not sparse"
        adapter = shira.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert set(adapter) == {name for name in base if not name.endswith(".none")}
    adapter.save(tmp_path / "a")
    loaded, (found, _) = shira.Adapter.load(tmp_path / "a"), read((tmp_path / "a").read_bytes())
    for name, tensor in loaded.items():
        at = tensor.indices.long()
        assert at.tolist() == list(range(0, base[name].numel(), 11)) == found[name].indices
        old, new = (bits(side[name]).view(base[name].numel(), -1)[at].view(-1) for side in (base, tuned))
        assert torch.equal(bits(tensor.values), new)
        assert found[name].values == bytes(new.tolist())
        assert (tensor.kind, tensor.checksum) == ("replace", checksum_of(old)) == (found[name].kind, found[name].base)
        assert found[name].dtype == found[name].values_dtype == str(tensor.dtype).removeprefix("torch.")
    out = tmp_path / "out.safetensors"
    shira.merge_checkpoint(tmp_path / "base.safetensors", [(tmp_path / "a", 1.0)], out)
    assert_same(load_file(out), tuned)
    assert len(shira.diff(tmp_path / "out.safetensors", tuned)) == 0


@pytest.mark.parametrize("dtype", COPIED, ids=str)
def test_nans_and_negative_zeros_keep_their_bits(dtype: torch.dtype) -> None:
    """Every pattern of a byte against its complement."""
    patterns = torch.arange(2 if dtype == torch.bool else 256, dtype=torch.uint8).repeat(8)
    base, tuned = patterns.view(dtype), patterns.flip(0).view(dtype)
    with pytest.warns(shira.ShiraWarning, match="not sparse"):
        adapter = shira.diff({"w": base}, {"w": tuned})
    assert adapter["w"].indices.tolist() == list(range(base.numel()))
    assert torch.equal(bits(adapter["w"].values), patterns.flip(0))
    equal = shira.diff({"w": tuned}, {"w": tuned.clone()})
    assert len(equal) == 0, "a NaN is what it is"


def test_no_entries_and_nothing_at_all() -> None:
    for dtype in DTYPES:
        none = torch.empty(0, dtype=dtype)
        tensor = shira.AdapterTensor(torch.empty(0, dtype=torch.int32), none, (3, 4), dtype)
        data = to_bytes(shira.Adapter({"a": tensor, "b": tensor}))
        found, _ = read(data)
        assert found["a"].values == b""
        assert found["a"].dtype == NAMES[dtype]
    assert b'"format":"shira/1",' in to_bytes(shira.Adapter({}))


def test_what_did_not_change_may_be_of_any_dtype() -> None:
    """Also a dtype that no adapter holds."""
    same = {
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "wide": torch.randn(3, dtype=torch.complex128),
        "packed": torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "nothing": torch.empty(0, dtype=torch.complex64),
    }
    copies = {name: tensor.clone() for name, tensor in same.items()}
    adapter = shira.diff({**same, "w": torch.zeros(20)}, {**copies, "w": torch.eye(20)[3]})
    assert list(adapter) == ["w"]


def test_top_keeps_whole_what_has_no_magnitude() -> None:
    base = {"w": torch.zeros(100), "codes": torch.zeros(100, dtype=torch.uint8), "count": torch.tensor(3)}
    tuned = {"w": torch.arange(100.0), "codes": torch.arange(100).byte() // 10 * 10 % 30, "count": torch.tensor(7)}
    with pytest.warns(shira.ShiraWarning, match=r"^not sparse: .* changed in codes \(60\.0%\)$"):
        adapter = shira.diff(base, tuned, top=0.02)
    assert adapter["w"].indices.tolist() == [98, 99]
    assert adapter["codes"].nnz == 60
    assert adapter["count"].values.tolist() == [7]
    assert adapter.provenance is not None
    assert adapter.provenance["diff"]["energy"]["codes"] == 1.0
    assert adapter.provenance["diff"]["energy_kept"] == pytest.approx((98**2 + 99**2) / sum(i**2 for i in range(100)))


@DENSE
def test_merging_scales_and_mixes_numbers_only(tmp_path: Path) -> None:
    """Of two adapters one has a counter, at strength 1; the other's strength does not matter to it."""
    base = {"w": torch.zeros(4), "v": torch.zeros(4), "count": torch.tensor(3), "mask": torch.zeros(4).bool()}
    save_file(base, tmp_path / "base")
    a = shira.diff({"w": base["w"], "count": base["count"]}, {"w": torch.eye(4)[0], "count": torch.tensor(9)})
    b = shira.diff({"w": base["w"], "mask": base["mask"]}, {"w": torch.eye(4)[1], "mask": torch.eye(4)[2].bool()})
    only_w = shira.diff({"w": base["w"]}, {"w": torch.eye(4)[1]})
    shira.merge_checkpoint(tmp_path / "base", [(a, 1.0), (only_w, 0.5)], tmp_path / "out")
    expected = {**base, "w": torch.tensor([1, 0.5, 0, 0]), "count": torch.tensor(9)}
    assert_same(load_file(tmp_path / "out"), expected)
    bank = shira.ResidentAdapters(model := state_module(base))
    bank.add("a", a)
    bank.add("only_w", only_w)
    bank.switch({"a": 1.0, "only_w": 0.5})
    assert_same(dict(model.state_dict()), expected)
    fused = shira.fuse([(a, 1.0), (only_w, 0.5)], base=tmp_path / "base")
    assert (fused["w"].kind, fused["count"].kind, fused["count"].dtype) == ("add", "replace", torch.int64)
    assert fused["count"].checksum == checksum_of(base["count"].view(-1))
    shira.merge_checkpoint(tmp_path / "base", [(fused, 1.0)], tmp_path / "fused")
    assert_same(load_file(tmp_path / "fused"), expected)
    deltas = shira.Adapter({"w": shira.AdapterTensor(a["w"].indices, a["w"].values, (4,), torch.float32, "add")})
    assert shira.fuse([(deltas, 0.5), (shira.Adapter({"count": a["count"]}), 1.0)])["count"].checksum is not None

    half = r"adapters\[1\] changes 'mask', which is torch.bool: its entries can be replaced at strength 1 only, got 0.5"
    both = r"adapters\[0\] and adapters\[1\] both change 'count', which is torch.int64: .* not mixed"
    for call in (
        lambda pairs: shira.merge_checkpoint(tmp_path / "base", pairs, tmp_path / "refused"),
        lambda pairs: shira.fuse(pairs, base=base),
    ):
        with pytest.raises(ValueError, match=half):
            call([(a, 1.0), (b, 0.5)])
        with pytest.raises(ValueError, match=both):
            call([(a, 1.0), (a, 1.0)])
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match=r"adapters\[0\]: count: the adapter belongs to another base"):
        shira.fuse([(a, 1.0)], base={**base, "count": torch.tensor(4)})


@DENSE
def test_what_is_computed_with_deltas_refuses_them_by_name() -> None:
    base = {"w": torch.zeros(4), "codes": torch.zeros(4, dtype=torch.int8)}
    a = shira.diff(base, {"w": torch.eye(4)[0], "codes": torch.eye(4)[1].char()})
    assert shira.overlap(a, a) == 1
    for metric in (shira.awom, shira.awor):
        with pytest.raises(ValueError, match=r"codes: it is torch\.int8, whose entries can be replaced"):
            metric(a, a, base)


def test_buffers_of_a_model_as_base() -> None:
    """A model, its state dict and a bank know a buffer by the same name, if the state dict has it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    model, tuned = Model(), Model()
    tuned.norm.running_mean += 1
    tuned.norm.num_batches_tracked += 5
    with pytest.warns(shira.ShiraWarning, match="not sparse"):
        adapter = shira.diff(model, tuned)
    assert list(adapter) == ["norm.running_mean", "norm.num_batches_tracked"]
    fused = shira.fuse([(adapter, 1.0)], base=model)
    assert fused["norm.running_mean"].values.tolist() == [1, 1, 1]
    assert fused["norm.num_batches_tracked"].values.tolist() == [5]
    other = shira.Adapter({"cache": fused["norm.running_mean"]})
    with pytest.raises(ValueError, match="the model has no parameter or buffer 'cache'"):
        shira.fuse([(other, 1.0)], base=model)


def test_checksums_are_of_bytes() -> None:
    for dtype in DTYPES:
        entries = random_bits(dtype, 9)
        assert checksum_of(entries) == checksum_of(bits(entries))
        assert bytes(bytes_of(entries)) == bytes(bits(entries).tolist())


def state_module(state: State) -> nn.Module:
    """A module of these tensors: floating-point ones are parameters, others buffers."""
    module = nn.Module()
    for name, tensor in state.items():
        if tensor.dtype in ARITHMETIC:
            module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
        else:
            module.register_buffer(name, tensor.clone())
    return module
