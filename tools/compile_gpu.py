"""Compiles every GPU kernel with no GPU: CUDA C++ for sm_80 and sm_90, Triton for sm_80, sm_90 and gfx942.

Fails if anything does not compile or spills registers. Each Triton kernel is compiled in the variants that
`tools/triton_variants.py` lists.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch.utils.cpp_extension import include_paths
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_variants import variants

ROOT = Path(__file__).parent.parent
CUDA_ARCHITECTURES = ("80", "90")
TRITON_TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64))


def compile_cuda(source: Path) -> list[str]:
    """Compiles one .cu file for all architectures; returns a line for each problem."""
    command = ["nvcc", "-c", str(source), "-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES]
    command += ["-DUSE_CUDA", *(f"-I{path}" for path in include_paths())]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"{source.name}: nvcc failed:\n{done.stderr}"]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", done.stderr)]
    kernels = done.stderr.count("Compiling entry function")
    registers = max(map(int, re.findall(r"Used (\d+) registers", done.stderr)), default=0)
    print(f"cuda    {source.name}: {kernels} kernels, at most {registers} registers, {sum(spills)} bytes spilled")
    return [f"{source.name}: spills registers"] if sum(spills) else []


def compile_triton() -> list[str]:
    problems = []
    for target in TRITON_TARGETS:
        count, registers = 0, 0
        for kernel, signature, constants in variants():
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget(*target), options={"enable_fp_fusion": False})
            if target[0] == "cuda":
                used, spilled = cubin_registers(compiled.asm["cubin"])
            else:
                text = compiled.asm["amdgcn"]
                used = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
                spilled = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
            count, registers = count + 1, max(registers, used)
            if spilled:
                problems.append(f"{kernel.__name__} {constants} spills registers on {target[1]}")
        print(f"triton  {target[1]}: {count} kernels, at most {registers} registers")
    return problems


def cubin_registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def main() -> int:
    if shutil.which("nvcc") is None:
        print("compile_gpu: nvcc is not on the PATH", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__} headers")
    problems = [problem for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for problem in compile_cuda(source)]
    problems += compile_triton()
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
