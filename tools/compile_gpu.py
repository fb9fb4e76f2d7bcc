"""Compiles every GPU kernel with no GPU: CUDA C++ for sm_80 and sm_90, Triton for what `--targets` names.

Fails if anything does not compile or spills registers. Of Triton kernels the variants are compiled that run:
`tools/triton_variants.py` calls the ops' launchers, and notes what Triton would compile. Two versions of Triton are
compared by running this with each of them first on PYTHONPATH. For each kernel it prints how many variants there are,
and the most registers, bytes of spills and instructions of one of them, so that a regression is seen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["SHIRA_GPU_BACKEND"] = "triton"  # in a build with CUDA C++ too, calls go to the Triton launchers

import torch
import triton
from pretended_gpu import Variant
from torch.utils.cpp_extension import include_paths
from triton.backends.compiler import GPUTarget
from triton_variants import variants

ROOT = Path(__file__).parent.parent
CUDA_ARCHITECTURES = ("80", "90")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
EVERY_VARIANT = "sm_90"  # elsewhere one variant for each set of constants and element types: time is short
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION, NOP = 16, 0x918  # of sm_70 and later: bytes, and the lowest 12 bits of what only fills


class Compiled(NamedTuple):
    """One kernel. `spilled`: bytes of local memory, for AMD GPUs registers. `problem` is empty if all is well."""

    kernel: str
    variant: str
    registers: int
    spilled: int
    instructions: int
    problem: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS), help="GPUs of Triton kernels")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA C++ kernels, which need nvcc")
    parser.add_argument("--only", default="", help="kernels with this in their name, or .cu files")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print all variants as JSON")
    options = parser.parse_args()
    if not options.no_cuda and shutil.which("nvcc") is None:
        print("compile_gpu: nvcc is not on the PATH", file=sys.stderr)
        return 1
    done: dict[str, list[Compiled]] = {}
    if not options.no_cuda:
        sources = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if options.only in path.stem]
        wanted = [(path, number) for number in CUDA_ARCHITECTURES for path in sources]
        for (_, number), compiled in zip(wanted, in_processes(compile_cuda, wanted, options.processes), strict=True):
            done.setdefault(f"cuda sm_{number}", []).extend(compiled)
    for name in options.targets:
        found = variants(GPUTarget(*TARGETS[name]), every=name == EVERY_VARIANT)
        wanted = [item for item in found if options.only in item.kernel.__name__]
        done[f"triton {name}"] = list(in_processes(compile_triton, wanted, options.processes))
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if options.json:
        listed = {target: [item._asdict() for item in compiled] for target, compiled in done.items()}
        print(json.dumps({**versions, "compiled": listed}, indent=1))
    else:
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        print("\n".join(table(done)))
    problems = [(target, item) for target, compiled in done.items() for item in compiled if item.problem]
    for target, item in problems:
        print(f"{target}: {item.problem}: {item.variant}", file=sys.stderr)
    return bool(problems)


def table(done: dict[str, list[Compiled]]) -> Iterator[str]:
    """A line for each kernel and target; of its variants the worst in each column."""
    yield f"{'target':14} {'kernel':32} {'variants':>8} {'registers':>9} {'spilled':>7} {'instructions':>12}"
    for target, compiled in done.items():
        for kernel in dict.fromkeys(item.kernel for item in compiled):
            of_it = [item for item in compiled if item.kernel == kernel]
            worst = [max(item[place] for item in of_it) for place in (2, 3, 4)]
            yield "{:14} {:32} {:8} {:9} {:7} {:12}".format(target, kernel, len(of_it), *worst)


def in_processes(task: Callable[[Any], Any], items: list[Any], processes: int) -> Iterator[Any]:
    """task(item) for each item, in order. Processes are forked, so that Triton's kernels need not be sent to them."""
    _work[:] = [task, items]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_do, range(len(items)))


_work: list[Any] = []


def _do(place: int) -> Any:
    task, items = _work
    return task(items[place])


def compile_cuda(wanted: tuple[Path, str]) -> list[Compiled]:
    """The kernels of one .cu file for one architecture."""
    source, number = wanted
    command = ["nvcc", "-cubin", str(source), "-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr"]
    command += [f"-arch=sm_{number}", "-DUSE_CUDA", *(f"-I{path}" for path in include_paths())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.cubin")
        done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            return [Compiled(source.name, source.name, 0, 0, 0, f"nvcc failed: {done.stderr}")]
        return kernels_of(path, source.stem, lambda name: name)


def compile_triton(variant: Variant) -> Compiled:
    kernel = variant.kernel.__name__
    try:
        compiled = variant.compile()
    except Exception as error:  # noqa: BLE001 - whatever stops one kernel, the others are compiled
        return Compiled(kernel, str(variant), 0, 0, 0, f"{type(error).__name__}: {error}")
    if "cubin" not in compiled.asm:
        return amd_kernel(compiled.asm["amdgcn"], kernel, str(variant))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (made,) = kernels_of(Path(file.name), kernel, lambda name: str(variant))
    return made


def kernels_of(cubin: Path, kernel: str, variant: Callable[[str], str]) -> list[Compiled]:
    """Registers, local memory (a spill; nothing here has arrays of its own) and instructions of what a cubin holds."""
    command = [TOOLS / "cuobjdump", "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = instructions_of(cubin.read_bytes())
    found = []
    for name, text in re.findall(r"Function (\S+):\n(.*)", usage):
        registers, stack, local = (int(re.findall(rf"{what}:(\d+)", text)[0]) for what in ("REG", "STACK", "LOCAL"))
        spilled = stack + local
        found.append(Compiled(kernel, variant(name), registers, spilled, sizes[name], "spills" if spilled else ""))
    return found


def instructions_of(cubin: bytes) -> dict[str, int]:
    """The number of instructions of each kernel: what `cuobjdump -sass` lists, which takes half a second a cubin."""
    (begin,) = struct.unpack_from("<Q", cubin, 0x28)  # ELF: where the section headers are, their size, number and names
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, begin + place * size) for place in range(number)]
    found = {}
    for name_at, _, _, _, offset, length in headers:
        start = headers[names][4] + name_at
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            heads = struct.unpack(f"<{length // 2}H", cubin[offset : offset + length])[:: INSTRUCTION // 2]
            found[name.removeprefix(".text.")] = sum(head & 0xFFF != NOP for head in heads)
    return found


def amd_kernel(assembly: str, kernel: str, variant: str) -> Compiled:
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
    spilled = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)))
    instructions = len(re.findall(r"^\t[a-z]+_\w+", assembly, re.MULTILINE))
    return Compiled(kernel, variant, registers, spilled, instructions, "spills" if spilled else "")


if __name__ == "__main__":
    sys.exit(main())
