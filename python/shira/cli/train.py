"""What `shira train` does: a Hugging Face model folder and a file of text become an adapter and its training curve."""

from __future__ import annotations

import io
import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import shira
from shira.files.atomic import write_atomically
from shira.files.output import check_files_free
from shira.masks.config import ShiraConfig
from shira.masks.ranking import needs_gradient
from shira.model.names import printable

FILES = ("adapter.safetensors", "training.json", "training.png")
TASKS = {  # the ends of their architectures' names
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "classification": ("ForSequenceClassification",),
}
_CALIBRATION_BATCHES = 8
_MOST = 10**9  # of epochs, steps, and examples in a step
_IGNORED = -100  # a label that no loss counts
_INK = "#303438"

Example = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: how often each training example is seen; fractions are allowed.
        max_steps: a bound on the steps of the optimizer; 0 for none.
        batch_size: examples in a step.
        learning_rate: at its highest, after `warmup` (share of the steps) linear steps; it then falls linearly to 0.
        max_length: tokens of an example; more are cut off, or in a text file begin the next example.
        held_out: share of the examples that are not trained on, but scored before and after: at least one, of 0 none.
        seed: for the split, the order of examples, dropout, and masks that draw.

    Raises:
        ValueError: a number that nothing can be trained with.
    """

    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_length: int = 256
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epochs <= _MOST:
            raise ValueError(f"--epochs must be above 0 and at most {_MOST}, got {self.epochs}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be finite and above 0, got {self.learning_rate}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out must be a share from 0 to below 1, got {self.held_out}")
        for option, number in (("max-steps", self.max_steps), ("batch-size", self.batch_size)):
            if number > _MOST:
                raise ValueError(f"--{option} must be at most {_MOST}, got {number}")

    def steps(self, examples: int) -> int:
        """Of the optimizer."""
        steps = math.ceil(self.epochs * math.ceil(examples / self.batch_size))
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True)
class Training:
    """What came of it; losses are means in nats, of tokens or of texts.

    Attributes:
        losses: of each step.
        held_out_before, held_out_after: `loss` on held-out examples, and `accuracy` where classes are learned; empty
            without such examples.
    """

    adapter: shira.Adapter
    task: str
    examples: int
    held_out_examples: int
    losses: list[float]
    held_out_before: dict[str, float]
    held_out_after: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types."""
        numbers = {name: value for name, value in self.__dict__.items() if name != "adapter"}
        return {"entries": self.adapter.nnz, "density": self.adapter.density, **numbers}


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
        data: a text file; or JSON lines with "text", "prompt" and "completion", or "text" and "label".
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
    records = read_records(data)
    task = task or task_of(model_folder)
    with console.status("loading the model"):
        model, tokenizer = load(model_folder, task)
        asked, recipe = recipe.max_length, replace(recipe, max_length=_length(recipe.max_length, model, tokenizer))
        examples = list(encode(records, tokenizer, recipe, task, model.config, data))
    _check_ids(examples, model, tokenizer, model_folder)
    training, held_out = split(examples, recipe, data)
    if recipe.max_length < asked:
        console.print(f"examples have at most {recipe.max_length} tokens: the model takes no longer ones")
    found = train(model, tokenizer, training, held_out, config, recipe, task, console, began)
    output.mkdir(parents=True, exist_ok=True)
    found.adapter.save(output / "adapter.safetensors")  # first, so that no failure of the others loses it
    numbers = {"model": str(model_folder), "data": str(data), **found.to_dict()}
    numbers |= {"config": config.to_dict(), "recipe": asdict(recipe)}
    write_atomically(output / "training.json", (json.dumps(numbers, indent=1) + "\n").encode())
    write_atomically(output / "training.png", picture(found))
    _show(found, model_folder, output, console)
    return numbers


