"""What the machine is: its CPU's name, caches, and the CPUs that this process may use."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch


def available_threads() -> int:
    """CPUs that this process may use, or as many as OMP_NUM_THREADS says, if those are fewer."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cpus, int(wanted)) if wanted.isdecimal() and int(wanted) else cpus


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def cache_bytes(device: str) -> int:
    """Size in bytes of the last cache before memory; 64 MiB where a CPU does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=64 * 2**20)


def line_bytes(device: str) -> int:
    """The smallest piece of memory that is read and written: a CPU's cache line, a GPU's sector."""
    return 32 if device == "cuda" else 64
