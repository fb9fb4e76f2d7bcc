"""A comparison as one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from shira.adapter.metrics import Interference, Overlap
from shira.cli.report.compare import Comparison
from shira.cli.report.measures import SHARES, Measure, measures_of

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
    measures = measures_of(found)
    title = f"Interference of {', '.join(names)}"
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in found.notes),
        "<h2>Adapters</h2>",
        _adapter_table(found),
        "<h2>Whole adapters, pair by pair</h2>",
        _table("pair", {", ".join(pair): found.total(pair) for pair in found.overlaps}, (), measures),
        "<dl>",
        *(f"<dt>{m.title}</dt><dd>{escape(m.meaning[0].upper() + m.meaning[1:])}.</dd>" for m in measures),
        "</dl>",
        "<h2>Picture</h2>",
        f'<img alt="matrices of all measures, and their values tensor by tensor" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">',
        "<h2>Tensor by tensor</h2>",
    ]
    for pair in found.overlaps:
        rows = {name: found.overlaps[pair][name] for name in found.tensors if name in found.overlaps[pair]}
        lines += [
            f"<details{' open' * (len(found.overlaps) == 1)}><summary>{escape(' and '.join(pair))}</summary>",
            f'<div class="scroll">{_table("tensor", rows, pair, measures)}</div></details>',
        ]
    return "\n".join([*lines, "</body></html>", ""])


def _adapter_table(found: Comparison) -> str:
    head = ["adapter", "tensors", "entries", "density", *["energy"] * found.has_deltas]
    rows = []
    for name, adapter in found.adapters.items():
        cells = [str(len(adapter)), f"{adapter.nnz:,}", f"{adapter.density:.3%}"]
        cells += [f"{sum(found.energies(name).values()):.4g}"] * found.has_deltas
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{''.join(rows)}</table>"


def _table(first: str, rows: Mapping[str, Overlap], pair: Sequence[str], measures: Sequence[Measure]) -> str:
    """A row for each overlap: common entries and all measures; of one `pair` of adapters also what each of them has."""
    energies = [f"energy of {name}" for name in pair] if len(measures) > 1 else []
    head = [first, *(f"entries of {name}" for name in pair), "common", *(m.title for m in measures), *energies]
    tops = {m: max((m.of(overlap) for overlap in rows.values() if m.known(overlap)), default=0.0) for m in measures}
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for name, overlap in rows.items():
        cells = [f"<td>{count:,}</td>" for count in (*(overlap.entries if pair else ()), overlap.common)]
        for measure in measures:
            value, top = measure.of(overlap), 1.0 if measure in SHARES else tops[measure] or 1.0
            cells.append(
                f'<td class="bar" style="--share:{100 * value / top:.1f}%">{measure.text(value)}</td>'
                if measure.known(overlap)
                else '<td class="none">-</td>'
            )
        if energies and isinstance(overlap, Interference):
            cells += [f"<td>{energy:.4g}</td>" for energy in overlap.energy]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f"<table>{chr(10).join(lines)}</table>"
