"""This tree's cases over the packages of another revision, and over its own, in turn: `pytest bench --compare REV`.

A round is a process for each side, which checks and times all selected cases; the sides take turns in going first. The
ratio of a case is taken round by round: its time with the revision's packages over that with this tree's. The case's
first baseline that runs no kernel of the packages is timed beside it: its own ratio shows the machine's noise.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/compare"  # git ignores it, and `make clean` removes it
ENDED = (0, 1, 2)  # pytest's exit codes: passed, some failed, some not collected
NOTHING_SELECTED = 5
SOURCES = (".cpp", ".h", ".cu", ".cuh")
TAIL = 15  # lines of a process's output in an error


class CompareError(Exception):
    """What the user can put right, or has to see; its text is all that is shown."""


@dataclass(frozen=True)
class Side:
    """A tree whose packages are timed: its name in the report, and its folder."""

    name: str
    root: Path

    def environment(self) -> dict[str, str]:
        """The packages come from this side's folder; one thread, unless OMP_NUM_THREADS says otherwise."""
        path = [str(self.root), str(self.root / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path)}


@dataclass(frozen=True)
class Time:
    """A case in one process: microseconds a call of ours and of the control, and the kernel that ran."""

    ours_us: float
    kernel: str
    control: str = ""  # empty where all baselines run kernels of the packages
    control_us: float = 1.0


