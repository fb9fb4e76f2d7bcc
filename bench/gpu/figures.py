"""Times one op's cases of bench/gpu/floors.py on a GPU: a worker of the GPU check.

    python bench/gpu/figures.py OP --record FILE [--environment FILE] [--device cpu] [--profile]

Each backend's equality comes first: one that fails is recorded as wrong and is not timed. Then all sides are timed in
turn: each backend, and what PyTorch offers. `--profile` runs the first case twice, for a profiler, and times nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

# gpu, cases and harness are folders of bench/; the records are the driver's, in tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import gpu_records
import torch
from gpu.floors import TINY, Case, Job, cases
from harness import compare, rotation
from harness.compare import Place, Side

from shira_kernels import backends

SECONDS = 1.0  # of timed rounds for each case
GPU_BACKENDS = ("triton", "cuda")


def kernels(op: str, device: str) -> dict[str, Callable[..., Any]]:
    """A callable for each backend of the op; on a CPU the op itself stands for all."""
    call = getattr(torch.ops.shira, op)
    if device == "cpu":
        return {"triton": call, **({"cuda": call} if Path(f"csrc/cuda/{op}.cu").exists() else {})}
    # The one that torch.ops chooses is called as users call it: its host time is theirs.
    found = {b: backends.kernel(op, b) for b in GPU_BACKENDS if not backends.reason_unavailable(op, b)}
    return {backend: call if backends.active(op, device) == backend else kernel for backend, kernel in found.items()}


def checked(case: Case, job: Job, found: dict[str, Any], device: str, record: Callable[..., None]) -> dict[str, Any]:
    """The backends that compute what the baselines compute."""
    right = {}
    for backend, call in found.items():
        try:
            with nullcontext() if device == "cpu" else backends.use(backend):
                job.check()
            right[backend] = call
        except AssertionError as error:
            note = " ".join(str(error).split())[:500]
            record(op=case.op, backend=backend, case=case.name, result="wrong", note=note)
    return right


def measure(
    case: Case, job: Job, found: dict[str, Any], place: Place, copy: float, record: Callable[..., None]
) -> None:
    right = checked(case, job, found, place.device, record)
    if not right:
        return
    sides = {backend: Side(partial(job.run, call), 0) for backend, call in right.items()}
    sides |= {name: Side(run, 0) for name, run in job.baselines.items()}
    ran = {name: compare.kernels_run(side, job.slots[0]) for name, side in sides.items()}
    timings = compare.time_in_turn(sides, job.slots, place, calls=1, seconds=SECONDS if place.device == "cuda" else 0)
    medians = {name: statistics.median(times.total) for name, times in timings.items()}
    best = min(job.baselines, key=lambda name: medians[name])
    for backend in right:
        mine = timings[backend]
        seconds = medians[backend]
        record(
            op=case.op,
            backend=backend,
            case=case.name,
            us=seconds * 1e6,
            host_us=statistics.median(mine.host) * 1e6,
            min_us=min(mine.total) * 1e6,
            rounds=len(mine.total),
            floor_us=case.floor_us,
            share_of_copy=case.bytes_moved / seconds / copy,
            ratio=statistics.median(b / m for b, m in zip(timings[best].total, mine.total, strict=True)),
            baseline=best,
            baselines_us={name: medians[name] * 1e6 for name in job.baselines},
            baselines_host_us={name: statistics.median(timings[name].host) * 1e6 for name in job.baselines},
            kernel=ran[backend],
        )


def profile(case: Case, device: str) -> None:
    job = case.make(device)
    for call in kernels(case.op, device).values():
        for slot in job.slots[:2]:
            job.run(call, slot)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        job.run(call, job.slots[-1])
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def copy_speed(path: Path | None, place: Place) -> float:
    """Bytes per second of a copy, as measured before, or now."""
    known = json.loads(path.read_text()).get("copy_gb_per_s") if path and path.is_file() else None
    return known * 1e9 if known else compare.bandwidth(place).copy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--record", required=True)
    parser.add_argument("--environment", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    record = partial(gpu_records.append, options.record)
    chosen = [case for case in cases(TINY if options.device == "cpu" else None) if case.op == options.op]
    place = Place(options.device, int(os.environ.get("OMP_NUM_THREADS", 1)))
    if options.device == "cpu":
        compare.MIN_ROUNDS, rotation.CACHE_TURNS = 1, 0  # one round, warm
        torch.set_num_threads(place.threads)
    if options.profile:
        profile(chosen[0], options.device)
        return 0
    copy = copy_speed(options.environment, place)
    found = kernels(options.op, options.device)
    with torch.no_grad():
        for case in chosen:
            try:
                measure(case, case.make(options.device), found, place, copy, record)
                if options.device == "cuda":
                    torch.cuda.synchronize()
            except RuntimeError as error:
                note = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                record(
                    op=case.op,
                    backend=backends.active(case.op, options.device),
                    case=case.name,
                    result="died",
                    note=note,
                )
                if "CUDA error" in str(error):
                    return 0
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
