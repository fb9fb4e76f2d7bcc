"""When fusing wins, as a picture, from the JSON of test_fused_or_unfused.

python bench/studies/unfused/report.py out.json -o PNG
"""

from __future__ import annotations

import argparse
import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

# cases is a folder of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases.bench_unfused import FUSED

from shira.files.atomic import write_atomically

_INK = "#303438"
Point = tuple[int, float, float, float]  # tokens; ratio of fused over unfused: median, and the middle half


def points_of(benchmarks: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """The points of each kind of block, in the order of tokens."""
    found: dict[str, list[Point]] = {"forwards of one token each": [], "one forward of all tokens": []}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if FUSED not in info["sides"]:
            continue
        side = info["sides"][FUSED]
        point = (info["tokens"], side["ratio"], *side["ratio_quartiles"])
        if info["forwards"] == info["tokens"]:
            found["forwards of one token each"].append(point)
        if info["forwards"] == 1:
            found["one forward of all tokens"].append(point)
    return {kind: sorted(points) for kind, points in found.items()}


def picture(found: dict[str, list[Point]], title: str) -> bytes:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (kind, points), colour in zip(found.items(), ("#2f6fb5", "#d9772b"), strict=True):
        tokens, ratios, lows, highs = (list(column) for column in zip(*points, strict=True))
        axes.plot(tokens, ratios, "o-", color=colour, label=kind)
        axes.fill_between(tokens, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1.0, color=_INK, linewidth=1)
    axes.text(0.99, 0.97, "unfused is faster", transform=axes.transAxes, ha="right", va="top", color=_INK)
    axes.text(0.99, 0.03, "fused is faster", transform=axes.transAxes, ha="right", va="bottom", color=_INK)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens that the block runs", color=_INK)
    axes.set_ylabel("time fused, switches included, over unfused", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    benchmarks = json.loads(arguments.json.read_text())["benchmarks"]
    found = points_of(benchmarks)
    if not all(found.values()):
        sys.exit(f"{arguments.json}: it has no cases of test_fused_or_unfused of both kinds")
    info = next(b["extra_info"] for b in benchmarks if FUSED in b["extra_info"]["sides"])
    title = f"A block that one adapter owns: 4 Llama layers, hidden 1024, {info['density']:.2%}, {info['dtype']}, "
    write_atomically(arguments.output, picture(found, title + info["place"]))


if __name__ == "__main__":
    main()
