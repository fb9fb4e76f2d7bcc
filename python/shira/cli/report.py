"""What `shira report` shows: how adapters interfere, as numbers, a picture and a page."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shira.adapter.adapter import Adapter
from shira.adapter.metrics import Interference, Overlap, as_deltas, energy_of, interference_of, overlap_of, pairs
from shira.files.atomic import write_atomically
from shira.files.checkpoint import Base
from shira.files.output import check_files_free
from shira.model.names import printable

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


@dataclass(frozen=True)
class Comparison:
    """How adapters interfere.

    Attributes:
        adapters: by name; of kind "add" if `has_deltas`.
        parts: (name, name) -> tensor -> their overlap; with `has_deltas` their interference.
        has_deltas: whether a base was there for all adapters that need one.
        notes: what is missing or doubtful, a sentence each.
    """

    adapters: dict[str, Adapter]
    parts: dict[tuple[str, str], dict[str, Overlap]]
    has_deltas: bool
    notes: list[str]

    def total(self, pair: tuple[str, str]) -> Overlap:
        """Of the whole adapters."""
        return sum(self.parts[pair].values(), Interference() if self.has_deltas else Overlap())

    @cached_property
    def tensors(self) -> list[str]:
        """All names, those of one kind together: they differ in nothing but numbers, and are ordered by these."""
        names = dict.fromkeys(name for parts in self.parts.values() for name in parts)
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(map(kind_of, names)))}
        return sorted(names, key=lambda name: (kinds[kind_of(name)], [int(n) for n in re.findall(r"\d+", name)]))

    @cached_property
    def spans(self) -> list[tuple[int, int, str]]:
        """Where in `tensors` those of each kind begin and end, and the kind."""
        spans, start = [], 0
        for kind, names in itertools.groupby(self.tensors, kind_of):
            end = start + len(list(names))
            spans.append((start, end, kind))
            start = end
        return spans

    def energies(self, name: str) -> dict[str, float]:
        """By tensor, the energy of an adapter's deltas."""
        by_name = {tensor: part for tensor, part, _ in pairs(self.adapters[name], Adapter({}))}
        return {tensor: energy_of(by_name.get(tensor)) for tensor in self.tensors}


