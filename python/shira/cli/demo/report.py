"""The demonstration's report: `report.md` and `report.png`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from shira.cli.demo.results import Results
from shira.files.atomic import write_atomically

_COLOURS = {"base": "#9aa0a6", "cpp": "#2f6fb5", "prose": "#d9772b"}
_INK = "#303438"
_SMOOTHING = 5  # batches


def write(results: Results, folder: Path) -> None:
    """Writes both files. Raises OSError."""
    write_atomically(folder / "report.png", picture(results))
    write_atomically(folder / "report.md", markdown(results).encode())


def printable(text: str) -> str:
    """Text without control characters, which a terminal or a page would act on."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in text.expandtabs(4))


def change(results: Results, state: str, domain: str) -> float:
    """Relative change of the bits per byte against the base."""
    return results.bpb[state][domain] / results.bpb["base"][domain] - 1


def markdown(results: Results) -> str:
    """The report as Markdown."""
    domains = list(results.bpb["base"])
    lines = [
        "# Two sparse adapters on one model",
        "",
        "![bits per byte, training curves, and times](report.png)",
        "",
        "## Held-out bits per byte",
        "",
        f"| weights | {' | '.join(domains)} |",
        f"|---|{'---:|' * len(domains)}",
    ]
    for state, scores in results.bpb.items():
        cells = [
            f"{scores[d]:.3f}" + ("" if state == "base" else f" ({change(results, state, d):+.1%})") for d in domains
        ]
        lines.append(f"| {state} | {' | '.join(cells)} |")
    count = len(results.switch_seconds)
    equal = "the same bytes" if results.base_bytes_equal else "OTHER BYTES"
    lines += [
        "",
        "## Adapters",
        "",
        *(f"- `{name}.safetensors`: {text}" for name, text in results.adapters.items()),
        "",
        "## Switching",
        "",
        f"Medians of {count}, in turn, on one thread, all adapted weights of the model:",
        "",
        "| | ms |",
        "|---|---:|",
        f"| switch from one adapter to the other | {results.switch_ms:.3f} |",
        f"| fuse one LoRA of the same size, `W.addmm_(B, A)` | {results.lora_fuse_ms:.3f} |",
        "",
        "A switch takes the old adapter out and writes the new one; taking the old LoRA out would be another fuse.",
        "",
        f"After all training and switches the base has {equal} as before (SHA-256 over all weights).",
        "",
        "## Generated text",
    ]
    for state, sample in results.samples.items():
        # Indented, because no fence is safe around text that may hold any.
        lines += ["", f"With {state}:", "", *(f"    {line}" for line in printable(sample).split("\n"))]
    lines += ["", f"Made in {results.seconds:.0f} s."]
    return "\n".join(lines) + "\n"


def picture(results: Results) -> bytes:
    """The report as a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": 10,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#b8bcc0",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with rc_context(style):
        figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1], hspace=0.08, wspace=0.06)
        _draw_scores(figure.add_subplot(grid[0, :]), results)
        _draw_curves(figure.add_subplot(grid[1, 0]), results)
        _draw_times(figure.add_subplot(grid[1, 1]), results)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _draw_scores(axes: Any, results: Results) -> None:
    states, domains = list(results.bpb), list(results.bpb["base"])
    width = 0.26
    top = max(max(scores.values()) for scores in results.bpb.values())
    for i, state in enumerate(states):
        places = [j + (i - (len(states) - 1) / 2) * (width + 0.02) for j in range(len(domains))]
        heights = [results.bpb[state][domain] for domain in domains]
        label = "base" if state == "base" else f"{state} adapter"
        axes.bar(places, heights, width, color=_COLOURS[state], label=label)
        for place, height, domain in zip(places, heights, domains, strict=True):
            text = f"{height:.2f}"
            if state != "base":
                text += f"\n{change(results, state, domain):+.0%}"
            weight = "bold" if state == domain else "normal"
            axes.text(place, height + top * 0.015, text, ha="center", va="bottom", fontsize=9, fontweight=weight)
    titles = {"python": "Python (what the base knows)", "cpp": "C++ headers", "prose": "English prose"}
    axes.set_xticks(range(len(domains)), [titles[domain] for domain in domains])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, top * 1.17)
    axes.set_ylabel("bits per byte")
    axes.set_title("Held-out text: bits per byte, less is better")
    axes.legend(frameon=False, ncols=len(states), loc="lower right", bbox_to_anchor=(1, 1))


def _draw_curves(axes: Any, results: Results) -> None:
    for name, curve in results.curves.items():
        smooth = [
            sum(part) / len(part) for part in (curve[max(0, i + 1 - _SMOOTHING) : i + 1] for i in range(len(curve)))
        ]
        steps = range(1, len(curve) + 1)
        axes.plot(steps, curve, color=_COLOURS[name], alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color=_COLOURS[name], linewidth=2)
        axes.annotate(
            name, (len(curve), smooth[-1]), (6, 0), textcoords="offset points", color=_COLOURS[name], va="center"
        )
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per byte")
    axes.set_title("Training, 1 % of the weights")


def _draw_times(axes: Any, results: Results) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = (
        (results.lora_fuse_seconds, "fuse a LoRA\nof the same size", "#7d6aa8", results.lora_fuse_ms),
        (results.switch_seconds, "switch\nadapters", "#1d8a74", results.switch_ms),
    )
    for y, (seconds, _, colour, median) in enumerate(rows):
        spread = [y + ((i * 0.618) % 1 - 0.5) * 0.34 for i in range(len(seconds))]
        axes.scatter([s * 1e3 for s in seconds], spread, s=9, color=colour, alpha=0.35, linewidths=0)
        axes.plot([median, median], [y - 0.26, y + 0.26], color=colour, linewidth=2.5)
        axes.text(median, y + 0.3, f"{median:.2g} ms", ha="center", va="bottom", color=colour, fontweight="bold")
    axes.set_xscale("log")
    times = [s * 1e3 for seconds, *_ in rows for s in seconds]
    axes.set_xlim(min(times) / 1.6, max(times) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.5, 1.7)
    axes.set_yticks([0, 1], [label for _, label, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms, one thread, whole model (log scale)")
    axes.set_title(f"Switching: medians of {len(results.switch_seconds)}, taken in turn")
