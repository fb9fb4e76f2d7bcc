"""Figure 4 of the paper again: AWOM and AWOR of random dense, sparse LoRA, SHiRA-WM and SHiRA-Struct adapters.

python bench/studies/interference/run.py --output bench/results/interference      about 10 minutes on one core
python bench/studies/interference/run.py --output /tmp/interference --quick       small sizes, few draws: seconds

The paper does not say how its adapters were drawn; `draw` says how these are. SHiRA's are measured by
`shira.adapter.metrics`, as sparse matrices; the others here, as dense ones.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

# harness and studies are folders of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import typer
from harness import study
from harness.machine import cpu_name
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from studies.interference import report

from shira import AdapterTensor, masks
from shira.adapter.metrics import Interference, interference_of
from shira.files.atomic import write_atomically

DESIGNS = ("dense", "sparse LoRA", "SHiRA-WM", "SHiRA-Struct")
FACTOR_DENSITY = 0.2  # of the sparse LoRA's factors
# A delta: its entries, or matrices (float32) whose product it is, one for dense and two for LoRA.
Delta: TypeAlias = AdapterTensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    densities: tuple[float, ...] = (0.01, 0.02)
    draws: int = 50
    spectral_size: int = 512  # where the spectral norm is computed too, which takes a dense product


FULL = Settings()
QUICK = Settings(sizes=(64, 128), draws=3, spectral_size=64)


@dataclass(frozen=True)
class Case:
    design: str
    size: int
    density: float | None  # numbers that the adapter holds, over the weight's elements; None for dense


def cases(settings: Settings) -> Iterator[Case]:
    for size in settings.sizes:
        for design in DESIGNS:
            for density in (None,) if design == "dense" else settings.densities:
                yield Case(design, size, density)


def draw(case: Case, seed: int) -> tuple[Delta, Delta]:
    """Two adapters of a [size, size] weight; normal means drawn from N(0, 1).

    - dense: all elements normal.
    - sparse LoRA: B C with factors of which 20 % of the elements, drawn at random, are normal and the others zero; of
      the rank with which both factors hold density * size^2 numbers. Scaled so that its elements have variance 1.
    - SHiRA-WM: normal deltas at the largest of a normal weight, which both adapters have in common as their base.
    - SHiRA-Struct: normal deltas on the diagonal and on rows, of which the adapters share none.
    """
    generator = torch.Generator().manual_seed(seed)
    size, density = case.size, case.density

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if density is None:
        return (normal(size, size),), (normal(size, size),)
    if case.design == "sparse LoRA":
        rank = lora_rank(size, density)

        def factor(rows: int, columns: int) -> torch.Tensor:
            part = torch.zeros(rows, columns)
            chosen = masks.rand(part, FACTOR_DENSITY, seed=int(torch.randint(2**31, (), generator=generator)))
            part.view(-1)[chosen.long()] = normal(chosen.numel())
            return part

        scale = (rank * FACTOR_DENSITY**2) ** -0.5
        first, second = ((factor(size, rank), factor(rank, size) * scale) for _ in range(2))
        return first, second
    if case.design == "SHiRA-WM":
        places = [masks.wm(normal(size, size), density)] * 2
    else:
        places = [masks.struct(torch.empty(size, size), density, offset=offset) for offset in (0, 1)]
    first, second = (
        AdapterTensor(indices, normal(indices.numel()), (size, size), torch.float32, "add") for indices in places
    )
    return first, second


def lora_rank(size: int, density: float) -> int:
    """The rank of factors [size, rank] and [rank, size] of which 20 % are density * size^2 numbers, or nearly."""
    return max(1, round(density * size / (2 * FACTOR_DENSITY)))


def measure(first: Delta, second: Delta) -> Interference:
    """Dense ones in float32: there rounding alone makes a zero of one element in some millions."""
    if isinstance(first, AdapterTensor) and isinstance(second, AdapterTensor):
        return interference_of(first, second)
    assert not isinstance(first, AdapterTensor)
    assert not isinstance(second, AdapterTensor)
    product = _chain(*(factor.T for factor in reversed(first)), *second)
    deltas = _chain(*first), _chain(*second)
    energy = _energy(deltas[0]), _energy(deltas[1])
    return Interference(
        entries=(deltas[0].count_nonzero().item(), deltas[1].count_nonzero().item()),
        energy=energy,
        product_energy=_energy(product),
        product_nonzeros=int(product.count_nonzero()),
        product_numel=product.numel(),
        product_bound=energy[0] * energy[1],
    )


def spectral_norm(first: Delta, second: Delta) -> float:
    """The largest singular value of A1^T A2."""
    return float(torch.linalg.matrix_norm(_dense(first).T @ _dense(second), ord=2))


def _dense(delta: Delta) -> torch.Tensor:
    if not isinstance(delta, AdapterTensor):
        return _chain(*delta).double()
    matrix = torch.zeros(delta.shape, dtype=torch.float64)
    matrix.view(-1)[delta.indices.long()] = delta.values.double()
    return matrix


def _chain(*factors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]


def _energy(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def run(settings: Settings, progress: Progress) -> list[dict[str, object]]:
    """For each case the numbers of each draw, and of Struct whether Lemma 4.5 holds in them."""
    planned = list(cases(settings))
    bar = progress.add_task("", total=len(planned) * settings.draws)
    rows = []
    for case in planned:
        label = case.design if case.density is None else f"{case.design}, {case.density:.0%}"
        progress.update(bar, description=f"{case.size} x {case.size}: {label}")
        found, spectral, seconds = [], [], []
        for seed in range(settings.draws):
            deltas = draw(case, seed)
            began = time.perf_counter()
            found.append(measure(*deltas))
            seconds.append(time.perf_counter() - began)
            if case.size == settings.spectral_size:
                spectral.append(spectral_norm(*deltas))
            progress.advance(bar)
        rows.append(
            {
                "design": case.design,
                "size": case.size,
                "density": case.density,
                "rank": lora_rank(case.size, case.density) if case.design == "sparse LoRA" and case.density else None,
                "awom": [one.awom for one in found],
                "awor": [one.awor for one in found],
                "relative_awom": [one.relative_awom for one in found],
                # Share of nonzeros of both deltas together, which the proof of Lemma 4.5 compares with the product's.
                "densities_sum": [sum(one.entries) / case.size**2 for one in found],
                "spectral_norm": spectral,
                "measure_seconds_median": statistics.median(seconds),
            }
        )
    return rows


def command(
    output: Annotated[Path, typer.Option(metavar="DIR", help="For results.json, report.md and figure4.png.")],
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few draws: shows that it works.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Repeat Figure 4 of the paper: how orthogonal random adapters of four designs are."""
    settings = QUICK if quick else FULL
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    began = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        rows = run(settings, progress)
    results = {
        "command": "python bench/studies/interference/run.py --output DIR" + " --quick" * quick,
        "draws": settings.draws,
        "conditions": {"cpu": cpu_name(), "threads": threads, "torch": torch.__version__},
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }
    write_atomically(output / "results.json", (json.dumps(results) + "\n").encode())
    report.write(results, output, quick)
    console.print(f"{output / 'report.md'}", soft_wrap=True)


def main() -> None:
    study.main(command, "interference")


if __name__ == "__main__":
    main()