def kind_of(name: str) -> str:
    """The tensor's name without numbers of layers: "layers.3.mlp.up_proj.weight" -> "layers.*.mlp.up_proj.weight"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def run_report(
    files: Sequence[Path], *, base: Path | None, output: Path, force: bool = False, console: Console | None = None
) -> Comparison:
    """Compares adapter files; writes `report.html` and `report.png` to `output`, and shows the sums.

    Raises:
        ValueError: a file is no valid adapter, the adapters do not belong together or to the base, or something that
            would be written is there and `force` is not given. Nothing was written then.
        OSError: something cannot be read or written.
    """
    if len(files) < 2:
        raise ValueError(f"two or more adapters are needed, got {len(files)}")
    stems = [file.stem for file in files]
    names = [printable(file.stem if stems.count(file.stem) == 1 else str(file)) for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"an adapter is given twice: {', '.join(names)}")
    check_files_free(output, ("report.html", "report.png"), [*files, *([base] if base else [])], force)
    adapters = {name: Adapter.load(file, base=base) for name, file in zip(names, files, strict=True)}

    progress_console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(
        *columns, console=progress_console, transient=True, disable=not progress_console.is_terminal
    ) as progress:
        task = progress.add_task("subtracting the base" if base else "", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        found = compare(adapters, base, show)
    output.mkdir(parents=True, exist_ok=True)
    write(found, output)
    _print_summary(found, output, console or Console())
    return found


def compare(
    adapters: Mapping[str, Adapter], base: Base | None, progress: Callable[[int, int, str], None] = lambda *_: None
) -> Comparison:
    """Compares each adapter with each other one.

    Without a base that some of them need to become deltas, there is only their overlap, and a note says so.

    Args:
        adapters: by name, at least two.
        base: as in `shira.awom`.
        progress: called before each tensor of each pair, with how many are done, how many there are, and which it is.

    Raises:
        ValueError: as in `shira.awom`.
        OSError: the base cannot be read.
    """
    notes = []
    needy = [name for name, adapter in adapters.items() if any(part.kind == "replace" for part in adapter.values())]
    has_deltas = not needy or base is not None
    if not has_deltas:
        notes.append(
            f"Only the overlap is known. AWOM, AWOR, conflicts of sign and energies need the base, --base: "
            f"{', '.join(needy)} {'holds' if len(needy) == 1 else 'hold'} tuned weights, not what they add to it."
        )
    else:
        found = {}
        for name, adapter in adapters.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found[name] = as_deltas(adapter, base)
            if caught:
                notes.append(f"Adapter {name}: {caught[0].message} ({len(caught)} of {len(adapter)} tensors).")
        adapters = found
    tasks = [
        ((a, b), tensor, first, second)
        for a, b in itertools.combinations(adapters, 2)
        for tensor, first, second in pairs(adapters[a], adapters[b])
    ]
    parts: dict[tuple[str, str], dict[str, Overlap]] = {pair: {} for pair in itertools.combinations(adapters, 2)}
    for done, (pair, tensor, first, second) in enumerate(tasks):
        progress(done, len(tasks), f"{' and '.join(pair)}: {tensor}")
        parts[pair][tensor] = interference_of(first, second) if has_deltas else overlap_of(first, second)
    return Comparison(dict(adapters), parts, has_deltas, notes)


def to_dict(found: Comparison) -> dict[str, Any]:
    """All numbers as JSON types."""
    adapters = {}
    for name, adapter in found.adapters.items():
        adapters[name] = {"tensors": len(adapter), "entries": adapter.nnz, "density": adapter.density}
        if found.has_deltas:
            adapters[name]["energy"] = sum(found.energies(name).values())
    return {
        "adapters": adapters,
        "pairs": [
            {"adapters": list(pair), **_numbers(found.total(pair))}
            | {"tensors": {name: _numbers(part) for name, part in parts.items()}}
            for pair, parts in found.parts.items()
        ],
        "notes": found.notes,
    }


def _numbers(part: Overlap) -> dict[str, Any]:
    numbers: dict[str, Any] = {"entries": list(part.entries), "common": part.common, "overlap": part.overlap}
    if isinstance(part, Interference):
        numbers |= {
            "awom": part.awom,
            "relative_awom": part.relative_awom,
            "awor": part.awor,
            "opposite": part.opposite,
            "sign_conflicts": part.sign_conflicts,
            "energy": list(part.energy),
        }
    return numbers


def _print_summary(found: Comparison, output: Path, console: Console) -> None:
    measures = _measures(found)
    table = Table(*["pair", *(measure.title for measure in measures)], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for pair in found.parts:
        total = found.total(pair)
        cells = [measure.text(measure.of(total)) if measure.known(total) else "-" for measure in measures]
        table.add_row(escape_markup(", ".join(pair)), *cells)
    console.print(table)
    for note in found.notes:
        console.print(note, markup=False, highlight=False)
    written = printable(f"{output / 'report.html'}, {output / 'report.png'}")
    console.print(written, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Measure:
    """A column of the tables, a panel of the picture."""

    attribute: str
    title: str
    meaning: str
    percent: bool = True

    def of(self, part: Overlap) -> float:
        value: float = getattr(part, self.attribute)
        return value

    def text(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"

    def known(self, part: Overlap) -> bool:
        """Whether the value means something: not where there is nothing to compare."""
        return part.common > 0 if self.attribute == "sign_conflicts" else all(part.entries)


_OVERLAP = _Measure(
    "overlap", "Overlap", "of the entries that at least one adapter changes, the share that both change"
)
_AWOM = _Measure("awom", "AWOM", "the norm of A1^T A2: 0 is orthogonal; it grows with the energies", percent=False)
_RELATIVE = _Measure(
    "relative_awom",
    "Relative AWOM",
    "AWOM over the largest that deltas of these energies can have, so that strong and weak adapters compare",
)
_AWOR = _Measure("awor", "AWOR", "the share of zeros in A1^T A2: 100 % is orthogonal")
_CONFLICTS = _Measure("sign_conflicts", "Conflicts of sign", "of the common entries, the share with opposite signs")
_SHARES = (_OVERLAP, _AWOR, _CONFLICTS)  # their bars and colours end at 100 %, those of others at the largest
_DELTA_MEASURES = (_AWOM, _RELATIVE, _AWOR, _CONFLICTS)


def _measures(found: Comparison) -> tuple[_Measure, ...]:
    return (_OVERLAP, *_DELTA_MEASURES) if found.has_deltas else (_OVERLAP,)


def write(found: Comparison, folder: Path) -> None:
    """Writes report.png and report.html, which holds the picture too. Raises OSError."""
    image = picture(found)
    write_atomically(folder / "report.png", image)
    write_atomically(folder / "report.html", page(found, image).encode())


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #303438; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e5e8; white-space: nowrap; }
th { position: sticky; top: 0; background: white; border-bottom: 2px solid #b8bcc0; }
th:first-child, td:first-child { text-align: left; }
td.bar { background: linear-gradient(to right, #cfe0f2 var(--share), transparent var(--share)); }
td.none { color: #9aa0a6; }
.scroll { overflow: auto; max-height: 34rem; }
.note { background: #fdf3e7; border-left: 4px solid #d9772b; padding: .6rem 1rem; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1.2rem; }
"""


