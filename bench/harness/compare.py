"""Times several ways to do one job in turn, in one run, and hands the figures to pytest-benchmark.

Order of work: equality check, warm-up, timed rounds. In each round every side runs once, each on the next slot of the
rotation, so all sides meet the same kind of memory state.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from typing import Any

import torch
from harness.machine import cache_bytes, cpu_name

from shira_kernels import backends

MIN_ROUNDS, MAX_ROUNDS = 5, 1000
# Device cycles queued ahead of a timed GPU call (about 5 ms), so that the host's launch cost is hidden behind them.
GPU_HEAD_START_CYCLES = 10_000_000


@dataclass(frozen=True)
class Place:
    """Where a case runs: "cpu" with a number of threads, or "cuda"."""

    device: str
    threads: int = 1

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"cpu, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return self.device


@dataclass(frozen=True)
class Side:
    """One way to do the job.

    `run` does it once on a slot of the rotation; `bytes_moved` is the memory traffic of one call that it cannot avoid;
    `context` is entered around the timing, not inside it; `before`, not timed either, brings the slot to where `run`
    starts.
    """

    run: Callable[[Any], object]
    bytes_moved: int
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    before: Callable[[Any], object] = lambda _: None


@dataclass
class Timings:
    """Seconds per call, one for each round. `host` is the time until the call returned, `total` until it was done."""

    total: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


_replayed: deque[float] = deque()


def replay() -> float:
    """The timer that pytest-benchmark reads: it replays rounds already timed, so that they end up in its JSON."""
    return _replayed.popleft()


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second, bytes read plus bytes written, over buffers far larger than the cache.

    `copy` is `Tensor.copy_`: a CPU also loads each line that it writes, which is not counted. `in_place` is
    `Tensor.neg_`, which reads and writes the same lines, as a sparse write does: the byte bound stands on it.
    """

    copy: float
    in_place: float


