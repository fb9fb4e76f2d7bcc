"""The summary of the GPU check, made from what is on disk: under 4000 characters, and the exit code."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_records
from gpu_records import Record

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 3990  # characters
FAILURES_SHOWN = 10
REST = "(further lines are in models.jsonl and figures.jsonl)"
ROOM_FOR_FAILURES = 900  # characters that other parts leave to failures, where there are some

FILES = (
    "environment.json",
    "build.log",
    "smoke.jsonl",
    "figures.jsonl",
    "tests.jsonl",
    "sanitizer.jsonl",
    "models.jsonl",
    "summary.txt",
)
DEAD = ("died", "hung")  # how a worker may end that makes the exit code 1, as "wrong" does
BACKENDS = ("triton", "cuda")


def kernels() -> list[tuple[str, str]]:
    """Each op with each backend that has a GPU kernel for it; one without any has the backend "none"."""
    found = []
    for path in sorted((ROOT / "shira_kernels/ops").glob("[a-z]*.py")):
        composed = re.search(r'^COMPOSED_OF = "(\w+)"', path.read_text(), re.MULTILINE)
        source = composed[1] if composed else path.stem
        sources = {"triton": f"shira_kernels/triton/{source}.py", "cuda": f"csrc/cuda/{source}.cu"}
        own = [backend for backend in BACKENDS if (ROOT / sources[backend]).is_file()]
        found += [(path.stem, backend) for backend in own or ["none"]]
    return found


def test_of(node: str) -> tuple[str, str]:
    """The op and the backend that a test's id names; what it does not name is empty."""
    file = re.search(r"test_(\w+)\.py", node)
    op = file[1] if file and (ROOT / f"shira_kernels/ops/{file[1]}.py").is_file() else ""
    backend = re.search(r"[\[-](triton|cuda|reference)(?:-gpu|-interpreter)?(?=[\]-])", node)
    return op, backend[1] if backend else ""


WORST_LAST = ("skipped", "passed", "failed", "crashed")


def outcomes(records: Iterable[Record]) -> dict[str, Record]:
    """Each test's worst record."""
    worst: dict[str, Record] = {}
    for record in records:
        if "test" not in record:
            continue
        known = worst.get(record["test"])
        if known is None or WORST_LAST.index(record["outcome"]) > WORST_LAST.index(known["outcome"]):
            # What a test said before its worker died says more than that it died.
            note = (known or {}).get("note") or record.get("note", "")
            worst[record["test"]] = {**record, "note": note}
    return worst


def tests_cell(counts: Counter[str]) -> str:
    """Passed, failed and crashed."""
    return f"{counts['passed']}/{counts['failed']}/{counts['crashed']}" if counts.total() else "-"


def worker_cell(records: list[Record]) -> str:
    """What came of the processes of one op and backend, the worst first."""
    ends = [record["ended"] for record in records if "ended" in record]
    results = [record["result"] for record in records if "result" in record]
    for bad in ("wrong", "died", "hung"):
        if bad in ends or bad in results:
            return bad.upper()
    for word in ("refused", "cut", "missing"):
        if word in ends or word in results:
            return word
    return "ok" if ends else "-"


def of(records: Iterable[Record], op: str, backend: str) -> list[Record]:
    return [record for record in records if record.get("op") == op and record.get("backend") == backend]


