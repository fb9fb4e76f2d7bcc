"""Models and tokenizers of transformers, loaded from a folder that may be hostile.

No code of the folder is run and nothing is unpickled, nothing is read outside of the folder and nothing is asked for on
the network, and the model is no larger than its checkpoint has weights for.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from shira.files.checkpoint import TensorFolder
from shira.files.reading import check_folder, read_inside

CODE = "it needs code of its own, which is never run"
_MOST_PARTS = 100_000  # layers, experts, classes, .. of a model: configs make lists of as many
_PARTS = re.compile("layer|depth|block|stage|expert|label|head")
_NOT_PARTS = re.compile("size|token|_id")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_model(kind: Any, folder: str | os.PathLike[str], **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model in the dtype of its file, on the CPU, and transformers' report on the weights that it found.

    Args:
        kind: a class of transformers, which has `from_pretrained`.
        folder: a Hugging Face folder.
        options: for `from_pretrained`.

    Raises:
        ValueError: the folder's config names code, kernels or files of other places, or numbers that its weights are
            too few for; a link leads out of it. And whatever transformers raises for damaged ones.
        OSError: something cannot be read.
    """
    folder = Path(folder)
    check_model_folder(folder)
    with sealed(), no_larger_than(*bounds_of(TensorFolder(folder))):
        return kind.from_pretrained(  # type: ignore[no-any-return]
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, **_LOCAL, **options
        )


def load_tokenizer(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The config of a model and its tokenizer. Raises as `load_model` does."""
    import transformers

    check_model_folder(Path(folder))
    with sealed():
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        return config, transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)


def check_model_folder(folder: Path) -> None:
    """Refuses with ValueError what transformers would follow elsewhere; of the folder only JSON is read."""
    check_folder(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder}: it holds an adapter of PEFT beside the model, which would be loaded too: remove it"
        )
    config = read_inside(folder, "config.json")
    for place, name, value in _fields(config, ""):
        where = f"{folder / 'config.json'}: {place + name}"
        if name == "auto_map" and place:  # of a part, for which transformers asks at the terminal
            raise ValueError(f"{where}: {CODE}")
        if name.endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{where} names a kernel of the network, {str(value)[:80]!r}, which is not fetched")
        if type(value) is int and value > _MOST_PARTS and _PARTS.search(name) and not _NOT_PARTS.search(name):
            raise ValueError(f"{where} must be at most {_MOST_PARTS}, got {value}")
    tokenizer = "tokenizer_config.json"
    named = read_inside(folder, tokenizer).get("fast_tokenizer_files") if (folder / tokenizer).exists() else None
    if not all(isinstance(file, str) and os.path.basename(file) == file for file in named or []):
        raise ValueError(f"{folder / tokenizer}: fast_tokenizer_files must be names of files beside it")


def _fields(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """All fields of a config and of the configs in it: the path of the object, the name, the value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield place, name, inner
            yield from _fields(inner, f"{place}{name}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, place)


_seal_lock, _sealed, _before = threading.Lock(), 0, (False, 0)


@contextmanager
def sealed() -> Iterator[None]:
    """While a block runs, no request of huggingface_hub leaves the process, and transformers takes code that nobody
    allowed as refused, where it would ask at standard input: for parts of a model, to which a caller's refusal does not
    get. It holds for all threads."""
    global _sealed, _before
    from huggingface_hub import constants
    from transformers import dynamic_module_utils

    with _seal_lock:
        if _sealed == 0:
            _before = constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE
            constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE = True, 0
        _sealed += 1
    try:
        yield
    finally:
        with _seal_lock:
            _sealed -= 1
            if _sealed == 0:
                constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE = _before


def bounds_of(checkpoint: TensorFolder) -> tuple[int, int]:
    """How many tensors, and entries of them, a model may have that is loaded from a checkpoint: far more than any has,
    since merged and tied ones are few on disk."""
    size = sum(file.stat().st_size for file in set(checkpoint.files.values()))
    return 16 * len(checkpoint) + 4096, 4 * size + 2**26


@contextmanager
def no_larger_than(tensors: int, entries: int) -> Iterator[None]:
    """Refuses with ValueError what this thread makes in the block, if its modules have more parameters and buffers than
    `tensors`, or those have more entries than `entries`: so numbers of a config fill neither time nor memory."""
    thread, sizes, total = threading.get_ident(), dict[tuple[int, str], int](), 0

    def count(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal total
        if threading.get_ident() != thread or tensor is None:
            return
        total += tensor.numel() - sizes.get((id(module), name), 0)
        sizes[id(module), name] = tensor.numel()
        if len(sizes) > tensors or total > entries:
            raise ValueError("the config describes a far larger model than there are weights")

    hooks = [
        module_hooks.register_module_parameter_registration_hook(count),
        module_hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
