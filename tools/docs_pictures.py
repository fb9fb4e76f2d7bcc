"""Draws the pictures of README.md and docs/architecture.md as SVG, light and dark: `python tools/docs_pictures.py`.

Times come from the reports in bench/results/, so a picture shows nothing that was not measured; a test draws them again
and compares.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs/images"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Colours:
    """Of one of the two appearances."""

    ground: str
    text: str
    faint: str  # further text, arrows
    cell: str  # a weight of the base
    new: str  # a weight that an adapter overwrites; our bars
    other: str  # bars of others
    box: str


THEMES = {
    "light": Colours("#ffffff", "#1f2328", "#59636e", "#d8dee4", "#3f51b5", "#afb8c1", "#f3f5f8"),
    "dark": Colours("#0d1117", "#e6edf3", "#9198a1", "#30363d", "#8c9eff", "#59636e", "#161b22"),
}


class Drawing:
    """An SVG that grows; sizes are in pixels of its own width."""

    def __init__(self, width: int, height: int, colours: Colours, title: str) -> None:
        self.colours = colours
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="{SANS}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{colours.ground}"/>',
        ]

    def text(
        self, x: float, y: float, words: str, size: float = 14, *, anchor: str = "start", faint: bool = False,
        mono: bool = False, bold: bool = False,
    ) -> None:  # fmt: skip
        style = f' font-family="{MONO}"' if mono else ""
        style += ' font-weight="600"' if bold else ""
        colour = self.colours.faint if faint else self.colours.text
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{style}>'
            f"{escape(words, quote=False)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str, radius: float = 2) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{colour}"/>'
        )

    def cells(self, x: float, y: float, side: int, pitch: float, gap: float) -> None:
        """A square of `side` x `side` cells, each `pitch - gap` wide."""
        name = f"cells-{x:g}"
        self._parts.append(
            f'<pattern id="{name}" x="{x:g}" y="{y:g}" width="{pitch:g}" height="{pitch:g}" '
            f'patternUnits="userSpaceOnUse"><rect width="{pitch - gap:g}" height="{pitch - gap:g}" rx="1" '
            f'fill="{self.colours.cell}"/></pattern>'
        )
        self.box(x, y, side * pitch - gap, side * pitch - gap, f"url(#{name})", 0)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with its head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = max(abs(x1 - x0), abs(y1 - y0))
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        head = (
            f"M{x1:g} {y1:g} L{x1 - 8 * dx - 4 * dy:g} {y1 - 8 * dy - 4 * dx:g} "
            f"L{x1 - 8 * dx + 4 * dy:g} {y1 - 8 * dy + 4 * dx:g} Z"
        )
        colour = self.colours.faint
        self._parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        self._parts.append(f'<path d="{head}" fill="{colour}"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


# --- README: what a switch is, and how long it takes


@dataclass(frozen=True)
class Bar:
    side: str
    ms: float
    ours: bool


def recorded(report: str, heading: str, case: str, sides: dict[str, str]) -> list[Bar]:
    """Medians of one case of a report: the sides that `sides` names, under the names that it gives them."""
    text = (ROOT / "bench/results" / report / "report.md").read_text()
    section = text.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    found: dict[str, float] = {}
    current = ""
    for line in section.splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if len(cells) < 4:
            continue
        current = cells[0] or current
        time = re.fullmatch(r"([\d.]+) (us|ms)", cells[3])
        if current.endswith(case) and time:
            found[cells[1]] = float(time[1]) / (1000 if time[2] == "us" else 1)
    return [Bar(shown, found[side], i == 0) for i, (side, shown) in enumerate(sides.items())]


def panels() -> list[tuple[str, list[Bar]]]:
    """What the bars of README show."""
    return [
        (
            "from A to B, 4 Llama layers, hidden 1024, 1 %",
            recorded(
                "switching", "From adapter A to B (4 Llama layers", "cpu, 1 thread, bfloat16",
                {"SHiRA (ours)": "SHiRA, ours", "SHiRA (PEFT)": "SHiRA, PEFT", "LoRA (PEFT)": "LoRA, PEFT"},
            ),
        ),
        (
            "into one weight, 4096 x 4096, 2 %",
            recorded(
                "cpu", "Switch one weight (4096 x 4096, 2 %, cold)", "cpu, 1 thread, bfloat16",
                {
                    "scatter_apply": "SHiRA, ours",
                    "index_copy_": "index_copy_",
                    "LoRA addmm_, rank 64": "LoRA, addmm_",
                    "LoRA W += B @ A, rank 64": "LoRA, W += B @ A",
                },
            ),
        ),
    ]  # fmt: skip


def switch_picture(colours: Colours) -> str:
    """Base weights, 1 % overwritten, the way back; beside them how long a switch takes."""
    drawing = Drawing(960, 288, colours, "A switch overwrites 1 % of the weights, and takes milliseconds")
    changed = [(14, 3), (3, 8), (10, 12), (16, 17)]  # 4 of 20 x 20 cells
    side, pitch, top = 20, 7.8, 64
    width = side * pitch - 1.8
    for number, (title, below) in enumerate(
        [("base", "as it was loaded"), ("blue", "1 % overwritten"), ("base", "the same, bit for bit")]
    ):
        left = 28 + number * 216
        drawing.text(left + width / 2, 46, title, 15, anchor="middle", bold=True)
        drawing.cells(left, top, side, pitch, 1.8)
        for column, row in changed if number == 1 else []:
            drawing.box(left + column * pitch, top + row * pitch, pitch - 1.8, pitch - 1.8, colours.new, 1)
        drawing.text(left + width / 2, top + width + 24, below, 13, anchor="middle", faint=True)
    for left, target in ((188, '"blue"'), (404, "None")):
        drawing.text(left + 25, top + width / 2 - 26, "switch", 12, anchor="middle", mono=True)
        drawing.text(left + 25, top + width / 2 - 11, f"({target})", 12, anchor="middle", mono=True)
        drawing.arrow((left + 6, top + width / 2), (left + 46, top + width / 2))
    _bars(drawing, 652, 296)
    return drawing.svg()


def _bars(drawing: Drawing, left: float, width: float) -> None:
    colours = drawing.colours
    drawing.text(left, 26, "Time of a switch, ms", 15, bold=True)
    y = 48.0
    for title, bars in panels():
        drawing.text(left, y, title, 12.5, faint=True)
        y += 10
        longest = max(bar.ms for bar in bars)
        for bar in bars:
            drawing.text(left + 116, y + 13, bar.side, 13, anchor="end", bold=bar.ours)
            length = max(2.0, (width - 116 - 62) * bar.ms / longest)
            drawing.box(left + 124, y + 2, length, 14, colours.new if bar.ours else colours.other)
            drawing.text(left + 130 + length, y + 13, f"{bar.ms:.3g}", 13, bold=bar.ours)
            y += 21
        y += 22
    drawing.text(left, 272, "bfloat16, one CPU thread, cold; bench/results/", 12, faint=True)


# --- docs/architecture.md: what imports what

_FLOORS = (  # from the top; each imports from those below it only
    (("cli", "the only place that prints"),),
    (("integrations", "one file for each host"),),
    (("convert", "other tools' formats"), ("sync", "weight patches to engines (to come)")),
    (("training", "entries as parameters"), ("serving", "adapters beside a live model")),
    (("adapter", "data, file, base, arithmetic"),),
    (("masks", "which entries"),),
    (("model", "names, users, owners of weights"),),
    (("files", "whole or not at all"),),
)
_KERNELS = (
    ("shira_kernels", "torch.ops.shira: schemas, checks, reference, Triton, choice of a kernel"),
    ("shira_kernels._C", "csrc/: C++ and CUDA C++, by libtorch's stable ABI"),
)


def architecture_picture(colours: Colours) -> str:
    """The rooms of python/shira, floor on floor, over the kernels."""
    drawing = Drawing(760, 560, colours, "The rooms of python/shira, each importing from below, over the kernels")
    left, width, height, gap = 24, 640, 40, 9
    y = 24.0
    for floor in _FLOORS:
        each = (width - gap * (len(floor) - 1)) / len(floor)
        for number, (name, meaning) in enumerate(floor):
            x = left + number * (each + gap)
            drawing.box(x, y, each, height, colours.box, 5)
            drawing.text(x + 14, y + 25, name, 14.5, mono=True, bold=True)
            drawing.text(x + each - 14, y + 25, meaning, 13, anchor="end", faint=True)
        y += height + gap
    bottom = y - gap
    drawing.arrow((left + width + 22, 26), (left + width + 22, bottom))
    drawing.text(left + width + 34, 50, "imports", 12.5, faint=True)
    drawing.text(left, y + 16, "python/shira", 12.5, faint=True)
    y += 32
    for name, meaning in _KERNELS:
        drawing.box(left, y, width, height, colours.cell, 5)
        drawing.text(left + 14, y + 25, name, 14.5, mono=True, bold=True)
        drawing.text(left + width - 14, y + 25, meaning, 13, anchor="end")
        y += height + gap
    return drawing.svg()


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    return {
        f"{name}-{theme}.svg": draw(colours)
        for theme, colours in THEMES.items()
        for name, draw in (("switch", switch_picture), ("architecture", architecture_picture))
    }


def main() -> int:
    for name, svg in pictures().items():
        (IMAGES / name).write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
