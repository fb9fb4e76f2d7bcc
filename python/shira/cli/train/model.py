"""A model folder: which task it is for, the model and its tokenizer, and what they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shira.cli.train.examples import Example
from shira.cli.train.labels import problem_of
from shira.files.reading import read_inside
from shira.model import pretrained
from shira.model.names import printable

TASKS = {  # the ends of their architectures' names
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "classification": ("ForSequenceClassification",),
}


def task_of(folder: Path) -> str:
    """The task that the model's architecture is for. Raises ValueError if that is neither."""
    try:
        architectures = read_inside(folder, "config.json").get("architectures") or []
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a model folder: it has no config.json") from None
    for task, endings in TASKS.items():
        if any(str(name).endswith(endings) for name in architectures):
            return task
    raise ValueError(
        f"{folder}: its architecture is {', '.join(map(str, architectures)) or 'not named'}, neither a causal language "
        "model nor a sequence classifier: an adapter does not hold a new head, so the folder must have one"
    )


def load_tokenizer(folder: Path) -> tuple[Any, Any]:
    """The model's config and its tokenizer, which has a padding token and pads on the right.

    Raises:
        ValueError: the folder cannot be loaded, or its tokenizer has no token to pad with.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with _in_one_line(folder):
        config, tokenizer = pretrained.load_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{folder}: its tokenizer has neither a padding nor an end-of-text token: name one in tokenizer_config.json"
        )
    if config.model_type != "xlnet":  # which alone classifies by what stands last, padding or not
        tokenizer.padding_side = "right"  # positions are counted from the left
    return config, tokenizer


def load_model(folder: Path, task: str, tokenizer: Any) -> Any:
    """The model, in the dtype of its file.

    Raises:
        ValueError: the folder cannot be loaded, or has no weights for a part of the model.
    """
    import transformers

    kind = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModelForSequenceClassification
    with _in_one_line(folder):
        model, report = pretrained.load_model(kind, folder, ignore_mismatched_sizes=True)  # which are refused below
    if report["mismatched_keys"]:
        name = min(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
        raise ValueError(f"{folder}: its weights for {name} have another shape than its config.json says")
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: has no weights for {min(report['missing_keys'])}: an adapter does not hold a new head"
        )
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id  # by which decoders find the last token that is not padding
    if task == "classification":
        model.config.problem_type = problem_of(model.config)
    elif _sees_what_follows(model):
        raise ValueError(
            f"{folder}: not a causal model: what it predicts depends on the token that it is to predict; models of "
            'the kind of BERT need "is_decoder": true in config.json'
        )
    return model


@torch.no_grad()
def _sees_what_follows(model: Any) -> bool:
    """Whether what a model says after a first token depends on the second."""
    first, second = (model(input_ids=torch.tensor([[0, token]])).logits[0, 0].float() for token in (1, 2))
    return bool((first - second).abs().max() > 1e-2 * first.std())  # not by rounding alone


@contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """Whatever a damaged folder makes the libraries raise becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of any type
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = pretrained.CODE
        elif not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{folder}: cannot be loaded: {reason}") from None


def length_of(asked: int, config: Any, tokenizer: Any) -> int:
    """How many tokens the longest examples have: those asked for, or what the model and its tokenizer take."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(asked, *(int(limit) for limit in (positions, tokenizer.model_max_length) if limit and limit > 0))


def check_fits(examples: Sequence[Example], model: Any, tokenizer: Any, folder: Path) -> None:
    """Refuses with ValueError examples with tokens or positions of which the model has no embedding."""
    tokens = max((token for example in examples for token in example["input_ids"]), default=0)
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    rows = min(table.weight.shape[0] for table in tables)
    largest = max(tokens, tokenizer.pad_token_id)
    if largest >= rows:
        name = printable(str(tokenizer.convert_ids_to_tokens(largest)))
        raise ValueError(
            f"{folder}: its tokenizer gives the token {largest} ({name}), and the model has {rows}: resize the model's "
            "embeddings, or take the tokenizer that it was made with"
        )
    longest = max((len(example["input_ids"]) for example in examples), default=0)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            room = module.num_embeddings - module.padding_idx - 1  # positions begin after it, as in RoBERTa
            if longest > room:
                raise ValueError(f"{folder}: the model takes examples of {room} tokens: --max-length {room}")
