"""`shira.diff` and `shira.merge_checkpoint`: exact, streaming, and whole or not at all."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import shira
from shira import Adapter, AdapterTensor, ResidentAdapters
from shira.adapter import checksum_of
from shira.convert import merge
from shira.files.checkpoint import TensorFolder

pytestmark = pytest.mark.filterwarnings("ignore:not sparse")
State = dict[str, torch.Tensor]
SHAPES = {"embed.weight": (16, 8), "layers.0.q.weight": (8, 8), "layers.0.q.bias": (8,), "layers.1.q.weight": (8, 8)}


def make_state(dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}


def tuned_of(state: State, share: float = 0.05, seed: int = 1) -> State:
    draw = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in state.items():
        mask = torch.rand(tensor.shape, generator=draw) < share
        mask.view(-1)[0] = True
        changed[name] = torch.where(mask, tensor + torch.randn(tensor.shape, generator=draw).to(tensor.dtype), tensor)
    return changed


def sharded(state: State, folder: Path) -> Path:
    """As transformers saves it: an index, two files with metadata, and other files beside them."""
    folder.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, inside in parts.items():
        save_file({name: state[name] for name in inside}, folder / file, metadata={"format": "pt", "made by": "test"})
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.txt").write_text("a b c")
    (folder / "pytorch_model.bin").write_bytes(b"weights of the base in another format")
    (folder / ".cache").write_text("hidden")
    return folder


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(bits(found[name]), bits(tensor)), name


def applied(state: State, adapter: Adapter) -> State:
    result = {name: tensor.clone() for name, tensor in state.items()}
    for name, part in adapter.items():
        result[name].view(-1)[part.indices.long()] = part.values
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_diff_is_exact_and_knows_its_base(dtype: torch.dtype) -> None:
    base = make_state(dtype)
    tuned = tuned_of(base)
    tuned["layers.0.q.bias"] = base["layers.0.q.bias"].clone()
    tuned["embed.weight"][1, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    base["embed.weight"][1, 2] = 0.0
    adapter = shira.diff(base, tuned)
    assert list(adapter) == ["embed.weight", "layers.0.q.weight", "layers.1.q.weight"]
    assert_same(applied(base, adapter), tuned)
    for name, part in adapter.items():
        assert (part.kind, part.dtype, part.shape) == ("replace", dtype, SHAPES[name])
        assert part.indices.dtype == torch.int32
        assert part.checksum == checksum_of(base[name].view(-1)[part.indices.long()])
    assert adapter.provenance == {"diff": {"base": None, "tuned": None}}
    assert len(shira.diff(base, base)) == 0


def test_every_form_of_a_checkpoint_gives_the_same(tmp_path: Path) -> None:
    base, tuned = make_state(), tuned_of(make_state())
    expected = shira.diff(base, tuned)
    save_file(base, tmp_path / "base.safetensors")
    prefixed = {f"base_model.model.{name}".replace("q.w", "q.base_layer.w"): tensor for name, tensor in tuned.items()}
    sides = [tmp_path / "base.safetensors", str(sharded(base, tmp_path / "base")), as_module(base)]
    others = [sharded(tuned, tmp_path / "tuned"), prefixed, as_module(tuned)]
    for one in sides:
        for other in others:
            adapter = shira.diff(one, other)
            assert set(adapter) == set(expected)
            for name, part in expected.items():
                assert torch.equal(adapter[name].indices, part.indices)
                assert torch.equal(adapter[name].values, part.values)
                assert adapter[name].checksum == part.checksum
    assert shira.diff(sides[0], others[0]).provenance == {"diff": {"base": "base.safetensors", "tuned": "tuned"}}


def as_module(state: State) -> nn.Module:
    model = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        setattr(module, last, nn.Parameter(tensor.clone()))
    return model


class Counted(Mapping[str, torch.Tensor]):
    """Gives a new tensor at each reading, and knows the most that were alive at once, over all instances."""

    alive = most = 0

    def __init__(self, state: State) -> None:
        self.state = state

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.state[name].clone()
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(tensor.untyped_storage(), Counted.gone)
        return tensor

    @staticmethod
    def gone() -> None:
        Counted.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_at_most_two_tensors_are_in_memory() -> None:
    base = make_state()
    Counted.alive = Counted.most = 0
    for top in (None, 0.5):
        shira.diff(Counted(base), Counted(tuned_of(base)), top=top)
    assert (Counted.alive, Counted.most) == (0, 2)


def test_peak_memory_of_a_diff_of_files(tmp_path: Path) -> None:
    """Two files of 16 tensors of 4 MB: the process grows by a few tensors, not by files."""
    size = 2**20
    base = {f"layer.{i:02}.weight": torch.randn(size) for i in range(16)}
    save_file(base, tmp_path / "base.safetensors")
    for tensor in base.values():
        tensor[:100] += 1
    save_file(base, tmp_path / "tuned.safetensors")
    code = """
