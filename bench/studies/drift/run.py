"""What is left in the weights after many rounds of base -> A -> B -> base: ours, and PEFT's LoRA and SHiRA.

python bench/studies/drift/run.py --output bench/results/drift          about four minutes on one core
python bench/studies/drift/run.py --output /tmp/drift --quick           a few rounds: shows that it works

PEFT adds an adapter to the weights and subtracts it later; both round. ResidentAdapters keeps the entries it replaces.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

# harness and studies are folders of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import typer
from harness import study
from harness.architectures import Architecture, llama_shapes
from harness.machine import cpu_name
from harness.switching import (
    CHANGE,
    LORA,
    OURS,
    SHIRA_PEFT,
    base_of,
    make_adapter,
    make_lora,
    make_model,
    make_shira_peft,
    share_of_changed,
    weights_of,
)
from rich.console import Console
from rich.progress import track

import shira
from shira.files.atomic import write_atomically

ARCHITECTURE = Architecture("2 Llama layers, hidden 256", llama_shapes(256, 704, 2), rank=2)
DTYPES = ("float32", "bfloat16")
# How many adapters take turns: after which rounds the weights are looked at.
ROUNDS = {2: (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 40: (1, 2, 5, 10, 20, 50, 100, 200)}
QUICK_ROUNDS = {2: (1, 2, 3), 4: (1, 2, 3)}
COLOURS = {OURS: "#d9772b", LORA: "#2f6fb5", SHIRA_PEFT: "#5a9e5a"}


Turn = Callable[[str, str], None]  # one round with two adapters


def ours(dtype: torch.dtype, seeds: dict[str, int]) -> tuple[Turn, dict[str, torch.Tensor]]:
    """One round, and the weights."""
    model = make_model(ARCHITECTURE.shapes, dtype, "cpu")
    bank = shira.ResidentAdapters(model)
    for name, seed in seeds.items():
        bank.add(name, make_adapter(ARCHITECTURE, dtype, seed))

    def turn(first: str, second: str) -> None:
        for target in (first, second, None):
            bank.switch(target)

    return turn, weights_of(model)


def _peft(peft: Any) -> tuple[Turn, dict[str, torch.Tensor]]:
    def turn(first: str, second: str) -> None:
        for name in (first, second):
            peft.merge_adapter([name])
            peft.unmerge_adapter()

    return turn, weights_of(peft)


def lora(dtype: torch.dtype, seeds: dict[str, int]) -> tuple[Turn, dict[str, torch.Tensor]]:
    return _peft(make_lora(make_model(ARCHITECTURE.shapes, dtype, "cpu"), ARCHITECTURE, seeds))


def shira_peft(dtype: torch.dtype, seeds: dict[str, int]) -> tuple[Turn, dict[str, torch.Tensor]]:
    return _peft(make_shira_peft(make_model(ARCHITECTURE.shapes, dtype, "cpu"), ARCHITECTURE, seeds))


METHODS = {OURS: ours, LORA: lora, SHIRA_PEFT: shira_peft}


def drift(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the weights are from the base: the share whose bits differ, the largest difference, and both the
    largest and the mean difference over the mean of |base|."""
    base = torch.cat([base_of(weight).view(-1) for weight in weights.values()]).double()
    apart = (torch.cat([weight.view(-1) for weight in weights.values()]).double() - base).abs()
    size = base.abs().mean()
    return {
        "changed": share_of_changed(weights),
        "largest": apart.max().item(),
        "largest_over_mean": (apart.max() / size).item(),
        "mean_over_mean": (apart.mean() / size).item(),
    }


