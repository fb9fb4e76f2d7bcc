"""Whole models and layers on a GPU against PEFT's LoRA, or LoRA by hand: a worker of the GPU check.

    python bench/gpu/models.py training --record FILE     a step of a 1B-class Llama in bfloat16, time and peak memory
    python bench/gpu/models.py switch --record FILE       a 7B-shaped model from one adapter to another
    python bench/gpu/models.py layers --record FILE       decode and prefill of a layer with 1 and 8 adapters, unfused

`--device cpu` does the same with tiny shapes. Each records a line for the summary.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

# gpu, cases and harness are folders of bench/; the records are the driver's, in tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import gpu_records
import torch
from gpu import floors
from harness import compare, rotation, switching
from harness.architectures import Architecture, llama_shapes
from harness.compare import Place, Side, Timings

import shira

SECONDS = 3.0  # of timed rounds
LLAMA_7B = Architecture("a 7B Llama", llama_shapes(4096, 11008, 32), rank=26)
TINY = Architecture("tiny", llama_shapes(64, 96, 1), rank=1)
Record = Callable[..., None]


def timed(sides: dict[str, Callable[[Any], object]], slots: list[Any], place: Place) -> dict[str, Timings]:
    seconds = SECONDS if place.device == "cuda" else 0.0
    return compare.time_in_turn({name: Side(run, 0) for name, run in sides.items()}, slots, place, 1, seconds)


def told(timings: dict[str, Timings]) -> str:
    """The first side's time, and the others' with their ratio to it. Times in us; behind the slash the host's."""
    ours, *others = timings
    parts = []
    for name, times in timings.items():
        us, host = (statistics.median(seconds) * 1e6 for seconds in (times.total, times.host))
        pairs = zip(times.total, timings[ours].total, strict=True)
        ratio = f" ({statistics.median(t / o for t, o in pairs):.2f}x)" if name in others else ""
        parts.append(f"{name} {us:.0f}/{host:.0f}{ratio}")
    return " | ".join(parts)


def training(place: Place, record: Record) -> None:
    from harness import training as ways

    if place.device == "cpu":
        ways.SHAPES["cpu"] = ways.Shape(64, 96, 1, 2, 2, "float32", 2, 16)
    makers = {"ours": ways.ours}
    if importlib.util.find_spec("peft"):
        makers["LoRA"] = ways.lora
    makers["frozen"] = ways.frozen
    ids, steps, peaks, trained = ways.batch(place.device), {}, {}, {}
    for name, make in makers.items():
        before = torch.cuda.memory_allocated() if place.device == "cuda" else 0
        side = make(place.device)
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the model was made in float32
        losses = [side.step(ids) for _ in range(3)]
        assert all(loss == loss for loss in losses), f"{name}: the loss is not a number"
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if place.device == "cuda" else 0.0
        steps[name], trained[name] = side.step, side.trained
        record(what="training", side=name, peak_gib=peaks[name], trained=side.trained, losses=losses)
    assert "LoRA" not in trained or trained["ours"] == trained["LoRA"], f"unequal numbers: {trained}"
    timings = timed(steps, [ids], place)
    memory = ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items())
    record(line=f"training step, {ways.SHAPES[place.device]}: us/host {told(timings)}; peak GiB {memory}")


def factors(architecture: Architecture, dtype: torch.dtype, device: str, seed: int) -> list[tuple[Any, Any]]:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(0.001).to(dtype)

    return [(random(n, architecture.rank), random(architecture.rank, m)) for n, m in architecture.shapes.values()]


def switch(place: Place, record: Record) -> None:
    """`ResidentAdapters.switch`, the op behind it alone, and LoRA unfused and fused by addmm_ of each weight."""
    architecture, dtype, device = (LLAMA_7B if place.device == "cuda" else TINY), torch.bfloat16, place.device
    adapters = {name: switching.make_adapter(architecture, dtype, seed, device) for seed, name in enumerate("ab", 1)}
    model = switching.make_model(architecture.shapes, dtype, device)
    weights = switching.weights_of(model)
    bank = shira.ResidentAdapters(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    for name in ("a", "b", "a"):
        bank.switch(name)
        for layer in list(weights)[:7]:
            part = adapters[name][f"{layer}.weight"]
            compare.assert_same_bits(layer, [weights[layer]], [switching.expected_of(weights[layer], part)])
    there = cycle([partial(bank.switch, "b"), partial(bank.switch, "a")])

    # The op alone, on the same weights: what it writes need not be an adapter's.
    names = [f"{layer}.weight" for layer in weights]
    lists = []
    for adapter in adapters.values():
        parts = [adapter[name] for name in names]
        offsets = torch.tensor([0, *(part.nnz for part in parts)]).cumsum(0).to(device)
        indices = torch.cat([part.indices for part in parts]).to(device)
        values = torch.cat([part.values for part in parts]).to(device)
        lists.append((offsets, indices, values, torch.zeros_like(values)))
    live = list(weights.values())

    def op(old: Any, new: Any) -> None:
        torch.ops.shira.scatter_switch_batched(live, *old[:2], old[3], *new)

    turn = cycle([partial(op, *lists), partial(op, *reversed(lists))])
    lora = cycle([factors(architecture, dtype, device, 1), factors(architecture, dtype, device, 2)])
    state = {"old": next(lora)}

    def fuse(_: Any) -> None:
        new = next(lora)
        for weight, (b, a), (d, c) in zip(live, state["old"], new, strict=True):
            weight.addmm_(b, a, alpha=-1).addmm_(d, c)
        state["old"] = new

    sides = {"ours": lambda _: next(there)(), "the op alone": lambda _: next(turn)(), "LoRA addmm_": fuse}
    line = told(timed(sides, [None], place))
    record(line=f"switch, {architecture}, {len(live)} weights, bf16: us/host {line}")


def layers(place: Place, record: Record) -> None:
    """Our op behind the base product, unfused LoRA of as many numbers, and the base product alone."""
    sizes = floors.TINY if place.device == "cpu" else floors.Sizes()
    rows, columns = sizes.square
    rank = max(1, floors.count([sizes.square], floors.DELTA_DENSITY) // (rows + columns))
    for case in floors.cases(sizes):
        if not case.op.startswith("add_sparse_delta_mm"):
            continue
        job = case.make(place.device)
        job.check()
        adapters = len(job.slots[0].dense)
        b, a = (
            torch.randn(adapters, *size, device=place.device).mul_(0.02).to(torch.bfloat16)
            for size in ((rows, rank), (rank, columns))
        )

        def lora(slot: Any, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            out = floors.base(slot).view(len(a), -1, rows)
            return out.baddbmm_(torch.bmm(slot.grouped, a.mT), b.mT)

        sides = {"ours": partial(job.run, getattr(torch.ops.shira, case.op)), "LoRA": lora, "base": floors.base}
        record(line=f"{case.name}: us/host {told(timed(sides, list(job.slots), place))}")
        del job
        gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = {"training": training, "switch": switch, "layers": layers}
    parser.add_argument("what", choices=whats)
    parser.add_argument("--record", required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    place = Place(options.device)
    if options.device == "cpu":
        compare.MIN_ROUNDS, rotation.CACHE_TURNS = 1, 0  # one round, warm
        torch.set_num_threads(1)
    record = partial(gpu_records.append, options.record)
    try:
        if options.what == "training":
            training(place, record)
        else:
            with torch.no_grad():
                whats[options.what](place, record)
    except AssertionError as error:
        record(op=options.what, result="wrong", note=" ".join(str(error).split())[:500])
    return 0


if __name__ == "__main__":
    sys.exit(main())
