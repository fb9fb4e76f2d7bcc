"""Builds the C++ (and CUDA) kernels; everything else about the package is in pyproject.toml.

SHIRA_BUILD=auto  CPU kernels where there is a compiler, CUDA kernels where nvcc is there and torch has CUDA (default)
            cpu   CPU kernels; an error without a compiler
            cuda  CPU and CUDA kernels; an error without nvcc
            0     none: the package works on its PyTorch reference and Triton
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup


def extension_arguments() -> dict:
    mode = os.environ.get("SHIRA_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "0"):
        raise SystemExit(f"SHIRA_BUILD must be auto, cpu, cuda or 0, got {mode!r}")
    compiler = shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])
    if "egg_info" in sys.argv or "sdist" in sys.argv or "dist_info" in sys.argv:
        return {}  # nothing is compiled, and torch may not be there yet
    if mode == "0" or (mode == "auto" and compiler is None):
        print("shira-kernels: no C++ kernels are built;", "SHIRA_BUILD=0" if mode == "0" else "no C++ compiler found")
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    has_nvcc = CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
    with_cuda = mode == "cuda" or (mode == "auto" and torch.version.cuda is not None and has_nvcc)
    sources = ["csrc/bindings.cpp", *map(str, sorted(Path("csrc").glob("[ch]*/*.cpp")))]
    # Each operation rounds on its own, on every backend; only functions in SHIRA_ISA namespaces use wider instructions.
    # Square roots need not set errno, so they are vectorised.
    macros: list = []
    cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-g0"]
    nvcc = ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-ffp-contract=off"]
    if with_cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        macros += [("USE_CUDA", None), ("SHIRA_CUDA_ARCHITECTURES", f'"{architectures}"')]
        sources += map(str, sorted(Path("csrc/cuda").glob("*.cu")))
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "shira_kernels._C", sources, define_macros=macros, extra_compile_args={"cxx": cxx, "nvcc": nvcc}
    )
    # Only the stable ABI of torch is used, which is here; nothing of c10 or torch_python.
    extension.libraries = [name for name in extension.libraries if name in ("torch_cpu", "torch_cuda", "cudart")]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
