"""The backends that each op is tested on, and the proof of which kernel ran."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shira_kernels import backends


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    isa: str | None = None

    @property
    def kernel(self) -> str:
        """The name that `backends.calls` gives it."""
        return f"{self.name}/{self.isa}" if self.isa else self.name

    def missing(self, op: str = "scatter_apply") -> str:
        """Why it cannot run the op here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no GPU"
        if self.name == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if self.name == "triton" and self.device == "cpu" and torch.cuda.is_available():
            return "Triton kernels run on the GPU here, not in the interpreter"
        if self.isa and backends.extension is None:
            return f"C++ extension {backends.extension_reason}"
        if self.isa and self.isa not in backends.extension.runnable_isas():
            return f"this processor does not run {self.isa}"
        return backends.reason_unavailable(op, self.name)

    @contextlib.contextmanager
    def running(self, times: int = 1) -> Iterator[None]:
        """Runs ops on this backend, and asserts that its kernel ran this number of times, and no other."""
        before = backends.calls()
        with backends.use(self.name, isa=self.isa):
            yield
        ran = {name: number for name, number in (backends.calls() - before).items() if number}
        assert ran == ({self.kernel: times} if times else {})


BACKENDS = (
    Backend("reference"),
    *(Backend("cpu", isa=isa) for isa in backends.CPU_ISAS),
    Backend("triton"),
    Backend("reference", "cuda"),
    Backend("triton", "cuda"),
    Backend("cuda", "cuda"),
)


def _parameter(backend: Backend, op: str) -> object:
    marks = [pytest.mark.gpu] if backend.device == "cuda" else []
    if reason := backend.missing(op):
        marks.append(pytest.mark.skip(reason=reason))
    interpreted = "-interpreter" if backend.name == "triton" and backend.device == "cpu" else ""
    return pytest.param(
        backend, marks=marks, id=backend.kernel + interpreted + ("-gpu" if backend.device == "cuda" else "")
    )


def each_backend_of(op: str) -> pytest.MarkDecorator:
    """Runs a test on every backend that may have a kernel of its own for the op; CUDA C++ only has some ops, and
    AVX512-BF16 only masked_grad and the products with a sparse delta: other kernels there are those of avx512."""
    own = {
        "cuda": (Path(__file__).parents[2] / f"csrc/cuda/{op}.cu").exists(),
        "cpu/avx512_bf16": op == "masked_grad" or "sparse_delta_mm" in op,
    }
    chosen = [backend for backend in BACKENDS if own.get(backend.kernel, True)]
    return pytest.mark.parametrize("backend", [_parameter(backend, op) for backend in chosen])


def but_the_interpreter(each_backend: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Leaves out Triton's interpreter, which takes too long for large inputs."""
    chosen = [p for p in each_backend.args[1] if (p.values[0].name, p.values[0].device) != ("triton", "cpu")]
    return pytest.mark.parametrize("backend", chosen)


each_backend = each_backend_of("scatter_apply")
