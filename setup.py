"""Builds the C++ (and CUDA) kernels; everything else about the package is in pyproject.toml.

SHIRA_BUILD=auto  CPU kernels where there is a compiler, CUDA kernels where there is an nvcc of torch's CUDA (default)
            cpu   CPU kernels; an error without a compiler
            cuda  CPU and CUDA kernels; an error without nvcc
            sanitize  CPU kernels that end the process at an address or an operation that is undefined; `make sanitize`
            0     none: the package works on its PyTorch reference and Triton

The extension uses Python's limited API and torch's stable ABI, so a wheel with it serves every Python from 3.10 and
every torch from 2.10; one with CUDA kernels needs a torch of the same CUDA, which its build tag names.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
NO_COMPILER = "no C++ compiler was found when it was installed"


def find_cuda() -> None:
    """Sets CUDA_HOME to where nvcc's libraries are, unless it is set to a folder that has nvcc.

    The nvcc on the PATH may be a script that calls one elsewhere, so its own folder says nothing; nvcc is asked.
    """
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if nvcc is None or (given and Path(given, "bin", "nvcc").exists()):
        return
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE)
    if top and Path(top[1], "bin", "nvcc").exists():
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def cuda_of(nvcc: Path) -> str:
    """The major version of CUDA that a compiler is of."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", said)
    return release[1] if release else "unknown"


def without_cuda(torch_cuda: str | None, home: str | None) -> str:
    """Why CUDA kernels cannot be built; empty if they can."""
    if torch_cuda is None:
        return "torch is a build without CUDA"
    nvcc = Path(home or "", "bin", "nvcc")
    if home is None or not nvcc.exists():
        return f"there is no nvcc on the PATH or in CUDA_HOME ({home or 'not set'})"
    if cuda_of(nvcc) != torch_cuda.split(".")[0]:
        return f"torch is built with CUDA {torch_cuda}, and {nvcc} is of CUDA {cuda_of(nvcc)}"
    return ""


class BuildWithoutCompiler(build_py):
    """Leaves a note in the package, from which it tells its user that its kernels are missing, and why."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "shira_kernels", "not_built.txt").write_text(NO_COMPILER)


def extension_arguments() -> dict:
    mode = os.environ.get("SHIRA_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "sanitize", "0"):
        raise SystemExit(f"SHIRA_BUILD must be auto, cpu, cuda, sanitize or 0, got {mode!r}")
    compiler = shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])
    if "egg_info" in sys.argv or "sdist" in sys.argv or "dist_info" in sys.argv:
        return {}  # nothing is compiled, and torch may not be there yet
    if mode == "0":
        print("shira-kernels: no C++ kernels are built; SHIRA_BUILD=0", file=sys.stderr)
        return {}
    if mode == "auto" and compiler is None:
        print(f"shira-kernels: no C++ kernels are built; {NO_COMPILER}", file=sys.stderr)
        return {"cmdclass": {"build_py": BuildWithoutCompiler}}
    find_cuda()  # before PyTorch's module below looks for it
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    missing = without_cuda(torch.version.cuda, CUDA_HOME)
    if missing and mode == "auto" and torch.version.cuda is not None:
        print(f"shira-kernels: {missing}: CPU kernels are built, and no CUDA kernels", file=sys.stderr)
    if missing and mode == "cuda":
        raise SystemExit(f"SHIRA_BUILD=cuda cannot be built: {missing}")
    with_cuda = mode not in ("cpu", "sanitize") and not missing
    sources = ["csrc/bindings.cpp", *map(str, sorted(Path("csrc").glob("[ch]*/*.cpp")))]
    # Each operation rounds on its own, on every backend; only functions in SHIRA_ISA namespaces use wider instructions.
    # Square roots need not set errno, so they are vectorised.
    macros: list = []
    cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-g0"]
    nvcc = ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-ffp-contract=off"]
    if mode == "sanitize":
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]
    if with_cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        macros += [("USE_CUDA", None), ("SHIRA_CUDA_ARCHITECTURES", f'"{architectures}"')]
        sources += map(str, sorted(Path("csrc/cuda").glob("*.cu")))
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "shira_kernels._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=list(SANITIZERS) if mode == "sanitize" else [],
        py_limited_api=True,
    )
    # Only the stable ABI of torch is used, which is here; nothing of c10 or torch_python.
    extension.libraries = [name for name in extension.libraries if name in ("torch_cpu", "torch_cuda", "cudart")]
    wheel = {"py_limited_api": "cp310"}
    if with_cuda:
        wheel["build_number"] = f"1cu{torch.version.cuda.split('.')[0]}"
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}, "options": {"bdist_wheel": wheel}}


setup(**extension_arguments())
