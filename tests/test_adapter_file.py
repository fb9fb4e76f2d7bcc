"""Adapter and its file: what is refused, bit-exact round trips, atomic writes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shira
from shira.adapter import checksum_of

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
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
    assert list(a) == list(b) or set(a) == set(b)
    assert a.config == b.config
    for name in a:
        assert same_bits(a[name].values, b[name].values)
        assert torch.equal(a[name].indices, b[name].indices)
        assert a[name].indices.dtype == b[name].indices.dtype
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
        ({"dtype": torch.int32}, "dtype"),
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
    assert checksum_of(entries) == "fd7c1d233f09a934e4f3b9d1b41f3deb"
    assert checksum_of(entries) != checksum_of(entries.abs())
    assert checksum_of(entries) != checksum_of(entries.flip(0))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert len(checksum_of(entries.to(dtype))) == 32
    assert checksum_of(torch.empty(0)) == checksum_of(torch.empty(0, dtype=torch.bfloat16))


bits = st.integers(-(2**63), 2**63 - 1)


@given(
    st.lists(bits, max_size=20),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from(["replace", "add"]),
    st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable()),
    st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_round_trip_of_any_bits(
    numbers: list[int], dtype: torch.dtype, index_dtype: torch.dtype, kind: str, name: str, with_config: bool
) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    values = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8).view(-1, 8)[:, :size]
    values = values.contiguous().view(-1).view(dtype)
    indices = torch.arange(len(numbers), dtype=index_dtype) * 3
    config = shira.ShiraConfig(["x"], mask="rand", seed=4) if with_config else None
    part = shira.AdapterTensor(indices, values, (4, 5, 3), dtype, kind, CHECKSUM if with_config else None)
    adapter = shira.Adapter({name: part, "other.weight": part}, config)
    path = FOLDER / "round.safetensors"
    adapter.save(path)
    assert_same(adapter, shira.Adapter.load(path))


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
        assert Path(source).parent == Path(target).parent
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
        with pytest.raises(shira.AdapterFormatError, match="cut") as raised:
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


def description() -> dict[str, Any]:
    fields = {"shape": [2, 3], "dtype": "float32", "kind": "replace", "checksum": CHECKSUM}
    return {"config": {"target_modules": "all-linear"}, "tensors": {"a": fields}}


def write(path: Path, text: str | None, *, form: str | None = "shira/0", **arrays: torch.Tensor) -> None:
    tensors = {"a.indices": torch.tensor([1, 4, 5]), "a.values": torch.ones(3)}
    metadata = {key: value for key, value in (("format", form), ("adapter", text)) if value is not None}
    safetensors.torch.save_file({**tensors, **arrays}, path, metadata)


def change(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(whole: dict[str, Any]) -> None:
        for key in keys[:-1]:
            whole = whole[key]
        whole[keys[-1]] = value

    return apply


LIES = [
    (change("config", value=[]), "config"),
    (change("config", value={}), "target_modules is missing"),
    (change("config", "density", value="x"), "density"),
    (change("config", "surprise", value=1), "surprise"),
    (change("tensors", value=[]), "tensors"),
    (change("tensors", value={}), "a.indices' is not described"),
    (change("tensors", "b", value={}), "b.indices' is missing"),
    (change("tensors", "a", value=None), "description"),
    (change("tensors", "a", "extra", value=1), "description"),
    (change("tensors", "a", "shape", value=None), "shape"),
    (change("tensors", "a", "shape", value=[2, "3"]), "shape"),
    (change("tensors", "a", "shape", value=[2, 2]), "indices"),
    (change("tensors", "a", "shape", value=[2, -3]), "shape"),
    (change("tensors", "a", "dtype", value="bfloat16"), "values"),
    (change("tensors", "a", "dtype", value="load"), "dtype"),
    (change("tensors", "a", "dtype", value=["float32"]), "dtype"),
    (change("tensors", "a", "kind", value={}), "kind"),
    (change("tensors", "a", "checksum", value="0"), "checksum"),
    (change("more", value=1), "config"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_metadata_that_lies_is_refused(tmp_path: Path, lie: Callable[[dict[str, Any]], None], message: str) -> None:
    path = tmp_path / "file"
    whole = description()
    write(path, json.dumps(whole))
    assert shira.Adapter.load(path).nnz == 3
    lie(whole)
    write(path, json.dumps(whole))
    with pytest.raises(shira.AdapterFormatError, match=message) as raised:
        shira.Adapter.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '{"config": null}', "[" * 100_000])
def test_metadata_that_is_no_description_is_refused(tmp_path: Path, text: str | None) -> None:
    write(tmp_path / "file", text)
    with pytest.raises(shira.AdapterFormatError, match="adapter"):
        shira.Adapter.load(tmp_path / "file")


@pytest.mark.parametrize("form", [None, "", "shira/1", "pt"])
def test_another_format_is_refused(tmp_path: Path, form: str | None) -> None:
    write(tmp_path / "file", json.dumps(description()), form=form)
    with pytest.raises(shira.AdapterFormatError, match="unknown format"):
        shira.Adapter.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.indices": torch.tensor([5, 4, 1])}, "sorted"),
        ({"a.indices": torch.tensor([1, 4, 6])}, r"\[0, 6\)"),
        ({"a.indices": torch.tensor([1, 4])}, "one per index"),
        ({"a.indices": torch.ones(3)}, "int32 or int64"),
        ({"a.values": torch.ones(3, dtype=torch.float64)}, "values"),
        ({"b.values": torch.ones(3)}, "not described"),
    ],
)
def test_tensors_that_are_wrong_are_refused(tmp_path: Path, arrays: dict[str, torch.Tensor], message: str) -> None:
    write(tmp_path / "file", json.dumps(description()), **arrays)
    with pytest.raises(shira.AdapterFormatError, match=message):
        shira.Adapter.load(tmp_path / "file")