def page(found: Comparison, image: bytes) -> str:
    """The comparison as one HTML page that needs no other file."""
    names = list(found.adapters)
    measures = _measures(found)
    title = f"Interference of {', '.join(names)}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in found.notes),
        "<h2>Adapters</h2>",
        _adapter_table(found),
        "<h2>Whole adapters, pair by pair</h2>",
        _table("pair", {", ".join(pair): found.total(pair) for pair in found.parts}, (), measures),
        "<dl>",
        *(f"<dt>{m.title}</dt><dd>{escape(m.meaning[0].upper() + m.meaning[1:])}.</dd>" for m in measures),
        "</dl>",
        "<h2>Picture</h2>",
        f'<img alt="matrices of all measures, and their values tensor by tensor" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">',
        "<h2>Tensor by tensor</h2>",
    ]
    for pair in found.parts:
        rows = {name: found.parts[pair][name] for name in found.tensors if name in found.parts[pair]}
        parts += [
            f"<details{' open' * (len(found.parts) == 1)}><summary>{escape(' and '.join(pair))}</summary>",
            f'<div class="scroll">{_table("tensor", rows, pair, measures)}</div></details>',
        ]
    return "\n".join([*parts, "</body></html>", ""])


def _adapter_table(found: Comparison) -> str:
    head = ["adapter", "tensors", "entries", "density", *["energy"] * found.has_deltas]
    rows = []
    for name, adapter in found.adapters.items():
        cells = [str(len(adapter)), f"{adapter.nnz:,}", f"{adapter.density:.3%}"]
        cells += [f"{sum(found.energies(name).values()):.4g}"] * found.has_deltas
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{''.join(rows)}</table>"