@cache
def bandwidth(place: Place) -> Bandwidth:
    """Measured once for each place. Call it with torch's thread count already set to `place.threads`."""
    source = torch.ones(max(4 * cache_bytes(place.device), 2**28) // 4, device=place.device)
    target = torch.zeros_like(source)
    sides = {
        "copy": Side(lambda _: target.copy_(source), 2 * source.nbytes),
        "in_place": Side(lambda _: source.neg_(), 2 * source.nbytes),
    }
    timings = time_in_turn(sides, [None], place, calls=1, seconds=1.0)
    return Bandwidth(
        **{name: side.bytes_moved / statistics.median(timings[name].total) for name, side in sides.items()}
    )


def compare(
    benchmark: Any,
    seconds: float,
    sides: dict[str, Side],
    *,
    ours: str,
    baselines: Sequence[str],
    slots: Sequence[Any],
    check: Callable[[], None],
    place: Place,
    group: str,
    label: str,
    info: dict[str, Any],
    calls: int = 1,
    control_only: bool = False,
) -> None:
    """Runs one case. The figures go into `benchmark.extra_info`, the rounds of `ours` into pytest-benchmark's own.

    Args:
        benchmark: pytest-benchmark's fixture.
        seconds: time to spend on the timed rounds, all sides together; at least MIN_ROUNDS are run.
        sides: name -> Side. Those that are neither `ours` nor in `baselines` are shown as variants of ours.
        slots: the rotation; each timed call takes the next one. One slot means warm.
        check: raises AssertionError where the sides do not compute the same; then nothing is timed or reported.
        place: torch's thread count is already set to it.
        group, label: what is measured, and which case of it.
        info: more facts for the report (dtype, nnz, density, ...), JSON types only.
        calls: calls per round, for calls too short to time one by one; `before` comes once, ahead of them.
        control_only: beside ours, times only the first baseline that runs no shira kernel, if there is one.
    """
    check()
    if benchmark.disabled:
        benchmark.pedantic(lambda: None)
        return

    kernels = {name: kernels_run(side, slots[0]) for name, side in sides.items()}
    if control_only:
        baselines = [name for name in baselines if not kernels[name]][:1]
        sides = {name: sides[name] for name in (ours, *baselines)}
    timings = time_in_turn(sides, slots, place, calls, seconds)
    speed = bandwidth(place)
    bound = sides[ours].bytes_moved / speed.in_place

    benchmark.group = group
    benchmark.extra_info.update(
        label=label,
        place=str(place),
        device=place.device,
        threads=place.threads,
        ours=ours,
        baselines=list(baselines),
        sides={
            name: {
                **_figures(side, timings[name], timings[ours], bound, speed),
                "host_us": statistics.median(timings[name].host) * 1e6 if place.device == "cuda" else None,
                "kernel": kernels[name],
            }
            for name, side in sides.items()
        },
        byte_bound_us=bound * 1e6,
        copy_gb_per_s=speed.copy / 1e9,
        in_place_gb_per_s=speed.in_place / 1e9,
        slots=len(slots),
        calls_per_round=calls,
        torch=torch.__version__,
        cpu=cpu_name(),
        isa=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if place.device == "cuda" else None,
        **info,
    )
    for duration in timings[ours].total:
        _replayed.extend((0.0, duration))
    benchmark.pedantic(lambda: None, rounds=len(timings[ours].total))


def assert_same_bits(name: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Tensors of 2 or 4 bytes an element.

    Raises:
        AssertionError: names the side, and says how many entries of which tensor differ.
    """
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        bits = {2: torch.int16, 4: torch.int32}[w.element_size()]
        differ = int((g.view(bits) != w.view(bits)).sum())
        assert not differ, f"{name}: {differ} of {g.numel()} entries of tensor {i} differ in their bits"


def kernels_run(side: Side, slot: Any) -> str:
    """The shira kernels that one call really ran, as they are named by `backends.active`; empty for none."""
    with side.context():
        side.before(slot)
        before = backends.calls()
        side.run(slot)
    return ", ".join(sorted(backends.calls() - before))


def _figures(side: Side, timings: Timings, ours: Timings, bound: float, speed: Bandwidth) -> dict[str, Any]:
    """What the report shows of one side. Ratios are this side's time over ours in the same round."""
    first, median, third = _quartiles(timings.total)
    ratio_first, ratio, ratio_third = _quartiles(t / o for t, o in zip(timings.total, ours.total, strict=True))
    bytes_per_second = side.bytes_moved / median
    return {
        "median_us": median * 1e6,
        "iqr_us": (third - first) * 1e6,
        "min_us": min(timings.total) * 1e6,
        "rounds": len(timings.total),
        "ratio": ratio,
        "ratio_quartiles": [ratio_first, ratio_third],
        "bytes_moved": side.bytes_moved,
        "gb_per_s": bytes_per_second / 1e9,
        "share_of_copy": bytes_per_second / speed.copy,
        "share_of_byte_bound": bound / median,
    }


def _quartiles(numbers: Iterable[float]) -> tuple[float, float, float]:
    first, median, third = statistics.quantiles(numbers, n=4, method="inclusive")
    return first, median, third


def time_in_turn(
    sides: dict[str, Side], slots: Sequence[Any], place: Place, calls: int, seconds: float
) -> dict[str, Timings]:
    timings = {name: Timings() for name in sides}
    rotation = cycle(slots)
    # A fixed order would leave each side always the same neighbour's dirty cache lines to write back.
    order, shuffle = list(sides), random.Random(0).shuffle
    warm_up_rounds = 2 + len(slots) // len(sides)
    gc.collect()
    gc.disable()
    try:
        for _ in range(warm_up_rounds):
            for name in order:
                time_side(sides[name], next(rotation), place, calls)
        begin, rounds = time.perf_counter(), 0
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - begin < seconds):
            shuffle(order)
            for name in order:
                total, host = time_side(sides[name], next(rotation), place, calls)
                timings[name].total.append(total)
                timings[name].host.append(host)
            rounds += 1
    finally:
        gc.enable()
    return timings


def time_side(side: Side, slot: Any, place: Place, calls: int) -> tuple[float, float]:
    """Seconds per call until the work was done, and until the call returned."""
    run = side.run
    with side.context():
        side.before(slot)
        if place.device == "cpu":
            begin = time.perf_counter_ns()
            for _ in range(calls):
                run(slot)
            elapsed = (time.perf_counter_ns() - begin) * 1e-9 / calls
            return elapsed, elapsed
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(GPU_HEAD_START_CYCLES)
        start.record()
        begin = time.perf_counter_ns()
        for _ in range(calls):
            run(slot)
        host = (time.perf_counter_ns() - begin) * 1e-9 / calls
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls, host
