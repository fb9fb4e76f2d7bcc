"""Adapters of PEFT that are merged into the weights, such as LoRA and DoRA: PEFT itself does it, layer by layer.

PEFT and transformers are imported when an adapter is read, not before.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shira.adapter.base import BaseTensors
from shira.adapter.difference import Energies, changes
from shira.adapter.tensor import AdapterTensor, same_entries
from shira.convert.peft_checks import check_adapter, check_patterns
from shira.convert.source import CONFIG, WEIGHTS, peft_tensors, tied_once
from shira.files.checkpoint import Base
from shira.files.progress import Progress
from shira.files.reading import read_inside
from shira.model.names import canonical, canonical_in, state_buffers
from shira.model.pretrained import load_model, no_larger_than, sealed

# Model classes of transformers by PEFT's task types; without one the class that the base's config.json names.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def read(folder: Path, base: Base, top: float | None, progress: Progress) -> tuple[dict[str, AdapterTensor], Energies]:
    """Each layer of the adapter merged by PEFT, compared with what it was, and put back.

    Returns tensors of kind "replace", and the energies of their changes. Raises and warns as `shira.convert.read` does.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = check_adapter(folder)
    task = _checked_task(folder, config["peft_type"])
    model = base if isinstance(base, nn.Module) else _model(base, task)
    check_patterns(folder, config, [name for name, _ in model.named_modules()])
    bare, weights = canonical_in(model), _by_use(model)
    found = _Changes(folder, top, None if isinstance(base, nn.Module) else BaseTensors(base))
    # What the file has whole, such as biases and `modules_to_save` with their buffers: PEFT may load it into the model.
    file = peft_tensors(folder)
    whole = {canonical(key): key for key in file if canonical(key) in weights}
    with _put_back(model, {name: weights[name] for name in whole}) as before:
        tuned, paths = _with_adapter(model, folder)
        layers = [(name, layer) for name, layer in tuned.named_modules() if isinstance(layer, BaseTunerLayer)]
        for name, key in whole.items():
            weights[name].data.copy_(before[name])
            found.add(name, before[name], file[key])
        for done, (name, layer) in enumerate(layers):
            progress(done, len(layers), canonical(name))
            path = paths.get(layer.get_base_layer(), canonical(name))
            for field, (parameter, new) in _merged_layer(folder, name, layer).items():
                use = bare(f"{path}.{field}" if path else field)
                if weights.get(use) is not parameter:
                    raise ValueError(f"{folder}: merging {name} changes what is no weight of the model")
                found.add(use, parameter.detach(), new)
    if not layers and not whole:
        raise ValueError(f"{folder}: PEFT finds no layer of the model to merge this adapter into")
    uses: dict[torch.Tensor, list[str]] = {}
    for name, tensor in weights.items():
        uses.setdefault(tensor, []).append(name)
    tensors = tied_once(folder, found.tensors, lambda name: sorted(uses[weights[name]], key=lambda use: use != name))
    return tensors, {name: found.energies[name] for name in tensors}


def _by_use(model: nn.Module) -> dict[str, torch.Tensor]:
    """By all canonical names the parameters, and the buffers of the state dict."""
    bare = canonical_in(model)
    state = itertools.chain(model.named_parameters(remove_duplicate=False), state_buffers(model))
    return {bare(name): tensor for name, tensor in state}


