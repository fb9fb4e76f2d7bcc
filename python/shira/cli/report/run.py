"""The report, from files of adapters to a page, a picture and a table at the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shira.adapter.adapter import Adapter
from shira.cli.console import folder_made, progress_bar
from shira.cli.report.compare import Comparison, compare
from shira.cli.report.measures import measures_of
from shira.cli.report.page import page
from shira.cli.report.picture import picture
from shira.files.atomic import write_atomically
from shira.files.output import check_files_free
from shira.model.names import printable


def run_report(
    files: Sequence[Path], *, base: Path | None, output: Path, force: bool = False, console: Console | None = None
) -> Comparison:
    """Compares adapter files; writes `report.html` and `report.png` to `output`, and shows the sums.

    Raises:
        ValueError: a file is not a valid adapter, the adapters do not belong together or to the base, or something that
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
    with progress_bar("subtracting the base" if base else "") as progress:
        found = compare(adapters, base, progress)
    image = picture(found)
    with folder_made(output):
        write_atomically(output / "report.png", image)
        write_atomically(output / "report.html", page(found, image).encode())
    _print_summary(found, output, console or Console())
    return found


def _print_summary(found: Comparison, output: Path, console: Console) -> None:
    measures = measures_of(found)
    table = Table(*["pair", *(measure.title for measure in measures)], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for pair in found.overlaps:
        total = found.total(pair)
        cells = [measure.text(measure.of(total)) if measure.known(total) else "-" for measure in measures]
        table.add_row(escape(", ".join(pair)), *cells)
    console.print(table)
    for note in found.notes:
        console.print(note, markup=False, highlight=False)
    written = printable(f"{output / 'report.html'}, {output / 'report.png'}")
    console.print(written, markup=False, highlight=False, soft_wrap=True)