def read_records(path: Path) -> list[dict[str, Any]]:
    """The examples of a file: of JSON lines one a line, of any other text a single one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        return [{"text": text, "whole": True}]
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append(_record(line, f"{path}, line {number}"))
    return records


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or not ("text" in record or {"prompt", "completion"} <= set(record)):
        raise ValueError(f'{where}: must be an object with "text", or with "prompt" and "completion"')
    for field in {"text", "prompt", "completion"} & set(record):
        if not isinstance(record[field], str):
            raise ValueError(f"{where}: {field!r} must be a string, got {record[field]!r:.60}")
    return {**record, "where": where}


def task_of(folder: Path) -> str:
    """The task that the model's architecture is for."""
    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a model folder: it has no config.json") from None
    except (ValueError, AttributeError):
        raise ValueError(f"{folder / 'config.json'}: not a JSON object") from None
    for task, endings in TASKS.items():
        if any(str(name).endswith(endings) for name in architectures):
            return task
    raise ValueError(
        f"{folder}: its architecture is {', '.join(map(str, architectures)) or 'not named'}, neither a causal language "
        "model nor a sequence classifier: an adapter does not hold a new head, so the folder must have one"
    )


def load(folder: Path, task: str) -> tuple[Any, Any]:
    """The model, in the dtype of its file, and its tokenizer."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModelForSequenceClassification
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = kind.from_pretrained(
            folder, local_files_only=True, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: cannot be loaded: {error}") from None
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: has no weights for {min(report['missing_keys'])}: an adapter does not hold a new head"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder}: its tokenizer has neither a padding nor an end-of-text token")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _length(asked: int, model: Any, tokenizer: Any) -> int:
    """Of the longest examples: what was asked for, or what the model and its tokenizer take."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min(asked, *(int(limit) for limit in limits if limit and limit > 0))