def number(value: float | None) -> str:
    """Three digits of a number that may be missing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def figure_cells(figure: Record | None) -> list[str]:
    if figure is None:
        return []
    cells = [number(figure.get(name)) for name in ("us", "floor_us", "host_us")]
    share, ratio = figure.get("share_of_copy"), figure.get("ratio")
    return [*cells, "-" if share is None else f"{share:.0%}", "-" if ratio is None else f"{ratio:.2f}x"]


def table(rows: list[list[str]], numbers: int) -> list[str]:
    """Rows of cells, the last `numbers` columns to the right."""
    full = max(map(len, rows))
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(full)]
    return [
        " ".join(
            cell.rjust(widths[i]) if i >= full - numbers else cell.ljust(widths[i]) for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def failures(files: dict[str, list[Record]]) -> list[str]:
    """A line for each wrong result and dead worker, in the order of the phases."""
    found = []
    for name, records in files.items():
        part = name.partition(".")[0]
        for record in records:
            where = " ".join(str(record[key]) for key in ("op", "backend", "case", "tool") if record.get(key))
            if record.get("result") in ("wrong", *DEAD):
                found.append(f"{part} {where}: {record.get('note', '')}")
            elif record.get("ended") in ("wrong", *DEAD):
                found.append(f"{part} {where or record.get('task', '')} {record['ended']}: {record.get('note', '')}")
        tests = [record for record in outcomes(records).values() if record["outcome"] in ("failed", "crashed")]
        found += [f"{record['test'].rpartition('/')[2]} {record['outcome']}: {record['note']}" for record in tests]
    return [" ".join(line.split()) for line in found]


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def head(environment: dict[str, Any], built: Record | None, rehearse: bool) -> list[str]:
    """What ran where. A rehearsal names no GPU."""
    versions = f"torch {environment.get('torch', '?')}, triton {environment.get('triton', '?')}"
    if rehearse:
        return [
            "REHEARSAL without a GPU: no line below says anything about one. " + versions,
            "Kernels ran in Triton's interpreter, or the reference in their place; times are the CPU's, at tiny sizes.",
        ]
    copy = environment.get("copy_gb_per_s")
    bandwidth = f", copy {copy / 1000:.2f} TB/s" if copy else ""
    lines = [f"GPU check: {environment.get('gpu') or 'NO GPU FOUND'}{bandwidth}, {versions}"]
    if built and not built["cuda_cpp"]:
        lines.append(f"!! NO CUDA C++ KERNELS: {clipped(built['build_note'], 150)} (see build.log)")
    return lines


def phase_lines(records: list[Record]) -> list[str]:
    """How long each phase took and how it ended, with the number of its processes that ended otherwise than well."""
    parts = []
    for phase in sorted((r for r in records if "phase_ended" in r), key=lambda r: r["phase"]):
        ends = Counter(r["ended"] for r in records if r.get("phase") == phase["phase"] and "ended" in r)
        ends.pop("ok", None)
        badly = f" ({', '.join(f'{n} {word}' for word, n in ends.items())})" if ends else ""
        parts.append(f"{phase['phase']} {phase['name']} {phase['seconds']:.0f} s {phase['phase_ended']}{badly}")
    lines = [" | ".join(parts[i : i + 3]) for i in range(0, len(parts), 3)]
    notes = dict.fromkeys("note: " + record["remark"] for record in records if "remark" in record)
    return ["phases: " + "\n        ".join(lines), *(clipped(note, 150) for note in notes)]


def op_lines(files: dict[str, list[Record]]) -> list[str]:
    """A line for each op and backend, with the first of its figures."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for node, record in outcomes(files["tests.jsonl"]).items():
        counts.setdefault(test_of(node), Counter())[record["outcome"]] += 1
    rows = [["op", "backend", "smoke", "tests", "sanit.", "us", "floor", "host", "copy", "ratio"]]
    for op, backend in kernels():
        if backend == "none":
            rows.append([op, backend])
            continue
        figures = [record for record in of(files["figures.jsonl"], op, backend) if "us" in record]
        cells = [op, backend, worker_cell(of(files["smoke.jsonl"], op, backend))]
        cells += [
            tests_cell(counts.pop((op, backend), Counter())),
            worker_cell(of(files["sanitizer.jsonl"], op, backend)),
        ]
        rows.append(cells + figure_cells(figures[0] if figures else None))
    rest = {"reference": Counter[str](), "": Counter[str]()}
    for (_, backend), counted in counts.items():
        rest["reference" if backend == "reference" else ""] += counted
    lines = table(rows, 5)
    if counts:
        lines.append(
            f"tests passed/failed/crashed beside these: reference {tests_cell(rest['reference'])}, "
            f"others {tests_cell(rest[''])}"
        )
    return lines


def further_figures(files: dict[str, list[Record]]) -> list[str]:
    """The cases of each op behind its first, the backends side by side."""
    lines = []
    for op in dict.fromkeys(op for op, _ in kernels()):
        figures = [record for record in files["figures.jsonl"] if record.get("op") == op and "us" in record]
        cases = list(dict.fromkeys(record["case"] for record in figures))
        for case in cases[1:]:
            same = [record for record in figures if record["case"] == case]
            sides = (f"{r['backend']} {' '.join(figure_cells(r))}" for r in same)
            lines.append(f"{case}: {' | '.join(sides)}")
    return ["further cases: us, floor, host us, share of copy, ratio to the best baseline", *lines] if lines else []


def model_lines(records: Iterable[Record]) -> list[str]:
    return [record["line"] for record in records if "line" in record]


def summary(out: Path, rehearse: bool) -> tuple[str, int]:
    """The text, and 1 if there was a wrong result or a dead worker, else 0."""
    files = {name: gpu_records.read(out / name) for name in FILES if name.endswith(".jsonl")}
    machine = gpu_records.read(out / "build.log")  # the records of phases 0 and 1, between the output of the build
    files = {"build.log": machine, **files}
    environment = environment_of(out)
    found = failures(files)
    everything = [record for records in files.values() for record in records]
    built = next((record for record in reversed(machine) if "cuda_cpp" in record), None)
    fixed = [*head(environment, built, rehearse), *op_lines(files), *phase_lines(everything)]
    verdict = f"{len(found)} failures" if found else "no wrong result, no dead worker"
    fixed.append(verdict + (f"; the first {min(FAILURES_SHOWN, len(found))}:" if found else ""))
    room = LONGEST - sum(len(line) + 1 for line in fixed)
    shown = found[:FAILURES_SHOWN]
    if shown:
        width = max(
            30, min(300, room // len(shown) - 3 if room < ROOM_FOR_FAILURES else ROOM_FOR_FAILURES // len(shown))
        )
        shown = ["- " + clipped(line, width) for line in shown]
        room -= sum(len(line) + 1 for line in shown)
    more = fitting([*model_lines(files["models.jsonl"]), *further_figures(files)], room)
    return clipped("\n".join([*fixed[:-1], *more, fixed[-1], *shown]), LONGEST), 1 if found else 0


def fitting(lines: list[str], room: int) -> list[str]:
    """The first lines that fit, and a last one if some do not."""
    if sum(len(line) + 1 for line in lines) <= room:
        return lines
    kept, used = [], len(REST) + 1
    for line in lines:
        used += len(line) + 1
        if used > room:
            break
        kept.append(line)
    return [*kept, REST] if len(REST) < room else []


def environment_of(out: Path) -> dict[str, Any]:
    try:
        known = json.loads((out / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
