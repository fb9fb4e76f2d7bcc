"""Runs code that uses `tools/pretended_gpu.py` in a process of its own, where Triton does not interpret its kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SHIRA_", "TRITON_INT"))}
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), *(str(ROOT / folder) for folder in ("", "python", "tools"))]
    return {**inherited, "PYTHONPATH": os.pathsep.join(path), "SHIRA_GPU_BACKEND": "triton"}


def result_of(code: str) -> Any:
    """What the code prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
