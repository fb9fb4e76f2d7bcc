"""`shira report`, as at a terminal: numbers, page and picture; what is refused leaves no file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import exit_code_of
from safetensors.torch import save_file

import shira
from shira import Adapter, AdapterTensor
from shira.adapter import checksum_of, metrics
from shira.cli.report import compare, picture
from shira.files.checkpoint import TensorFolder

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
NAMES = [f"layers.{i}.{kind}.weight" for i in (0, 2, 10) for kind in ("q", "up")]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code_of(monkeypatch, "report", *arguments)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 8, generator=draw) for name in NAMES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, base: dict[str, torch.Tensor]) -> Path:
    """Adapters a, b (without the last tensor) and <c>, the base as one file, and as a folder of two."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("a", "b", "<c>")):
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for tensor, weight in base.items():
            indices = (torch.rand(48, generator=draw) < 0.4).nonzero().squeeze(1)
            old = weight.view(-1)[indices]
            tuned = old + torch.randn(old.shape, generator=draw)
            if (name, tensor) != ("b", NAMES[-1]):
                tensors[tensor] = AdapterTensor(indices, tuned, (6, 8), torch.float32, checksum=checksum_of(old))
        Adapter(tensors).save(folder / f"{name}.safetensors")
    save_file(base, folder / "base.safetensors")
    sharded = folder / "sharded"
    sharded.mkdir()
    parts = {"one.safetensors": NAMES[:2], "two.safetensors": NAMES[2:]}
    for file, names in parts.items():
        save_file({name: base[name] for name in names}, sharded / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Page(HTMLParser):
    """Text of each table cell, row by row; addresses that the page asks for; tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_report(files: Path, base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """In a process of its own, where also warnings of libraries would be seen."""
    adapters = [files / "a.safetensors", files / "b.safetensors", files / "<c>.safetensors"]
    command = [*adapters, "--base", files / "sharded", "-o", tmp_path / "deep" / "out", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "shira.cli", "report", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0
    assert "AWOM" in done.stderr
    assert "a, <c>" in done.stderr
    assert "Warning" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == ["report.html", "report.png"]
    assert (tmp_path / "deep/out/report.png").read_bytes().startswith(b"\x89PNG")

    found = json.loads(done.stdout)
    assert found["notes"] == []
    loaded = {path.stem: Adapter.load(path) for path in adapters}
    assert [pair["adapters"] for pair in found["pairs"]] == [["a", "b"], ["a", "<c>"], ["b", "<c>"]]
    for pair in found["pairs"]:
        first, second = (loaded[name] for name in pair["adapters"])
        expected = metrics.interference(first, second, base)
        assert list(pair["tensors"]) == list(expected)
        for name, part in expected.items():
            for field in ("common", "overlap", "awom", "awor", "relative_awom", "opposite", "sign_conflicts"):
                assert pair["tensors"][name][field] == pytest.approx(getattr(part, field), rel=1e-12), field
        assert pair["awom"] == pytest.approx(shira.awom(first, second, base))
        assert pair["awor"] == pytest.approx(shira.awor(first, second, base))
        assert pair["overlap"] == shira.overlap(first, second)
    for name, adapter in loaded.items():
        deltas = metrics.as_deltas(adapter, base)
        assert found["adapters"][name]["entries"] == adapter.nnz
        assert found["adapters"][name]["energy"] == pytest.approx(sum(map(metrics.energy_of, deltas.values())))

    page = Page((tmp_path / "deep/out/report.html").read_text())
    assert page.open == []
    (image,) = page.addresses
    assert image.startswith("data:image/png;base64,")
    assert ["a", "6", f"{loaded['a'].nnz:,}"] in [row[:3] for row in page.rows]
    assert ["<c>", "6"] in [row[:2] for row in page.rows]
    assert sum(row[0] in NAMES for row in page.rows) == 3 * 6
    # Kinds together, layers by number.
    assert [row[0] for row in page.rows if row[0] in NAMES][:6] == NAMES[0::2] + NAMES[1::2]
    # What b lacks is not compared.
    (lacking,) = (row for row in page.rows if row[0] == NAMES[-1] and row[2] == "0")
    assert lacking[4:9] == ["-"] * 5


def test_without_the_base_there_is_the_overlap(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = files / "a.safetensors", files / "b.safetensors"
    assert run(monkeypatch, a, b, "-o", tmp_path, "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    (pair,), (note,) = found["pairs"], found["notes"]
    assert pair["overlap"] == shira.overlap(a, b) > 0
    assert "awom" not in pair
    assert "a, b hold tuned weights" in note
    assert "--base" in note
    assert "need the base" in " ".join(shown.err.split())
    page = (tmp_path / "report.html").read_text()
    assert note in page
    assert "<th>AWOM</th>" not in page


def test_doubts_about_the_base_are_notes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = Adapter.load(files / "a.safetensors")
    unknown = Adapter(
        {name: AdapterTensor(part.indices, part.values, part.shape, part.dtype) for name, part in tensors.items()}
    )
    unknown.save(tmp_path / "u.safetensors")
    command = [files / "b.safetensors", tmp_path / "u.safetensors", "--base", files / "base.safetensors"]
    as_deltas = compare.as_deltas

    def with_a_warning_of_a_library(*arguments: Any) -> Any:
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)
        return as_deltas(*arguments)

    monkeypatch.setattr(compare, "as_deltas", with_a_warning_of_a_library)
    assert run(monkeypatch, *command, "-o", tmp_path, "--json") == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("Adapter u: ")
    assert "no checksum" in note
    assert "6 of 6 tensors" in note


def test_what_is_there_is_replaced_only_by_force(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [files / "a.safetensors", files / "b.safetensors", "-o", tmp_path]
    for name in ("report.html", "report.png"):
        (tmp_path / name).write_text("old")
        assert run(monkeypatch, *command) == 2
        assert f"{name}: there already; --force" in capsys.readouterr().err
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
        (tmp_path / name).unlink()
    (tmp_path / "report.html").write_text("old")
    assert run(monkeypatch, *command, "--force") == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["{files}/a.safetensors"], "two or more adapters are needed, got 1"),
        (["{files}/a.safetensors", "{files}/a.safetensors"], "given twice"),
        (["{files}/a.safetensors", "{files}/none.safetensors"], "none.safetensors"),
        (["{files}/a.safetensors", "{files}/base.safetensors"], "base.safetensors: unknown format"),
        (["{files}/a.safetensors", "{tmp}/narrow.safetensors"], "layers.0.q.weight: the adapters were made for diff"),
        (["{files}/a.safetensors", "{files}/b.safetensors", "--base", "{tmp}/none"], "none"),
        (["{files}/a.safetensors", "{files}/b.safetensors", "--base", "{tmp}/small"], "no tensor of this name"),
        (["{files}/a.safetensors", "{files}/b.safetensors", "--base", "{tmp}/other.safetensors"], "layers.0.q.weight"),
        (["{files}/a.safetensors", "{files}/b.safetensors", "--base", "{tmp}/empty"], "no safetensors file"),
        (["{files}/a.safetensors", "{files}/b.safetensors", "--bogus"], "--bogus"),
        (["{files}/a.safetensors", "{files}/b.safetensors", "--base", "{tmp}"], "must be apart from"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    files: Path,
    base: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    one = AdapterTensor(torch.tensor([0]), torch.tensor([1.0]), (6, 7), torch.float32, "add")
    Adapter({NAMES[0]: one}).save(tmp_path / "narrow.safetensors")
    save_file({name: weight + 1 for name, weight in base.items()}, tmp_path / "other.safetensors")
    (tmp_path / "small").mkdir()
    save_file({"x": base[NAMES[0]]}, tmp_path / "small/x.safetensors")
    written = [argument.replace("{files}", str(files)).replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert run(monkeypatch, *written, "-o", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("shira: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_adapters_of_one_file_name_are_told_apart(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.safetensors").write_bytes((files / "b.safetensors").read_bytes())
    command = [files / "a.safetensors", tmp_path / "a.safetensors", "-o", tmp_path, "--json"]
    assert run(monkeypatch, *command) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["adapters"]) == [str(files / "a.safetensors"), str(tmp_path / "a.safetensors")]


def test_names_of_any_bytes_and_signs_are_shown(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no UTF-8, what a terminal obeys, and what rich and matplotlib have a meaning for."""
    names = ["[red]a", os.fsdecode(b"n\xff"), "e\x1b[31m", "$\\frac$", "_first"]
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    for path in paths:
        path.write_bytes((files / "a.safetensors").read_bytes())
    output = tmp_path / "o\x1b[31m"
    assert run(monkeypatch, *paths, "--base", files / "base.safetensors", "-o", output) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "\x1b" not in shown.out
    assert "[red]a" in shown.out
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_many_adapters_and_kinds_are_drawn() -> None:
    """More than there are colours and room for names; a tensor without a number; deltas that are all zero."""
    adapters = {}
    for i in range(8):
        tensors = {
            f"{'abcdefgh'[k % 8] * (k // 8 + 1)}.{i % 2}.weight": AdapterTensor(
                torch.tensor([i]), torch.tensor([0.0]), (4, 4), torch.float32, "add"
            )
            for k in range(30)
        }
        adapters[f"adapter-{i}"] = Adapter(tensors)
    found = compare.compare(adapters, None)
    assert len(found.overlaps) == math.comb(8, 2)
    assert picture.picture(found).startswith(b"\x89PNG")
    assert compare.kind_of("a.0.b1.2.w") == "a.*.b1.*.w"


def test_adapters_that_may_have_names_of_different_checkpoints(files: Path) -> None:
    """Without a base nothing tells whether the names mean the same tensors, so 0 % is not all that is said."""
    a = Adapter.load(files / "a.safetensors")
    elsewhere = Adapter({f"model.{name}": tensor for name, tensor in a.items()})
    found = compare.compare({"a": a, "same": a, "elsewhere": elsewhere, "empty": Adapter({})}, None)
    apart = [note for note in found.notes if "no tensor of the same name" in note]
    assert [note.partition(" have ")[0] for note in apart] == ["a and elsewhere", "same and elsewhere"]


def test_adapters_that_change_nothing() -> None:
    found = compare.compare({"a": Adapter({}), "b": Adapter({})}, None)
    assert not found.notes
    assert picture.picture(found).startswith(b"\x89PNG")


def test_a_folder_of_weights(files: Path, base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = TensorFolder(files / "sharded")
    assert sorted(folder) == sorted(base)
    assert len(folder) == len(base)
    assert all(torch.equal(folder[name], base[name]) for name in base)
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    save_file({"y": torch.ones(2)}, tmp_path / "a.safetensors")
    assert sorted(TensorFolder(tmp_path)) == ["x", "y"]
    save_file({"x": torch.ones(3)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"'x' is in b\.safetensors and in c\.safetensors"):
        TensorFolder(tmp_path)
    save_file({"z": torch.ones(3)}, tmp_path / "model.safetensors")
    assert list(TensorFolder(tmp_path)) == ["z"]
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    wrong: list[Any] = ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}']
    for text in wrong:
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: it must be .*JSON"):
            TensorFolder(tmp_path)
    index.write_text('{"weight_map": {"x": "c.safetensors", "q": "c.safetensors"}}')
    assert torch.equal(TensorFolder(tmp_path)["x"], torch.ones(3))
    with pytest.raises(ValueError, match="'q' cannot be read"):
        TensorFolder(tmp_path)["q"]
    (tmp_path / "c.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        TensorFolder(tmp_path)["x"]
