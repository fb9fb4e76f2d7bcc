"""The rows of a data file, checked as far as that goes without the model's tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira.files.reading import check_regular

_MOST_BYTES = 2**30  # of a file, whose tokens take some forty times as much

DOCUMENT = frozenset({"document"})  # the form of a file that is one text
TEXT = frozenset({"text"})
PAIR = frozenset({"prompt", "completion"})
CHATS = (frozenset({"messages"}), frozenset({"conversations"}))
LABELLED = frozenset({"text", "label"})

_FORMS = {"causal-lm": (TEXT, PAIR, *CHATS), "classification": (LABELLED,)}  # of each task
_NEEDS = {
    "causal-lm": 'must be an object with "text", with "prompt" and "completion", or with "messages"',
    "classification": 'a classifier needs JSON lines with "text" and "label"',
}
# What these hold belongs to what a model reads, so a row is not right without it.
_PART_OF_THE_TEXT = ("system", "tools", "documents", "images", "chat_template_kwargs", "text_pair")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Row:
    """A row of the data.

    Attributes:
        where: the file and the line, for messages.
        form: the keys that make it a text, a pair, a chat, or a text with its label; `DOCUMENT` for a whole file.
        values: what those keys hold. Texts are not blank; a chat is a list of messages with "role" and "content".
        unread: the other keys.
    """

    where: str
    form: frozenset[str]
    values: Mapping[str, Any]
    unread: frozenset[str] = frozenset()


def read_rows(path: Path, task: str) -> list[Row]:
    """The rows of a file for a task: JSON lines (.jsonl, .ndjson, .json) or a JSON list (.json); other text is one row.

    Raises:
        ValueError: the file is not regular, not UTF-8 or holds nothing, or a row is not of a form that the task takes;
            the message names its line.
        OSError: it cannot be read.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES or len(data := file.read(_MOST_BYTES + 1)) > _MOST_BYTES:
                raise ValueError(f"{path}: has more than {_MOST_BYTES} bytes, and all of it is in memory: split it")
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return [_row(record, where, task) for where, record in _records(text, path)]
    if task != "causal-lm":
        raise ValueError(f"{path}: {_NEEDS[task]}, in a file named .jsonl")
    if _holds_rows(text):
        raise ValueError(f"{path}: holds rows of JSON: name the file .jsonl to have them read")
    return [Row(str(path), DOCUMENT, {"document": text})]


def _records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(text, str(path)), 1):
            yield f"{path}, row {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} is there twice")
        found[key] = value
    return found


def _holds_rows(text: str) -> bool:
    """Whether a text begins with a line that is a row of any task."""
    first = text.strip().partition("\n")[0]
    try:
        record = json.loads(first) if first.startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(form <= set(record) for forms in _FORMS.values() for form in forms)


def _row(record: Any, where: str, task: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {_NEEDS[task]}")
    given = {
        key: value for key, value in record.items() if value is not None
    }  # other rows' keys are null in some files
    forms = [form for form in _FORMS[task] if form <= set(given)]
    if not forms:
        raise ValueError(f"{where}: {_NEEDS[task]}")
    if len(forms) > 1:
        raise ValueError(f"{where}: has {' and '.join(sorted(set().union(*forms)))}: a row has only one of these forms")
    (form,) = forms
    for key in _PART_OF_THE_TEXT:
        if given.get(key):
            raise ValueError(f"{where}: {key!r} is not read: write it into the text or the messages, or leave it out")
    values = {key: given[key] for key in form}
    for key in form & (TEXT | PAIR):
        values[key] = _text(given[key], f"{where}: {key!r}", blank=key == "prompt")
    for key in form & set().union(*CHATS):
        values[key] = _messages(given[key], where, key)
    return Row(where, form, values, frozenset(given) - form)


def _text(value: Any, what: str, blank: bool) -> str:
    """The value, if it is a text that a tokenizer takes."""
    if not isinstance(value, str):
        hint = '; a chat is a row with "messages"' if isinstance(value, list) else ""
        raise ValueError(f"{what} must be a string, got {value!r:.60}{hint}")
    if not blank and not value.strip():
        raise ValueError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which is not a character") from None
    return value


def _messages(value: Any, where: str, key: str) -> list[dict[str, str]]:
    """Messages with "role" and "content"; those with "from" and "value" are renamed."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key!r} must be a list of messages, got {value!r:.60}")
    messages = []
    for number, message in enumerate(value, 1):
        what = f"{where}: message {number}"
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if set(given) == {"from", "value"}:
            role = _ROLES.get(given["from"]) if isinstance(given["from"], str) else None
            if role is None:
                raise ValueError(f'{what}: "from" must be one of {", ".join(_ROLES)}, got {given["from"]!r:.40}')
            given = {"role": role, "content": given["value"]}
        if set(given) != {"role", "content"}:
            raise ValueError(
                f'{what}: must have "role" and "content", or "from" and "value", and nothing else; it has '
                f"{', '.join(map(repr, sorted(given))) or 'neither'}"
            )
        role = _text(given["role"], f"{what}: 'role'", blank=False)
        content = _text(given["content"], f"{what}: 'content'", blank=role != "assistant")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: there is no token to learn: no message is the assistant's")
    return messages
