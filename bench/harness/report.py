"""Turns pytest-benchmark's JSON into report.md and pictures.

python bench/harness/report.py out.json [more.json] -o DIR
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shira.files.atomic import write_atomically

LEGEND = """\
- **ratio**: this side's time over ours, round by round: the median, and in brackets the middle half of the rounds.
  Above 1 ours is faster. **LOSS** marks a baseline that is faster than ours.
- **bytes moved**: memory traffic that one call cannot avoid. A sparse write reads and writes every memory line that it
  touches (64 bytes on a CPU, 32 on a GPU), counted from the indices.
- **of copy**: bytes moved per second over those of a plain copy in the same run, bytes read plus bytes written. A CPU's
  copy also loads each line that it writes, which is not counted, so a share may exceed 100 %.
- **of byte bound**: the time in which a streaming update in place moves the bytes that ours must move, over this side's
  time.
- **overhead**: the time above that of the floor, a side that does only what all sides have to do.
- **host**: on a GPU, the time until the call returned. The medians there are times on the device, which was kept busy
  while the call was prepared, so they do not contain it. **HOST-BOUND** marks a side whose host time is the longer one:
  called again and again, it takes that long. "waits" marks a call that waits for the GPU: its host time is not a cost.
"""

# A call whose host time is this long has waited for what keeps the device busy (compare.GPU_HEAD_START_CYCLES, 5 ms at
# 2 GHz, and longer on slower GPUs). Host time that is as long without waiting is not hidden, but in the medians.
_WAITS_US = 4500.0


# What `compare` records of a case and of a side, and this report needs.
CASE_KEYS = """label place device threads dtype ours baselines sides byte_bound_us copy_gb_per_s in_place_gb_per_s slots
    torch cpu isa gpu command"""
SIDE_KEYS = (
    """median_us iqr_us ratio ratio_quartiles bytes_moved gb_per_s share_of_copy share_of_byte_bound host_us kernel"""
)


class ReportError(Exception):
    """A file that cannot be reported; the message is one line."""


@dataclass(frozen=True)
class Case:
    """One benchmark of the JSON: its group and the facts that `compare` recorded. `tag` tells several files apart."""

    tag: str
    group: str
    info: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.tag}{self.info['label']}"

    @property
    def place(self) -> str:
        return f"{self.tag}{self.info['place']}"

    @property
    def sides(self) -> dict[str, dict[str, Any]]:
        return self.info["sides"]

    @property
    def is_cold(self) -> bool:
        """Whether each call meets its data in memory; a single slot counts as warm unless the case says otherwise."""
        return self.info.get("cold", self.info["slots"] > 1)

    def is_loss(self, name: str) -> bool:
        return name in self.info["baselines"] and self.sides[name]["ratio"] < 1

    def host_ratio(self, name: str) -> float | None:
        """A side's time over ours where calls follow each other on a GPU, each as long as its host's or device's time;
        None where the device's is the longer one for both."""
        names = name, self.info["ours"]
        if not any(self.is_host_bound(side) for side in names):
            return None
        theirs, ours = (self.sides[side]["host_us" if self.is_host_bound(side) else "median_us"] for side in names)
        return theirs / ours

    def waits(self, name: str) -> bool:
        """Whether a call waits for the GPU."""
        host_us = self.sides[name]["host_us"]
        return host_us is not None and host_us * self.info.get("calls_per_round", 1) >= _WAITS_US

    def is_host_bound(self, name: str) -> bool:
        side = self.sides[name]
        return side["host_us"] is not None and side["host_us"] > side["median_us"] and not self.waits(name)

    def host_time(self, name: str) -> str:
        if self.sides[name]["host_us"] is None:
            return ""
        note = " (waits)" if self.waits(name) else " **HOST-BOUND**" if self.is_host_bound(name) else ""
        return format_time(self.sides[name]["host_us"]) + note


@dataclass(frozen=True)
class Run:
    """One JSON file: when it was made, and its cases."""

    tag: str
    date: str
    commit: str
    cases: list[Case]


def load(path: Path, tag: str = "") -> Run:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: not readable as JSON: {error}") from error
    try:
        cases = [Case(tag, entry["group"], entry["extra_info"]) for entry in content["benchmarks"]]
        commit = content["commit_info"]
        described = (
            f"{commit['id'][:12]}{' with local changes' if commit['dirty'] else ''}" if commit["id"] else "unknown"
        )
        for case in cases:
            if missing := (set(CASE_KEYS.split()) - case.info.keys()) | {
                key for side in case.sides.values() for key in set(SIDE_KEYS.split()) - side.keys()
            }:
                raise ReportError(
                    f"{path}: no {', '.join(sorted(missing))} in a benchmark; was it made by pytest bench/?"
                )
            if case.info["device"] == "cuda" and any(side["host_us"] is None for side in case.sides.values()):
                raise ReportError(f"{path}: no host_us in a benchmark on a GPU: {case.label}")
        run = Run(tag, content["datetime"][:16], described, cases)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: not a result of `pytest bench/ --benchmark-json`: {error!r}") from error
    if not cases:
        raise ReportError(f"{path}: holds no benchmarks")
    return run


