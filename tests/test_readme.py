"""README and the pages: code runs as it is printed, links lead somewhere, tests that are named are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc/README.md", ROOT / "bench/README.md"]
)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Runs a page's blocks from top to bottom, without a network."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def test_readme_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert len(blocks("README.md")) == 3
    run("README.md", tmp_path, monkeypatch)
    assert "SHiRA trains one weight of a hundred" in capsys.readouterr().out, "what the block's comment says"
    kilobytes = int(re.search(r"each linear layer: (\d+) kB", README)[1])
    assert round((tmp_path / "motto.safetensors").stat().st_size / 1000) == kilobytes


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/masks.md"])
def test_code_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert blocks(page)
    run(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            assert ((ROOT / page).parent / target).exists(), target


def test_tests_that_readme_names_are_there() -> None:
    table = README.split("## What it works with", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 10
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(name for name in named if f"def {name}(" not in written) == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 125