@dataclass
class Outcome:
    """One process: the times of the cases that passed, and why the others did not."""

    times: dict[str, Time] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CompareError("--compare needs git, which is not installed") from None
    if done.returncode:
        raise CompareError(f"git {arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def commit_of(revision: str) -> str:
    """The full name of the revision's commit.

    Raises:
        CompareError: there is none, or this is not a git repository.
    """
    _git("rev-parse", "--git-dir")
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except CompareError:
        raise CompareError(f"--compare: {revision!r} is not a revision of this repository") from None


def this_tree() -> Side:
    """The working tree as it is, uncommitted changes included."""
    changed = " with local changes" if _git("status", "--porcelain", "--", "shira_kernels", "python", "csrc") else ""
    return Side(f"this tree ({_git('rev-parse', '--short=12', 'HEAD')}{changed})", ROOT)


def extension_in(root: Path) -> Path | None:
    return next(iter(sorted((root / "shira_kernels").glob("_C.*.so"))), None)


def checked_out(revision: str) -> Side:
    """The revision's files in a folder of CACHE; its C++ extension is built once, where this tree has one.

    Raises:
        CompareError: there is no such revision, or its extension cannot be built.
    """
    commit, with_extension = commit_of(revision), extension_in(ROOT) is not None
    kind = f"torch-{torch.__version__}-{sys.implementation.cache_tag}" if with_extension else "python-only"
    folder = CACHE / f"{commit[:12]}-{kind}"
    side = Side(f"{revision} ({commit[:12]})", folder)
    if folder.exists():
        return side
    CACHE.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix="making-", dir=CACHE))
    try:
        archive = making / "tree.tar"
        _git("archive", "--format=tar", f"--output={archive}", commit)
        shutil.unpack_archive(archive, making)
        archive.unlink()
        if with_extension:
            _say(f"building the C++ extension of {side.name}")
            done = subprocess.run(
                [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
                cwd=making,
                env=Side("", making).environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode or extension_in(making) is None:
                raise CompareError(f"the extension of {side.name} cannot be built:\n{_tail(done.stdout)}")
        os.replace(making, folder)  # whole or not there
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return side


def stale_extension() -> str:
    """Says so where this tree's extension is older than a source of it; it may be built from another one."""
    extension = extension_in(ROOT)
    if extension is None:
        return ""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES]
    newest = max(sources, key=lambda path: path.stat().st_mtime, default=extension)
    if newest.stat().st_mtime <= extension.stat().st_mtime:
        return ""
    return f"{extension.name} is older than {newest.relative_to(ROOT)}: run `make build` first if that file changed"


def run_side(side: Side, arguments: list[str]) -> Outcome:
    """All selected cases in one process over the side's packages.

    Raises:
        CompareError: pytest did not come to the cases, or selected none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        times, reports = Path(scratch, "times.json"), Path(scratch, "reports.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--packages-of", str(side.root)]
        command += [f"--benchmark-json={times}", f"--junitxml={reports}", *arguments]
        done = subprocess.run(
            command,
            cwd=side.root,  # which "python -m" puts before all other paths
            env=side.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode == NOTHING_SELECTED:
            raise CompareError("--compare: no case is selected")
        if done.returncode not in ENDED or not reports.exists():
            raise CompareError(f"pytest ended with exit code {done.returncode} on {side.name}:\n{_tail(done.stdout)}")
        content = json.loads(times.read_text() or "{}") if times.exists() else {}
        return Outcome(dict(_times(content)), dict(_failures(ElementTree.parse(reports))))


def _times(content: dict[str, Any]) -> Iterator[tuple[str, Time]]:
    for benchmark in content.get("benchmarks", []):
        info = benchmark["extra_info"]
        ours = info["sides"][info["ours"]]
        controls = [(name, info["sides"][name]["median_us"]) for name in info["baselines"]]
        control, control_us = next(iter(controls), ("", 1.0))
        yield _short(benchmark["fullname"]), Time(ours["median_us"], ours["kernel"], control, control_us)


def _failures(reports: ElementTree.ElementTree) -> Iterator[tuple[str, str]]:
    for case in reports.iter("testcase"):
        for bad in (*case.iter("failure"), *case.iter("error")):
            file = case.get("classname", "").rpartition(".")[2]
            name = f"{file}.py::{case.get('name')}" if file else f"{case.get('name', '').rpartition('.')[2]}.py"
            # Of a case that was not collected the message says only that; the last line of the trace says why.
            trace = [line for line in (bad.text or "").splitlines() if line.startswith("E ")]
            message = bad.get("message", "") if file or not trace else trace[-1].removeprefix("E")
            yield name, " ".join(message.split())[:200]


def _short(fullname: str) -> str:
    """Without the folders before the file."""
    file, _, name = fullname.partition("::")
    return f"{file.rpartition('/')[2]}::{name}"


def run_in_turn(sides: tuple[Side, Side], rounds: int, run: Callable[[Side], Outcome]) -> list[tuple[Outcome, Outcome]]:
    """For each round the outcome of both sides, which take turns in going first."""
    done = []
    for i in range(rounds):
        order = sides if i % 2 == 0 else sides[::-1]
        found = {}
        for side in order:
            _say(f"round {i + 1} of {rounds}: {side.name}")
            found[side] = run(side)
        done.append((found[sides[0]], found[sides[1]]))
    return done


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


def report(ours: Side, theirs: Side, done: list[tuple[Outcome, Outcome]], threads: str) -> str:
    """The ratios as Markdown, then what could not be compared."""
    names = [name for name in done[0][0].times if all(name in side.times for pair in done for side in pair)]
    lines = [
        f"# {ours.name} against {theirs.name}",
        "",
        f"{len(done)} rounds of a process for each side, OMP_NUM_THREADS={threads}. ratio: the time with the packages "
        f"of {theirs.name} over that with this tree's, the median of the rounds and in brackets the lowest and the "
        "highest; above 1 this tree is faster. control: the same of a baseline, whose code is the same on both sides: "
        "what it is off 1 is the machine's noise. net: ratio over control, round by round, without the noise that both "
        "share.",
        "",
    ]
    if names:
        lines += [
            "| case | net | ratio | control | us here | us there | control is |",
            "|---|---|---|---|---:|---:|---|",
        ]
    notes = []
    for name in names:
        pairs = [(here.times[name], there.times[name]) for here, there in done]
        ratios = [there.ours_us / here.ours_us for here, there in pairs]
        controls = [there.control_us / here.control_us for here, there in pairs]
        net = [ratio / control for ratio, control in zip(ratios, controls, strict=True)]
        is_controlled = bool(pairs[0][0].control)
        shown = " | ".join(_spread(r) if r is ratios or is_controlled else "-" for r in (net, ratios, controls))
        here_us, there_us = (statistics.median(time.ours_us for time in side) for side in zip(*pairs, strict=True))
        here, there = pairs[0]
        lines.append(f"| {name} | {shown} | {here_us:.1f} | {there_us:.1f} | {here.control or '-'} |")
        if here.kernel != there.kernel:
            notes.append(
                f"- {name}: other kernels ran, {here.kernel or 'none'} here and {there.kernel or 'none'} there"
            )
    for side, failed in zip((ours, theirs), failures(done), strict=True):
        notes += [f"- {side.name} does not run {name}: {reason}" for name, reason in failed.items()]
    return "\n".join(
        [*lines, *([""] if names and notes else []), *notes, *([] if names else ["", "Nothing compared."])]
    )


def failures(done: list[tuple[Outcome, Outcome]]) -> tuple[dict[str, str], dict[str, str]]:
    """What did not pass in some round, and why: of this tree, and of the revision."""
    here, there = ({name: why for pair in done for name, why in pair[i].failed.items()} for i in (0, 1))
    return here, there


def compare_revision(revision: str, rounds: int, arguments: list[str]) -> int:
    """Prints the report; gives the exit code: 1 where a case of this tree fails, 2 where nothing could be done.

    Args:
        revision: any name of a commit that git knows.
        rounds: how many, at least 1.
        arguments: pytest's, absolute paths and options that select cases and bound their time.
    """
    try:
        if rounds < 1:
            raise CompareError(f"--compare-rounds must be at least 1, got {rounds}")
        theirs, ours = checked_out(revision), this_tree()
        if note := stale_extension():
            _say(note)
        done = run_in_turn((ours, theirs), rounds, lambda side: run_side(side, arguments))
    except CompareError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(ours, theirs, done, ours.environment()["OMP_NUM_THREADS"]))
    return int(bool(failures(done)[0]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-TAIL:])