def conditions(run: Run) -> list[str]:
    infos = [case.info for case in run.cases]

    def distinct(values: Iterator[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))

    speeds = dict.fromkeys(
        f"{i['place']} copy {i['copy_gb_per_s']:.1f}, in place {i['in_place_gb_per_s']:.1f} GB/s" for i in infos
    )
    lines = [
        f"- {run.tag}{run.date}, commit {run.commit}",
        f"- CPU: {distinct(i['cpu'] for i in infos)}, {distinct(i['isa'] for i in infos)}",
        f"- GPU: {distinct(i['gpu'] for i in infos)}",
        f"- torch {distinct(i['torch'] for i in infos)}, "
        f"threads: {distinct(i['threads'] for i in infos if i['device'] == 'cpu')}",
        f"- bandwidth, read plus written: {'; '.join(speeds)}",
        f"- command: `{distinct(i['command'] for i in infos)}`",
    ]
    return [line for line in lines if not line.endswith(": ")]


def groups(runs: list[Run]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for run in runs:
        for case in run.cases:
            found.setdefault(case.group, []).append(case)
    return found


def format_time(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} us"


def format_bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def table(cases: list[Case]) -> list[str]:
    on_gpu = any(case.info["device"] == "cuda" for case in cases)
    columns = [
        "case",
        "side",
        "kernel",
        "median",
        "spread (IQR)",
        "ratio",
        "bytes moved",
        "GB/s",
        "of copy",
        "of byte bound",
    ]
    columns += ["overhead"] if has_floor(cases) else []
    columns += ["host"] if on_gpu else []
    columns += ["steps/s", "trained", "peak memory over the floor"] if is_training(cases) else []
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for case in cases:
        for name, side in case.sides.items():
            is_ours = name == case.info["ours"]
            low, high = side["ratio_quartiles"]
            ratio = f"{side['ratio']:.2f} [{low:.2f}, {high:.2f}]"
            cells = [
                case.label if is_ours else "",
                f"**{name}**" if is_ours else name,
                side["kernel"] or "",
                format_time(side["median_us"]),
                f"{side['iqr_us'] / side['median_us']:.0%}",
                "1" if is_ours else f"{ratio} **LOSS**" if case.is_loss(name) else ratio,
                format_bytes(side["bytes_moved"]),
            ]
            # Warm data is in the cache, where memory bandwidth says nothing.
            shares = [f"{side['gb_per_s']:.1f}", f"{side['share_of_copy']:.0%}", f"{side['share_of_byte_bound']:.0%}"]
            cells += shares if case.is_cold else [""] * len(shares)
            cells += [overhead(case, name)] if has_floor(cases) else []
            cells += [case.host_time(name)] if on_gpu else []
            if is_training(cases):
                cells += [f"{1e6 / side['median_us']:.3f}", f"{case.info['trained'][name]:,}", memory(case, name)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def has_floor(cases: list[Case]) -> bool:
    return "floor" in cases[0].info


def overhead(case: Case, name: str) -> str:
    """What a side takes more than the floor, which does a part of its work."""
    return f"{case.sides[name]['ratio'] / case.sides[case.info['floor']]['ratio'] - 1:+.1%}"


def is_training(cases: list[Case]) -> bool:
    return "peak_bytes" in cases[0].info


def memory(case: Case, name: str) -> str:
    """The peak memory of a side above that of the floor."""
    peaks = case.info["peak_bytes"]
    return f"{(peaks[name] - peaks[case.info['floor']]) / 1e6:+.0f} MB"


def markdown(runs: list[Run], pictures: dict[str, str]) -> str:
    lines = ["# Benchmark report", ""]
    for run in runs:
        lines += [*conditions(run), ""]
    lines += [LEGEND]
    losses = [
        f"- {case.group}; {case.label}: {name} takes {case.sides[name]['ratio']:.2f} of our time"
        for run in runs
        for case in run.cases
        for name in case.info["baselines"]
        if case.is_loss(name)
    ]
    losses += [
        f"- {case.group}; {case.label}: one after the other, host time included, {name} takes {ratio:.2f} of our time"
        for run in runs
        for case in run.cases
        for name in case.info["baselines"]
        if (ratio := case.host_ratio(name)) is not None and ratio < 1
    ]
    lines += ["## Losses", "", *(losses or ["None."]), ""]
    for group, cases in groups(runs).items():
        lines += [f"## {group}", "", f"![{group}]({pictures[group]})", "", *table(cases), ""]
    return "\n".join(lines)


def draw_ratios(group: str, cases: list[Case]) -> bytes:
    """Bars: each baseline's time over ours, log axis, the middle half of the rounds as whiskers."""
    names = list(dict.fromkeys(name for case in cases for name in case.info["baselines"]))
    height = 0.8 / len(cases)
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.32 * len(names) * len(cases)), layout="constrained")
    colours = plt.get_cmap("tab10" if len(cases) <= 10 else "tab20")
    for row, case in enumerate(cases):
        shown = [name for name in names if name in case.sides]
        places = [names.index(name) + (row - (len(cases) - 1) / 2) * height for name in shown]
        sides = [case.sides[name] for name in shown]
        ratios = [side["ratio"] for side in sides]
        whiskers = [
            [side["ratio"] - side["ratio_quartiles"][0] for side in sides],
            [side["ratio_quartiles"][1] - side["ratio"] for side in sides],
        ]
        # Bars start at 1, so that a loss points to the other side.
        axes.barh(
            places,
            [r - 1 for r in ratios],
            height,
            left=1,
            xerr=whiskers,
            color=colours(row % colours.N),
            label=case.label,
        )
        for y, ratio, side in zip(places, ratios, sides, strict=True):
            axes.text(
                max(1, side["ratio_quartiles"][1]) * 1.05,
                y,
                f"{ratio:.2f}" + (" LOSS" if ratio < 1 else ""),
                va="center",
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2) * 1.3)
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [t for e in range(-2, 7) for t in (step * 10**e for step in steps) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"time over that of {cases[0].info['ours']} (log scale; right of 1: ours is faster)")
    axes.set_title(group)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return png(figure)


