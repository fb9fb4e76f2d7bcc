"""report.md and figure4.png of run.py, from its results."""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path
from typing import Any

from shira.files.atomic import write_atomically

_COLOURS = {"dense": "#3c4043", "sparse LoRA": "#2f6fb5", "SHiRA-WM": "#d9772b", "SHiRA-Struct": "#1d8a74"}
_INK = "#303438"
_LINES = {None: "-", 0.01: "-", 0.02: "--"}
Row = dict[str, Any]


def write(results: dict[str, Any], folder: Path, quick: bool) -> None:
    """Writes both files. Raises OSError."""
    write_atomically(folder / "figure4.png", picture(results))
    write_atomically(folder / "report.md", markdown(results, quick).encode())


def label(row: Row) -> str:
    return row["design"] if row["density"] is None else f"{row['design']}, {row['density']:.0%}"


def find(results: dict[str, Any], design: str, size: int, density: float | None = None) -> Row:
    (row,) = (
        row
        for row in results["rows"]
        if (row["design"], row["size"], row["density"]) == (design, size, None if design == "dense" else density)
    )
    return row


def mean(row: Row, field: str) -> float:
    return statistics.mean(row[field])


def cell(row: Row, field: str, percent: bool) -> str:
    """Mean and standard deviation over draws."""
    values = [100 * value for value in row[field]] if percent else row[field]
    average, spread = statistics.mean(values), statistics.stdev(values)
    return f"{average:.2f} ± {spread:.2f}" if percent else f"{average:.4g} ± {spread:.2g}"


def markdown(results: dict[str, Any], quick: bool) -> str:
    """The report as Markdown."""
    sizes = sorted({row["size"] for row in results["rows"]})
    top = [row for row in results["rows"] if row["size"] == sizes[-1]]
    lines = ["# Interference of random adapters: Figure 4 of the paper", ""]
    if quick:
        lines += ["**Made with --quick: small sizes, few draws. The paper speaks of other sizes.**", ""]
    lines += [
        "![AWOM, AWOR and relative AWOM by size](figure4.png)",
        "",
        f"Means ± standard deviations over {results['draws']} draws of two adapters of one square weight.",
    ]
    for field, title, percent in (
        ("awor", "AWOR: share of zeros in A1^T A2, %", True),
        ("awom", "AWOM: Frobenius norm of A1^T A2", False),
        ("relative_awom", "Relative AWOM: AWOM over the product of both adapters' norms, %", True),
    ):
        lines += ["", f"## {title}", "", f"| | {' | '.join(map(str, sizes))} |", f"|---|{'---:|' * len(sizes)}"]
        for row in top:
            cells = [cell(find(results, row["design"], size, row["density"]), field, percent) for size in sizes]
            lines.append(f"| {label(row)} | {' | '.join(cells)} |")
    lines += ["", "## What the paper says of it, and what we find", "", *_statements(results, sizes)]
    lines += ["", *_norms(results), "", *_conditions(results)]
    return "\n".join(lines) + "\n"


