"""report.md and fusion.png of run.py, from results.json."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import study
from harness.study import INK
from studies.fusion.plan import DOMAINS, Results

from shira.files.atomic import write_atomically

_COLOURS = {
    "LoRA": "#2f6fb5",
    "SHiRA wm, overlapping": "#d9772b",
    "SHiRA wm, non-overlapping": "#b3261e",
    "SHiRA struct": "#1d8a74",
    "SHiRA snip": "#7d5ba6",
}
_TITLES = {"cpp": "C++", "prose": "prose"}
# Table 4 of the paper: accuracy in %, mean of three tasks, each adapter alone and all three fused.
_PAPER = {
    "LoRA": (78.41, 67.33),
    "SHiRA-WM, overlapping": (78.45, 74.02),
    "SHiRA-WM, non-overlapping": (77.54, 73.92),
}


@dataclass(frozen=True)
class Row:
    """A method's pairs, one a seed. An improvement is how many bits per byte a text costs less than with the base."""

    name: str
    trained: int  # numbers of one adapter
    shared: float | None
    single: list[dict[str, float]]  # of each domain's own adapter on its domain, by domain
    other: list[dict[str, float]]  # of the other domain's adapter on it
    fused: dict[str, list[dict[str, float]]]  # by strength

    @property
    def main(self) -> list[dict[str, float]]:
        """Fused as in table 4: both adapters at the last strength, 1."""
        return list(self.fused.values())[-1]

    def drop(self) -> list[float]:
        """Improvement that fusing takes, a mean over domains, one a seed."""
        return [a - b for a, b in zip(means(self.single), means(self.main), strict=True)]

    def interaction(self) -> list[float]:
        """How far the fused improvement is from the sum of what both adapters do alone, one a seed."""
        parts = zip(means(self.single), means(self.other), means(self.main), strict=True)
        return [fused - single - other for single, other, fused in parts]

    def lost(self) -> list[float]:
        """The drop as a share of the improvement."""
        return [drop / single for drop, single in zip(self.drop(), means(self.single), strict=True)]


def means(improvements: Sequence[dict[str, float]]) -> list[float]:
    """Over domains, one a seed."""
    return [statistics.mean(improvement.values()) for improvement in improvements]


def rows(results: Results) -> list[Row]:
    base = results.base
    found = []
    for method in results.methods:
        pairs = [pair for seed in results.settings.seeds if (pair := results.pair(method, seed))]

        def improvements(state_of: Callable[[str], str], pairs: list[dict[str, Any]] = pairs) -> list[dict[str, float]]:
            return [{d: base[d] - pair["scores"][state_of(d)][d] for d in DOMAINS} for pair in pairs]

        other = dict(zip(DOMAINS, reversed(DOMAINS), strict=True))
        fused = {f"{s:g}": improvements(lambda _, s=s: f"{s:g}") for s in results.settings.strengths}  # type: ignore[misc]
        shared = [pair["shared"] for pair in pairs]
        found.append(
            Row(
                method.name,
                max(pairs[0]["trained"]),
                None if None in shared else statistics.mean(shared),
                improvements(lambda domain: domain),
                improvements(other.__getitem__),
                fused,
            )
        )
    return found


def write(results: Results, folder: Path, quick: bool, command: str) -> None:
    """Writes both files. Raises OSError."""
    table = rows(results)
    write_atomically(folder / "fusion.png", picture(table, results))
    write_atomically(folder / "report.md", markdown(table, results, quick, command).encode())


