"""The demonstration's text: where it comes from, how it is cut, how it is scored."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shira.cli.demo import base, corpus


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty documents of three paragraphs; one paragraph is the same in all."""
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(f"# a licence\n\nnumber = {i}\n\n\nlast_{i} = 0\n")
    monkeypatch.setattr(corpus, "_installed_files", lambda: sorted(tmp_path.iterdir()))
    return tmp_path


def text(data: torch.Tensor) -> str:
    return bytes(data.tolist()).decode()


def test_split(files: Path) -> None:
    split = corpus.load("python", train_bytes=10_000, heldout_bytes=10_000)
    train, heldout = text(split.train), text(split.heldout)
    assert train.count("\0") + heldout.count("\0") == 40
    assert 0 < heldout.count("\0") < 15
    assert train.count("# a licence") == 1
    assert "# a licence" not in heldout
    for i in range(40):
        assert (f"number = {i}\n" in train) != (f"number = {i}\n" in heldout)


def test_the_split_depends_on_names_only(files: Path) -> None:
    before = corpus.load("python", train_bytes=10_000, heldout_bytes=10_000)
    (files / "40.py").write_text("more = 1\n")
    (files / "unread.txt").write_text("not Python")
    (files / "bytes.py").write_bytes(b"\xff\xfe")
    after = corpus.load("python", train_bytes=10_000, heldout_bytes=10_000)
    assert set(text(before.heldout).split("\0")) <= set(text(after.heldout).split("\0"))


def test_limits_and_errors(files: Path) -> None:
    split = corpus.load("python", train_bytes=50, heldout_bytes=0)
    assert split.train.dtype == torch.uint8
    assert (len(split.train), len(split.heldout)) == (50, 0)
    with pytest.raises(ValueError, match="domain must be one of python, cpp, prose"):
        corpus.load("latin", train_bytes=1, heldout_bytes=1)
    for path in files.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no text of domain 'python'"):
        corpus.load("python", train_bytes=1, heldout_bytes=1)


@pytest.mark.parametrize("domain", ["cpp", "prose"])
def test_installed_packages_hold_text(domain: str) -> None:
    split = corpus.load(domain, train_bytes=20_000, heldout_bytes=5_000)
    assert (len(split.train), len(split.heldout)) == (20_000, 5_000)
    assert torch.equal(split.train, corpus.load(domain, train_bytes=20_000, heldout_bytes=0).train)


def test_windows() -> None:
    data = torch.arange(600).to(torch.uint8)
    rows = base.windows(data)
    assert rows.shape == (2, base.CONTEXT)
    assert rows[1, 0] == data[base.CONTEXT]
    drawn = base.random_windows(data, 50, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, base.CONTEXT)
    assert ((drawn[:, 1:] - drawn[:, :-1]) % 256 == 1).all()
    assert len(drawn[:, 0].unique()) > 10


def test_bits_per_byte_of_a_model_that_knows_nothing_is_eight() -> None:
    def uniform(input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 256)
        return SimpleNamespace(
            loss=torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )

    data = torch.randint(0, 256, (5 * base.CONTEXT + 3,), dtype=torch.uint8)
    assert math.isclose(base.bits_per_byte(uniform, data, batch=2), 8.0, rel_tol=1e-6)
    with pytest.raises(ValueError, match="at least 256 bytes"):
        base.bits_per_byte(uniform, data[:255])
