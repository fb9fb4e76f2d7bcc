"""Checks and measures the GPU kernels within minutes: `python tools/gpu_check.py --out DIR`, or `make gpu-check`.

Phases run one after the other, as processes of their own, each group ended at its limit; what was measured by then is
on disk, and is printed last. Exit code 1 only for a wrong result or a dead worker; a phase that its limit cuts says so,
and is not an error. After SIGTERM or SIGINT the exit code is 128 + the signal's number. docs/gpu.md says more.

  --rehearse   every phase without a GPU: the interpreter or the reference instead of it, tiny sizes
  --carry      builds the C++ extension for a machine with a GPU, checks what it holds, and ends
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import gpu_driver
import gpu_phases


def chosen_phases(text: str) -> set[int]:
    """The numbers of "0-5", "0,2,4" or "6"."""
    if not re.fullmatch(r"[0-6](-[0-6])?(,[0-6](-[0-6])?)*", text):
        raise argparse.ArgumentTypeError(f"must be phases from 0 to 6 such as 0-5 or 0,2,4, got {text!r}")
    parts = [part.partition("-") for part in text.split(",")]
    return {number for first, _, last in parts for number in range(int(first), int(last or first) + 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=gpu_driver.ROOT / "bench-results/gpu", metavar="DIR", help="at most 8 files"
    )
    parser.add_argument("--phases", type=chosen_phases, default="0-6", help="such as 0-5 or 0,2,4 (default: 0-6)")
    parser.add_argument(
        "--deadline", type=float, default=gpu_driver.DEADLINE, metavar="SECONDS", help="for all phases (default: 540)"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--carry", action="store_true", help="build what a machine with a GPU can be given, and end")
    parser.add_argument("--python", default=sys.executable, help="with --carry: the Python to build for")
    options = parser.parse_args()
    if options.carry:
        return gpu_phases.carry(options.python)
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch; run this with a Python that has it, or make gpu-check PYTHON=...")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        setup = gpu_driver.Setup(options.out.resolve(), options.rehearse, options.deadline, scratch=Path(scratch))
        phases = [phase for phase in gpu_phases.phases(setup) if phase.number in options.phases]
        return gpu_driver.run(phases, setup)


if __name__ == "__main__":
    sys.exit(main())
