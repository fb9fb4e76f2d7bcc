"""Code in a Python process of its own, which finds this tree's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code; environment: variables set for it. Those of SHIRA_ and TRITON_ are not inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SHIRA_", "TRITON_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
