"""A comparison as a PNG."""

from __future__ import annotations

import io
import math
from typing import Any

from shira.cli.report.compare import Comparison
from shira.cli.report.measures import AWOR, DELTA_MEASURES, OVERLAP, SHARES, Measure, measures_of

_INK = "#303438"
_COLOURS = (
    "#2f6fb5",
    "#d9772b",
    "#1d8a74",
    "#b0457b",
    "#7d6aa8",
    "#a3852a",
    "#4aa3c7",
    "#8c564b",
    "#6b8e23",
    "#c44e52",
)
_NUMBERED = 7  # adapters: the matrices of more have no numbers
_MANY_KINDS = 28  # of tensors: more have no names in the picture


def picture(found: Comparison) -> bytes:
    """The comparison as a PNG: matrices of whole adapters, below them a panel of each measure over the tensors."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measures = measures_of(found)
    style = {
        "text.parse_math": False,  # names may have dollars
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": "#b8bcc0",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    panels = len(measures) + found.has_deltas
    labels = 0.03 * max((len(_label(kind)) for *_, kind in found.spans), default=0)
    heights = [1.4 + 0.36 * max(3, len(found.adapters)), *[1.55] * panels]
    with rc_context(style):
        figure = Figure(figsize=(13, sum(heights) + 0.9 + labels), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(1 + panels, 1, height_ratios=heights, hspace=0.06)
        row = grid[0].subgridspec(1, 1 + len(DELTA_MEASURES), wspace=0.08)
        for i, measure in enumerate(measures):
            _draw_matrix(figure.add_subplot(row[i]), found, measure)
        first = None
        for i in range(panels):
            axes = figure.add_subplot(grid[1 + i], sharex=first)
            first = first or axes
            if i < len(measures):
                _draw_tensors(axes, found, measures[i])
            else:
                _draw_energies(axes, found)
            _mark_kinds(axes, found, last=i == panels - 1)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_matrix(axes: Any, found: Comparison, measure: Measure) -> None:
    names = list(found.adapters)
    values = {pair: measure.of(found.total(pair)) for pair in found.overlaps}
    top = 1.0 if measure in SHARES else max(values.values()) or 1.0
    cells = [[float("nan")] * len(names) for _ in names]
    for (a, b), value in values.items():
        i, j = names.index(a), names.index(b)
        cells[i][j] = cells[j][i] = value
        text = measure.text(value).removesuffix(" %") if len(names) <= _NUMBERED else ""
        for x, y in ((i, j), (j, i)):
            colour = "white" if value > 0.6 * top else _INK
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9 if len(names) <= 3 else 7)
    axes.imshow(cells, cmap="Greens" if measure is AWOR else "Blues", vmin=0, vmax=top * 1.15, aspect="auto")
    axes.set_facecolor("#f1f2f4")
    short = [name if len(name) <= 16 else name[:15] + "\N{HORIZONTAL ELLIPSIS}" for name in names]
    across = max(map(len, short)) * len(short) <= 30  # characters
    axes.set_xticks(range(len(names)), short, rotation=0 if across else 90)
    axes.set_yticks(range(len(names)), short if measure is OVERLAP else [""] * len(names))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(measure.title + ", %" * measure.percent)


def _draw_tensors(axes: Any, found: Comparison, measure: Measure) -> None:
    tensors = found.tensors
    for i, ((a, b), overlaps) in enumerate(found.overlaps.items()):
        points = {
            x: measure.of(overlaps[name])
            for x, name in enumerate(tensors)
            if name in overlaps and measure.known(overlaps[name])
        }
        _draw_line(axes, found, points, i, f"{a}, {b}")
    axes.set_title(measure.title)
    if measure.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    top = max([axes.dataLim.y1, 0.001] if axes.has_data() else [1.0])
    axes.set_ylim(-0.05 * top, 1.08 * top)
    if measure is OVERLAP and 1 < len(found.overlaps) <= len(_COLOURS):
        axes.legend(frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)


def _draw_energies(axes: Any, found: Comparison) -> None:
    for i, name in enumerate(found.adapters):
        points = {x: energy for x, energy in enumerate(found.energies(name).values()) if energy}
        _draw_line(axes, found, points, -1 - i, name)
    if axes.dataLim.y1 > 0:  # else nothing was drawn
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the scale's own is TeX, which would be shown as it is
    axes.set_title("Energy of the deltas (sum of squares)")
    axes.legend(frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)


def _draw_line(axes: Any, found: Comparison, points: dict[int, float], i: int, label: str) -> None:
    """A dot for each tensor, and a line through those of one kind."""
    xs: list[float] = []
    ys: list[float] = []
    for start, end, _ in found.spans:
        places = [x for x in range(start, end) if x in points]
        xs += [*places, math.nan]
        ys += [*(points[x] for x in places), math.nan]
    size = 4 if len(found.tensors) <= 60 else 2.5
    axes.plot(xs, ys, "o-", color=_COLOURS[i % len(_COLOURS)], linewidth=0.8, markersize=size, mew=0, label=label)


def _label(kind: str) -> str:
    """The end of a kind, which tells it from others: "model.layers.*.mlp.up_proj.weight" -> "mlp.up_proj"."""
    return kind.rpartition("*.")[2].removesuffix(".weight")


def _mark_kinds(axes: Any, found: Comparison, last: bool) -> None:
    spans = found.spans
    for i, (start, end, _) in enumerate(spans):
        if i % 2:
            axes.axvspan(start - 0.5, end - 0.5, color="#f4f5f7", zorder=0, linewidth=0)
    axes.set_xlim(-0.7, len(found.tensors) - 0.3)
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0, labelbottom=last)
    if len(spans) > _MANY_KINDS:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(found.tensors)} tensors, in the order of the tables" if last else "")
    else:
        axes.set_xticks(
            [(start + end - 1) / 2 for start, end, _ in spans],
            [_label(kind) for *_, kind in spans],
            rotation=20 if len(spans) > 4 else 0,
            ha="right" if len(spans) > 4 else "center",
            rotation_mode="anchor",
        )
        axes.set_xlabel(
            f"{len(found.tensors)} tensors by kind, those of a kind from the first layer to the last" if last else ""
        )
