"""The CUDA C++ of this repository as kernels for CPU tensors: csrc/cuda and csrc/host compiled by g++.

The ops get a namespace of their own, `shira_on_host`, with the schemas of `shira`. `include/` holds what stands in for
CUDA; everything else is the code that nvcc compiles: checks, batches, the choice of an instance, launches, kernels.
All tensors are taken to be on the device, except those that `Extension.on_host` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.cpp_extension import include_paths

import shira_kernels  # noqa: F401  (defines the schemas)
from shira_kernels import backends

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
# Not optimised, which compiles fastest. An index outside an array, or an overflow, ends the process.
CHECKED = ("-O0", "-fsanitize=bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error")


class Counts(ctypes.Structure):
    """What the code has asked of CUDA so far."""

    _fields_ = [(name, ctypes.c_int64) for name in ("launches", "copies", "waits", "allocations", "argument_bytes")]
    launches: int
    copies: int
    waits: int
    allocations: int
    argument_bytes: int


def reason_missing() -> str:
    """Why it cannot be built here; empty if it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return "" if int(version.split(".")[0]) >= 11 else f"g++ {version.strip()} is older than 11"


def build(flags: tuple[str, ...] = CHECKED) -> Path:
    """The shared library, built where the temporary files are; what is there from the same sources is used."""
    host = [path for path in sorted(CSRC.glob("host/*.cpp")) if path.stem != "tables"]  # that registers other ops
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *host, HERE / "emulation.cpp"]
    headers = [
        *(path for folder in ("cuda", "host", "shared") for path in sorted(CSRC.glob(f"{folder}/*.*h"))),
        *(path for path in sorted((HERE / "include").rglob("*")) if path.is_file()),
    ]
    options = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DUSE_CUDA", "-Wno-unknown-pragmas"]
    options += [*flags, f"-I{HERE / 'include'}", *(f"-isystem{path}" for path in include_paths())]
    folder = Path(tempfile.gettempdir(), f"shira-cuda-on-host-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    common = _digest(torch.__version__.encode(), str(options).encode(), *(path.read_bytes() for path in headers))

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}-{_digest(common.encode(), source.read_bytes())}.o"
        return _made(target, ["g++", "-x", "c++", "-c", str(source), *options])

    sources.sort(key=lambda path: ("switch" not in path.name, path.suffix != ".cu"))  # the longest first
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        parts = [str(part) for part in threads.map(compiled, sources)]
    libraries = Path(torch.__file__).parent / "lib"
    target = folder / f"cuda_on_host-{_digest(*(part.encode() for part in parts))}.so"
    return _made(target, ["g++", "-shared", *parts, f"-L{libraries}", "-ltorch_cpu"])


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _made(target: Path, command: list[str]) -> Path:
    if not target.exists():
        made = target.with_name(f"{os.getpid()}-{target.name}")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        os.replace(made, target)  # whole or not there, also for another process
    return target


class Extension(TorchFunctionMode):
    """Within `with extension:` calls of torch.ops.shira go to the ops of shira_on_host that there are."""

    def __init__(self, flags: tuple[str, ...] = CHECKED) -> None:
        super().__init__()
        path = str(build(flags))
        self.library = ctypes.CDLL(path)
        self.library.calls.restype = ctypes.c_int64
        self.library.counts.restype = ctypes.POINTER(Counts)
        self.library.ops.restype = ctypes.c_char_p
        self.ops = self.library.ops().decode().split()
        self.schemas = {op: getattr(torch.ops.shira, op).default._schema for op in self.ops}
        self._definitions = torch.library.Library("shira_on_host", "DEF")
        for schema in self.schemas.values():
            self._definitions.define(str(schema).removeprefix("shira::"))
        torch.ops.load_library(path)
        self.on_host: tuple[str, ...] = ()  # names of arguments that are on the CPU, not on the device

    @property
    def counts(self) -> Counts:
        counts = Counts()
        ctypes.pointer(counts)[0] = self.library.counts().contents
        return counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = str(func).removeprefix("shira.").removesuffix(".default")
        if not str(func).startswith("shira.") or op not in self.ops:
            return func(*args, **kwargs)
        given = {**dict(zip((a.name for a in self.schemas[op].arguments), args, strict=False)), **kwargs}
        self.library.forget_host_tensors()
        for name in self.on_host:
            if given.get(name) is not None:
                self.library.add_host_tensor(ctypes.c_void_p(given[name].data_ptr()))
        return getattr(torch.ops.shira_on_host, op)(*args, **kwargs)


@functools.cache
def extension() -> Extension:
    return Extension()


class OnHost:
    """A `Backend` for the tests of the ops: what it runs is the CUDA C++, on CPU tensors.

    `on_host` are the arguments that count as tensors on the CPU; the others count as tensors on the device.
    """

    name, device, isa, kernel = "cuda", "cpu", None, "cuda"

    def __init__(self, *on_host: str) -> None:
        self.on_host = on_host

    @contextlib.contextmanager
    def running(self, times: int = 1) -> Iterator[None]:
        """Asserts that CUDA C++ kernels ran so often, no others did, and that nothing that a CUDA graph could not
        capture was asked of CUDA."""
        running, others = extension(), backends.calls()
        running.on_host = self.on_host
        checked = backends._check_gpu_indices
        running.library.set_check_indices(checked)
        before, counts = running.library.calls(), running.counts
        with running:
            yield
        after = running.counts
        assert running.library.calls() - before == times
        assert backends.calls() == others
        if not checked:
            for name in ("copies", "waits", "allocations"):
                assert getattr(after, name) == getattr(counts, name), name