def _statements(results: dict[str, Any], sizes: list[int]) -> list[str]:
    size = sizes[-1]

    def at(design: str, field: str, density: float | None = None) -> float:
        return mean(find(results, design, size, density), field)

    dense, lora = at("dense", "awor"), max(at("sparse LoRA", "awor", d) for d in (0.01, 0.02))
    wm, struct = ({d: at(design, "awor", d) for d in (0.01, 0.02)} for design in ("SHiRA-WM", "SHiRA-Struct"))
    smallest = {d: mean(find(results, "sparse LoRA", sizes[0], d), "awor") for d in (0.01, 0.02)}
    awom = {d: [at("dense", "awom") / at(x, "awom", d) for x in ("SHiRA-WM", "SHiRA-Struct")] for d in (0.01, 0.02)}
    struct_rows = [row for row in results["rows"] if row["design"] == "SHiRA-Struct"]
    draws = [draw for row in struct_rows for draw in zip(row["awor"], row["densities_sum"], strict=True)]
    literal = sum(ratio <= densities for ratio, densities in draws)
    proved = sum(1 - ratio <= densities + 1e-12 for ratio, densities in draws)
    relative = {x: at(x, "relative_awom", 0.01) for x in ("SHiRA-WM", "SHiRA-Struct", "sparse LoRA")}
    low, high = wm[0.01] - lora, struct[0.02] - lora
    return [
        f'- **"Both dense and sparse LoRA have low AWOR for adapters with larger dimensions": '
        f"{_verdict(max(dense, lora) < 0.05)}.** At {size} x {size} dense has {dense:.1%} and sparse LoRA at most "
        f"{lora:.1%}. Of small ones it is not true of sparse LoRA: at {sizes[0]} it has {smallest[0.01]:.0%} (1 %) and "
        f"{smallest[0.02]:.0%} (2 %), because at so low a rank whole columns of the factors are zero.",
        f'- **"SHiRA-WM achieves much higher AWOR than the LoRA variants": '
        f"{_verdict(wm[0.01] - lora > 0.3)} at 1 %; at 2 % the distance is {100 * (wm[0.02] - lora):.0f} points.** At "
        f"{size} x {size} it is {wm[0.01]:.1%} at 1 % and {wm[0.02]:.1%} at 2 %. It follows (1 - d^2)^n for n rows of "
        f"density d, here {(1 - 0.01**2) ** size:.1%} and {(1 - 0.02**2) ** size:.1%}, so it falls fast with size and "
        f"density: at 8192 rows and 2 % it would be {(1 - 0.02**2) ** 8192:.1%}. The masks of the adapters were equal "
        "here, as those of one base are; that costs no more than the product's diagonal.",
        f'- **"SHiRA-Struct is nearly orthogonal": {_verdict(min(struct.values()) > 0.9)}, by AWOR.** '
        f"{struct[0.01]:.1%} at 1 % and {struct[0.02]:.1%} at 2 %, and nearly the same at every size: about 1 - 2 d.",
        f'- **"AWOR of SHiRA adapters is 63-96% higher sparsity than LoRA": {_near(low, high)}.** WM at 1 % is '
        f"{100 * low:.0f} points above sparse LoRA, Struct {100 * (struct[0.01] - lora):.0f} at 1 % and "
        f"{100 * high:.0f} at 2 %. So the paper's numbers are what densities between 1 and 2 % give at 4096; it does "
        "not say which it took.",
        f'- **"AWOM also tends to be much lower for SHiRA adapters than the dense counterparts": '
        f"{_verdict(min(min(v) for v in awom.values()) > 2)}.** At {size} x {size} the dense AWOM is "
        f"{awom[0.01][0]:.0f} (WM) and {awom[0.01][1]:.0f} (Struct) times as large at 1 %, {awom[0.02][0]:.0f} and "
        f"{awom[0.02][1]:.0f} times at 2 %. **But WM's is low only because it has fewer entries of the same size.** "
        f"Relative to the adapters' norms dense has {at('dense', 'relative_awom'):.2%}, sparse LoRA "
        f"{relative['sparse LoRA']:.2%} and WM {relative['SHiRA-WM']:.2%}, all about 1 / sqrt(n) = "
        f"{1 / math.sqrt(size):.2%}: random adapters of equal energy interfere alike, sparse or not. Struct has "
        f"{relative['SHiRA-Struct']:.2%}; it alone is closer to orthogonal in this sense.",
        f'- **Lemma 4.5, "AWOR for non-overlapping SHiRA-Struct adapters is at most the sum of sparsity of individual '
        f'adapters": not as worded, but as proved.** AWOR is a share of zeros. Read with "sparsity" as the share of '
        f"nonzeros (1 % + 1 %), it was at most that in {literal} of {len(draws)} draws; read as the share of zeros "
        "(99 % + 99 %), the bound is above 1 and says nothing. What the proof shows is that the product's *nonzeros* "
        f"are at most those of both adapters together, 1 - AWOR <= d1 + d2: that held in {proved} of {len(draws)} "
        "draws, and it is what makes them nearly orthogonal.",
    ]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _near(low: float, high: float) -> str:
    return "about so" if abs(low - 0.63) < 0.06 and abs(high - 0.96) < 0.03 else "not so"