@dataclass
class _Changes:
    """What merging an adapter changes, tensor by tensor."""

    folder: Path
    top: float | None
    stored: BaseTensors | None  # of the base on disk, which may have fewer tensors than the model
    tensors: dict[str, AdapterTensor] = field(default_factory=dict)
    energies: Energies = field(default_factory=dict)

    def add(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        """Compares a weight with what it is when the adapter is merged."""
        tensor, energy = changes(name, old, new.to(old.dtype), self.top)
        if tensor is None:
            return
        if name in self.tensors and not same_entries(self.tensors[name], tensor):
            raise ValueError(f"{self.folder}: two parts of the adapter change {name}, and differently")
        if self.stored is not None and name not in self.stored:
            raise ValueError(f"{name}: the base has no tensor of this name")
        self.tensors[name], self.energies[name] = tensor, energy


def _checked_task(folder: Path, kind: str) -> str | None:
    """The task type of an adapter's config. Refuses with ValueError an adapter that PEFT cannot merge."""
    import peft

    if kind not in peft.PeftType.__members__:
        raise ValueError(f"{folder / CONFIG}: peft_type {kind!r} is none that PEFT {peft.__version__} has")
    with _as_value_errors(f"{folder}: PEFT cannot load this adapter"), sealed():
        config = peft.PeftConfig.from_pretrained(folder)
    task: str | None = config.task_type
    return task


@contextmanager
def _put_back(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Gives what these weights hold, which they hold again at the end; and what required grad then does so again."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield before
    finally:
        for name, weight in weights.items():
            weight.data.copy_(before[name])
        for parameter, required_grad in flags:
            parameter.requires_grad_(required_grad)


def _with_adapter(model: nn.Module, folder: Path) -> tuple[Any, dict[nn.Module, str]]:
    """A model of PEFT with the adapter, all of which was loaded: modules of its own around the same parameters. And the
    path in the model of each of those modules."""
    import peft

    file, shared = (
        peft_tensors(folder),
        {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())},
    )
    entries = sum(tensor.numel() for tensor in shared.values())
    entries += sum(math.prod(file.shape(name)) for name in file)
    bound = no_larger_than(16 * (len(shared) + len(file)) + 4096, 4 * entries + 2**26)
    copied = copy.deepcopy(model, shared)
    paths = {module: path for path, module in copied.named_modules()}
    with _as_value_errors(f"{folder}: PEFT cannot load this adapter"), sealed(), bound:
        tuned = peft.PeftModel.from_pretrained(copied, folder)
        # It does not say which tensors it missed, or had no place for; loading the file once more does.
        keys = tuned.load_adapter(folder, "default")
    _check_all_loaded(folder / WEIGHTS, tuned, keys.missing_keys, keys.unexpected_keys)
    return tuned, paths


@contextmanager
def _as_value_errors(what: str) -> Iterator[None]:
    """What PEFT and transformers raise for wrong configs and files, which they hardly check: ValueErrors, of a line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (
        ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError, RuntimeError, ImportError,
        re.error, SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        text = textwrap.shorten(f"{type(error).__name__}: {error}", 280, placeholder=" ...")
        raise ValueError(f"{what}: {text.removesuffix(':')}") from None


def _check_all_loaded(file: Path, tuned: Any, missing: list[str], unexpected: list[str]) -> None:
    """PEFT leaves what a file lacks as it began, mostly without effect, and drops what it has no place for."""
    places = {name: parameter.data_ptr() for name, parameter in tuned.named_parameters(remove_duplicate=False)}
    # One that layers share is in the file once.
    found = {address for name, address in places.items() if name not in missing}
    model = type(tuned.get_base_model()).__name__
    if lacking := [name for name in missing if places.get(name) not in found]:
        raise ValueError(f"{file}: it lacks {lacking[0]}{_and_more(lacking)}, which the adapter has in a {model}")
    if unexpected:
        raise ValueError(f"{file}: PEFT finds no place in a {model} for {unexpected[0]}{_and_more(unexpected)}")


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _merged_layer(folder: Path, name: str, layer: Any) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
    """The weights of a layer by their names in it, which hold what they did before, and what they are when the adapter
    is merged."""
    parameters = dict(layer.get_base_layer().named_parameters(recurse=False))
    held = [(parameter, parameter.data, parameter.detach().clone()) for parameter in parameters.values()]
    try:
        with _as_value_errors(f"{folder}: PEFT cannot merge {name}"):
            layer.merge()
        after = dict(layer.get_base_layer().named_parameters(recurse=False))  # of another layer, if PEFT exchanges it
        if {f: p.shape for f, p in after.items()} != {f: p.shape for f, p in parameters.items()}:
            raise ValueError(f"{folder}: merging {name} gives other parameters, not other values of them")
        return {field: (parameter, after[field].detach().clone()) for field, parameter in parameters.items()}
    finally:
        for parameter, memory, old in held:
            parameter.data = memory.copy_(old)


def _model(base: Base, task: str | None) -> nn.Module:
    """The base as a model of transformers, on the CPU and in its own dtype."""
    import transformers

    needed = "to merge a PEFT adapter the base must be a Hugging Face folder with config.json, or a model"
    if not isinstance(base, (str, os.PathLike)):
        raise ValueError(f"{needed}, got {type(base).__name__}")
    os.stat(base)  # for the usual OSError, with errno and path
    path = Path(base) / "config.json"
    if not path.exists():
        raise ValueError(f"{base}: {needed}")
    config = read_inside(Path(base), path.name)
    if task in _CLASSES:
        found = getattr(transformers, _CLASSES[task])
    else:
        found = _named_class(path, config.get("architectures"))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # it has a long report, also of what is not used
    try:
        with _as_value_errors(f"{base}: transformers cannot load this model as {found.__name__}"):
            model, report = load_model(found, base, ignore_mismatched_sizes=True)
    finally:
        transformers.logging.set_verbosity(verbosity)
    for name, *shapes in sorted(report["mismatched_keys"]):
        stored, wanted = map(tuple, shapes)
        raise ValueError(f"{base}: {name} is {stored} in the file, but {wanted} by config.json")
    return model


def _named_class(path: Path, architectures: Any) -> Any:
    """The first of a config's architectures, a class of transformers; AutoModel if it names none."""
    import transformers

    if not architectures:
        return transformers.AutoModel
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ValueError(f'{path}: "architectures" must be a list of names')
    found = getattr(transformers, architectures[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model class {architectures[0]!r}")
    return found
