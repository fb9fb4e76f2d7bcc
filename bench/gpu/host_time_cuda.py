"""Host time of the CUDA C++ ops over a whole model, with launches that do nothing: what a call costs before the GPU.

    python bench/gpu/host_time_cuda.py

Runs the host code of csrc/cuda on CPU tensors (tests/ops/cuda_on_host) through torch.ops, on one thread. What a real
launch costs in the CUDA driver comes on top: about 3 to 6 us for each. Prints minimum and median, in us.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/ops"))

from cuda_on_host.extension import Extension

WEIGHTS = (28, 224, 560)
# A whole-model switch may take so many us of a host's time.
LIMITS_US = {28: 40, 224: 250, 560: 600}


def measured(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return min(times), statistics.median(times)


def calls(extension: Extension, weights: int) -> dict[str, Callable[[], object]]:
    ops = torch.ops.shira_on_host
    entries = 100
    targets = [torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(weights)]
    offsets = torch.tensor([0, *itertools.accumulate([entries] * weights)])
    indices = torch.arange(entries, dtype=torch.int32).repeat(weights)
    values = torch.zeros(entries * weights, dtype=torch.bfloat16)
    lists, saved = (offsets, indices, values), torch.zeros_like(values)
    old_lists = tuple(tensor.clone() for tensor in lists)
    states = [torch.zeros(entries * weights) for _ in range(3)]
    grads = [torch.zeros_like(target) for target in targets]
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0)
    step = torch.tensor(1.0)
    extension.library.forget_host_tensors()
    for tensor in (offsets, old_lists[0], step):
        extension.library.add_host_tensor(ctypes.c_void_p(tensor.data_ptr()))
    return {
        "scatter_apply_batched": lambda: ops.scatter_apply_batched(targets, *lists, 1.0, False, saved),
        "scatter_switch_batched": lambda: ops.scatter_switch_batched(targets, *old_lists, *lists, saved),
        "masked_adamw": lambda: ops.masked_adamw(targets, *lists[:2], grads, *states, step, *numbers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    extension = Extension(flags=("-O1",))
    extension.library.set_launches_do_nothing(True)
    for grad in (False, True):
        print("\nin grad mode" if grad else "\nunder no_grad")
        print(f"{'weights':>8}  {'op':24} {'min us':>8} {'median us':>10} limit")
        for weights in WEIGHTS:
            for op, call in calls(extension, weights).items():
                with torch.set_grad_enabled(grad):
                    least, median = measured(call, rounds)
                limit = str(LIMITS_US[weights]) if "switch" in op else ""
                print(f"{weights:8}  {op:24} {least:8.1f} {median:10.1f} {limit}")


if __name__ == "__main__":
    main()
