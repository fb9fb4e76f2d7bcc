"""`shira info, diff, apply, fuse, convert`, as at a terminal: what they write, say, refuse, and leave behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import Run
from oracle import bits
from safetensors.torch import load_file, save_file

import shira
from shira import Adapter, AdapterTensor, convert
from shira.cli.console import plainly
from shira.files.checkpoint import TensorFolder
from shira.files.output import check_free

SHAPES = {"layers.0.q.weight": (40, 30), "layers.1.q.weight": (40, 30), "norm.weight": (40,)}
State = dict[str, torch.Tensor]


def make_state(seed: int = 0) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in SHAPES.items()}


def tuned_of(state: State, seed: int = 1) -> State:
    tuned = {name: tensor.clone() for name, tensor in state.items()}
    for name in ("layers.0.q.weight", "layers.1.q.weight"):
        tuned[name].view(-1)[seed * 7 :: 53] += seed
    return tuned


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder: base/, tuned/, other/ of two files each, base.safetensors; adapters a, b, unknown, cut."""
    monkeypatch.chdir(tmp_path)
    base = make_state()
    for folder, state in {"base": base, "tuned": tuned_of(base), "other": make_state(5)}.items():
        Path(folder).mkdir()
        names = list(state)
        parts = {"model-1.safetensors": names[:1], "model-2.safetensors": names[1:]}
        for file, inside in parts.items():
            save_file({name: state[name] for name in inside}, Path(folder) / file, metadata={"format": "pt"})
        index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
        (Path(folder) / "config.json").write_text("{}")
    save_file(base, "base.safetensors")
    for name, seed in (("a", 1), ("b", 2)):
        shira.diff(base, tuned_of(base, seed)).save(name)
    unknown = {n: AdapterTensor(p.indices, p.values, p.shape, p.dtype) for n, p in Adapter.load("a").items()}
    Adapter(unknown).save("unknown")
    convert.write(Adapter.load("a"), "a-patch", "patch")
    Path("text").write_text("hello")
    torch.save(base, "adapter.bin")
    Path("peft").mkdir()
    Path("peft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    Path("peft/adapter_model.bin").write_bytes(b"")
    shutil.copytree("base", "misplaced")
    index = dict.fromkeys(base, "model-1.safetensors")
    Path("misplaced/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    Path("cut").write_bytes(Path("a").read_bytes()[:-9])
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def test_diff_and_apply_at_a_terminal(files: Path) -> None:
    """In processes of their own, where also warnings of libraries would be seen."""

    def shira_in_a_process(line: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-m", "shira.cli", *line.split()], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, error = shira_in_a_process("diff base tuned -o new.safetensors")
    assert (code, error) == (0, "")
    assert out.startswith("new.safetensors: 46 entries in 2 tensors, density 1.917%, kind replace, ")
    assert "layers.1.q.weight" in out  # and the density of each
    code, out, error = shira_in_a_process("apply base new.safetensors -o merged")
    assert (code, out, error) == (0, "merged: 46 entries of 2 tensors written into 2 files\n", "")
    for name, tensor in tuned_of(make_state()).items():
        assert torch.equal(bits(TensorFolder(files / "merged")[name]), bits(tensor))
    assert sorted(os.listdir("merged")) == sorted(os.listdir("base"))


def test_info(files: Path, run: Run) -> None:
    code, out, error = run("info a --base base")
    assert (code, error) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["tensor", "shape", "dtype", "kind", "entries", "density", "base"]
    assert lines[1][:-1] == ["layers.0.q.weight", "40", "x", "30", "bfloat16", "replace", "23", "1.917%"]
    assert "a: format shira, 46 entries in 2 tensors, density 1.917%" in out
    assert "the base base: the one that the adapter was made for" in out
    facts = json.loads(run("info a --json")[1])
    assert (facts["file"], facts["format"], facts["entries"]) == ("a", "shira", 46)
    assert facts["bytes"] == Path("a").stat().st_size
    assert facts["tensors"]["layers.1.q.weight"]["shape"] == [40, 30]
    assert facts["tensors"]["layers.1.q.weight"]["checksum"] == Adapter.load("a")["layers.1.q.weight"].checksum
    for line, fits, words in (
        ("a --base base", True, "the one that"),
        ("a --base other", False, "another base: 2 of 2 tensors"),
        ("unknown --base base", None, "shapes and types fit, checksums are not known"),
    ):
        facts = json.loads(run(f"info {line} --json")[1])
        assert facts["fits"] is fits
        assert facts["base"].startswith(words)
    assert "fits" not in json.loads(run("info a --json")[1])
    assert "checksums are not known" in run("info unknown --base base")[1]
    assert "no checksum of the base in 2 of 2 tensors" in run("info unknown")[1]
    save_file({"layers.0.q.weight": torch.zeros(2, 2)}, "small")
    assert "another model: layers.0.q.weight: the adapter's shape" in run("info a --base small")[1]
    save_file({"x": torch.zeros(2, 2)}, "lacking")
    assert "another model: it has no tensor layers.0.q.weight" in run("info a --base lacking")[1]
    assert not any(json.loads(run(f"info a --base {base} --json")[1])["fits"] for base in ("small", "lacking"))


def test_info_of_other_formats(files: Path, run: Run) -> None:
    convert.write(Adapter.load("a"), "patch", "patch")
    out = run("info patch")[1]
    assert "patch: format patch, 4 arrays" in out
    assert "layers.0.q.weight.indices" in out
    facts = json.loads(run("info patch --json")[1])
    assert facts["arrays"]["layers.0.q.weight.values"] == {"shape": [23], "dtype": "bfloat16"}
    facts = json.loads(run("info patch --base base --json")[1])
    assert (facts["format"], facts["entries"]) == ("patch", 46)


def test_diff(files: Path, run: Run) -> None:
    code, out, error = run("diff base.safetensors tuned -o new --json")
    assert (code, error) == (0, "")
    facts = json.loads(out)
    assert (facts["output"], facts["entries"]) == ("new", 46)
    assert facts["provenance"] == {"diff": {"base": "base.safetensors", "tuned": "tuned"}}
    assert Adapter.load("new").nnz == 46
    code, out, _ = run("diff base tuned -o new --top 0.01 --force")
    assert code == 0
    assert "24 entries in 2 tensors" in out
    assert "52.3% of the energy" in out
    save_file({"norm.weight": make_state()["norm.weight"] + 1}, "dense")
    code, _, error = run("diff base dense -o dense-diff --common")
    assert code == 0
    assert error == (
        "shira: warning: not sparse: more than 10% of the entries changed in norm.weight (100.0%); "
        "--top keeps only the largest changes\n"
    )


def test_apply(files: Path, run: Run) -> None:
    code, out, error = run("apply base.safetensors a b -w 0.7 -w -0.5 -o mix --json")
    assert (code, error) == (0, "")
    facts = json.loads(out)
    assert facts["adapters"] == [{"file": "a", "weight": 0.7}, {"file": "b", "weight": -0.5}]
    shira.merge_checkpoint("base.safetensors", [("a", 0.7), ("b", -0.5)], "expected")
    assert Path("mix").read_bytes() == Path("expected").read_bytes()
    code, _, error = run("apply base.safetensors unknown -o from-unknown")
    assert code == 0
    assert error == ("shira: warning: unknown: no checksum in 2 of 2 tensors, so it may be of another base\n")
    assert run("apply base.safetensors a-patch -o from-patch")[0] == 0
    assert Path("from-patch").read_bytes() == Path("from-unknown").read_bytes()
    assert run("apply other a -o forced --any-base")[0] == 0


def test_fuse(files: Path, run: Run) -> None:
    code, out, error = run("fuse a b -w 0.7 -w 0.3 --base base -o mix --policy mean --json")
    assert (code, error) == (0, "")
    facts = json.loads(out)
    assert [entry["weight"] for entry in facts["provenance"]["adapters"]] == [0.7, 0.3]
    assert [entry["name"] for entry in facts["provenance"]["adapters"]] == ["a", "b"]
    expected = shira.fuse([("a", 0.7), ("b", 0.3)], "mean", "base")
    for name, part in Adapter.load("mix").items():
        assert torch.equal(part.values, expected[name].values)
    code, _, error = run("fuse unknown unknown --base base -o twice")
    assert code == 0
    assert error.count("\n") == 1
    assert "no checksum, so the adapter may belong to another base (and " in error


def test_convert(files: Path, run: Run) -> None:
    code, out, error = run("convert a --to patch -o patch --json")
    assert (code, error) == (0, "")
    assert {key: json.loads(out)[key] for key in ("from", "to", "entries")} == {
        "from": "shira",
        "to": "patch",
        "entries": 46,
    }
    assert load_file("patch")["layers.0.q.weight.indices"].dtype == torch.int32
    code, out, error = run("convert patch --base base -o again")
    assert (code, error) == (0, "")
    assert "it has no checksum of its base" in out
    code, out, _ = run("convert patch --base base --trust-base -o trusted")
    assert "no checksum" not in out
    for name, part in Adapter.load("trusted").items():
        assert part.checksum == Adapter.load("a")[name].checksum
    code, out, error = run("convert a --base base --to peft-shira -o a-peft")
    assert (code, error) == (0, "")
    assert sorted(os.listdir("a-peft")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert run("convert a --base base --to peft-shira -o a-peft --force")[0] == 0
    assert convert.read("a-peft", "base").nnz == 2 * 70  # r (rows + columns), r = 1


def test_types_that_can_only_be_replaced(files: Path, run: Run) -> None:
    base = {**make_state(), "codes": torch.zeros(6, 50, dtype=torch.uint8), "count": torch.tensor(3)}
    base["eight"] = torch.zeros(6, 50).to(torch.float8_e4m3fn)
    tuned = {**tuned_of(base), "count": torch.tensor(9)}
    for name in ("codes", "eight"):
        tuned[name].view(torch.uint8)[2, ::9] = 0xFF  # of float8 a NaN
    tuned["layers.0.q.weight"] = base["layers.0.q.weight"]
    save_file(base, "any")
    save_file(tuned, "any-tuned")
    code, out, error = run("diff any any-tuned -o new")
    assert (code, error) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in run("info new --base any")[1].splitlines() if line}
    assert rows["codes"][3:6] == ["uint8", "replace", "6"]
    assert rows["eight"][3:6] == ["float8_e4m3fn", "replace", "6"]
    assert rows["count"][:4] == ["()", "int64", "replace", "1"]
    assert rows["the"] == ["base", "any:", "the", "one", "that", "the", "adapter", "was", "made", "for"]
    assert json.loads(run("info new --json")[1])["tensors"]["eight"]["dtype"] == "float8_e4m3fn"
    assert run("convert new --to patch -o new-patch")[0] == 0
    assert run("convert new-patch --base any --trust-base -o again")[0] == 0
    assert run("fuse again --base any -o fused")[0] == 0
    for name, adapter in (("merged", "new"), ("from-patch", "new-patch"), ("from-again", "again")):
        assert run(f"apply any {adapter} -o {name}")[0] == 0
        found = load_file(name)
        assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in tuned.items())
    found = load_file("from-fused") if run("apply any fused -o from-fused")[0] == 0 else {}
    assert all(torch.equal(bits(found[name]), bits(tuned[name])) for name in ("codes", "count", "eight"))
    before = sorted(os.listdir())
    for line, message in (
        ("apply any new -w 0.5 -o bad", "new changes 'codes', which is torch.uint8: its entries can be replaced at"),
        ("apply any new again -o bad", "new and again both change 'codes', which is torch.uint8"),
        ("fuse new again --base any -o bad", "new and again both change 'codes', which is torch.uint8"),
        ("fuse new -w 2 --base any -o bad", "new changes 'codes', which is torch.uint8"),
        ("convert new --base any --to peft-shira -o bad", "PEFT's SHiRA has weights of linear layers only"),
        ("bench new --base any", "new: codes is torch.uint8, to which LoRA cannot be added"),
        ("report new again --base any -o bad", "codes: it is torch.uint8, whose entries can be replaced"),
    ):
        code, out, error = run(line)
        assert (code, out) == (2, "")
        assert error.count("\n") == 1
        assert message in error
        assert sorted(os.listdir()) == before


def test_an_adapter_that_changes_nothing(files: Path, run: Run) -> None:
    for line in (
        "diff base base -o none",
        "convert none --to patch -o none-patch",
        "convert none-patch --base base -o none-again",
        "info none",
        "info none --json",
        "info none --base base",
        "info none-patch",
        "info none-patch --base base",
        "fuse none none-patch --base base -o none-fused",
        "apply base.safetensors none none-patch none-fused -o same",
    ):
        code, _, error = run(line)
        assert (code, error) == (0, ""), line
    assert Path("same").read_bytes() == Path("base.safetensors").read_bytes()
    assert Path("none").read_bytes() != Path("none-again").read_bytes()  # whose provenance is another
    code, _, error = run("convert none --to peft-shira --base base -o none-peft")
    assert (code, error.count("\n")) == (2, 1)


def test_tensors_of_other_types(files: Path, run: Run) -> None:
    """They may be there, if torch knows them, and must not differ."""

    def raw(path: str, dtype: str, shape: list[int], data: bytes) -> None:
        entries = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
        header = json.dumps(entries).encode()
        Path(path).write_bytes(len(header).to_bytes(8, "little") + header + data)

    for dtype, shape, message in (
        ("C64", [1], "a: it changed and is torch.complex64, which no adapter can hold"),
        ("F4", [16], "a: it changed and is torch.float4_e2m1fn_x2, which no adapter can hold"),
        ("F6_E2M3", [32], "'a' cannot be read: Dtype not understood: F6_E2M3"),
        ("X9", [8], "x: not a whole safetensors file"),
    ):
        size = 24 if dtype == "F6_E2M3" else 8
        raw("x", dtype, shape, bytes(size))
        raw("y", dtype, shape, bytes(size - 1) + b"\x01")
        code, out, error = run("diff x y -o new --force")
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert message in error
        assert not Path("new").exists()
        if dtype in ("C64", "F4"):
            assert run("diff x x -o same --force")[0] == 0


BAD = {
    "diff base tuned -o a": "a: there already; --force replaces it",
    "diff base tuned -o none/new": "none/new: there is no folder none",
    "diff base tuned -o peft --force": "peft: it must be a file, and there is a folder",
    "diff base tuned -o base/new": "base/new: the output must be apart from base, which is read",
    "diff base.safetensors tuned -o base.safetensors --force": "must be apart from base.safetensors, which is read",
    "diff base none -o new": "none: No such file or directory",
    "diff base cut -o new": "cut: not a whole safetensors file",
    "diff base adapter.bin -o new": "adapter.bin: not a whole safetensors file",
    "diff base peft -o new": "peft: the folder has no safetensors file",
    "diff base a -o new": "and 2 more; compare those that both have with --common",
    "diff base tuned -o new --top 2": "top must be a share of each tensor's entries, above 0 and up to 1, got 2.0",
    "diff base tuned -o new --top x": "Invalid value for '--top'",
    "diff base tuned": "Missing option '--output'",
    "diff base": "Missing argument 'TUNED'",
    "info": "Missing argument 'FILE'",
    "info none": "none: No such file or directory",
    "info cut": "cut: not a whole safetensors file",
    "info base.safetensors": "base.safetensors: no known adapter: neither a shira file nor a patch",
    "info base": "base: a folder without adapter_config.json holds no adapter",
    "info adapter.bin": "adapter.bin: this looks like a pickle of torch.save, which is never read: use safetensors",
    "info peft": "peft: there is no adapter_model.safetensors; adapter_model.bin is a pickle, which is never read",
    "info a --base none": "none: No such file or directory",
    "apply base a -o tuned": "tuned: there already; --force replaces it",
    "apply base a -o peft --force": "peft: not replaced, because it holds adapter_config.json, which",
    "apply base a -o . --force": "must be apart from base, which is read",
    "apply base.safetensors a-patch -o a-patch --force": "a-patch: the output must be apart from a-patch",
    "apply misplaced a -o new": "model-1.safetensors: it has no tensor 'layers.1.q.weight', which the index says",
    "apply base a -o base.safetensors --force": "the base is a folder, so the output must be one, and there is a file",
    "apply base.safetensors a -o tuned --force": "the base is a file, so the output must be one, and there is a folder",
    "apply other a -o new": "shira: a: layers.0.q.weight: the adapter belongs to another base",
    "apply base a b -w 1 -o new": "give --weight once for each adapter or not at all: 2 adapters, 1 weights",
    "apply base a -w nan -o new": "shira: a: the strength must be a finite float32 number, got nan",
    "apply base none -o new": "none: No such file or directory",
    "apply none a -o new": "none: No such file or directory",
    "apply base adapter.bin -o new": "looks like a pickle",
    "fuse a -o new": "shira: a: layers.0.q.weight: a part of kind 'replace' becomes a delta by subtracting the base",
    "fuse a --base base --policy best -o new": "policy must be one of sum, mean, last, ties, got 'best'",
    "fuse a --base other -o new": "shira: a: layers.0.q.weight: the adapter belongs to another base",
    "fuse a -o a --force": "a: the output must be apart from a, which is read",
    "convert a --to lora -o new": "--to must be one of shira, peft-shira, patch, got 'lora'",
    "convert peft --base base -o new": "adapter_model.bin is a pickle, which is never read",
    "convert a --top 0.1 -o new": "a: --top is for adapters that are merged, and this one is sparse already (shira)",
    "convert a --to peft-shira -o new": "give --base",
    "convert a-patch -o new": "the format patch does not tell the shapes and types of the weights: give --base",
    "info a --base text": "text: not a whole safetensors file",
    "convert a --to peft-shira --base other -o new": "the adapter belongs to another base",
    "convert a --to peft-shira --base base -o tuned --force": "tuned: not replaced, because it holds config.json",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(files: Path, run: Run, line: str) -> None:
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    code, out, error = run(line)
    assert (code, out) == (2, "")
    assert error.startswith("shira: ")
    assert error.count("\n") == 1
    assert BAD[line] in error
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["info", "diff", "apply", "fuse", "convert"])
def test_help_has_examples(run: Run, command: str) -> None:
    code, out, _ = run(f"{command} --help")
    assert code == 0
    assert f"Example: shira {command} " in out


INTERRUPTED = [
    "diff base tuned -o a --force",
    "apply base a -o merged --force",
    "fuse a b --base base -o mix",
    "convert a --to patch -o patch",
    "convert a --base base --to peft-shira -o new-peft",
]


@pytest.mark.parametrize("line", INTERRUPTED)
def test_an_interrupt_while_writing_leaves_what_was_there(
    files: Path, run: Run, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("base", "merged")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}

    def interrupt(*_: object) -> None:
        assert len(list(files.rglob("*"))) > len(before)  # something has been written
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        assert run(line) == (130, "", "")
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    assert not list(files.glob(".*"))


# Stops where a write has begun, says so, and waits for the signal; SIGHUP may come ignored, from nohup.
PAUSED = """
import os, signal, sys, time
from shira import cli
def pause(*args):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = pause
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.argv = ["shira", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_command_is_ended_from_outside(files: Path, number: int, expected: int) -> None:
    """As by Ctrl-C, kill, a terminal that is closed, and kill -9, after which the next run removes what is left."""
    shutil.copytree("base", "merged")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", PAUSED, *INTERRUPTED[1].split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (expected, b"", b"")
    assert bool(list(files.glob(".*"))) == (number == signal.SIGKILL)
    check_free(Path("merged"), True)
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


FULL = {
    "diff base tuned -o new --force": "new: File too large",
    "apply base a -o merged --force": "shira: merged/model-1.safetensors: File too large",
    "fuse a b --base base -o new --force": "new: File too large",
    "convert a --to patch -o new --force": "new: Error while serializing: I/O error: File too large",
    "convert a --base base --to peft-shira -o peft-new --force": "peft-new: Error while serializing: I/O error: File",
}


@pytest.mark.parametrize("line", FULL)
def test_a_full_disk_leaves_what_was_there(files: Path, run: Run, line: str) -> None:
    """A limit on the size of files is the disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    shutil.copytree("base", "merged")
    Path("new").write_text("old")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        code, out, error = run(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out) == (2, "")
    assert error.startswith("shira: ")
    assert error.count("\n") == 1
    assert FULL[line] in error
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    assert not list(files.glob(".*"))


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{dir}/tmp1234")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("shira.diff", lambda *_, **__: pytest.fail("the work was begun"))
    assert run("diff base tuned -o tuned/new") == (2, "", "shira: tuned: Permission denied\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("{shira} diff base tuned -o new 2>&1 | true", (1, "")),
        ("{shira} info a --json | true", (1, "")),
        ("{shira} info a > /dev/full", (2, "shira: No space left on device\n")),
        ("{shira} info a >&-", (0, "")),
    ],
)
def test_output_that_nobody_reads(files: Path, command: str, expected: tuple[int, str], unbuffered: str) -> None:
    """A pipe that is closed, a full disk, and no standard output at all: no traceback, and the work is done."""
    bash = shutil.which("bash")
    if bash is None or not Path("/dev/full").exists():
        pytest.skip("this needs bash and /dev/full")
    line = command.format(shira=f"{sys.executable} -m shira.cli") + "; exit ${PIPESTATUS[0]}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([bash, "-c", line], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == expected
    assert Path("new").exists() == ("-o new" in command)


def test_names_of_any_bytes_are_shown(files: Path, run: Run) -> None:
    name = os.fsdecode(b"n\xff\x1b[31m")
    code, out, error = run(f"fuse a --base base -o {name}")
    assert (code, error) == (0, "")
    assert out.startswith("n\\udcff\\x1b[31m: 46 entries in 2 tensors")
    assert json.loads(run(f"fuse a --base base -o {name} --force --json")[1])["output"] == name
    assert run(f"apply base {name}x -o new") == (2, "", "shira: n\\udcff\\x1b[31mx: No such file or directory\n")


def test_a_narrow_terminal_folds_names_only(files: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich then it is a terminal
    monkeypatch.setenv("COLUMNS", "40")
    name = "a.name.of.many.parts." * 3 + "weight"
    Adapter({name: Adapter.load("a")["layers.0.q.weight"]}).save("long")
    lines = run("info long")[1].splitlines()
    assert lines[1].split()[1:-1] == ["40", "x", "30", "bfloat16", "replace", "23", "1.917%"]
    folded = lines[1:-1][: len(name) // 20 + 1]
    assert "".join(line.split()[0] for line in folded) == name


def test_warnings_are_counted_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def kept() -> int:
        return sum(type(thing) is shira.ShiraWarning for thing in gc.get_objects())

    before = kept()
    with plainly():
        for i in range(5):
            warnings.warn_explicit(f"tensor {i}: odd", shira.ShiraWarning, shira.__file__, 1)
            warnings.warn_explicit(f"{i}: of a library", UserWarning, "library.py", 1)
        assert kept() == before
    assert capsys.readouterr().err == "shira: warning: tensor 0: odd (and 4 more)\n"


def test_names_in_files_do_not_reach_the_terminal_as_they_are(files: Path, run: Run) -> None:
    name = "\x1b[31mevil\nx"
    save_file({f"{name}.indices": torch.tensor([0], dtype=torch.int32), f"{name}.values": torch.ones(1)}, "evil")
    for command in ("info evil", "convert evil --base base -o made"):
        _, out, error = run(command)
        assert "\x1b[31mevil" not in out + error
    assert "evil" in run("info evil")[1]