def _norms(results: dict[str, Any]) -> list[str]:
    """The other reading of "l2 norm"."""
    rows = [row for row in results["rows"] if row["spectral_norm"]]
    lines = [
        '## If "l2 norm" means the spectral norm',
        "",
        'The paper defines AWOM as "the l2 norm of the product" to show "how far the product is from a zero matrix". '
        "`shira.awom` takes the norm of the elements (Frobenius). The text gives no value of AWOM that could decide "
        f"between this and the largest singular value; here are both, at {rows[0]['size']} x {rows[0]['size']}:",
        "",
        "| | Frobenius | spectral |",
        "|---|---:|---:|",
    ]
    lines += [f"| {label(row)} | {cell(row, 'awom', False)} | {cell(row, 'spectral_norm', False)} |" for row in rows]
    by_design = {(row["design"], row["density"]): mean(row, "spectral_norm") for row in rows}
    dense = by_design["dense", None]
    lower = all(value < dense for (design, _), value in by_design.items() if design.startswith("SHiRA"))
    struct = all(by_design["SHiRA-Struct", d] < by_design["SHiRA-WM", d] for d in (0.01, 0.02))
    return [
        *lines,
        "",
        f'"Much lower for SHiRA than dense" {_verdict(lower)} in the spectral norm too. That Struct is below WM '
        f"{_verdict(struct)} there{'' if struct else ': a few full rows are few, but large singular values'}.",
    ]


def _conditions(results: dict[str, Any]) -> list[str]:
    rank = ", ".join(
        f"{row['rank']} at {row['size']} ({row['density']:.0%})"
        for row in results["rows"]
        if row["rank"] and row["size"] in (results["rows"][0]["size"], results["rows"][-1]["size"])
    )
    conditions = results["conditions"]
    return [
        "## How they were drawn",
        "",
        f"    {results['command']}",
        "",
        "The paper says how many were drawn and of which designs, no more. Assumed here, normal meaning N(0, 1):",
        "",
        "- **dense**: all elements normal.",
        "- **sparse LoRA**: a product B C of normal factors of which 20 % of the elements, drawn at random, are kept. "
        "The paper's reference, SparseAdapter, prunes adapters to up to 80 % zeros, and makes them wider at an equal "
        "number of parameters; accordingly the rank is that at which both factors hold as many numbers as SHiRA: "
        f"{rank}. Scaled so that an element of B C has variance 1, as of dense.",
        "- **SHiRA-WM**: normal deltas at the largest 1 or 2 % of a normal weight, which both adapters share.",
        "- **SHiRA-Struct**: normal deltas on the diagonal and on every f-th row, other rows for each adapter, 1 or "
        "2 % in all; the last row may be cut.",
        "",
        "SHiRA's products are computed by `shira.metrics` in float64 from the sparse deltas, the others as dense "
        "matrices in float32, where rounding alone makes a zero of one element in tens of millions.",
        "",
        f"{conditions['cpu']}, {conditions['threads']} thread, torch {conditions['torch']}, {results['seconds']:.0f} s "
        "in all, which is not a measurement of speed.",
    ]


def picture(results: dict[str, Any]) -> bytes:
    """AWOM, AWOR and relative AWOM by size: means, and bands from the smallest to the largest draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": 10,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#b8bcc0",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    sizes = sorted({row["size"] for row in results["rows"]})
    with rc_context(style):
        figure = Figure(figsize=(14, 4.9), layout="constrained", facecolor="white")
        panels = figure.subplots(1, 3)
        for axes, field, title in zip(
            panels,
            ("awom", "awor", "relative_awom"),
            ("AWOM (less is better)", "AWOR (more is better)", "AWOM at equal energy (less is better)"),
            strict=True,
        ):
            for row in (row for row in results["rows"] if row["size"] == sizes[-1]):
                rows = [find(results, row["design"], size, row["density"]) for size in sizes]
                colour, line = _COLOURS[row["design"]], _LINES.get(row["density"], ":")
                wide = row["design"] == "dense"  # to be seen below the others
                axes.plot(
                    sizes,
                    [mean(r, field) for r in rows],
                    line,
                    marker="o",
                    markersize=9 if wide else 4,
                    linewidth=5 if wide else 1.5,
                    alpha=0.35 if wide else 1,
                    color=colour,
                    label=label(row),
                )
                band = [min(r[field]) for r in rows], [max(r[field]) for r in rows]
                axes.fill_between(sizes, *band, color=colour, alpha=0.12, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xlabel("rows and columns")
            axes.grid(axis="y", color="#e3e5e8")
            axes.set_axisbelow(True)
            axes.set_title(title)
        panels[0].set_yscale("log")
        panels[2].set_yscale("log")
        panels[1].set_ylim(-0.03, 1.03)
        for axes in panels[1:]:
            ticks = (0, 0.25, 0.5, 0.75, 1) if axes is panels[1] else (0.0025, 0.005, 0.01, 0.02, 0.05)
            axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
            axes.minorticks_off()
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=9.5
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
