"""What the GPU check is driven by: tasks, which are processes, in phases that end at their limits."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_records
import gpu_summary

ROOT = Path(__file__).resolve().parent.parent
FILE_LIMIT = 15 * 2**20  # bytes that a file in --out may keep
OUTPUT_KEPT = 4000  # characters of the end of a task's output, kept where it did not end well
DEADLINE = 540.0  # seconds for all phases together, if nothing else is asked for
RESERVE = 3.0  # seconds of the deadline for the summary
DIES_WITHIN = 5.0  # seconds that a killed process is waited for

Judge = Callable[[int, str], tuple[str, str]]


def by_exit_code(code: int, output: str) -> tuple[str, str]:
    """How a task ended, and a note: 0 is "ok", everything else "died"."""
    if code == 0:
        return "ok", ""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "died", f"{how}: {last_line(output)}"


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@dataclass(frozen=True)
class Setup:
    """What the tasks of a phase are made from."""

    out: Path
    rehearse: bool = False
    deadline: float = DEADLINE
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    python: str = sys.executable
    scratch: Path = Path(tempfile.gettempdir())  # a folder that is removed at the end


@dataclass(frozen=True)
class Task:
    """One process.

    `facts` (op, backend, tool) go into the record of how it ended; `judge` makes "ok", "wrong", "died" or another word,
    and a note, of its exit code and output. One that exceeds its own limit is "hung", a dead worker, unless it
    `may_take_longer`: then it is "cut", as is one that the limit of its phase ends.
    """

    label: str
    command: Sequence[str]
    limit: float = math.inf
    facts: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Judge = by_exit_code
    may_take_longer: bool = False
    log: Path | None = None  # where its whole output is appended
    output_kept: int = 0  # characters of the end of its output, kept also where it ended well


@dataclass(frozen=True)
class Phase:
    """`tasks` is asked for the next task when there is room for it, so that it can look at the records until then."""

    number: int
    name: str
    limit: float  # seconds
    file: str  # in --out: the records
    tasks: Callable[[Setup], Iterable[Task]]
    at_once: int = 1
    nothing_after: Callable[[Setup], str] = lambda _: ""  # why no later phase can run; empty where they can


class Stop:
    """Set by SIGTERM and SIGINT."""

    signal: int = 0

    def __enter__(self) -> Stop:
        self.before = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _set(self, number: int, _: object) -> None:
        self.signal = number


class Running:
    """A task's process, the leader of a process group of its own, and the file that its output goes to."""

    def __init__(self, task: Task, setup: Setup) -> None:
        self.task, self.begin = task, time.monotonic()
        self.output = tempfile.TemporaryFile(dir=setup.scratch)  # noqa: SIM115 - closed by `finish`
        paths = [ROOT, ROOT / "python", ROOT / "tools", ROOT / "bench", *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env={**environment, **task.environment},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end_group(self) -> bool:
        """Kills what is left of the group; says whether the process is gone."""
        self.kill_group()
        try:
            self.process.wait(DIES_WITHIN)
        except subprocess.TimeoutExpired:
            return False
        return True

    def finish(self, ended: str | None, note: str, path: Path, phase: Phase) -> None:
        """Ends the group and records how the task ended; `ended` is None for one that ended by itself."""
        seconds, gone = self.seconds, self.end_group()
        with self.output:
            size = self.output.seek(0, os.SEEK_END)
            self.output.seek(max(0, size - FILE_LIMIT))
            output = self.output.read().decode(errors="replace")
        if self.task.log is not None:
            with self.task.log.open("a") as log:
                log.write(output)
        if ended is None:
            ended, note = self.task.judge(self.process.returncode, output)
        if not gone:
            note += "; the process did not die"
        kept = max(self.task.output_kept, 0 if ended == "ok" else OUTPUT_KEPT)
        more = {"output": output[-kept:]} if kept else {}
        record_end(path, phase, self.task, ended, note, seconds, **more)


def run_phase(phase: Phase, setup: Setup, deadline: float, stop: Stop) -> None:
    """Runs a phase until it is done, or its limit or the deadline (monotonic seconds) has come, or `stop` is set."""
    path, begin = setup.out / phase.file, time.monotonic()
    limit = min(begin + phase.limit, deadline)
    tasks = iter(phase.tasks(setup))
    running: list[Running] = []
    ended = ""
    try:
        while not ended:
            for job in list(running):
                if job.process.poll() is not None:
                    job.finish(None, "", path, phase)
                elif job.seconds >= job.task.limit:
                    kind = "cut" if job.task.may_take_longer else "hung"
                    job.finish(kind, f"longer than {job.task.limit:.0f} s", path, phase)
                else:
                    continue
                running.remove(job)
            if stop.signal:
                ended = f"stopped by {signal.Signals(stop.signal).name}"
            elif time.monotonic() >= limit:
                ended = "cut by the deadline" if limit == deadline else "cut by its limit"
            elif not start_tasks(tasks, running, phase, setup) and not running:
                ended = "done"
            else:
                time.sleep(0.02)
    finally:
        for job in running:
            job.kill_group()  # all, before any is waited for
        for job in running:
            job.finish("cut", ended, path, phase)
        record_phase(path, phase, ended or "broken off", time.monotonic() - begin)


def start_tasks(tasks: Iterator[Task], running: list[Running], phase: Phase, setup: Setup) -> bool:
    """Fills the phase's room for tasks; says whether there may be more."""
    while len(running) < phase.at_once:
        task = next(tasks, None)
        if task is None:
            return False
        try:
            running.append(Running(task, setup))
        except OSError as error:
            record_end(setup.out / phase.file, phase, task, "died", str(error), 0.0)
    return True


def record_end(path: Path, phase: Phase, task: Task, ended: str, note: str, seconds: float, **more: Any) -> None:
    facts = {"phase": phase.number, "task": task.label, **task.facts, "seconds": round(seconds, 2)}
    gpu_records.append(path, ended=ended, note=note, **facts, **more)


def record_phase(path: Path, phase: Phase, ended: str, seconds: float) -> None:
    gpu_records.append(path, phase=phase.number, name=phase.name, phase_ended=ended, seconds=round(seconds, 1))


def run(phases: Sequence[Phase], setup: Setup) -> int:
    """Runs the phases within the deadline and prints the summary; returns the exit code."""
    end = time.monotonic() + setup.deadline - RESERVE
    setup.out.mkdir(parents=True, exist_ok=True)
    for name in gpu_summary.FILES:
        (setup.out / name).unlink(missing_ok=True)
    code = 1
    with Stop() as stop:
        try:
            why_not = ""
            for phase in phases:
                if stop.signal or time.monotonic() >= end:
                    why_not = "stopped" if stop.signal else "the deadline had come"
                if why_not:
                    record_phase(setup.out / phase.file, phase, f"not begun: {why_not}", 0.0)
                    continue
                print(f"gpu-check: phase {phase.number}, {phase.name}", flush=True)
                run_phase(phase, setup, end, stop)
                why_not = phase.nothing_after(setup)
        finally:
            for name in gpu_summary.FILES:
                shorten(setup.out / name)
            text, code = gpu_summary.summary(setup.out, setup.rehearse)
            (setup.out / "summary.txt").write_text(text + "\n")
            print(text, flush=True)
    return 128 + stop.signal if stop.signal else code


def shorten(path: Path) -> None:
    """Cuts a file that is too large at the end of a line."""
    if path.is_file() and path.stat().st_size > FILE_LIMIT:
        kept = path.read_bytes()[:FILE_LIMIT]
        path.write_bytes(kept[: kept.rfind(b"\n") + 1])
