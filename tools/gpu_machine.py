"""What the machine is and what is built: a worker of the GPU check.

python tools/gpu_machine.py facts FILE [--device cpu]     versions, the GPU, bandwidth, as JSON
python tools/gpu_machine.py extension --record FILE       whether there are CUDA C++ kernels
python tools/gpu_machine.py load PATH                     loads an extension that lies elsewhere
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_records
import torch

PACKAGES = ("numpy", "transformers", "peft", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "safetensors")
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "ninja", "c++")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device: str) -> dict[str, Any]:
    known: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": version("triton"),
        "packages": {package: version(package) for package in PACKAGES},
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "gpu": None,
    }
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        known |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        known |= {"capability": [properties.major, properties.minor], "cache_bytes": properties.L2_cache_size}
        known |= {"memory_bytes": total, "free_bytes": free}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
            known["nvidia_smi"] = answer.stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            known["nvidia_smi"] = str(error)
    return known


def bandwidth(device: str) -> dict[str, float]:
    from compare import Place
    from compare import bandwidth as measured

    speed = measured(Place(device, torch.get_num_threads()))
    return {f"{name}_gb_per_s": value / 1e9 for name, value in dataclasses.asdict(speed).items()}


def write_facts(path: Path, device: str) -> int:
    known = facts(device)
    path.write_text(json.dumps(known, indent=1))
    if device == "cuda" and known["gpu"] is None:
        print("torch sees no GPU: torch.cuda.is_available() is false")
        return 1
    path.write_text(json.dumps({**known, **bandwidth(device)}, indent=1))
    return 0


def extension(path: str) -> int:
    from shira_kernels import backends

    reason = backends.extension_reason if backends.extension is None else ""
    ops = list(backends.extension.cuda_ops()) if backends.extension is not None else []
    note = reason or ("" if ops else "the C++ extension was built without CUDA")
    gpu_records.append(path, cuda_cpp=bool(ops), cuda_ops=ops, build_note=note)
    return 0


def load(path: Path) -> int:
    """A file that was built beside the tree; torch's libraries are there already."""
    spec = importlib.util.spec_from_file_location("shira_kernels._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(module.build_facts(), module.cuda_ops())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "extension", "load"))
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--record")
    options = parser.parse_args()
    if options.what == "facts":
        return write_facts(options.path, options.device)
    return load(options.path) if options.what == "load" else extension(options.record)


if __name__ == "__main__":
    sys.exit(main())
