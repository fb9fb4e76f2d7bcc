"""What a call over a whole model costs the host on Triton's path, measured without a GPU.

Each op is called through torch's dispatcher, with CPU tensors and Triton's entry as its kernel; launches do nothing.
"checks" is everything but Triton's part: the dispatcher, the checks, autograd's bookkeeping, the table of addresses.
"whole" is with Triton's part before a launch; its driver is a fake one, for which it compiles as for an H100. A real
launch comes on top (about 5 us), and what is asked of CUDA about streams and captures (about 3 us).

Sides that take turns: checks in C++ and, as without the extension, in Python; and Triton asked at each call which
kernel it needs ("asking"). Times of the thread in us, which a busy machine stretches less than the clock's: the minimum
and the median of many calls, without garbage collection.

    python bench/gpu/host_time_triton.py [--rounds 300]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from shira_kernels import backends
from shira_kernels.triton import _launch

WEIGHTS = (28, 224, 560)
BUDGET_US = {28: 40, 224: 250, 560: 600}
ENTRIES = 16  # of each weight
OPS_OF_A_MODEL = ("scatter_apply_batched", "scatter_switch_batched", "masked_adamw")


class FakeDriver:
    """A GPU of compute capability 9.0 that runs nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )
        self.launcher_cls = lambda *_: lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NoLaunch:
    """In the place of a Triton kernel."""

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return lambda *_, **__: None


class Forgetful(dict[Any, Any]):
    """In the place of the kernels that are known."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@contextmanager
def without_launches(op: str) -> Iterator[None]:
    module = importlib.import_module(f"shira_kernels.triton.{op}")
    kernel = getattr(module, f"{op}_kernel")
    setattr(module, f"{op}_kernel", NoLaunch())
    try:
        yield
    finally:
        setattr(module, f"{op}_kernel", kernel)


def arguments_of(op: str, count: int) -> tuple[Any, ...]:
    weights = [torch.zeros(64, dtype=torch.bfloat16) for _ in range(count)]
    offsets = torch.arange(0, (count + 1) * ENTRIES, ENTRIES)
    indices = torch.arange(0, 2 * ENTRIES, 2, dtype=torch.int32).repeat(count)
    values, saved, old_saved = (torch.zeros(len(indices), dtype=torch.bfloat16) for _ in range(3))
    if op == "masked_adamw":
        grads = [torch.zeros(ENTRIES) for _ in range(count)]
        states = (torch.zeros(len(indices)) for _ in range(3))
        return weights, offsets, indices, grads, *states, torch.tensor(1.0), 1e-3, 0.9, 0.999, 1e-8, 0.01
    if op == "scatter_apply_batched":
        return weights, offsets, indices, values, 1.0, False, saved
    return weights, offsets.clone(), indices.clone(), old_saved, offsets, indices, values, saved


_libraries: list[torch.library.Library] = []  # what they define goes with them


def dispatched(op: str, side: str) -> Callable[..., None]:
    """Triton's entry behind torch's dispatcher, as it is on a GPU, but for the CPU and under another name."""
    library = torch.library.Library(f"shira_host_time_{side}", "FRAGMENT")
    _libraries.append(library)
    schema = str(getattr(torch.ops.shira, op).default._schema).removeprefix("shira::")
    library.define(schema)
    library.impl(op, backends._triton_entry(op), "CPU")
    return getattr(getattr(torch.ops, library.ns), op).default


def time_us(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    call(*arguments)  # the other side has just filled the caches
    begin = time.thread_time_ns()
    call(*arguments)
    return (time.thread_time_ns() - begin) / 1000


def sides_of(op: str) -> dict[str, Callable[..., None]]:
    """The op by Triton's entry with its checks in C++, and with those in Python."""
    extension = backends.extension
    sides = {"C++": dispatched(op, "cpp")}
    backends.extension = None
    sides["Python"] = dispatched(op, "python")
    backends.extension = extension
    return sides


def measure(op: str, count: int, rounds: int, sides: dict[str, Callable[..., None]]) -> dict[str, list[float]]:
    """side and column -> the time of each call"""
    arguments = arguments_of(op, count)
    times: dict[str, list[float]] = defaultdict(list)
    for at in range(rounds + 10):
        for name, run in sides.items():
            with without_launches(op):
                checks = time_us(run, arguments)
            whole = time_us(run, arguments)
            with mock.patch.object(_launch, "_compiled", Forgetful()):
                asking = time_us(run, arguments)
            if at >= 10:
                for column, number in {"checks": checks, "whole": whole, "asking": asking}.items():
                    times[f"{name} {column}"].append(number)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    gc.disable()
    triton.runtime.driver.set_active(FakeDriver())
    print(f"torch {torch.__version__}, triton {triton.__version__}; us, minimum / median of {rounds} calls")
    print(f"{'op':24}{'weights':>8}{'checks in':>10}{'checks':>16}{'whole':>16}{'asking':>16}{'budget':>8}")
    for op in OPS_OF_A_MODEL:
        sides = sides_of(op)
        for count in WEIGHTS:
            with torch.no_grad():
                times = measure(op, count, rounds, sides)
            for name in sides:
                cells = [times[f"{name} {column}"] for column in ("checks", "whole", "asking")]
                row = "".join(f"{f'{min(cell):.0f} / {statistics.median(cell):.0f}':>16}" for cell in cells)
                print(f"{op:24}{count:8}{name:>10}{row}{BUDGET_US[count]:8}", flush=True)


if __name__ == "__main__":
    main()
