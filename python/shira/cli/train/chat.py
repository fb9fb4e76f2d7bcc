"""Chats as tokens, by the tokenizer's chat template, and which of the tokens are the assistant's."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

# A template may be a stranger's program, which would never end or fill memory: what one chat may take of them.
_SECONDS, _BYTES, _CHARACTERS = 20, 2**31, 2**26
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it

Messages = list[dict[str, str]]


def check_template(tokenizer: Any, where: str) -> None:
    """Refuses with ValueError a tokenizer without a chat template, or with several and no default."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        template = None
    if not template:
        raise ValueError(
            f"{where}: the tokenizer has no chat template: save one with it (the model folder's "
            'chat_template.jinja), or write the chats as rows of "prompt" and "completion"'
        )


def chat_tokens(messages: Messages, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and which of them the assistant wrote, with what the template ends its turns with.

    A template with `{% generation %}` says itself what the assistant wrote. Of any other, a turn is what the template
    adds to the chat before it, as it is written when an answer is asked for.

    Raises:
        ValueError: the template refuses the chat, writes a turn in another way once more turns follow, or takes too
            much time or memory.
    """
    try:
        marked = _MARKED.search(tokenizer.get_chat_template())
        with _bounded():
            text, spans = _marked_turns(messages, tokenizer) if marked else _turns(messages, tokenizer)
        if len(text) > _CHARACTERS:
            raise ValueError(f"it writes {len(text)} characters, more than {_CHARACTERS}")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except Exception as error:  # noqa: BLE001 - a template is a program, which may raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: the tokenizer's chat template cannot write this chat: {reason}") from None
    return encoded["input_ids"], [any(_overlap(token, span) for span in spans) for token in encoded["offset_mapping"]]


def _marked_turns(messages: Messages, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and where in it the template says that the assistant's turns begin and end.

    The mask of tokens that `apply_chat_template` makes of these is wrong in older versions of transformers, where a
    turn begins or ends with a space that its tokens leave out.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, spans


def _turns(messages: Messages, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and where in it the assistant's turns begin and end. Raises ValueError if that is not told."""

    def written(number: int, asked: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=asked))

    if messages[0]["role"] == "assistant":
        raise ValueError("its first turn is the assistant's, which only a template with {% generation %} tells apart")
    text, spans = written(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(i, asked=True), written(i + 1)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"it writes message {i + 1} in another way when it is asked for, or when more follow: mark the "
                    "assistant's turns in the template with {% generation %}, or write rows of prompt and completion"
                )
            spans.append((len(before), len(after)))
    return text, spans


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises TimeoutError in a block that takes more than so many seconds of the processor, and MemoryError in one that
    takes more memory. Only the main thread gets signals; others are not bounded."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it takes more than {_SECONDS} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as sizes:  # of Linux; or less is left
            most = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _BYTES
            resource.setrlimit(resource.RLIMIT_AS, (min(one for one in (most, *limits) if one >= 0), limits[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, handler)


def _overlap(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token has a character of the span; one without characters, such as a trimmed space, where it begins."""
    return span[0] <= token[0] < span[1] or token[0] < span[0] < token[1]
