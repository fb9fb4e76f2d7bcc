from __future__ import annotations

import re
from pathlib import Path

import pytest

from shira_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0])
def test_code_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_code_is_there() -> None:
    assert len(BLOCKS) == 2


def test_every_op_is_in_the_table() -> None:
    for op in OPS:
        assert f"| `{op}` |" in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "csrc/README.md", "bench/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target
