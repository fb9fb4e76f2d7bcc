"""Which kernel an op runs, on which device, and why others do not.

    reference   plain PyTorch, everywhere
    cpu         C++, code for base, avx2, avx512 and avx512_bf16 in one build, the best picked at run time
    triton      Triton on NVIDIA and AMD GPUs; on CPU tensors under TRITON_INTERPRET=1
    cuda        CUDA C++ on NVIDIA GPUs

`SHIRA_CPU_ISA` (auto, base, avx2, avx512, avx512_bf16) and `SHIRA_GPU_BACKEND` (auto, triton, cuda) force one for the
process; a forced one that cannot run is an error at import. `SHIRA_CHECK_INDICES=1` makes GPU kernels refuse wrong
indices, which costs a wait for the GPU at each call. docs/environment.md lists all variables.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from shira_kernels.ops import OPS
from shira_kernels.ops._library import HOST_NAMESPACE, NAMESPACE, host_ops, library, python_calls, with_gradient

BACKENDS = ("reference", "cpu", "triton", "cuda")
CPU_ISAS = ("base", "avx2", "avx512", "avx512_bf16")


def _load_extension() -> tuple[ModuleType | None, str, str]:
    """The C++ module; or None, why there is none, and what to tell users who did not ask for that."""
    try:
        return importlib.import_module("shira_kernels._C"), "", ""
    except ModuleNotFoundError:
        note = Path(__file__).with_name("not_built.txt")  # of setup.py
        if not note.exists():
            return None, "not built (installed with SHIRA_BUILD=0, or a checkout without `make build`)", ""
        reason = f"not built ({note.read_text()})"
        remedy = "install one, then this package again; or this package again with SHIRA_BUILD=0, which asks for none"
    except ImportError as error:
        reason = f"failed to load: {error}"
        remedy = "install a build for this torch"
    slower = "CPU tensors take the PyTorch reference, which is slower"
    return None, reason, f"shira_kernels: {slower}: C++ extension {reason}. To change that, {remedy}."


extension, extension_reason, extension_warning = _load_extension()
_forced = threading.local()  # .backends: those of the open `use` blocks of a thread
_check_gpu_indices = False


def _environment(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise RuntimeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def reason_unavailable(op: str, backend: str) -> str:
    """Why `backend` cannot run `op` in this process; empty if it can.

    Raises ValueError for an unknown op or backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    op = _with_kernels(op)
    if backend == "reference":
        return ""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if importlib.util.find_spec(f"shira_kernels.triton.{op}") is None:
            return "has no kernel for this op"
        if _triton_interprets():
            return _interpreter_refusal()
        return "" if torch.cuda.is_available() else "no GPU"
    if extension is None:
        return f"C++ extension {extension_reason}"
    if backend == "cpu":
        return "" if _has_cpp_kernel(op, "CPU") else "has no kernel for this op"
    if "cuda architectures" not in extension.build_facts():
        return "C++ extension built without CUDA"
    if op not in extension.cuda_ops():
        return "has no kernel for this op"
    return "" if torch.cuda.is_available() else "no GPU"


def _with_kernels(op: str) -> str:
    """The op whose kernels an op runs: itself, unless it is composed of another."""
    return OPS[op].composed_of or op


def _has_cpp_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


