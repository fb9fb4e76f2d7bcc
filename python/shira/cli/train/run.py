"""The training run, from a model folder and a file of text to an adapter, its numbers and its curve."""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import shira
from shira.cli.console import bar, folder_made
from shira.cli.train.curve import picture
from shira.cli.train.examples import Encoder, Example, split
from shira.cli.train.labels import REGRESSION
from shira.cli.train.model import TASKS, check_fits, length_of, load_model, load_tokenizer, task_of
from shira.cli.train.recipe import Recipe
from shira.cli.train.rows import read_rows
from shira.cli.train.training import Training
from shira.files.atomic import write_atomically
from shira.files.output import check_files_free
from shira.masks.config import ShiraConfig
from shira.masks.ranking import needs_gradient
from shira.model.names import printable

FILES = ("adapter.safetensors", "training.json", "training.png")
_CALIBRATION_BATCHES = 8


def run_training(
    model_folder: Path,
    data: Path,
    *,
    output: Path,
    config: ShiraConfig,
    recipe: Recipe,
    task: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, and writes `adapter.safetensors`, `training.json` and `training.png` to `output`, all at the end.

    Of a model with fewer positions than `recipe.max_length` the examples are as long as it takes.

    Args:
        model_folder: a model with its tokenizer, as `save_pretrained` writes them. It is only read.
        data: a text file; or JSON lines with "text", "prompt" and "completion", "messages", or "text" and "label".
        task: "causal-lm" or "classification"; None for what the model's architecture says.

    Returns:
        What training.json holds.

    Raises:
        ValueError: the data, the folder or the config are not what they must be, or files are there already and `force`
            is not given. Nothing was written then.
        OSError: something cannot be read or written.
        RuntimeError: the loss is not finite; nothing was written then.
    """
    began = time.perf_counter()
    console = console or Console(stderr=True)
    if task is not None and task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    check_files_free(output, FILES, [model_folder, data], force)
    task = task or task_of(model_folder)
    rows = read_rows(data, task)
    with console.status("loading the model"):
        model_config, tokenizer = load_tokenizer(model_folder)
        asked, recipe = (
            recipe.max_length,
            replace(recipe, max_length=length_of(recipe.max_length, model_config, tokenizer)),
        )
        encoder = Encoder(tokenizer, model_config, recipe.max_length)
        examples = encoder.encode(rows)
        training, held_out = split(examples, recipe, data)
        model = load_model(model_folder, task, tokenizer)
    check_fits(examples, model, tokenizer, model_folder)
    notes = encoder.notes(len(examples))
    if recipe.max_length < asked:
        notes.insert(0, f"examples have at most {recipe.max_length} tokens: the model takes no longer ones")
    if unread := sorted({key for row in rows for key in row.unread}):
        notes.append(f"keys that are not read: {', '.join(unread)}")
    for note in notes:
        console.print(escape(printable(note)), soft_wrap=True)
    found = train(model, tokenizer, training, held_out, config, recipe, task, console, began)
    numbers = {"model": str(model_folder), "data": str(data), **found.to_dict()}
    numbers |= {"config": config.to_dict(), "recipe": asdict(recipe)}
    with folder_made(output):
        found.adapter.save(output / "adapter.safetensors")  # first, so that no failure of the others loses it
        write_atomically(output / "training.json", (json.dumps(numbers, indent=1) + "\n").encode())
        write_atomically(output / "training.png", picture(found))
    _show(found, model_folder, output, console)
    return numbers


def train(
    model: Any,
    tokenizer: Any,
    training: list[Example],
    held_out: list[Example],
    config: ShiraConfig,
    recipe: Recipe,
    task: str,
    console: Console,
    began: float,
) -> Training:
    """Trains an adapter with transformers' Trainer and takes it out of the model again."""
    import transformers

    pad = transformers.DataCollatorForSeq2Seq if task == "causal-lm" else transformers.DataCollatorWithPadding
    collate, curve = pad(tokenizer), _curve(transformers)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(recipe, len(training), folder)
        model.to(arguments.device)
        calibration = None
        if isinstance(config.mask, str) and needs_gradient(config.mask):
            first = training[: _CALIBRATION_BATCHES * recipe.batch_size]
            starts = range(0, len(first), recipe.batch_size)
            calibration = [collate(first[i : i + recipe.batch_size]).to(arguments.device) for i in starts]
        with console.status("choosing entries"):
            handle = shira.attach(model, config, calibration=calibration)
        try:
            optimizer = shira.ShiraAdamW(handle.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
            trainer = transformers.Trainer(
                model=model,
                args=arguments,
                data_collator=collate,
                train_dataset=training,
                eval_dataset=held_out,
                optimizers=(optimizer, None),
                compute_metrics=_accuracy if _has_classes(model, task) else None,
                preprocess_logits_for_metrics=lambda outputs, _: outputs[0] if isinstance(outputs, tuple) else outputs,
                callbacks=[curve],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            before, after = _run(trainer, curve, bool(held_out), console)
            adapter = handle.adapter()
        finally:
            handle.detach()
    return Training(
        adapter=adapter,
        task=task,
        examples=len(training),
        held_out_examples=len(held_out),
        losses=curve.losses,
        held_out_before=before,
        held_out_after=after,
        seconds=time.perf_counter() - began,
    )


def _arguments(recipe: Recipe, examples: int, folder: str) -> Any:
    import transformers

    return transformers.TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps(examples),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(recipe.warmup * recipe.steps(examples)),
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
    )


def _run(trainer: Any, curve: Any, scored: bool, console: Console) -> tuple[dict[str, float], dict[str, float]]:
    """Trains behind a bar; the scores of the held-out examples before and after, empty unless `scored`.

    Raises:
        RuntimeError: a loss is not finite.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with bar(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        before = _scores(trainer.evaluate()) if scored else {}
        curve.watch(progress)
        trainer.train()
        after = _scores(trainer.evaluate()) if scored else {}
    if not all(math.isfinite(loss) for loss in (*curve.losses, *after.values())):
        raise RuntimeError("the loss is not finite: try a lower --learning-rate")
    return before, after


def _curve(transformers: Any) -> Any:
    """A callback that notes each step's loss and shows it."""

    class Curve(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self._show: Callable[[Any, str], None] = lambda state, note: None

        def watch(self, progress: Progress) -> None:
            task = progress.add_task("training", total=None, note="")
            self._show = lambda state, note: progress.update(
                task, completed=state.global_step, total=state.max_steps, note=note
            )

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))
                self._show(state, f"loss {self.losses[-1]:.3f}")

    return Curve()


def _has_classes(model: Any, task: str) -> bool:
    return task == "classification" and model.config.problem_type != REGRESSION


def _accuracy(predictions: Any) -> dict[str, float]:
    """The share of texts whose class is the likeliest, or all of whose labels are right where texts have several."""
    scores, labels = predictions.predictions, predictions.label_ids
    right = (scores.argmax(-1) == labels) if labels.ndim == 1 else ((scores > 0) == (labels > 0.5)).all(-1)
    return {"accuracy": float(right.mean())}


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(metrics[f"eval_{name}"]) for name in ("loss", "accuracy") if f"eval_{name}" in metrics}


def _show(found: Training, model_folder: Path, output: Path, console: Console) -> None:
    before, after = found.held_out_before, found.held_out_after
    if not found.held_out_examples:
        console.print("no example was held out: how well others are predicted is not known")
    for name in after:
        console.print(f"held-out {name}: {before[name]:.4g} before, {after[name]:.4g} after")
    adapter = output / "adapter.safetensors"
    console.print(
        f"{escape(printable(str(adapter)))}: {found.adapter.nnz} entries, {adapter.stat().st_size / 1e6:.2f} MB, "
        f"{found.seconds:.0f} s; curve in training.png",
        soft_wrap=True,
    )
    console.print("to use it, merge it into a copy of the model:", soft_wrap=True)
    command = shlex.join(["shira", "apply", str(model_folder), str(adapter), "-o", "MERGED"])
    console.print(f"  {escape(printable(command))}", soft_wrap=True)
    console.print(
        f'or switch it in live weights: shira.ResidentAdapters(model).add("name", {escape(repr(str(adapter)))})',
        soft_wrap=True,
    )