import resource, sys, torch, shira
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
shira.diff({"a": torch.zeros(9)}, {"a": torch.ones(9)}, top=1.0) and None
before = peak()
adapter = shira.diff(sys.argv[1], sys.argv[2])
assert adapter.nnz == 1600
print(peak() - before)
"""
    files = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40  # MB; both files are 128


def test_top_keeps_the_largest_changes() -> None:
    base = {"w": torch.zeros(100), "one": torch.zeros(3)}
    tuned = {"w": torch.zeros(100), "one": torch.tensor([0.0, 2.0, 1.0])}
    tuned["w"][10:20] = torch.tensor([3.0, -5.0, 1.0, 4.0, -1.0, 0.5, -4.0, 0.0, 0.0, 0.0])
    tuned["w"][17] = -0.0  # a change of energy 0
    adapter = shira.diff(base, tuned, top=0.03)
    assert adapter["w"].indices.tolist() == [11, 13, 16]
    assert adapter["w"].values.tolist() == [-5.0, 4.0, -4.0]
    assert adapter["w"].checksum == checksum_of(torch.zeros(3))
    assert adapter["one"].indices.tolist() == [1]  # at least one
    energy = adapter.provenance["diff"]
    all_of_w = 9 + 25 + 1 + 16 + 1 + 0.25 + 16
    assert energy["top"] == 0.03
    assert energy["energy"] == pytest.approx({"w": 57 / all_of_w, "one": 4 / 5})
    assert energy["energy_kept"] == pytest.approx(61 / (all_of_w + 5))
    whole = shira.diff(base, tuned, top=1.0)
    assert whole.nnz == 10
    assert whole.provenance["diff"]["energy_kept"] == 1.0


def test_tensors_that_are_not_sparse_are_named_once() -> None:
    base = {f"layer.{i}": torch.zeros(100) for i in range(6)}
    tuned = {name: torch.zeros(100) for name in base}
    tuned["layer.0"][:10] = 1  # a tenth is still sparse
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shira.diff(base, tuned)
    for i in range(1, 6):
        tuned[f"layer.{i}"][: 10 * i + 1] = 1
    with pytest.warns(UserWarning, match=r"layer.1 \(11.0%\), layer.2 \(21.0%\), layer.3 \(31.0%\) and 2 more") as seen:
        adapter = shira.diff(base, tuned)
    assert [warning.filename for warning in seen] == [__file__]
    assert_same(applied(base, adapter), tuned)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_tensors_are_kept_once_under_their_first_name() -> None:
    base, tuned = Tied(), Tied()
    with torch.no_grad():
        tuned.embed.weight.copy_(base.embed.weight)
        tuned.embed.weight[0, 0] += 1
    once = {"embed.weight": tuned.embed.weight.detach().clone()}
    for one, other in ((base, tuned), (base, once), ({"embed.weight": base.embed.weight}, tuned)):
        assert list(shira.diff(one, other)) == ["embed.weight"]
    untied = Tied(tied=False)
    with torch.no_grad():
        untied.embed.weight.copy_(base.embed.weight)
        untied.head.weight.copy_(base.embed.weight)
        untied.head.weight[1, 1] += 1
    # Tied on one side only: a base with one tensor cannot become two.
    assert list(shira.diff(untied, tuned)) == ["embed.weight", "head.weight"]
    with pytest.raises(ValueError, match=r"^head.weight: base has it and 'embed.weight' as one tensor, and in tuned"):
        shira.diff(base, untied)
    # In another order, or under the other name only.
    swapped = dict(reversed(list(tuned.state_dict().items())))
    for other in (swapped, {"head.weight": tuned.head.weight.detach().clone()}):
        found = shira.diff(base, other)
        assert list(found) == ["embed.weight"]
        model = copy.deepcopy(base)
        bank = ResidentAdapters(model)
        bank.add("tuned", found)
        bank.switch("tuned")
        assert torch.equal(model.head.weight, tuned.head.weight)


@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_any_difference_is_exact(seed: int, share: float, dtype: torch.dtype) -> None:
    base = make_state(dtype, seed)
    tuned = tuned_of(base, share, seed + 1)
    assert_same(applied(base, shira.diff(base, tuned)), tuned)


FLOAT4 = torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def bad_diffs() -> dict[str, tuple[dict, str]]:
    w = torch.zeros(4)
    return {
        "nothing in common": ({"base": {"other": w}, "common": True}, "no tensor of the same name"),
        "too large": ({"tuned": {"w": w.double() + 1e200}, "base": {"w": w.double()}, "top": 0.5}, "w: the squares of"),
        "base lacks": ({"base": {}}, "base lacks the tensor 'w'; compare those that both have with `common`"),
        "tuned lacks": ({"base": {"w": w, "b": w + 1, "c": w + 2}}, "tuned lacks the tensor 'b', and 1 more"),
        "shape": ({"base": {"w": w.view(2, 2)}}, r"w: the shape is \(2, 2\) in base, but \(4,\) in tuned"),
        "dtype": ({"base": {"w": w.half()}}, "w: the dtype is torch.float16 in base, but torch.float32 in tuned"),
        "twice": (
            {"base": {"w": w, "base_model.model.w": w + 1}},
            "base has the tensor 'w' twice: as 'w' and as 'base_model.model.w'",
        ),
        "meta": ({"base": {"w": w.to("meta")}}, "w: base's tensor is on the meta device"),
        "complex": (
            {"base": {"w": w.to(torch.complex64)}, "tuned": {"w": w.to(torch.complex64) + 1}},
            "w: it changed and is torch.complex64, which no adapter can hold",
        ),
        "more than 8 bytes": (
            {"base": {"w": w.to(torch.complex128)}, "tuned": {"w": w.to(torch.complex128) + 1}},
            "w: it changed and is torch.complex128",
        ),
        "less than a byte": (
            {"base": {"w": FLOAT4}, "tuned": {"w": (FLOAT4.view(torch.uint8) + 1).view(FLOAT4.dtype)}},
            "w: it changed and is torch.float4_e2m1fn_x2",
        ),
        "sparse": ({"base": {"w": w.to_sparse()}, "tuned": {"w": w.to_sparse()}}, "w: base's tensor must be dense"),
        "top": ({"top": 0.0}, "top must be a share of each tensor's entries, above 0 and up to 1, got 0.0"),
        "not finite": ({"tuned": {"w": w / 0}, "top": 0.5}, "w: `top` cannot rank changes that are not finite"),
        "no base at all": ({"base": 3}, "base must be a model, its state dict or the path of safetensors, got 3"),
    }


@pytest.mark.parametrize("case", bad_diffs())
def test_bad_diffs(case: str) -> None:
    changes, message = bad_diffs()[case]
    with pytest.raises(ValueError, match=message):
        shira.diff(**{"base": {"w": torch.zeros(4)}, "tuned": {"w": torch.ones(4)}, **changes})


def test_common_leaves_out_what_one_side_lacks() -> None:
    one, other = {"w": torch.zeros(20), "b": torch.zeros(2)}, {"c": torch.zeros(2), "w": torch.eye(20)[0]}
    assert list(shira.diff(one, other, common=True)) == ["w"]


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shira.diff(tmp_path / "none.safetensors", {})
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match="text: not a whole safetensors file"):
        shira.diff(tmp_path / "text", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: the folder has no safetensors file"):
        shira.diff({}, tmp_path / "empty")


def test_a_folder_with_two_checkpoints_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    save_file({"w": torch.ones(4)}, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "shard.safetensors"}}')
    with pytest.raises(ValueError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        shira.diff(tmp_path, {"w": torch.zeros(4)})


# merge_checkpoint


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def switched(state: State, adapters: list[tuple[Adapter, float]]) -> State:
    model = as_module(state)
    bank = ResidentAdapters(model)
    for i, (adapter, _) in enumerate(adapters):
        bank.add(str(i), adapter)
    bank.switch({str(i): strength for i, (_, strength) in enumerate(adapters)})
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def with_add(state: State, seed: int) -> Adapter:
    """Kind add in one tensor, kind replace in another."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for name, kind in (("layers.0.q.weight", "add"), ("layers.1.q.weight", "replace")):
        weight = state[name]
        indices = (torch.rand(weight.numel(), generator=draw) < 0.3).nonzero().view(-1).int()
        old = weight.view(-1)[indices.long()]
        values = torch.randn(old.shape, generator=draw)
        parts[name] = AdapterTensor(
            indices, values.to(weight.dtype) if kind == "replace" else values, tuple(weight.shape), weight.dtype, kind,
            checksum_of(old),
        )  # fmt: skip
    return Adapter(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strengths", [(1.0,), (0.7,), (1.0, 0.3), (0.5, -1.0, 1.0)], ids=str)
def test_merged_is_the_switch_bit_for_bit(tmp_path: Path, dtype: torch.dtype, strengths: tuple[float, ...]) -> None:
    base = make_state(dtype)
    adapters = [shira.diff(base, tuned_of(base, 0.08, 5)), with_add(base, 6), shira.diff(base, tuned_of(base, 0.1, 7))]
    for start in range(2):
        chosen = [(adapters[(start + i) % 3], strength) for i, strength in enumerate(strengths)]
        folder = sharded(base, tmp_path / f"base{start}")
        before = digest(folder)
        merged = shira.merge_checkpoint(folder, chosen, tmp_path / f"out{start}")
        assert digest(folder) == before
        expected = switched(base, chosen)
        found = TensorFolder(tmp_path / f"out{start}")
        assert set(found) == set(expected)
        for name in expected:
            assert torch.equal(bits(found[name]), bits(expected[name])), name
        assert merged.entries == sum(adapter.nnz for adapter, _ in chosen)
        assert merged.left_out == [".cache", "pytorch_model.bin"]
        for file in merged.files:
            assert header_of(tmp_path / f"out{start}" / file) == header_of(folder / file)
        same = {name for name, value in digest(tmp_path / f"out{start}").items() if before[name] == value}
        assert {"config.json", "tokenizer/vocab.txt", "model.safetensors.index.json"} <= same
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_single_file_keeps_its_metadata_and_order(tmp_path: Path) -> None:
    base = make_state(torch.bfloat16) | {"ids": torch.arange(5), "eight": torch.zeros(3).to(torch.float8_e4m3fn)}
    tuned = tuned_of({name: base[name] for name in SHAPES}) | {name: base[name] for name in ("ids", "eight")}
    save_file(base, tmp_path / "base.safetensors", metadata={"a": "b"})
    shira.diff(base, tuned).save(tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    shira.merge_checkpoint(tmp_path / "base.safetensors", [(tmp_path / "adapter.safetensors", 1.0)], out)
    assert header_of(out) == header_of(tmp_path / "base.safetensors")
    assert_same(dict(sorted(load_file(out).items())), dict(sorted(tuned.items())))
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"a": "b"}


def test_refused_merges_leave_nothing(tmp_path: Path) -> None:
    base = make_state()
    folder = sharded(base, tmp_path / "base")
    adapter = shira.diff(base, tuned_of(base))
    other = shira.diff(make_state(seed=9), tuned_of(make_state(seed=9)))
    (tmp_path / "work").mkdir()
    out = tmp_path / "work/out"

    def refused(message: str, *args: object, **kwargs: object) -> None:
        before = digest(tmp_path)
        with pytest.raises(ValueError, match=message):
            shira.merge_checkpoint(*args, **kwargs)
        assert digest(tmp_path) == before
        assert not list((tmp_path / "work").glob(".*"))

    refused("at least one", folder, [], out)
    refused(r"adapters\[0\]: embed.weight: the adapter belongs to another base", folder, [(other, 1.0)], out)
    refused("strength must be a finite", folder, [(adapter, float("nan"))], out)
    refused("must be apart from", folder, [(adapter, 1.0)], folder / "out")
    refused("must be apart from", folder, [(adapter, 1.0)], folder, overwrite=True)
    refused("must be apart from", folder, [(adapter, 1.0)], tmp_path, overwrite=True)
    refused("there is no folder", folder, [(adapter, 1.0)], tmp_path / "none/out")
    wrong = Adapter({"other.weight": adapter["embed.weight"]})
    refused(r"adapters\[0\]: other.weight: the base has no tensor of this name", folder, [(wrong, 1.0)], out)
    twice = Adapter({"embed.weight": adapter["embed.weight"], "_orig_mod.embed.weight": adapter["embed.weight"]})
    refused("names the tensor 'embed.weight' twice", folder, [(twice, 1.0)], out)
    half = {name: tensor.half() for name, tensor in base.items()}
    refused("the adapter's dtype", folder, [(shira.diff(half, tuned_of(half)), 1.0)], out)
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    refused("there already; `overwrite` replaces it", folder, [(adapter, 1.0)], out)
    refused(
        r"out: not replaced, because it holds letter.txt, which the new folder would not",
        folder,
        [(adapter, 1.0)],
        out,
        overwrite=True,
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../base/{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "letter.txt").unlink()
    refused("which does not lie in its folder", folder, [(adapter, 1.0)], out)


def test_force_replaces_a_checkpoint_and_takes_another_base(tmp_path: Path) -> None:
    base = make_state()
    folder = sharded(base, tmp_path / "base")
    adapter = shira.diff(base, tuned_of(base))
    other = shira.diff(make_state(seed=9), tuned_of(make_state(seed=9)))
    out = tmp_path / "out"
    shira.merge_checkpoint(folder, [(adapter, 1.0)], out)
    shira.merge_checkpoint(folder, [(other, 1.0)], out, overwrite=True, force_base=True)
    assert_same({name: TensorFolder(out)[name] for name in SHAPES}, applied(base, other))
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_an_adapter_without_a_checksum_says_so(tmp_path: Path) -> None:
    base = make_state()
    save_file(base, tmp_path / "base")
    part = shira.diff(base, tuned_of(base))["embed.weight"]
    unknown = Adapter({"embed.weight": AdapterTensor(part.indices, part.values, part.shape, part.dtype)})
    with pytest.warns(UserWarning, match=r"adapters\[0\]: no checksum in 1 of 1 tensors"):
        shira.merge_checkpoint(tmp_path / "base", [(unknown, 1.0)], tmp_path / "out")


def test_whether_an_adapter_fits_a_base(tmp_path: Path) -> None:
    base = make_state()
    adapter = shira.diff(base, tuned_of(base))
    folder = sharded(base, tmp_path / "base")
    save_file(base, tmp_path / "file")
    for where in (base, folder, tmp_path / "file", as_module(base)):
        assert merge.fit_of(adapter, where) == merge.Fit(True, "the one that the adapter was made for")
    *_, name = adapter
    part = adapter[name]
    unknown = AdapterTensor(part.indices, part.values, part.shape, part.dtype)
    assert merge.fit_of(Adapter({**adapter, name: unknown}), base).fits is None
    changed = {**base, name: base[name] * (1 + 2**-20)}
    assert merge.fit_of(adapter, changed) == merge.Fit(
        False, "another base: 1 of 4 tensors differ where the adapter changes them"
    )
    lacking = {key: tensor for key, tensor in base.items() if key != name}
    assert merge.fit_of(adapter, lacking) == merge.Fit(False, f"another model: it has no tensor {name}")
    for wrong, message in ((base[name].double(), "the adapter's dtype"), (base[name][1:], "the adapter's shape")):
        found = merge.fit_of(adapter, {**base, name: wrong})
        assert found.fits is False
        assert found.reason.startswith(f"another model: {name}: {message}")


def test_a_merge_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is freed before the next is read, also while the garbage collector does not run."""
    base = make_state()
    adapter = shira.diff(base, tuned_of(base))
    alive = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(*args: Any) -> torch.Tensor:
        nonlocal alive
        assert alive == 0
        alive += 1
        tensor = switch_tensor(*args)
        weakref.finalize(tensor.untyped_storage(), gone)
        return tensor

    switch_tensor = merge._switched
    monkeypatch.setattr(merge, "_switched", counted)
    gc.disable()
    try:
        shira.merge_checkpoint(sharded(base, tmp_path / "base"), [(adapter, 0.5)], tmp_path / "out")
    finally:
        gc.enable()


def test_a_killed_merge_leaves_what_was_there(tmp_path: Path) -> None:
    """Killed when the first tensor has been written."""
    base = make_state()
    folder = sharded(base, tmp_path / "base")
    shira.diff(base, tuned_of(base)).save(tmp_path / "adapter")
    shira.merge_checkpoint(folder, [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    before = digest(tmp_path / "out")
    code = """
import sys, time, shira
def progress(done, total, what):
    if done == 2:
        print("now", flush=True)
        time.sleep(60)
shira.merge_checkpoint(sys.argv[1], [(sys.argv[2], 0.5)], sys.argv[3], overwrite=True, progress=progress)
"""
    command = [sys.executable, "-c", code, folder, tmp_path / "adapter", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert process.returncode != 0
    assert digest(tmp_path / "out") == before
