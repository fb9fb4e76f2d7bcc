"""Examples: rows made into tokens and labels, split into those trained on and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shira.cli.train.chat import chat_tokens, check_template
from shira.cli.train.labels import label_of
from shira.cli.train.recipe import Recipe
from shira.cli.train.rows import CHATS, DOCUMENT, LABELLED, PAIR, Row

_IGNORED = -100  # a label that no loss counts

Example = dict[str, Any]


class Encoder:
    """Makes rows into examples as the model takes them: `input_ids`, `attention_mask` and `labels`.

    A text gets the special tokens that the tokenizer puts around texts, once around the whole of it, also where it is
    a prompt and a completion; and an end-of-text token, unless it has one.

    Attributes:
        cut: how many examples were longer than `length` and lost their end.
        apart: of how many pairs prompt and completion were made into tokens apart, since a token spans both.
    """

    def __init__(self, tokenizer: Any, config: Any, length: int) -> None:
        self._tokenizer, self._config, self._length = tokenizer, config, length
        self._around: tuple[list[int], list[int]] | None = None
        self.cut = self.apart = 0

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of the rows: one each, but as many of a document as it is long.

        Raises:
            ValueError: there is nothing to learn in a row; the message names its line.
        """
        examples = []
        for row in rows:
            try:
                examples += self._encode(row)
            except ValueError:
                raise
            except Exception as error:  # noqa: BLE001 - tokenizers raise Exception, such as where they miss <unk>
                raise ValueError(f"{row.where}: the tokenizer fails: {' '.join(str(error).split())}") from None
        return examples

    def notes(self, examples: int) -> list[str]:
        """What is said once about the examples."""
        notes = []
        if self.cut:
            notes.append(f"{self.cut} of {examples} examples were cut to {self._length} tokens")
        if self.apart:
            notes.append(
                f"{self.apart} of {examples} prompts end within a token of the joined text: there prompt and "
                "completion were tokenized apart"
            )
        return notes

    def _encode(self, row: Row) -> list[Example]:
        if row.form == DOCUMENT:
            return self._windows(row)
        return [self._labelled(row) if row.form == LABELLED else self._causal(row, *self._tokens_of(row))]

    def _tokens_of(self, row: Row) -> tuple[list[int], list[bool]]:
        """A row's tokens, and which of them are learned."""
        if row.form in CHATS:
            (messages,) = row.values.values()
            check_template(self._tokenizer, row.where)
            return chat_tokens(messages, self._tokenizer, row.where)
        paired = row.form == PAIR
        prompt, learned = self._pair(row) if paired else ([], self._bare(row.values["text"]))
        if not learned:
            raise ValueError(f"{row.where}: there is no token to learn: the tokenizer makes none of the text")
        begin, end = self._specials(prompt + learned, row)
        given, learned = begin + prompt, learned + end
        if len(given) >= self._length:
            raise ValueError(f"{row.where}: the prompt fills --max-length {self._length}")
        return given + learned, [not paired] * len(given) + [True] * len(learned)

    def _pair(self, row: Row) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, as a model is given it, and those of the completion that goes on from it.

        They are those of the joined text, unless one of its tokens spans both: then each is tokenized by itself.
        """
        prompt = self._bare(row.values["prompt"])
        joined = self._bare(row.values["prompt"] + row.values["completion"])
        if joined[: len(prompt)] == prompt:
            return prompt, joined[len(prompt) :]
        self.apart += 1
        return prompt, self._continued(row.values["completion"])

    def _continued(self, text: str) -> list[int]:
        """The tokens of a text that goes on: tokenizers that put a space before a text put none behind a line's end."""
        line, joined = self._bare("\n"), self._bare("\n" + text)
        return joined[len(line) :] if joined[: len(line)] == line else self._bare(text)

    def _windows(self, row: Row) -> list[Example]:
        text = self._bare(row.values["document"])
        begin, end = self._specials(text, row, closed=False) if text else ([], [])
        tokens = begin + text + end
        windows = [tokens[start : start + self._length] for start in range(0, len(tokens), self._length)]
        # One token predicts nothing.
        return [self._causal(row, window, [True] * len(window)) for window in windows if len(window) > 1]

    def _causal(self, row: Row, tokens: list[int], learned: list[bool]) -> Example:
        self.cut += len(tokens) > self._length
        tokens, learned = tokens[: self._length], learned[: self._length]
        if not any(learned[1:]):
            raise ValueError(
                f"{row.where}: there is no token to learn among the first {self._length}: the first of all is given, "
                "and so are those that are not the completion's or the assistant's"
            )
        labels = [token if own else _IGNORED for token, own in zip(tokens, learned, strict=True)]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    def _labelled(self, row: Row) -> Example:
        label = label_of(row.values["label"], self._config, row.where)
        text, added = row.values["text"], self._tokenizer.num_special_tokens_to_add()
        encoded = self._tokenizer(text, verbose=False)
        if len(encoded["input_ids"]) <= added:
            raise ValueError(f"{row.where}: the text has no tokens")
        if added >= self._length:
            raise ValueError(f"{row.where}: the tokenizer's special tokens fill --max-length {self._length}")
        if len(encoded["input_ids"]) > self._length:
            self.cut += 1
            encoded = self._tokenizer(text, truncation=True, max_length=self._length)
        if encoded["input_ids"][-1] == self._tokenizer.pad_token_id:
            raise ValueError(
                f"{row.where}: the text ends in {self._tokenizer.pad_token!r}, with which the tokenizer pads: a model "
                "that classifies by the last token would not see it; give the tokenizer a padding token of its own"
            )
        return {**encoded, "labels": label}

    def _bare(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _specials(self, tokens: list[int], row: Row, closed: bool = True) -> tuple[list[int], list[int]]:
        """What is put before and after a text's tokens, which may have it already; `closed` by an end-of-text token."""
        if self._around is None:
            self._around = self._find_around(row)
        begin, end = self._around
        final = self._tokenizer.eos_token_id
        if closed and final is not None and final not in end[-1:]:
            end = [*end, final]
        return (
            [] if tokens[: len(begin)] == begin else begin,
            [] if tokens[len(tokens) - len(end) :] == end else end,
        )

    def _find_around(self, row: Row) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after any text: it is found around a text's own tokens."""
        for text in ("a", "1", *row.values.values()):
            bare, whole = self._bare(text), list(self._tokenizer(text, verbose=False)["input_ids"])
            starts = [i for i in range(len(whole) - len(bare) + 1) if bare and whole[i : i + len(bare)] == bare]
            if len(starts) == 1:
                return whole[: starts[0]], whole[starts[0] + len(bare) :]
        raise ValueError(f"{row.where}: the tokenizer's special tokens cannot be told from those of the text")


def split(examples: list[Example], recipe: Recipe, data: Path) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out: at least one example each, but nothing is held out of a share of 0."""
    if len(examples) < (2 if recipe.held_out else 1):
        needed = "two are needed, or --held-out 0" if recipe.held_out else "one is needed"
        raise ValueError(f"{data}: has {len(examples)} example(s) of at most {recipe.max_length} tokens; {needed}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held_out = min(len(examples) - 1, max(1, round(recipe.held_out * len(examples)))) if recipe.held_out else 0
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]
