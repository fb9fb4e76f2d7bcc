"""`python -m shira_kernels`: which kernel each op runs here, and why others do not. `--json` for scripts."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Any

import torch

import shira_kernels
from shira_kernels import backends
from shira_kernels.ops import OPS


def facts() -> dict[str, Any]:
    """Versions, the machine, the build, and for each op and backend "active", "available" or the reason against it."""
    gpu = torch.cuda.is_available()
    devices = ["cpu", *(["cuda"] if gpu else [])]
    extension = backends.extension
    return {
        "shira-kernels": shira_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "threads": torch.get_num_threads(),
        "isa": extension.isa() if extension else None,
        "runnable isas": extension.runnable_isas() if extension else [],
        "build": extension.build_facts() if extension else f"no C++ extension: {backends.extension_reason}",
        "warning": backends.extension_warning or None,
        "active": {op: {device: backends.active(op, device) for device in devices} for op in OPS},
        "kernels": {op: {backend: _state(op, backend, devices) for backend in backends.BACKENDS} for op in OPS},
    }


def _state(op: str, backend: str, devices: list[str]) -> str:
    active_on = [device for device in devices if backends.active(op, device).split("/")[0] == backend]
    if active_on:
        return f"active on {' and '.join(active_on)}"
    return backends.reason_unavailable(op, backend) or "available"


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shira_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    known = facts()
    if parser.parse_args().json:
        print(json.dumps(known, indent=2))
        return 0
    for name in ("shira-kernels", "python", "torch", "triton", "gpu", "threads"):
        print(f"{name:14} {known[name] if known[name] is not None else 'none'}")
    print(f"{'isa':14} {known['isa'] or 'none'}  (this processor runs: {', '.join(known['runnable isas']) or 'none'})")
    build = known["build"]
    print(f"{'build':14} {build if isinstance(build, str) else ', '.join(f'{k} {v}' for k, v in build.items())}\n")
    rows = [(op, backend, state) for op, states in known["kernels"].items() for backend, state in states.items()]
    print(table([("op", "backend", "state"), *rows]))
    if known["warning"]:
        print(f"\n{known['warning']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
