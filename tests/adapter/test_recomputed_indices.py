"""Files without indices wherever an adapter's file may be given: they work where a base is at hand."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from oracle import bits
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import shira
from shira import convert
from shira.adapter import adapter as adapter_module
from shira.cli.bench import run_bench
from shira.cli.report.run import run_report
from shira.convert import merge

SHAPES = {"layers.0.q.weight": (40, 30), "layers.1.q.weight": (40, 30), "norm.weight": (40,)}
MASKS: dict[str, dict[str, Any]] = {
    "wm": {"density": 0.02},
    "wm of the model": {"density": 0.02, "budget": "model"},
    "wm in runs": {"density": 0.02, "granularity": 4},
    "small": {"mask": "small", "k": 20},
    "rand": {"mask": "rand", "density": 0.02, "seed": 5},
    "struct": {"mask": "struct", "density": 0.1},
}
NO_BASE = "indices that are left out are recomputed from the base: give `base`"
OTHER_BASE = "the mask that was recomputed from the base is not the one that was saved, or the file is damaged"


def make_state(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in SHAPES.items()}


class Model(nn.Module):
    """Layers whose names are those of SHAPES."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(30, 40, bias=False)}) for _ in range(2))
        self.norm = nn.LayerNorm(40, bias=False)
        self.bfloat16().load_state_dict(state)


def trained(state: Mapping[str, torch.Tensor], by: float, **config: Any) -> shira.Adapter:
    handle = shira.attach(Model(state), shira.ShiraConfig("all-linear", **config))
    with torch.no_grad():
        for values in handle.parameters():
            values += by
    return handle.adapter()


@pytest.fixture(params=MASKS)
def mask(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def files(mask: str, folder: Path) -> None:
    """base, other: checkpoints; a, b: files of adapters; a-bare, b-bare: the same without indices."""
    base = make_state()
    save_file(base, folder / "base")
    save_file(make_state(1), folder / "other")
    for name, by in (("a", 0.5), ("b", -0.25)):
        adapter = trained(base, by, **MASKS[mask])
        adapter.save(folder / name)
        adapter.save(folder / f"{name}-bare", indices=False, base=base)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str) -> Path:
    monkeypatch.chdir(tmp_path)
    files(mask, tmp_path)
    return tmp_path


@pytest.fixture
def wm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files("wm", tmp_path)
    return tmp_path


def assert_same(one: shira.Adapter, other: shira.Adapter) -> None:
    assert list(one) == list(other)
    for name, part in one.items():
        assert (part.shape, part.dtype, part.kind, part.checksum) == (
            other[name].shape,
            other[name].dtype,
            other[name].kind,
            other[name].checksum,
        )
        assert torch.equal(part.indices, other[name].indices)
        assert torch.equal(bits(part.values), bits(other[name].values))


def test_every_function_takes_them_with_a_base(folder: Path) -> None:
    shira.merge_checkpoint("base", [("a", 0.7), ("b", 0.5)], "expected")
    shira.merge_checkpoint("base", [("a-bare", 0.7), ("b-bare", 0.5)], "merged")
    assert Path("merged").read_bytes() == Path("expected").read_bytes()
    fused = [shira.fuse([(f"a{form}", 0.7), (f"b{form}", 0.3)], base="base") for form in ("", "-bare")]
    assert_same(*fused)
    assert shira.overlap("a-bare", "b-bare", "base") == shira.overlap("a", "b") == 1.0
    assert shira.awom("a-bare", "b-bare", "base") == shira.awom("a", "b", "base")
    assert shira.awor("a-bare", "b", "base") == shira.awor("a", "b", "base")
    assert_same(convert.read("a-bare", "base"), shira.Adapter.load("a"))
    assert merge.fit_of("a-bare", "base").fits is True


def test_a_bank_takes_them_whatever_is_active(folder: Path) -> None:
    """The mask is that of the base, also where the weights hold another adapter, a mix, or runs of entries."""
    model, base = Model(make_state()), make_state()
    bank = shira.ResidentAdapters(model)
    bank.add("a", "a-bare")
    for round_, active in enumerate(("a", {"a": 3.0, "b": -0.5}, None)):
        bank.switch(active)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        bank.add(f"b{round_ or ''}", "b-bare")
        for name, weight in model.state_dict().items():
            assert torch.equal(bits(weight), bits(before[name]))
        bank.switch(f"b{round_ or ''}")
        for name, part in shira.Adapter.load("b").items():
            expected = base[name].clone()
            expected.view(-1)[part.indices.long()] = part.values
            assert torch.equal(bits(model.state_dict()[name]), bits(expected))
    bank.verify_base()