@torch.no_grad()
def measure(method: str, dtype: str, adapters: int, rounds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The drift after each number of rounds, each with the next two adapters."""
    seeds = {f"number_{seed}": seed for seed in range(1, adapters + 1)}
    turn, weights = METHODS[method](getattr(torch, dtype), seeds)
    names = cycle(seeds)
    found, done = [], 0
    for goal in track(rounds, f"{method}, {dtype}, {adapters} adapters", console=Console(stderr=True)):
        for _ in range(goal - done):
            turn(next(names), next(names))
        done = goal
        found.append({"adapters": adapters, "method": method, "dtype": dtype, "rounds": goal, **drift(weights)})
    return found


def picture(results: list[dict[str, Any]]) -> bytes:
    """Over the rounds: the share of changed weights, and the mean difference; a row for each number of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted({row["adapters"] for row in results})
    figure, grid = plt.subplots(len(counts), 2, figsize=(10, 3.6 * len(counts)), squeeze=False, layout="constrained")
    for (left, right), adapters in zip(grid, counts, strict=True):
        for method in METHODS:
            for dtype in DTYPES:
                rows = [r for r in results if (r["adapters"], r["method"], r["dtype"]) == (adapters, method, dtype)]
                x = [row["rounds"] for row in rows]
                style = {"color": COLOURS[method], "linestyle": "-" if dtype == "bfloat16" else "--", "marker": "."}
                label = f"{method}, {dtype}"
                left.plot(x, [100 * row["changed"] for row in rows], label=label, **style)
                right.plot(x, [100 * row["mean_over_mean"] for row in rows], **style)
        left.set_ylabel("weights whose bits changed, %")
        right.set_ylabel("mean change, % of the mean |weight|")
        right.set_yscale("symlog", linthresh=1e-9)
        for axes in (left, right):
            axes.set_title(f"{adapters} adapters in turn", fontsize=10, loc="left")
            axes.set_ylim(bottom=0)
            axes.set_xscale("log")
            axes.set_xlabel("rounds of base → A → B → base")
            axes.grid(color="#e3e5e8")
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    plt.close(figure)
    return stream.getvalue()


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def markdown(results: list[dict[str, Any]], conditions: dict[str, Any], quick: bool) -> str:
    lines = ["# What switching leaves in the weights", ""]
    lines += ["**Made with --quick: a few rounds.**", ""] if quick else []
    lines += [
        "After rounds of base → A → B → base, each with the next two of the adapters, against the base before:",
        "",
        "| adapters | rounds | | dtype | weights changed | largest change | the same over mean \\|w\\| "
        "| mean change over mean \\|w\\| |",
        "|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in results:
        if row["rounds"] == max(r["rounds"] for r in results if r["adapters"] == row["adapters"]):
            lines.append(
                f"| {row['adapters']} | {row['rounds']} | {row['method']} | {row['dtype']} | {percent(row['changed'])} "
                f"| {row['largest']:.2g} | {percent(row['largest_over_mean'])} | {percent(row['mean_over_mean'])} |"
            )
    lines += [
        "",
        "![share of changed weights, and the mean change, over the rounds](drift.png)",
        "",
        "PEFT merges and unmerges by adding and subtracting, and each rounds the weight: LoRA's product reaches all of "
        "them, SHiRA's entries only their own. When the same adapters come again, bfloat16's roundings soon "
        "repeat themselves, but further adapters bring further ones; float32's add up. ResidentAdapters keeps what it "
        "replaces and puts it back.",
        "",
        "## Conditions",
        "",
        f"    {conditions['command']}",
        "",
        f"- {conditions['architecture']}: {conditions['weights']:,} weights, {conditions['numbers']:,} numbers in each "
        f"adapter ({conditions['density']:.2%}; LoRA of rank {conditions['rank']}). Weights and adapters are random; "
        f"an adapter's change has {CHANGE:.0%} of the weights' norm. Both SHiRAs have the same entries and "
        "values: ours rounded to the weights' dtype, PEFT's changes in float32, as it trains them.",
        f"- {conditions['cpu']}, one thread, torch {conditions['torch']}, peft {conditions['peft']}.",
    ]
    return "\n".join(lines) + "\n"


def command(
    output: Annotated[Path, typer.Option(metavar="DIR", help="For results.json, report.md and drift.png.")],
    quick: Annotated[bool, typer.Option("--quick", help="A few rounds: shows that it works, no more.")] = False,
) -> None:
    """Measure what is left in the weights after many switches, ours and PEFT's."""
    import peft

    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    conditions = {
        "command": "python bench/studies/drift/run.py --output DIR" + " --quick" * quick,
        "architecture": ARCHITECTURE.title,
        "weights": ARCHITECTURE.numel,
        "numbers": ARCHITECTURE.nnz,
        "density": ARCHITECTURE.density,
        "rank": ARCHITECTURE.rank,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
    results = [
        row
        for adapters, looks in rounds.items()
        for dtype in DTYPES
        for method in METHODS
        for row in measure(method, dtype, adapters, looks)
    ]
    content = json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n"
    write_atomically(output / "results.json", content.encode())
    write_atomically(output / "drift.png", picture(results))
    write_atomically(output / "report.md", markdown(results, conditions, quick).encode())
    print(output / "report.md")


def main() -> None:
    study.main(command, "drift")


if __name__ == "__main__":
    main()
