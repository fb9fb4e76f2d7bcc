"""Concept loss (table 4 of the paper) on real text: adapters for two domains, each alone and both in one model.

python bench/studies/fusion/run.py --output bench/results/fusion       about 15 minutes on one free core
python bench/studies/fusion/run.py --output /tmp/fusion --quick        every method, two steps: numbers without meaning

The base is the demonstration's byte-level Llama, trained on Python sources. One adapter learns C++ headers, the other
English prose, each alone; all hold equally many numbers. Each tries as many learning rates, on the first seed, by the
bits per byte of its own domain's validation part. Then both are written into one model, and held-out text counts.
Each run is written when it is done; the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# harness and studies are folders of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from harness import study
from harness.study import StudyError, autocast, schedule
from rich.console import Console
from studies.fusion import report
from studies.fusion.plan import DOMAINS, FULL, QUICK, Base, Pair, Recipe, Results, Settings, Trial
from torch import nn

import shira
from shira.cli.demo import base, corpus
from shira.cli.demo.run import sample_windows


@dataclass(frozen=True)
class Text:
    """A domain's parts: bytes, uint8, 1-D."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


Adapter = shira.Adapter | dict[str, torch.Tensor]  # of LoRA: PEFT's factors by name


@dataclass(frozen=True)
class Trained:
    adapter: Adapter
    validation: float  # bits per byte on its domain

    @property
    def numbers(self) -> int:
        if isinstance(self.adapter, shira.Adapter):
            return sum(tensor.nnz for tensor in self.adapter.values())
        return sum(tensor.numel() for tensor in self.adapter.values())


@dataclass
class Task:
    model: nn.Module  # the base; every function leaves it as it was
    texts: dict[str, Text]
    trained: dict[tuple[Any, ...], Trained] = field(default_factory=dict)  # so that nothing is trained twice

    def digest(self) -> str:
        state = hashlib.sha256()
        for text in self.texts.values():
            for part in (text.train, text.validation, text.test):
                state.update(part.numpy().tobytes())
        return state.hexdigest()[:16]


def load_task(settings: Settings) -> Task:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Task(base.load_base(), {domain: _text(domain, settings) for domain in DOMAINS})


def _text(domain: str, settings: Settings) -> Text:
    split = corpus.load(domain, train_bytes=settings.train_bytes, heldout_bytes=16 * settings.test_bytes)
    if split.train.numel() < 2 * settings.validation_bytes or split.heldout.numel() < settings.test_bytes:
        raise StudyError(f"the installed packages hold too little text of domain {domain!r}")
    train, validation = split.train.split([split.train.numel() - settings.validation_bytes, settings.validation_bytes])
    return Text(train, validation, sample_windows(split.heldout, settings.test_bytes))


def score(model: nn.Module, data: torch.Tensor) -> float:
    with autocast():
        return base.bits_per_byte(model, data)


def train(task: Task, recipe: Recipe, domain: str, lr: float, seed: int, settings: Settings) -> Trained:
    """An adapter for a domain. It is kept, so that a second call costs nothing."""
    key = recipe, domain, lr, seed
    if key not in task.trained:
        torch.manual_seed(seed)
        make = _train_shira if recipe.mask else _train_lora
        task.trained[key] = make(task, recipe, domain, lr, seed, settings)
    return task.trained[key]


def _train_shira(task: Task, recipe: Recipe, domain: str, lr: float, seed: int, settings: Settings) -> Trained:
    text = task.texts[domain]
    config = shira.ShiraConfig(
        "all-linear", mask=recipe.mask, r=settings.rank, family=recipe.family, offset=recipe.offset, seed=seed
    )
    calibration = None
    if recipe.mask == "snip":
        rows = _batches(text.train, settings.calibration_batches, settings.batch, seed)
        calibration = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in rows]
    handle = shira.attach(task.model, config, calibration=calibration)
    try:
        optimizer = shira.ShiraAdamW(handle.parameters(), lr=lr, betas=settings.betas, weight_decay=0.0)
        _fit(task.model, optimizer, text.train, seed, settings)
        return Trained(handle.adapter(), score(task.model, text.validation))
    finally:
        handle.detach()


def _train_lora(task: Task, _: Recipe, domain: str, lr: float, seed: int, settings: Settings) -> Trained:
    from peft import get_peft_model_state_dict

    text = task.texts[domain]
    model = _lora_model(task, settings, domain)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=settings.betas, weight_decay=0.0, fused=True)
    _fit(model, optimizer, text.train, seed, settings)
    tensors = get_peft_model_state_dict(model, adapter_name=domain)
    return Trained({name: tensor.detach().clone() for name, tensor in tensors.items()}, score(model, text.validation))