def draw_sweep(group: str, cases: list[Case]) -> bytes:
    """Lines: time over the swept quantity, one panel for each place and dtype, with the byte bound."""
    panels: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        panels.setdefault((case.place, case.info["dtype"]), []).append(case)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, ((place, dtype), members) in zip(grid.flat, panels.items(), strict=False):
        swept = members[0].info["sweep"]
        members = sorted(members, key=lambda case: case.info[swept])
        x = [case.info[swept] for case in members]
        for name in members[0].sides:
            [line] = axes.plot(x, [case.sides[name]["median_us"] / 1000 for case in members], marker="o", label=name)
            if members[0].info["device"] == "cuda":
                host = [case.sides[name]["host_us"] / 1000 for case in members]
                axes.plot(x, host, color=line.get_color(), linestyle=":")
        bound = [case.info["byte_bound_us"] / 1000 for case in members]
        axes.plot(x, bound, color="black", linestyle="--", label="byte bound of ours")
        axes.set_title(f"{place}, {dtype}")
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(swept)
        on_gpu = members[0].info["device"] == "cuda"
        axes.set_ylabel("median time, ms (dotted: of the host)" if on_gpu else "median time, ms")
        if x[-1] > 10 * x[0]:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(group)
    return png(figure)


def draw_training(group: str, cases: list[Case]) -> bytes:
    """Points: steps per second over the peak memory above the floor's, one for each side."""
    figure, grid = plt.subplots(1, len(cases), figsize=(7.5 * len(cases), 4.5), squeeze=False, layout="constrained")
    for axes, case in zip(grid.flat, cases, strict=True):
        peaks = case.info["peak_bytes"]
        for name, side in case.sides.items():
            point = ((peaks[name] - peaks[case.info["floor"]]) / 1e6, 1e6 / side["median_us"])
            axes.plot(*point, marker="*" if name == case.info["ours"] else "o", markersize=12, linestyle="none")
            below = name == case.info["ours"]  # beside the floor, whose label is above
            axes.annotate(name, point, xytext=(8, -14 if below else 6), textcoords="offset points")
        axes.margins(0.18)
        axes.set_title(case.label)
        axes.set_xlabel(f"peak memory over {case.info['floor']}, MB (less is better)")
        axes.set_ylabel("steps per second (more is better)")
        axes.grid(alpha=0.3)
    figure.suptitle(group)
    return png(figure)


def png(figure: plt.Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", nargs="+", type=Path, help="files written by pytest bench/ --benchmark-json=FILE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for report.md and the pictures")
    options = parser.parse_args(arguments)
    try:
        several = len(options.json) > 1
        runs = [load(path, f"{path.stem}: " if several else "") for path in options.json]
        options.output.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for group, cases in groups(runs).items():
            draw: Callable[[str, list[Case]], bytes] = draw_ratios
            if is_training(cases):
                draw = draw_training
            elif "sweep" in cases[0].info:
                draw = draw_sweep
            pictures[group] = re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-") + ".png"
            write_atomically(options.output / pictures[group], draw(group, cases))
        write_atomically(options.output / "report.md", markdown(runs, pictures).encode())
    except (ReportError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(options.output / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
