"""What `shira bench` measures: switching between adapters on this machine, beside two other ways to do it."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from shira.adapter.adapter import Adapter
from shira.adapter.base import BaseTensors
from shira.adapter.checksum import checksum_of
from shira.adapter.tensor import AdapterTensor
from shira.cli.console import bar
from shira.files.checkpoint import Base
from shira.files.errors import Argument, ArgumentError
from shira.serving.bank import ResidentAdapters
from shira_kernels import backends
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import ARITHMETIC

OURS, COPY, LORA = "shira", "index_copy_ twice", "LoRA, addmm_ twice"
_MIN_ROUNDS = 5
Weights = Mapping[str, torch.Tensor]
Switch = Callable[[str | None, str | None], None]  # from one adapter, or the base, to another


@dataclass(frozen=True)
class Timing:
    """Microseconds of one way to switch, and how many times ours it takes, round by round."""

    median_us: float
    quartiles_us: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Latency:
    """What was measured, and on what.

    Attributes:
        switches: how long a switch from one adapter to the next takes, by way.
        add_us: how long it takes to check an adapter and take it into a bank, by adapter.
        entries: how many entries each adapter changes, by name.
        weights, weight_bytes: number and size of the weights that they change.
        kernel: the kernel that wrote the entries.
    """

    switches: dict[str, Timing]
    add_us: dict[str, float]
    entries: dict[str, int]
    weights: int
    weight_bytes: int
    dtypes: list[str]
    device: str
    threads: int
    rounds: int
    kernel: str
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON types."""
        return asdict(self)


