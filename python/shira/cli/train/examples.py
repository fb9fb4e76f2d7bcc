"""Examples: read from a file of text, made into tokens and labels, split into those trained on and those held out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shira.cli.train.recipe import Recipe

_IGNORED = -100  # a label that no loss counts

Example = dict[str, Any]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file: JSON lines hold one a line, any other text is a single one. Raises ValueError, OSError."""
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


def encode(
    records: Sequence[Mapping[str, Any]], tokenizer: Any, recipe: Recipe, task: str, model_config: Any, data: Path
) -> Iterator[Example]:
    """Examples as the model takes them: `input_ids`, `attention_mask` and `labels`.

    Raises:
        ValueError: there is nothing to learn in a record; the message names its line.
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
        raise ValueError(
            f"{where}: there is no token to learn: the first token of a text is given, and so is the prompt of a pair"
        )
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
    """What is trained on, and what is held out: at least one example each, but nothing is held out of a share of 0."""
    if len(examples) < (2 if recipe.held_out else 1):
        needed = "two are needed, or --held-out 0" if recipe.held_out else "one is needed"
        raise ValueError(f"{data}: has {len(examples)} example(s) of at most {recipe.max_length} tokens; {needed}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held_out = min(len(examples) - 1, max(1, round(recipe.held_out * len(examples)))) if recipe.held_out else 0
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]
