"""Checks of the repository that no linter makes: `python tools/check_repository.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPS = sorted(path.stem for path in (ROOT / "shira_kernels/ops").glob("[a-z]*.py"))
HOST_OPS = ("decode_indices", "encode_indices")  # for files: they have no kernels for GPUs


def problems() -> list[str]:
    found = []
    for op in OPS:
        # An op that is composed of another runs that one's kernels, and has none of its own.
        composed = "\nCOMPOSED_OF = " in (ROOT / f"shira_kernels/ops/{op}.py").read_text()
        for path in (f"shira_kernels/reference/{op}.py", f"shira_kernels/triton/{op}.py", f"csrc/cpu/{op}.cpp"):
            has_none = composed or (op in HOST_OPS and "triton" in path)
            if (ROOT / path).is_file() == has_none:
                found.append(f"op {op} has {path}, but needs none" if has_none else f"op {op} has no {path}")
        if not (ROOT / f"tests/ops/test_{op}.py").is_file():
            found.append(f"op {op} has no tests/ops/test_{op}.py")
    for folder, suffix in (("reference", ".py"), ("triton", ".py")):
        for path in (ROOT / "shira_kernels" / folder).glob(f"[a-z]*{suffix}"):
            if path.stem not in OPS:
                found.append(f"{path.relative_to(ROOT)} belongs to no op")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "shira_kernels/__init__.py").read_text())
    if version is None or f"## {version[1].split('.dev')[0]}" not in changelog:
        found.append("CHANGELOG.md has no heading for the version in shira_kernels/__init__.py")
    documented = (ROOT / "docs/environment.md").read_text()
    sources = [*(ROOT / "shira_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py"), ROOT / "setup.py"]
    for path in sources:
        for name in set(re.findall(r'"(SHIRA_[A-Z_]+)"', path.read_text())):
            if name not in documented and name != "SHIRA_CUDA_ARCHITECTURES":
                found.append(f"{name} in {path.relative_to(ROOT)} is not in docs/environment.md")
    return found


if __name__ == "__main__":
    for problem in problems():
        print(problem, file=sys.stderr)
    sys.exit(bool(problems()))