def _table(first: str, rows: Mapping[str, Overlap], pair: Sequence[str], measures: Sequence[_Measure]) -> str:
    """A row of each part: common entries and all measures; if all are of one `pair`, also what either adapter has."""
    energies = [f"energy of {name}" for name in pair] if len(measures) > 1 else []
    head = [first, *(f"entries of {name}" for name in pair), "common", *(m.title for m in measures), *energies]
    tops = {m: max((m.of(part) for part in rows.values() if m.known(part)), default=0.0) for m in measures}
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for name, part in rows.items():
        cells = [f"<td>{count:,}</td>" for count in (*(part.entries if pair else ()), part.common)]
        for measure in measures:
            value, top = measure.of(part), 1.0 if measure in _SHARES else tops[measure] or 1.0
            cells.append(
                f'<td class="bar" style="--share:{100 * value / top:.1f}%">{measure.text(value)}</td>'
                if measure.known(part)
                else '<td class="none">-</td>'
            )
        if energies and isinstance(part, Interference):
            cells += [f"<td>{energy:.4g}</td>" for energy in part.energy]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f"<table>{chr(10).join(lines)}</table>"


def picture(found: Comparison) -> bytes:
    """The comparison as a PNG: matrices of whole adapters, below them a panel of each measure over the tensors."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measures = _measures(found)
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
    labels = 0.03 * max(len(_label(kind)) for *_, kind in found.spans)
    heights = [1.4 + 0.36 * max(3, len(found.adapters)), *[1.55] * panels]
    with rc_context(style):
        figure = Figure(figsize=(13, sum(heights) + 0.9 + labels), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(1 + panels, 1, height_ratios=heights, hspace=0.06)
        row = grid[0].subgridspec(1, 1 + len(_DELTA_MEASURES), wspace=0.08)
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


def _draw_matrix(axes: Any, found: Comparison, measure: _Measure) -> None:
    names = list(found.adapters)
    values = {pair: measure.of(found.total(pair)) for pair in found.parts}
    top = 1.0 if measure in _SHARES else max(values.values()) or 1.0
    cells = [[float("nan")] * len(names) for _ in names]
    for (a, b), value in values.items():
        i, j = names.index(a), names.index(b)
        cells[i][j] = cells[j][i] = value
        text = measure.text(value).removesuffix(" %") if len(names) <= _NUMBERED else ""
        for x, y in ((i, j), (j, i)):
            colour = "white" if value > 0.6 * top else _INK
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9 if len(names) <= 3 else 7)
    axes.imshow(cells, cmap="Greens" if measure is _AWOR else "Blues", vmin=0, vmax=top * 1.15, aspect="auto")
    axes.set_facecolor("#f1f2f4")
    short = [name if len(name) <= 16 else name[:15] + "\N{HORIZONTAL ELLIPSIS}" for name in names]
    across = max(map(len, short)) * len(short) <= 30  # characters
    axes.set_xticks(range(len(names)), short, rotation=0 if across else 90)
    axes.set_yticks(range(len(names)), short if measure is _OVERLAP else [""] * len(names))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(measure.title + ", %" * measure.percent)


def _draw_tensors(axes: Any, found: Comparison, measure: _Measure) -> None:
    tensors = found.tensors
    for i, ((a, b), parts) in enumerate(found.parts.items()):
        points = {
            x: measure.of(parts[name]) for x, name in enumerate(tensors) if name in parts and measure.known(parts[name])
        }
        _draw_line(axes, found, points, i, f"{a}, {b}")
    axes.set_title(measure.title)
    if measure.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    top = max([axes.dataLim.y1, 0.001] if axes.has_data() else [1.0])
    axes.set_ylim(-0.05 * top, 1.08 * top)
    if measure is _OVERLAP and 1 < len(found.parts) <= len(_COLOURS):
        axes.legend(frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)


def _draw_energies(axes: Any, found: Comparison) -> None:
    for i, name in enumerate(found.adapters):
        points = {x: energy for x, energy in enumerate(found.energies(name).values()) if energy}
        _draw_line(axes, found, points, -1 - i, name)
    if axes.dataLim.y1 > 0:  # else nothing was drawn
        axes.set_yscale("log")
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
    """What tells kinds apart: "model.layers.*.mlp.up_proj.weight" -> "mlp.up_proj"."""
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
