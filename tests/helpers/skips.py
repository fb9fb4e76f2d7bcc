"""One line at the end of a run says why tests were skipped. `pytest -rs` lists them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

NEEDS_GPU = re.compile(r"\b(no|needs a) GPU\b")
LACKS_ISA = re.compile(r"this processor does not run (\w+)")


def counted(reasons: Iterable[str]) -> str:
    """How many tests need a GPU, how many an instruction set that is not here, and how many each other reason keeps
    from running; empty where none was skipped."""
    gpu, sets, others = 0, Counter[str](), Counter[str]()
    for reason in reasons:
        if NEEDS_GPU.search(reason):
            gpu += 1
        elif lacking := LACKS_ISA.search(reason):
            sets[lacking[1]] += 1
        else:
            others[reason] += 1
    parts = [f"{gpu} need a GPU"] if gpu else []
    if sets:
        parts.append(f"{sets.total()} an instruction set that this processor lacks ({', '.join(sorted(sets))})")
    parts += [f"{count}: {reason}" for reason, count in sorted(others.items())]
    return "skipped: " + "; ".join(parts) if parts else ""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = []
    for report in terminalreporter.stats.get("skipped", []):
        # A skip that pytest recorded is (file, line, reason); an xfail that is reported as skipped is a text.
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.append(text.removeprefix("Skipped: "))
    if line := counted(reasons):
        terminalreporter.write_line(line)