def _check_ids(examples: Sequence[Example], model: Any, tokenizer: Any, folder: Path) -> None:
    largest = max((token for example in examples for token in example["input_ids"]), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(largest, tokenizer.pad_token_id) >= rows:
        raise ValueError(
            f"{folder}: its tokenizer gives the token {max(largest, tokenizer.pad_token_id)}, and the model has {rows}"
        )


def encode(
    records: Sequence[Mapping[str, Any]], tokenizer: Any, recipe: Recipe, task: str, model_config: Any, data: Path
) -> Iterator[Example]:
    """Examples as the model takes them: `input_ids`, `attention_mask` and `labels`.

    Raises:
        ValueError: naming the line, of which there is nothing to learn.
    """
    if task == "classification":
        for record in records:
            label = _label(record, model_config, data)
            encoded = tokenizer(record["text"], truncation=True, max_length=recipe.max_length)
            if not encoded["input_ids"]:
                raise ValueError(f"{record['where']}: the text has no tokens")
            yield {**encoded, "labels": label}
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for record in records:
        if "whole" in record:
            ids = tokenizer(record["text"], verbose=False)["input_ids"]
            for start in range(0, len(ids), recipe.max_length):
                window = ids[start : start + recipe.max_length]
                if len(window) > 1:  # one token predicts nothing
                    yield _causal(window, window, str(data))
        elif "text" in record:
            ids = [*tokenizer(record["text"])["input_ids"], *end][: recipe.max_length]
            yield _causal(ids, ids, record["where"])
        else:
            prompt = tokenizer(record["prompt"])["input_ids"]
            completion = [*tokenizer(record["completion"], add_special_tokens=False)["input_ids"], *end]
            if len(prompt) >= recipe.max_length:
                raise ValueError(f"{record['where']}: the prompt fills --max-length {recipe.max_length}")
            ids = [*prompt, *completion][: recipe.max_length]
            yield _causal(ids, [*[_IGNORED] * len(prompt), *completion][: recipe.max_length], record["where"])


def _causal(ids: list[int], labels: list[int], where: str) -> Example:
    if all(label == _IGNORED for label in labels[1:]):  # the first token is not predicted
        raise ValueError(f"{where}: there is no token to learn: of a text the first is given, of a pair the prompt")
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _label(record: Mapping[str, Any], model_config: Any, data: Path) -> int:
    where = record.get("where", data)
    if "whole" in record or "text" not in record or "label" not in record:
        raise ValueError(f'{where}: a classifier needs JSON lines with "text" and "label"')
    label = record["label"]
    if isinstance(label, str) and label in model_config.label2id:
        return int(model_config.label2id[label])
    if type(label) is int and 0 <= label < model_config.num_labels:
        return label
    known = ", ".join(sorted(model_config.label2id)[:8])
    raise ValueError(f"{where}: the model has no class {label!r:.40}; it has {model_config.num_labels}: {known}")


def split(examples: list[Example], recipe: Recipe, data: Path) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out: at least one example each, but none of a share of 0."""
    if len(examples) < (2 if recipe.held_out else 1):
        needed = "two are needed, or --held-out 0" if recipe.held_out else "one is needed"
        raise ValueError(f"{data}: has {len(examples)} example(s) of at most {recipe.max_length} tokens; {needed}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held_out = min(len(examples) - 1, max(1, round(recipe.held_out * len(examples)))) if recipe.held_out else 0
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]


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

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps(len(training)),
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup_steps=round(recipe.warmup * recipe.steps(len(training))),
            weight_decay=recipe.weight_decay,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=recipe.seed,
        )
        pad = transformers.DataCollatorForSeq2Seq if task == "causal-lm" else transformers.DataCollatorWithPadding
        collate = pad(tokenizer)
        model.to(arguments.device)
        calibration = None
        if isinstance(config.mask, str) and needs_gradient(config.mask):
            first = training[: _CALIBRATION_BATCHES * recipe.batch_size]
            calibration = [
                collate(first[i : i + recipe.batch_size]).to(arguments.device)
                for i in range(0, len(first), recipe.batch_size)
            ]
        with console.status("choosing entries"):
            handle = shira.attach(model, config, calibration=calibration)
        try:
            optimizer = shira.ShiraAdamW(handle.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
            curve = _curve(transformers)
            trainer = transformers.Trainer(
                model=model,
                args=arguments,
                data_collator=collate,
                train_dataset=training,
                eval_dataset=held_out,
                optimizers=(optimizer, None),
                compute_metrics=_accuracy if task == "classification" else None,
                callbacks=[curve],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            note = TextColumn("{task.fields[note]}")
            with Progress(*columns, note, console=console, transient=True, disable=not console.is_terminal) as progress:
                before = _scores(trainer.evaluate()) if held_out else {}
                curve.watch(progress)
                trainer.train()
                after = _scores(trainer.evaluate()) if held_out else {}
            if not all(math.isfinite(loss) for loss in (*curve.losses, *after.values())):
                raise RuntimeError("the loss is not finite: try a lower --learning-rate")
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


def _accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(metrics[f"eval_{name}"]) for name in ("loss", "accuracy") if f"eval_{name}" in metrics}


def picture(found: Training) -> bytes:
    """The training curve as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    steps = range(1, len(found.losses) + 1)
    window = max(1, len(found.losses) // 20)
    near = window // 2  # on either side
    parts = [found.losses[max(0, i - near) : i + near + 1] for i in range(len(found.losses))]
    smooth = [sum(part) / len(part) for part in parts]
    label = "training, each batch"
    if window > 1:
        axes.plot(steps, found.losses, color="#2f6fb5", alpha=0.3, linewidth=1)
        label += f" and the mean of {2 * near + 1}"
    axes.plot(steps, smooth, ".-" if window == 1 else "-", color="#2f6fb5", linewidth=2, label=label)
    title = f"{found.adapter.nnz} entries, {found.adapter.density:.2%} of the tensors"
    if found.held_out_examples:
        ends = [found.held_out_before["loss"], found.held_out_after["loss"]]
        axes.plot([0, len(found.losses)], ends, "o", color="#d9772b", label="held out, before and after", clip_on=False)
        for step, loss in zip((0, len(found.losses)), ends, strict=True):
            axes.annotate(f"{loss:.3f}", (step, loss), (0, 9), textcoords="offset points", ha="center", color="#d9772b")
    else:
        title += "; no example was held out"
    axes.margins(y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats)", color=_INK)
    axes.set_title(title, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


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
