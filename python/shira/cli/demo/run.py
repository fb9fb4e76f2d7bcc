"""The demonstration: two adapters are trained on a small language model, saved, loaded, switched and compared."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import shira
from shira.cli.console import folder_made
from shira.cli.demo import base, corpus, report
from shira.cli.demo.results import Results
from shira.files.output import check_files_free
from shira.model.names import printable

ADAPTERS = ("cpp", "prose")
STATES = ("base", *ADAPTERS)
FILES = (*(f"{name}.safetensors" for name in ADAPTERS), "report.md", "report.png")
CONFIG = shira.ShiraConfig("all-linear", mask="wm", density=0.01)
PEAK_LR = 6e-2  # of values whose magnitudes are the largest of each weight
BETAS = (0.7, 0.99)
WARMUP_STEPS = 3
TRAIN_BYTES = 4_000_000  # read at most, of each domain that is trained on
HELDOUT_BYTES = 262_144  # read at most, of each domain
PROMPTS = ("/// Returns ", "This software ")


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    steps: Mapping[str, int]  # of training, by adapter: prose, which the base half knows from docstrings, needs more
    batch: int  # windows of 256 bytes a step
    heldout_bytes: int  # scored, of each domain
    generated_bytes: int  # after each prompt, with each adapter
    switches: int = 100


FULL = Effort(steps={"cpp": 80, "prose": 120}, batch=16, heldout_bytes=32_768, generated_bytes=160)
QUICK = Effort(steps={"cpp": 24, "prose": 100}, batch=8, heldout_bytes=8_192, generated_bytes=80)


def run_demo(
    effort: Effort, *, output: Path, seed: int = 0, force: bool = False, console: Console | None = None
) -> Results:
    """Trains, scores and switches the adapters. Writes them, `report.md` and `report.png` to `output`.

    Raises:
        ValueError: one of these is there and `force` is not given. Nothing was written then.
        OSError: something cannot be written; before any work where that can be known.
    """
    began = time.perf_counter()
    console = console or Console()
    check_files_free(output, FILES, [], force)
    _quiet_transformers()

    with console.status("loading the base model and text of installed packages"):
        model = base.load_base()
        train_texts, heldout_texts = _texts(effort.heldout_bytes)
        before = bytes_hash(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"base: a byte-level Llama of {weights / 1e6:.1f} M weights, trained on Python sources")

    curves = {}
    with _progress(console) as progress:
        for name in ADAPTERS:
            adapter, curves[name] = train(
                model, train_texts[name], effort.steps[name], effort.batch, seed, name, progress
            )
            with folder_made(output):
                adapter.save(output / f"{name}.safetensors")

    bank = shira.ResidentAdapters(model)
    descriptions = {}
    for name in ADAPTERS:
        path = output / f"{name}.safetensors"
        bank.add(name, path)
        descriptions[name] = f"{shira.Adapter.load(path)!r}, {path.stat().st_size / 1e3:.0f} kB"
        console.print(f"{name}: {descriptions[name]}")
    with _progress(console) as progress:
        bpb, samples = _scores(model, bank, heldout_texts, effort.generated_bytes, seed, progress)
    with console.status("switching"):
        fused = random_lora(model, adapter, seed)
        switch_seconds, lora_fuse_seconds = time_switches(bank, fused, effort.switches)
        bank.switch(None)
        bank.verify_base()

    results = Results(
        bpb=bpb,
        curves=curves,
        samples=samples,
        adapters=descriptions,
        switch_seconds=switch_seconds,
        lora_fuse_seconds=lora_fuse_seconds,
        base_bytes_equal=bytes_hash(model) == before,
        seconds=time.perf_counter() - began,
    )
    _show(results, console)
    report.write(results, output)
    console.print(
        f"adapters, report.md and report.png are in {escape(printable(str(output)))}; {results.seconds:.0f} s in all"
    )
    return results


def _texts(heldout_bytes: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By domain, the text to train on, empty where no adapter does, and about `heldout_bytes` to score on."""
    train_texts, heldout_texts = {}, {}
    for domain in corpus.DOMAINS:
        train_bytes = TRAIN_BYTES if domain in ADAPTERS else 0
        split = corpus.load(domain, train_bytes=train_bytes, heldout_bytes=HELDOUT_BYTES)
        train_texts[domain] = split.train
        heldout_texts[domain] = sample_windows(split.heldout, heldout_bytes)
    return train_texts, heldout_texts