def run_bench(
    files: Sequence[Path],
    *,
    base: Path | None,
    device: str = "cpu",
    threads: int = 1,
    seconds: float = 2.0,
    console: Console | None = None,
) -> Latency:
    """Measures adapter files on their base; with no file two random adapters of 1 % on four small Llama layers.

    Raises:
        ValueError: files without a base, two files of one name, adapters that do not belong to the base, no such
            device, an adapter without entries, or of a dtype that LoRA cannot change. Nothing was written then.
        OSError: something cannot be read or written.
        RuntimeError: a switch gave other entries than the adapter's, or the base did not come back.
    """
    if bool(files) != (base is not None):
        raise ValueError("adapters need the base that they were made for, --base" if files else "--base needs adapters")
    if device not in ("cpu", "cuda"):
        raise ArgumentError(Argument("device"), f" must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(Argument("device"), " cuda: torch finds no GPU")
    if not 0 <= seconds < math.inf:
        raise ArgumentError(Argument("seconds"), f" must be finite and not negative, got {seconds}")
    adapters = {file.stem: Adapter.load(file, base=base) for file in files}
    if len(adapters) < len(files):
        raise ValueError(f"two adapters have the same name: {', '.join(file.stem for file in files)}")
    if empty := [name for name, adapter in adapters.items() if not adapter.nnz]:
        raise ValueError(f"{empty[0]}: the adapter changes nothing")
    for name, adapter in adapters.items():
        for tensor_name, tensor in adapter.items():
            if tensor.dtype not in ARITHMETIC:
                raise ValueError(f"{name}: {tensor_name} is {tensor.dtype}, to which LoRA cannot be added")
    model = random_model() if base is None else model_of(adapters.values(), base)
    if base is None:
        adapters = {f"random {i}": random_adapter(model, i) for i in range(2)}
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("measuring")
    # Drawn between the rounds, never while one is timed.
    with _threads(threads), torch.no_grad(), bar(*columns, auto_refresh=False) as shown:
        task = shown.add_task("", total=seconds)
        found = measure(
            model.to(device), adapters, seconds, lambda done: shown.update(task, completed=done, refresh=True)
        )
    show(found, console or Console())
    return found


def measure(
    model: nn.Module, adapters: dict[str, Adapter], seconds: float, show_progress: Callable[[float], None]
) -> Latency:
    """Switches from each adapter to the next, in turn with the other ways, after checking that a switch is right. Says
    now and then how many seconds were measured."""
    bank = ResidentAdapters(model)
    add_us = {}
    for name, adapter in adapters.items():
        start = time.perf_counter_ns()
        bank.add(name, adapter)
        add_us[name] = (time.perf_counter_ns() - start) / 1e3
    names = [*adapters, *([None] if len(adapters) == 1 else [])]
    weights = {tensor: model.get_parameter(tensor) for adapter in adapters.values() for tensor in adapter}
    device = next(iter(weights.values())).device
    copies = {tensor: weight.clone() for tensor, weight in weights.items()}  # what the other ways write to
    ways: dict[str, Switch] = {
        OURS: lambda _, new: bank.switch(new),
        COPY: _index_copy(bank, adapters, weights, copies),
        LORA: _lora(adapters, copies),
    }
    bank.switch(names[-1])
    ran = backends.calls()
    took = _times(ways, names, seconds, device, show_progress)
    [kernel] = backends.calls() - ran
    bank.switch(None)
    bank.verify_base()
    return Latency(
        switches={way: _timing(times, took[OURS]) for way, times in took.items()},
        add_us=add_us,
        entries={name: adapter.nnz for name, adapter in adapters.items()},
        weights=len(weights),
        weight_bytes=sum(weight.nbytes for weight in weights.values()),
        dtypes=sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        rounds=len(took[OURS]),
        kernel=kernel,
        torch=torch.__version__,
    )


def _times(
    ways: Mapping[str, Switch],
    names: Sequence[str | None],
    seconds: float,
    device: torch.device,
    show_progress: Callable[[float], None],
) -> dict[str, list[float]]:
    """Microseconds of each switch, by way: in each round all ways go from one name to the next."""
    took: dict[str, list[float]] = {way: [] for way in ways}
    round_ = 0
    begin = shown = time.perf_counter()
    while round_ < _MIN_ROUNDS + 2 or time.perf_counter() < begin + seconds:
        if (now := time.perf_counter()) > shown + 0.5:
            show_progress(now - begin)
            shown = now
        old, new = names[(round_ - 1) % len(names)], names[round_ % len(names)]
        for way, switch in ways.items():
            _wait(device)
            start = time.perf_counter_ns()
            switch(old, new)
            _wait(device)
            if round_ >= 2:  # the first warm up
                took[way].append((time.perf_counter_ns() - start) / 1e3)
        round_ += 1
    return took


def _index_copy(bank: ResidentAdapters, adapters: Mapping[str, Adapter], weights: Weights, copies: Weights) -> Switch:
    """Writes the base's entries and then the new adapter's. Those of each adapter are what the bank's switch wrote,
    which is checked."""
    device = next(iter(weights.values())).device
    at = {name: {t: tensor.indices.long().to(device) for t, tensor in a.items()} for name, a in adapters.items()}
    old_entries = {name: _entries(weights, indices) for name, indices in at.items()}
    new_entries = {}
    for name, adapter in adapters.items():
        bank.switch(name)
        new_entries[name] = _entries(weights, at[name])
        _check(name, adapter, new_entries[name])
    bank.switch(None)
    bank.verify_base()

    def switch(old: str | None, new: str | None) -> None:
        for name, entries in ((old, old_entries), (new, new_entries)):
            for tensor, indices in at.get(name or "", {}).items():
                copies[tensor].view(-1).index_copy_(0, indices, entries[name or ""][tensor])

    return switch


def _lora(adapters: Mapping[str, Adapter], copies: Weights) -> Switch:
    """Subtracts one low-rank product and adds another."""
    factors = {name: _factors(adapter, copies) for name, adapter in adapters.items()}

    def switch(old: str | None, new: str | None) -> None:
        for name, sign in ((old, -1.0), (new, 1.0)):
            for tensor, (b, a) in factors.get(name or "", {}).items():
                matrix = copies[tensor].view(b.shape[0], a.shape[1])
                matrix.addmm_(b, a, alpha=sign)

    return switch


def _entries(weights: Weights, indices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {tensor: weights[tensor].view(-1)[at] for tensor, at in indices.items()}


def _check(name: str, adapter: Adapter, entries: Mapping[str, torch.Tensor]) -> None:
    """Refuses with RuntimeError entries that are not, bit for bit, what an adapter replaces them by."""
    for tensor_name, tensor in adapter.items():
        if tensor.kind == "replace" and not torch.equal(as_bits(entries[tensor_name].cpu()), as_bits(tensor.values)):
            raise RuntimeError(f"{name}: {tensor_name}: a switch wrote other entries than the adapter's")


def _factors(adapter: Adapter, weights: Weights) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B [out, rank] and A [rank, in] for each matrix, of the rank at which both together hold about as many numbers as
    the adapter."""
    found = {}
    for name, tensor in adapter.items():
        weight = weights[name]
        rows = weight.shape[0] if weight.dim() > 1 else 1
        columns = weight.numel() // rows
        rank = max(1, round(tensor.nnz / (rows + columns)))
        found[name] = weight.new_full((rows, rank), 1e-6), weight.new_full((rank, columns), 1e-3)
    return found


def _timing(times: list[float], ours: list[float]) -> Timing:
    ratios = [time / mine for time, mine in zip(times, ours, strict=True)]
    return Timing(statistics.median(times), _middle_half(times), statistics.median(ratios), _middle_half(ratios))


def _middle_half(numbers: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(numbers, n=4)
    return low, high


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_of(adapters: Iterable[Adapter], base: Base) -> nn.Module:
    """A module with the tensors that the adapters change, under the adapters' names."""
    model, weights = nn.Module(), BaseTensors(base)
    for adapter in adapters:
        for name in adapter:
            _put(model, name, weights[weights.find(name)].clone())
    return model


def random_model() -> nn.Module:
    """The projections of four Llama layers of width 1024: 51 M weights in bfloat16."""
    hidden, inner = 1024, 2816
    shapes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    model, draw = nn.Module(), torch.Generator().manual_seed(0)
    for layer in range(4):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=draw).mul_(0.02).bfloat16()
            _put(model, f"layers.{layer}.{name}.weight", weight)
    return model


def random_adapter(model: nn.Module, seed: int) -> Adapter:
    """1 % of each weight, random entries."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in model.named_parameters():
        chosen = torch.randint(weight.numel(), (weight.numel() // 100,), generator=draw)
        indices = chosen.unique().int()
        old = weight.detach().view(-1)[indices]
        values = old + torch.randn(old.shape, generator=draw).mul_(0.01).to(old.dtype)
        tensors[name] = AdapterTensor(indices, values, tuple(weight.shape), weight.dtype, checksum=checksum_of(old))
    return Adapter(tensors)


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, last = name.split(".")
    for module in path:
        if module not in model._modules:
            model.add_module(module, nn.Module())
        model = model.get_submodule(module)
    if last not in model._parameters:
        model.register_parameter(last, nn.Parameter(tensor, requires_grad=False))


def show(found: Latency, console: Console) -> None:
    """The figures as a table."""
    entries = ", ".join(f"{name}: {number} entries" for name, number in found.entries.items())
    console.print(
        f"{found.weights} weights, {found.weight_bytes / 1e6:.1f} MB of {' and '.join(found.dtypes)}; {entries}",
        markup=False,
    )
    table = Table(
        title=f"From one adapter to the next: medians of {found.rounds} rounds; LoRA of equal size",
        title_justify="left",
    )
    for column in ("way", "us", "middle half", "over ours", "middle half"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, timing in found.switches.items():
        low, high = timing.quartiles_us
        ratios = "{:.2f} to {:.2f}".format(*timing.ratio_quartiles)
        table.add_row(way, f"{timing.median_us:.0f}", f"{low:.0f} to {high:.0f}", f"{timing.ratio:.2f}x", ratios)
    console.print(table)
    added = ", ".join(f"{name} {us / 1e3:.1f} ms" for name, us in found.add_us.items())
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    console.print(f"checked and added to the bank: {added}", markup=False)
    console.print(f"{found.device}, {threads}, kernel {found.kernel}, torch {found.torch}", markup=False)