@functools.cache  # as Triton itself, which reads it once
def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _interpreter_refusal() -> str:
    """Why Triton's interpreter cannot run kernels, if that is so. Before 3.7 it converts arrays of one dimension to the
    bounds of loops, which numpy refuses from 2.4 on."""
    import numpy
    import triton

    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        return f"the interpreter of triton {triton.__version__} needs numpy below 2.4, got {numpy.__version__}"
    return ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def active(op: str, device: torch.device | str) -> str:
    """The kernel that `torch.ops.shira.<op>` runs on a device: "cpu/avx512", "cuda", "triton" or "reference".

    Within `use` that is the forced one. Raises ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    kind = torch.device(device).type
    if forced := getattr(_forced, "backends", None):
        return f"cpu/{extension.isa()}" if forced[-1] == "cpu" else forced[-1]  # type: ignore[union-attr]
    if kind == "cpu" and not reason_unavailable(op, "cpu"):
        return f"cpu/{extension.isa()}"  # type: ignore[union-attr]
    if kind == "cuda":
        return _gpu_choice[op]
    return "reference"


def calls() -> Counter[str]:
    """How many op calls each kernel has run in this process, by the names that `active` gives."""
    counted = Counter(python_calls)
    if extension is not None:
        counted.update({f"cpu/{isa}": number for isa, number in extension.calls_by_isa().items() if number})
        counted.update({"cuda": extension.cuda_calls()} if extension.cuda_calls() else {})
    return counted


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """A callable with the op's arguments that runs it on one backend, with all its checks.

    Raises RuntimeError if the backend cannot run the op here.
    """
    if reason := reason_unavailable(op, backend):
        raise RuntimeError(f"backend {backend} cannot run shira::{op}: {reason}")
    if backend == "reference":
        return OPS[op].default if _with_kernels(op) == op else _composed(op, OPS[_with_kernels(op)].default)
    if backend == "triton":
        return _triton_entry(op)
    if backend == "cuda" and _gpu_choice[op] != "cuda":
        raise RuntimeError(f"backend cuda cannot run shira::{op}: SHIRA_GPU_BACKEND={_gpu_choice[op]} is set")
    return getattr(getattr(torch.ops, NAMESPACE), op).default


def _composed(op: str, product: Callable[..., Any], contents: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
    """An op that is composed of another, by that one's given kernel, behind its own checks."""

    def run(*args: Any, **kwargs: Any) -> Any:
        OPS[op].check(*args, **kwargs, contents=contents())
        return OPS[op].compose(product, *args, **kwargs)  # type: ignore[misc]

    return run


def _triton_reads_contents() -> bool:
    """Under the interpreter the data is on the CPU, where reading it does not wait for a GPU."""
    return _check_gpu_indices or _triton_interprets()


def _host_op(op: str) -> Callable[..., Any] | None:
    """The op's checks and bookkeeping in C++, for kernels that are not C++; None where the extension is not there."""
    return getattr(getattr(torch.ops, HOST_NAMESPACE), op).default if op in host_ops and extension is not None else None


def _triton_entry(op: str) -> Callable[..., Any]:
    """The Triton kernel behind the op's checks. Triton is imported at the first call."""
    if _with_kernels(op) != op:
        return _composed(op, _triton_entry(_with_kernels(op)), _triton_reads_contents)
    definition, host_op = OPS[op], _host_op(op)
    loaded: list[Callable[..., Any]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(f"shira_kernels.triton.{op}"), op))
        contents = _triton_reads_contents()
        if contents or host_op is None:
            written = definition.check(*args, **kwargs, contents=contents)
        if host_op is None:
            torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
        elif (table := host_op(*args, **kwargs)) is not None:
            kwargs["table"] = table
        python_calls["triton"] += 1
        # Triton launches on the current device, whatever the tensors' is. Offsets may lie on the CPU.
        gpu = next((tensor.device for tensor in _leaders((*args, *kwargs.values())) if tensor.is_cuda), None)
        if gpu is None or gpu.index == torch.cuda.current_device():
            return loaded[0](*args, **kwargs)
        with torch.cuda.device(gpu):
            return loaded[0](*args, **kwargs)

    return run