def _scores(
    model: nn.Module,
    bank: shira.ResidentAdapters,
    texts: Mapping[str, torch.Tensor],
    generated_bytes: int,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Bits per byte by state and domain, and generated text by state."""
    bpb: dict[str, dict[str, float]] = {}
    samples = {}
    task = progress.add_task("scoring", total=len(STATES) * len(texts), note="")
    for state in STATES:
        with bank.using(None if state == "base" else state):
            bpb[state] = {}
            for domain, text in texts.items():
                bpb[state][domain] = base.bits_per_byte(model, text)
                progress.update(task, advance=1, note=f"{state} on {domain}")
            samples[state] = "\n\n".join(generate(model, prompt, generated_bytes, seed) for prompt in PROMPTS)
    return bpb, samples


def train(
    model: nn.Module, text: torch.Tensor, steps: int, batch: int, seed: int, name: str, progress: Progress
) -> tuple[shira.Adapter, list[float]]:
    """Trains an adapter on `text` (uint8, 1-D) and leaves the model as it was; also the bits per byte of each batch."""
    handle = shira.attach(model, CONFIG)
    optimizer = shira.ShiraAdamW(handle.parameters(), lr=PEAK_LR, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (1.0 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    task = progress.add_task(f"training {name}", total=steps, note="")
    curve = []
    for _ in range(steps):
        rows = base.random_windows(text, batch, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16_products()):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(loss.item() / math.log(2))
        progress.update(task, advance=1, note=f"{curve[-1]:.3f} bits per byte")
    adapter = handle.adapter()
    handle.detach()
    return adapter, curve


def _has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def sample_windows(data: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` bytes of `data` in windows evenly spread over it, so that one long document does not decide."""
    rows = base.windows(data)
    wanted = min(len(rows), max(1, count // base.CONTEXT))
    return rows[torch.linspace(0, len(rows) - 1, wanted).long()].view(-1).to(torch.uint8)


def generate(model: nn.Module, prompt: str, count: int, seed: int) -> str:
    """`prompt` and `count` bytes that the model goes on with, sampled."""
    torch.manual_seed(seed)
    ids = torch.tensor([[0, *prompt.encode()]])
    ids = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.7,
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=0,
    )
    return bytes(ids[0, 1:].tolist()).decode(errors="replace")


def time_switches(
    bank: shira.ResidentAdapters, fused: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], count: int
) -> tuple[list[float], list[float]]:
    """Seconds of `count` switches from one adapter to the other, in turn with as many LoRA fuses, on one thread.

    A switch gives the old adapter's entries back and writes those of the new one. A fuse is `W.addmm_(B, A)` for each
    weight; taking an old LoRA out would be as much again.
    """
    switch, fuse = [], []
    with _one_thread(), torch.no_grad():
        for i in range(-2, count):  # the first two warm up
            start = time.perf_counter()
            bank.switch(ADAPTERS[i % 2])
            between = time.perf_counter()
            for weight, b, a in fused:
                weight.addmm_(b, a)
            end = time.perf_counter()
            if i >= 0:
                switch.append(between - start)
                fuse.append(end - between)
    return switch, fuse


def random_lora(
    model: nn.Module, adapter: shira.Adapter, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each weight that the adapter changes: a copy [out, in], B [out, rank] and A [rank, in].

    The rank is that at which B and A together hold as many numbers as the adapter does, or the nearest.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for name, tensor in adapter.items():
        weight = model.get_parameter(name).detach().clone()
        rank = max(1, round(tensor.nnz / sum(tensor.shape)))
        rows, columns = tensor.shape
        b = torch.randn(rows, rank, generator=generator, dtype=weight.dtype) * 1e-3
        result.append((weight, b, torch.randn(rank, columns, generator=generator, dtype=weight.dtype)))
    return result


def bytes_hash(model: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _quiet_transformers() -> None:
    """Its own bars and notes would garble those of the demonstration."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _show(results: Results, console: Console) -> None:
    table = Table(title="Held-out bits per byte (less is better)", title_justify="left")
    table.add_column("weights")
    for domain in corpus.DOMAINS:
        table.add_column(domain, justify="right")
    for state, scores in results.bpb.items():
        cells = []
        for domain, score in scores.items():
            change = score / results.bpb["base"][domain] - 1
            cells.append(f"{score:.3f}" if state == "base" else f"{score:.3f} ({change:+.1%})")
        table.add_row(state, *cells)
    console.print(table)
    for state, sample in results.samples.items():
        console.print(Panel(escape(report.printable(sample)), title=f"generated with {state}", title_align="left"))
    console.print(
        f"switch: {results.switch_ms:.3f} ms; LoRA fuse of the same size: {results.lora_fuse_ms:.3f} ms "
        f"({results.lora_fuse_ms / results.switch_ms:.1f}x; medians of {len(results.switch_seconds)}, one thread)"
    )
    equal = "the same bytes as" if results.base_bytes_equal else "[red]other bytes than[/red]"
    console.print(
        f"after training, scoring and {len(results.switch_seconds)} timed switches the base has {equal} before"
    )
