"""A model folder: which task it is for, the model and its tokenizer, and what they take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shira.cli.train.examples import Example

TASKS = {  # the ends of their architectures' names
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "classification": ("ForSequenceClassification",),
}


def task_of(folder: Path) -> str:
    """The task that the model's architecture is for. Raises ValueError if that is neither."""
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
    """The model, in the dtype of its file, and its tokenizer, which has a padding token.

    Raises:
        ValueError: the folder cannot be loaded, has no weights for a part of the model, or has no token to pad with.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModelForSequenceClassification
    try:
        local = {"local_files_only": True, "trust_remote_code": False}  # code of the folder is never run
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        model, report = kind.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused below
            **local,
        )
    except Exception as error:  # noqa: BLE001 - a damaged folder makes the libraries raise errors of any type
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, which is never run"
        elif not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{folder}: cannot be loaded: {reason}") from None
    if report["mismatched_keys"]:
        name = min(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
        raise ValueError(f"{folder}: its weights for {name} have another shape than its config.json says")
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


def length_of(asked: int, model: Any, tokenizer: Any) -> int:
    """How many tokens the longest examples have: those asked for, or what the model and its tokenizer take."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min(asked, *(int(limit) for limit in limits if limit and limit > 0))


def check_ids(examples: Sequence[Example], model: Any, tokenizer: Any, folder: Path) -> None:
    """Refuses with ValueError a tokenizer that gives tokens of which the model has no embedding."""
    largest = max((token for example in examples for token in example["input_ids"]), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(largest, tokenizer.pad_token_id) >= rows:
        raise ValueError(
            f"{folder}: its tokenizer gives the token {max(largest, tokenizer.pad_token_id)}, and the model has {rows}"
        )