def calls() -> dict[str, Callable[[], object]]:
    return {
        "load": lambda: shira.Adapter.load("a-bare"),
        "fuse": lambda: shira.fuse([("a-bare", 1.0)]),
        "overlap": lambda: shira.overlap("a", "a-bare"),
        "awom": lambda: shira.awom("a-bare", "b-bare"),
        "read": lambda: convert.read("a-bare"),
        "report": lambda: run_report([Path("a-bare"), Path("b")], base=None, output=Path("out")),
    }


@pytest.mark.parametrize("name", calls())
def test_without_a_base_one_error_says_so(wm: Path, name: str) -> None:
    with pytest.raises(shira.AdapterFormatError, match=f"^a-bare: {re.escape(NO_BASE)}$"):
        calls()[name]()
    assert not Path("out").exists()


def wrong_calls() -> dict[str, Callable[[], object]]:
    return {
        "load": lambda: shira.Adapter.load("a-bare", base="other"),
        "merge": lambda: shira.merge_checkpoint("other", [("a-bare", 1.0)], "out"),
        "fuse": lambda: shira.fuse([("a-bare", 1.0)], base="other"),
        "overlap": lambda: shira.overlap("a-bare", "b", "other"),
        "awom": lambda: shira.awom("a-bare", "b", "other"),
        "bank": lambda: shira.ResidentAdapters(Model(make_state(1))).add("a", "a-bare"),
        "bench": lambda: run_bench([Path("a-bare")], base=Path("other")),
        "report": lambda: run_report([Path("a-bare"), Path("b")], base=Path("other"), output=Path("out")),
        "read": lambda: convert.read("a-bare", "other"),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_another_base_is_refused(wm: Path, name: str) -> None:
    with pytest.raises(shira.AdapterFormatError, match=f"^a-bare: 'layers.0.q.weight': {OTHER_BASE}$"):
        wrong_calls()[name]()
    assert not Path("out").exists()
    Path("text").write_text("hello")
    with pytest.raises(ValueError, match=r"^text: not a whole safetensors file"):
        merge.fit_of("a-bare", "text")
    found = merge.fit_of("a-bare", "other")
    assert found.fits is False
    assert found.reason.startswith("another base: a-bare: ")


def test_a_random_mask_of_another_base_is_refused_when_written(tmp_path: Path) -> None:
    """Its indices are right for any base, but the checksum tells."""
    base = make_state()
    save_file(base, tmp_path / "base")
    save_file(make_state(1), tmp_path / "other")
    adapter = trained(base, 0.5, **MASKS["rand"])
    with pytest.raises(ValueError, match=r"layers\.0\.q\.weight: the adapter belongs to another base"):
        adapter.save(tmp_path / "a", indices=False, base=tmp_path / "other")
    assert not (tmp_path / "a").exists()
    adapter.save(tmp_path / "a", indices=False, base=tmp_path / "base")
    with pytest.raises(ValueError, match="the adapter belongs to another base"):
        shira.merge_checkpoint(tmp_path / "other", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert merge.fit_of(tmp_path / "a", tmp_path / "other").reason.startswith("another base: 2 of 2 tensors")
    save_file({name: tensor[:20] for name, tensor in base.items()}, tmp_path / "smaller")
    with pytest.raises(shira.AdapterFormatError, match=r"layers\.0\.q\.weight: the adapter's tensor is torch.bfloat16"):
        shira.Adapter.load(tmp_path / "a", base=tmp_path / "smaller")


def test_a_header_alone_describes_a_file(wm: Path) -> None:
    whole = shira.Adapter.load("a")
    for file, has_indices in (("a", True), ("a-bare", False)):
        described, found = adapter_module.describe(file)
        assert found is has_indices
        assert (described.nnz, described.density, described.config) == (whole.nnz, whole.density, whole.config)
        for name, part in described.items():
            assert part.indices.is_meta
            assert part.values.is_meta
            assert (part.shape, part.dtype, part.kind, part.checksum) == (
                whole[name].shape,
                whole[name].dtype,
                whole[name].kind,
                whole[name].checksum,
            )
    Path("cut").write_bytes(Path("a").read_bytes()[:-9])
    with pytest.raises(shira.AdapterFormatError, match=r"^cut: the header describes"):
        adapter_module.describe("cut")


class Counted(Mapping[str, torch.Tensor]):
    """A base that says how many of its tensors are alive when one is read."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state, self.alive, self.most = state, 0, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.state[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self.gone)
        return tensor

    def gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_one_tensor_of_the_base_is_in_memory_at_a_time(folder: Path) -> None:
    base = Counted(make_state())
    gc.disable()
    try:
        adapter = shira.Adapter.load("a-bare", base=base)
        adapter.save("again", indices=False, base=base)
    finally:
        gc.enable()
    assert base.most == 1
    assert Path("again").read_bytes() == Path("a-bare").read_bytes()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def test_convert_leaves_indices_out_and_puts_them_back(folder: Path, run: Run) -> None:
    code, out, error = run("convert a --no-indices --base base -o bare --json")
    assert (code, error) == (0, "")
    assert Path("bare").read_bytes() == Path("a-bare").read_bytes()
    facts = json.loads(out)
    assert facts["bytes"] == Path("bare").stat().st_size
    with safe_open("bare", framework="pt") as file:
        assert not [name for name in file.keys() if name.endswith(".indices")]  # noqa: SIM118 - it is no mapping
    assert run("convert bare --base base -o whole")[0] == 0
    assert Path("whole").read_bytes() == Path("a").read_bytes()


def test_commands_take_them(wm: Path, run: Run) -> None:
    for file in ("a", "a-bare"):
        for line in (
            f"apply base {file} b -o {file}.applied",
            f"fuse {file} b --base base -o {file}.fused",
            f"convert {file} --base base --to patch -o {file}.patch",
            f"report {file} b --base base -o {file}.report",
            f"bench {file} b --base base --seconds 0",
        ):
            code, _, error = run(line)
            assert (code, error) == (0, "")
    assert Path("a-bare.applied").read_bytes() == Path("a.applied").read_bytes()
    assert Path("a-bare.patch").read_bytes() == Path("a.patch").read_bytes()
    assert_same(shira.Adapter.load("a-bare.fused"), shira.Adapter.load("a.fused"))


def test_info_needs_no_base(wm: Path, run: Run) -> None:
    code, out, error = run("info a-bare")
    assert (code, error) == (0, "")
    assert "48 entries in 2 tensors" in out
    assert "no indices: they are recomputed from the base" in out
    bare, whole = (json.loads(run(f"info {file} --json")[1]) for file in ("a-bare", "a"))
    assert (bare.pop("indices"), whole.pop("indices")) == ("recomputed", "stored")
    assert bare.pop("bytes") < whole.pop("bytes")
    assert {**bare, "file": "a"} == whole
    assert "the one that the adapter was made for" in run("info a-bare --base base")[1]
    code, out, error = run("info a-bare --base other")
    assert (code, error) == (0, "")
    assert "another base: a-bare: " in out


BAD = {
    "convert a --no-indices -o new": "shira: indices that are left out are recomputed from the base: give --base",
    "convert a --no-indices --base other -o new": "'layers.0.q.weight': its indices are not those that the config",
    "convert a --no-indices --base base --to patch -o new": "indices can be left out of a file of the format shira",
    "convert a-bare -o new": "a-bare: indices that are left out are recomputed from the base: give --base",
    "convert a-bare --base other -o new": f"a-bare: 'layers.0.q.weight': {OTHER_BASE}",
    "apply other a-bare -o new": f"a-bare: 'layers.0.q.weight': {OTHER_BASE}",
    "fuse a-bare -o new": "a-bare: indices that are left out are recomputed from the base: give --base",
    "fuse a-bare b --base other -o new": f"a-bare: 'layers.0.q.weight': {OTHER_BASE}",
    "report a-bare b -o new": "a-bare: indices that are left out are recomputed from the base: give --base",
    "bench a-bare --base other": f"a-bare: 'layers.0.q.weight': {OTHER_BASE}",
    "bench a-bare": "adapters need the base that they were made for, --base",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(wm: Path, run: Run, line: str) -> None:
    before = sorted(wm.rglob("*"))
    code, out, error = run(line)
    assert (code, out) == (2, "")
    assert error.startswith("shira: ")
    assert error.count("\n") == 1
    assert BAD[line] in error
    assert sorted(wm.rglob("*")) == before