def _cell(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Mean and spread over seeds."""
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * study.spread(values):.{digits}f}"


def _of(improvements: list[dict[str, float]], domain: str) -> list[float]:
    return [improvement[domain] for improvement in improvements]


def markdown(table: list[Row], results: Results, quick: bool, command: str) -> str:
    """The report as Markdown."""
    s = results.settings
    lora = next(row for row in table if row.name == "LoRA")
    lines = ["# Two adapters in one model", ""]
    if quick:
        lines += ["**Made with --quick: two steps on little text. The numbers mean nothing.**", ""]
    lines += [
        "![improvement of each method, single and fused](fusion.png)",
        "",
        "Improvement over the base on held-out text, in bits per byte (more is better), "
        f"mean ± spread over {len(s.seeds)} seeds. Single: each adapter alone, on its own domain. "
        "Fused: both at strength 1.",
        "",
        "| method | single: C++ | prose | mean | fused: C++ | prose | mean | drop | drop, % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        cells = [
            *(_cell(_of(row.single, domain)) for domain in _TITLES),
            _cell(means(row.single)),
            *(_cell(_of(row.main, domain)) for domain in _TITLES),
            f"**{_cell(means(row.main))}**",
            _cell(row.drop()),
            _cell(row.lost(), 0, 100),
        ]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    base = ", ".join(f"{_TITLES[domain]} {score:.3f}" for domain, score in results.base.items())
    lines += [
        "",
        f"- The base has {base} bits per byte.",
        "- **drop**: single mean less fused mean; below zero, the domains help each other. **drop, %**: its share of "
        "the single mean.",
        "- **spread**: the standard deviation over seeds. A seed sets the order of the text, LoRA's start, and the "
        "texts that snip calibrates with; the held-out text is one.",
        "",
        "## SHiRA against LoRA",
        "",
        "Differences seed by seed, in thousandths of a bit per byte, mean ± standard deviation. One that is not larger "
        f"than its spread is called none; with {len(s.seeds)} seeds even a larger one is weak evidence.",
        "",
        "| | single | fused | drop avoided |",
        "|---|---|---|---|",
    ]
    for row in table:
        if row is not lora:
            pairs = (
                (means(row.single), means(lora.single)),
                (means(row.main), means(lora.main)),
                (lora.drop(), row.drop()),
            )
            verdicts = [study.verdict(a, b, scale=1000, digits=0, unit="mbit") for a, b in pairs]
            lines.append(f"| {row.name} | {' | '.join(verdicts)} |")
    overlapping, non_overlapping = (means(row.main) for row in table if row.name.startswith("SHiRA wm"))
    compared = study.verdict(non_overlapping, overlapping, scale=1000, digits=0, unit="mbit")
    lines += ["", f"wm fused, non-overlapping against overlapping: {compared}."]
    lines += ["", *_strengths(table), "", *_interference(table), "", *_paper(), "", *_tuning(results), ""]
    return "\n".join(lines + _conditions(results, table, command)) + "\n"


def _strengths(table: list[Row]) -> list[str]:
    strengths = list(table[0].fused)
    lines = [
        "## At other strengths",
        "",
        "Improvement of the fused model, mean over domains, both adapters at the same strength:",
        "",
        f"| method | {' | '.join(strengths)} |",
        f"|---|{'---:|' * len(strengths)}",
    ]
    for row in table:
        lines.append(f"| {row.name} | {' | '.join(_cell(means(fused)) for fused in row.fused.values())} |")
    return lines


def _interference(table: list[Row]) -> list[str]:
    lines = [
        "## What one adapter does to the other domain",
        "",
        "Improvement by the other domain's adapter alone (below zero: it harms). Interaction: the fused improvement "
        "less the sum of what both adapters do alone, mean over domains; below zero they hinder each other. Last, how "
        "many entries both train.",
        "",
        "| method | prose adapter on C++ | C++ adapter on prose | interaction | entries in common, % |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in table:
        cells = [*(_cell(_of(row.other, domain)) for domain in _TITLES), _cell(row.interaction())]
        common = "all are changed" if row.shared is None else f"{100 * row.shared:.0f}"
        lines.append(f"| {row.name} | {' | '.join(cells)} | {common} |")
    return lines


def _paper() -> list[str]:
    lines = [
        "## The paper's table 4",
        "",
        "A LLaMA of 7B weights, an adapter for each of BoolQ, PIQA and Arc-Easy, accuracy in %, mean over tasks:",
        "",
        "| method | single | fused | drop |",
        "|---|---:|---:|---:|",
    ]
    for name, (single, fused) in _PAPER.items():
        lines.append(f"| {name} | {single:.2f} | {fused:.2f} | {single - fused:.2f} |")
    return lines


def _tuning(results: Results) -> list[str]:
    lines = [
        "## Tuning",
        "",
        "Each adapter tried as many learning rates on the first seed; bits per byte on its own domain's validation "
        "part (less is better). Fused models were not tuned. The grids were placed by a few trials with another seed; "
        "the last rate of each was added when most C++ adapters had chosen the third. \\*: the best is an end of the "
        "grid; a better one may lie outside.",
        "",
        "| adapter | domain | learning rate: bits per byte |",
        "|---|---|---|",
    ]
    seen = set()
    for method in results.methods:
        for recipe, domain in zip(method.recipes, DOMAINS, strict=True):
            if (recipe, domain) in seen:
                continue
            seen.add((recipe, domain))
            best = results.best_lr(recipe, domain)
            cells = []
            for lr, score in results.trials(recipe, domain).items():
                edge = " \\*" * (lr in (recipe.learning_rates[0], recipe.learning_rates[-1]))
                cells.append(f"**{lr:g}: {score:.3f}**{edge}" if lr == best else f"{lr:g}: {score:.3f}")
            lines.append(f"| {recipe.name} | {_TITLES[domain]} | {', '.join(cells)} |")
    return lines


def _conditions(results: Results, table: list[Row], command: str) -> list[str]:
    from shira.cli.demo.base import CONTEXT

    s, conditions = results.settings, results.conditions
    versions = ", ".join(f"{name} {version}" for name, version in results.header["versions"].items())
    return [
        "## Conditions",
        "",
        f"    {command}",
        "",
        "- Base: the demonstration's byte-level Llama (3.1 M weights, hidden 256, 4 layers), trained on Python. "
        "Text: C++ headers of torch, and sentences from the descriptions, licences and notes of installed packages; "
        "documents are held out by a hash of their names, and a paragraph is kept once. Licences of one family "
        f"resemble each other across the parts. Checksum of the texts: {results.digest}.",
        f"- Up to {s.train_bytes / 1e6:g} MB to train on, {s.test_bytes} held-out bytes of each domain, "
        f"{s.validation_bytes} bytes for validation, in windows of {CONTEXT} bytes.",
        f"- Adapters: all linear layers, {max(row.trained for row in table):,} numbers each: LoRA of rank {s.rank} "
        f"(PEFT, alpha {s.rank}), SHiRA with {s.rank} (rows + columns) entries of each weight. wm, overlapping: both "
        "train the same largest weights; non-overlapping: prose trains the next largest. struct: rows at offset 0 and "
        f"1, the diagonal in both. snip: each ranks by {s.calibration_batches} batches of its own domain.",
        f"- {s.steps} steps of {s.batch} windows, Adam {s.betas}, no weight decay, {s.warmup:.0%} of the steps "
        "warm-up, then linear to zero.",
        "- SHiRA is fused by `ResidentAdapters.switch({cpp: s, prose: s})`, LoRA by PEFT's `add_weighted_adapter` with "
        'combination_type="cat": in both the result is the base and the sum of both deltas, times their strength.',
        f"- {conditions.get('cpu')}, {conditions.get('threads')} thread, {conditions.get('precision')}, scores too. "
        f"{versions}.",
    ]


def picture(table: list[Row], results: Results) -> bytes:
    """Left: each method's improvement, single and fused, a dot a seed. Right: the fused one by strength."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}):
        figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        _draw_fused(left, table)
        _draw_strengths(right, table)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _draw_fused(axes: Any, table: list[Row]) -> None:
    for place, row in enumerate(reversed(table)):
        colour = _COLOURS[row.name]
        single, fused = means(row.single), means(row.main)
        ends = statistics.mean(single), statistics.mean(fused)
        axes.annotate(
            "",
            (ends[1], place),
            (ends[0], place),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0},
        )
        for i, (a, b) in enumerate(zip(single, fused, strict=True)):
            y = place + 0.16 * (i - (len(single) - 1) / 2)
            axes.scatter([a], [y], s=30, facecolor="white", edgecolor=colour, zorder=3)
            axes.scatter([b], [y], s=30, color=colour, zorder=3)
        axes.text(ends[1], place + 0.3, f"{ends[1]:.3f}", color=colour, ha="center", va="bottom", fontweight="bold")
        axes.text(ends[0], place + 0.3, f"{ends[0]:.3f}", color=colour, ha="center", va="bottom")
    axes.set_yticks(range(len(table)), [row.name for row in reversed(table)])
    axes.set_ylim(-0.5, len(table) - 0.3)
    axes.axvline(0, color="#b8bcc0", linewidth=1)
    axes.grid(axis="x", color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("improvement over the base, bits per byte, mean of C++ and prose; a dot a seed")
    axes.set_title("Each adapter alone (hollow) and both in one model (filled)", loc="left", fontsize=10.5)


def _draw_strengths(axes: Any, table: list[Row]) -> None:
    for row in table:
        strengths = [float(strength) for strength in row.fused]
        values = [means(fused) for fused in row.fused.values()]
        axes.plot(strengths, [statistics.mean(v) for v in values], color=_COLOURS[row.name], label=row.name, marker="o")
    axes.set_xticks(strengths)
    axes.grid(color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.set_xlabel("strength of both adapters")
    axes.set_ylabel("improvement of the fused model")
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_title("Fused, by strength", loc="left", fontsize=10.5)