def _lora_model(task: Task, settings: Settings, *names: str) -> Any:
    """PEFT's model over a copy of the base, with fresh adapters of these names; the first is active."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(task.model), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def _batches(data: torch.Tensor, count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield base.random_windows(data, size, generator)


def _fit(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, seed: int, settings: Settings) -> None:
    scheduler = schedule(optimizer, settings.steps, settings.warmup)
    for ids in _batches(data, settings.steps, settings.batch, seed):
        with autocast():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def states(settings: Settings) -> dict[str, dict[str, float]]:
    """What is scored: each adapter alone, and both at each strength; name -> strength by adapter."""
    single = {domain: {domain: 1.0} for domain in DOMAINS}
    return single | {f"{s:g}": dict.fromkeys(DOMAINS, s) for s in settings.strengths}


def applied(task: Task, adapters: Mapping[str, Adapter], settings: Settings) -> Iterator[tuple[str, nn.Module]]:
    """Each state and the model that is in it, until the next is asked for."""
    make = _applied_shira if isinstance(adapters[DOMAINS[0]], shira.Adapter) else _applied_lora
    return make(task, adapters, settings)


def _applied_shira(task: Task, adapters: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, nn.Module]]:
    bank = shira.ResidentAdapters(task.model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    for state, strengths in states(settings).items():
        with bank.using(strengths):
            yield state, task.model


def _applied_lora(task: Task, adapters: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, nn.Module]]:
    from peft import set_peft_model_state_dict

    model = _lora_model(task, settings, *adapters).eval()
    for name, tensors in adapters.items():
        set_peft_model_state_dict(model, tensors, adapter_name=name)
    for state, strengths in states(settings).items():
        name = state.replace(".", "_")  # of a module
        if state not in adapters:
            # "cat" is the sum of both products B A; "linear" would add the factors, and so bring in cross terms.
            model.add_weighted_adapter(list(strengths), list(strengths.values()), name, combination_type="cat")
        model.set_adapter(name)
        yield state, model


def run(plan: Base | Trial | Pair, results: Results, task: Task) -> dict[str, Any]:
    settings = results.settings
    if isinstance(plan, Base):
        return {"method": "base", "scores": _scores(task.model, task)}
    if isinstance(plan, Trial):
        trained = train(task, plan.recipe, plan.domain, plan.lr, settings.seeds[0], settings)
        # What diverged loses against any number; NaN is not JSON.
        validation = trained.validation if math.isfinite(trained.validation) else 99.0
        return {"recipe": plan.recipe.name, "domain": plan.domain, "lr": plan.lr, "validation": validation}
    rates = results.best_rates(plan.method)
    both = {
        domain: train(task, recipe, domain, rates[domain], plan.seed, settings)  # type: ignore[arg-type]
        for recipe, domain in zip(plan.method.recipes, DOMAINS, strict=True)
    }
    adapters = {domain: trained.adapter for domain, trained in both.items()}
    return {
        "method": plan.method.name,
        "seed": plan.seed,
        "lr": rates,
        "trained": [trained.numbers for trained in both.values()],
        "shared": shared(*adapters.values()),
        "scores": {state: _scores(model, task) for state, model in applied(task, adapters, settings)},
    }


def _scores(model: nn.Module, task: Task) -> dict[str, float]:
    """Bits per byte of each domain's test part."""
    return {domain: score(model, text.test) for domain, text in task.texts.items()}


def shared(first: Adapter, second: Adapter) -> float | None:
    """Share of the first adapter's entries that the second has too; None for LoRA, which changes all entries."""
    if not isinstance(first, shira.Adapter) or not isinstance(second, shira.Adapter):
        return None
    common = sum(int(torch.isin(tensor.indices, second[name].indices).sum()) for name, tensor in first.items())
    return common / sum(tensor.nnz for tensor in first.values())


def command(
    output: study.Output, quick: study.Quick = False, report_only: study.ReportOnly = False, threads: study.Threads = 1
) -> None:
    """Fuse adapters of two domains, SHiRA's and LoRA's, and score what is left of each."""
    settings = QUICK if quick else FULL
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    results = Results(output / "results.json", settings)
    console = Console(stderr=True)
    if not report_only and results.missing():
        results.conditions = results.conditions or study.conditions()
        with console.status("loading the base model and text of installed packages"):
            task = load_task(settings)
        results.check_texts(task.digest())
        study.complete(results, lambda plan: run(plan, results, task), console)
    study.check_complete(results)
    report.write(results, output, quick, "python bench/studies/fusion/run.py --output DIR" + " --quick" * quick)
    console.print(f"{output / 'report.md'}", soft_wrap=True)


def main() -> None:
    study.main(command, "fusion")


if __name__ == "__main__":
    main()