class use(TorchFunctionMode):
    """`with use("reference"):` runs every op of this package on one backend, in this thread. For tests and debugging.

    The gradients of what runs are computed on that backend too, also after the block.

    Args:
        backend: reference, cpu, triton or cuda.
        isa: with cpu, also the instruction set, for the whole process.

    Raises:
        RuntimeError: if the backend, or the instruction set, cannot run here.
    """

    def __init__(self, backend: str, isa: str | None = None) -> None:
        super().__init__()
        self.kernels = {op: kernel(op, backend) for op in OPS if not reason_unavailable(op, backend)}
        if not self.kernels:
            raise RuntimeError(f"backend {backend} cannot run here: {reason_unavailable(next(iter(OPS)), backend)}")
        self.backend, self.isa = backend, isa
        if isa is not None and (backend != "cpu" or isa not in extension.runnable_isas()):  # type: ignore[union-attr]
            raise RuntimeError(f"isa must be one that this processor and backend cpu run, got {isa!r} with {backend}")

    def __enter__(self) -> use:
        self.previous_isa = extension.isa() if self.isa and extension else None
        if self.isa and extension:
            extension.set_isa(self.isa)
        _forced.backends = [*getattr(_forced, "backends", []), self.backend]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _forced.backends.pop()
        if self.previous_isa and extension:
            extension.set_isa(self.previous_isa)

    # A function mode, not a dispatch mode: the kernel runs where the op would, above autograd's bookkeeping.
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket if isinstance(func, OpOverload) else func
        if not isinstance(packet, OpOverloadPacket) or not str(packet).startswith(f"{NAMESPACE}."):
            return func(*args, **(kwargs or {}))
        op = str(packet).partition(".")[2]
        if op not in self.kernels:
            raise RuntimeError(f"backend {self.backend} cannot run shira::{op}: {reason_unavailable(op, self.backend)}")
        tensors = list(_tensors((*args, *(kwargs or {}).values())))
        if any(tensor.is_meta for tensor in tensors):  # without data there is nothing to run, on any backend
            return func(*args, **(kwargs or {}))
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if self.backend != "reference" and on_gpu != (self.backend != "cpu" and not _triton_interprets()):
            where = "on a GPU" if on_gpu else "on the CPU"
            raise RuntimeError(f"backend {self.backend} is forced, but cannot run shira::{op} {where}")
        kernel = self.kernels[op]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            kernel = with_gradient(op, kernel, lambda: use(self.backend, self.isa))
        return kernel(*args, **(kwargs or {}))


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def _leaders(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Tensors among arguments, and of lists of tensors, which share a device, the first."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        if isinstance(first, torch.Tensor):
            yield first


def set_check_indices(enabled: bool) -> None:
    """Checked mode of GPU kernels, for the process: wrong indices are refused before anything is written."""
    global _check_gpu_indices
    _check_gpu_indices = enabled
    if extension is not None:
        extension.set_check_indices(enabled)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Checked mode of GPU kernels within a `with` block."""
    before = _check_gpu_indices
    set_check_indices(True)
    try:
        yield
    finally:
        set_check_indices(before)


def _choose_gpu_backend() -> dict[str, str]:
    """op -> the backend of the CUDA dispatch key (AMD GPUs have it too); registers Triton where it is chosen."""
    wanted = _environment("SHIRA_GPU_BACKEND", ("auto", "triton", "cuda"))
    with_cuda = set(extension.cuda_ops()) if extension is not None else set()
    if wanted == "cuda" and not with_cuda:
        raise RuntimeError("SHIRA_GPU_BACKEND=cuda, but there are no CUDA C++ kernels in this build")
    # Not reason_unavailable: a GPU may come later than the import, and asking for one would touch it.
    is_installed = importlib.util.find_spec("triton") is not None
    written = {module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("triton"))])}
    choice = {}
    for op in OPS:
        if op in with_cuda and wanted != "triton":
            choice[op] = "cuda"
        elif is_installed and _with_kernels(op) in written:
            choice[op] = "triton"
        elif wanted == "triton" and not is_installed:
            raise RuntimeError(f"SHIRA_GPU_BACKEND=triton, but shira::{op} cannot run on it: triton is not installed")
        else:
            choice[op] = "reference"
        if choice[op] == "triton":
            library.impl(op, _triton_entry(op), "CUDA", allow_override=True)
    return choice


def _warn_at_the_first_call() -> None:
    """Gives CPU tensors kernels that warn once of the missing C++ extension, then run the default ones."""
    warned: list[bool] = []

    def warning(default: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not warned:
                warned.append(True)
                warnings.warn(extension_warning, RuntimeWarning, stacklevel=2)
            return default(*args, **kwargs)

        return run

    for op, definition in OPS.items():
        library.impl(op, warning(definition.default), "CPU")


def _choose_cpu_isa() -> None:
    isa = _environment("SHIRA_CPU_ISA", ("auto", *CPU_ISAS))
    if isa == "auto":
        return
    if extension is None:
        raise RuntimeError(f"SHIRA_CPU_ISA={isa}, but the C++ extension {extension_reason}")
    try:
        extension.set_isa(isa)
    except ValueError as error:
        raise RuntimeError(f"SHIRA_CPU_ISA={isa}: {error}") from error


if extension_warning:
    _warn_at_the_first_call()
_choose_cpu_isa()
_gpu_choice = _choose_gpu_backend()
set_check_indices(_environment("SHIRA_CHECK_INDICES", ("0", "1")) == "1")
