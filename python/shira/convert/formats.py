"""Reading and writing adapters in the formats that the package's docstring lists."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shira.adapter.adapter import DTYPES, Adapter, AdapterTensor, checksum_of
from shira.adapter.base import check_base, check_fits, entries_of
from shira.adapter.difference import (
    Energies,
    changes,
    check_top,
    energy_facts,
    warn_where_not_sparse,
)
from shira.adapter.fusion import deltas
from shira.files.checkpoint import Base, TensorFolder, open_tensors, save_tensors
from shira.files.output import check_free, check_replaceable, written_whole
from shira.files.progress import Progress, no_progress
from shira.model.names import canonical, first_names
from shira_kernels.bits import as_bits

WRITTEN = ("shira", "peft-shira", "patch")
_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_SPARSE = {"SHIRA": "peft-shira", "SUPERTUNING": "peft-supertuning"}
# Model classes of transformers by PEFT's task types; without one the class that the base's config.json names.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def format_of(path: str | os.PathLike[str]) -> str:
    """Which of the formats an adapter has, by its content.

    Raises:
        ValueError: it is none of them, or a pickle.
        OSError: it cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name in (_CONFIG, _WEIGHTS)) and (folder / _CONFIG).exists():
        if not (folder / _WEIGHTS).exists():
            pickle = f"; {_PICKLE} is a pickle, which is never read: save the adapter again with PEFT as safetensors"
            raise ValueError(f"{folder}: there is no {_WEIGHTS}{pickle if (folder / _PICKLE).exists() else ''}")
        config = _peft_config(folder)
        kind = _SPARSE.get(config["peft_type"], "peft-merged")
        return "peft-merged" if kind == "peft-supertuning" and config.get("r") is not None else kind
    if path.is_dir():
        raise ValueError(f"{path}: a folder without {_CONFIG} holds no adapter")
    try:
        tensors = TensorFolder(path)
    except ValueError:
        with open(path, "rb") as file:
            if file.read(2).startswith((b"PK", b"\x80")):
                raise ValueError(
                    f"{path}: this looks like a pickle of torch.save, which is never read: use safetensors"
                ) from None
        raise
    if any(value.startswith("shira/") for value in _metadata(path).values()):
        return "shira"
    stems = {name.removesuffix(".indices") for name in tensors if name.endswith(".indices")}
    if stems and set(tensors) == {f"{stem}.{part}" for stem in stems for part in ("indices", "values")}:
        return "patch"
    raise ValueError(
        f"{path}: no known adapter: neither a shira file nor a patch of <name>.indices and <name>.values; "
        f"of a PEFT adapter give the folder with {_CONFIG}"
    )


@torch.no_grad()
def read(
    path: str | os.PathLike[str],
    base: Base | None = None,
    *,
    top: float | None = None,
    trust_base: bool = False,
    progress: Progress = no_progress,
) -> Adapter:
    """An adapter of any format.

    Args:
        path: a file, or a folder of PEFT.
        base: the model that it was made for; all formats but "shira" need it, for shapes, dtypes and what they leave
            out, and so does a file of "shira" without indices. "peft-merged" needs a Hugging Face folder or the model
            itself, which is changed layer by layer and put back.
        top: with "peft-merged", of each weight keep only the largest changes, so many that they are at most this share
            of its entries. Without it every entry that the merge changes is kept, which is most of them.
        trust_base: the base given is the one that the adapter was made for: take its entries' checksum. Formats other
            than "shira" have none, so without this neither has the result, but for "peft-merged", whose values hold for
            the base that they were merged into.
        progress: called before each tensor, with how many are done, how many there are, and its name.

    Returns:
        Of "shira" what the file holds. "peft-shira" and "peft-supertuning" become kind "add"; PEFT's `modules_to_save`,
        "patch" and "peft-merged" kind "replace". The provenance has "converted" with the format and the file's name,
        and with `top` the energy kept, as in `shira.diff`.

    Raises:
        ValueError: naming the file or tensor: an unknown format, a pickle, no base where one is needed, a base without
            the tensor or with another shape or dtype, indices that are wrong, an adapter that cannot be merged.
        OSError: something cannot be read.
        ImportError: PEFT or transformers is needed and not installed.

    Warns:
        UserWarning: weights that are not sparse; positions of Super-Tuning that were recomputed.
    """
    path = Path(path)
    form = format_of(path)
    check_top(top)
    if top is not None and form != "peft-merged":
        raise ValueError(f"{path}: `top` is for adapters that are merged, and this one is sparse already ({form})")
    if form == "shira":
        return Adapter.load(path, base=base)
    if base is None:
        raise ValueError(f"{path}: the format {form} does not tell the shapes and types of the weights: give `base`")
    folder = path if path.is_dir() else path.parent
    facts: dict[str, Any] = {"from": form, "file": os.path.basename(os.path.abspath(path))}
    if form == "peft-merged":
        tensors, energies = _merged(folder, base, top, progress)
        warn_where_not_sparse(tensors, stacklevel=4)
        facts |= {"peft_type": _peft_config(folder)["peft_type"], **energy_facts(top, energies)}
    else:
        reader = {"peft-shira": _peft_shira, "peft-supertuning": _peft_supertuning, "patch": _patch}[form]
        tensors = reader(path if form == "patch" else folder, _Weights(base, trust_base), progress)
    return Adapter(tensors, provenance={"converted": facts})


@torch.no_grad()
def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    form: str = "shira",
    base: Base | None = None,
    *,
    indices: bool = True,
    overwrite: bool = False,
    force_base: bool = False,
) -> None:
    """Writes an adapter in one of the formats `WRITTEN`; `path` is there whole or not at all.

    Args:
        adapter: of any kind.
        path: of the file; of "peft-shira" of the folder, which `peft.PeftModel.from_pretrained` loads.
        form: the format. "peft-shira" holds changes of the weights of linear layers, in float32. All its layers have
            r (rows + columns) entries: r is the least that all fit in, and the rest is filled with changes of 0.
            "patch" holds the new values.
        base: the model that the adapter was made for; kind "replace" needs it to become "peft-shira", kind "add" to
            become a "patch".
        indices: False leaves the indices of a "shira" file out, as in `Adapter.save`, which needs `base`.
        overwrite: replace a file, or a folder if it holds no other files than will be written.
        force_base: take the base also if the adapter was made for another one.

    Raises:
        ValueError: naming the path or tensor: `path` is there, an unknown format, no base where one is needed, or
            another one than the adapter was made for, a tensor that the format cannot hold, indices that cannot be left
            out.
        OSError: something cannot be read or written.

    Warns:
        UserWarning: the adapter has no checksum, so that it cannot be told whether it was made for this base.
    """
    path = Path(path)
    if form not in WRITTEN:
        raise ValueError(f"the format to write must be one of {', '.join(WRITTEN)}, got {form!r}")
    check_free(path, overwrite)
    if path.is_dir() and form != "peft-shira":
        raise ValueError(f"{path}: the format {form} is a file, and there is a folder")
    if not indices and form != "shira":
        raise ValueError(f"indices can be left out of a file of the format shira only, not of {form}")
    if form == "shira":
        adapter.save(path, indices=indices, base=base)
    elif form == "peft-shira":
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: the format {form} is a folder, and there is a file")
        check_replaceable(path, (_CONFIG, _WEIGHTS))
        _write_peft_shira(adapter, path, base, force_base)
    else:
        _write_patch(adapter, path, base, force_base)


class _Weights:
    """The base's tensors by canonical name."""

    def __init__(self, base: Base, trusted: bool) -> None:
        self._tensors = open_tensors(base)
        self._own = {canonical(own): own for own in self._tensors}
        self._trusted = trusted

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._own:
            raise ValueError(f"{name}: the base has no tensor of this name")
        weight = self._tensors[self._own[name]].detach()
        if weight.dtype not in DTYPES:
            raise ValueError(f"{name}: the base's tensor must be floating point, got {weight.dtype}")
        return weight

    def part(
        self, name: str, weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, kind: str
    ) -> AdapterTensor:
        """From positions in any order; that there are no others, and none twice, is left to Adapter to check."""
        indices, order = _whole(name, indices).reshape(-1).sort()
        if values.shape != order.shape:
            raise ValueError(f"{name}: there are {order.numel()} indices, but values of shape {list(values.shape)}")
        if indices.numel() and not 0 <= int(indices[0]) <= int(indices[-1]) < weight.numel():
            raise ValueError(f"{name}: indices must lie in [0, {weight.numel()})")
        checksum = checksum_of(entries_of(weight, indices)) if self._trusted else None
        if weight.numel() < 2**31:
            indices = indices.int()
        return AdapterTensor(indices, values[order], tuple(weight.shape), weight.dtype, kind, checksum)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _peft_config(folder: Path) -> dict[str, Any]:
    config = _json_object(folder / _CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(f'{folder / _CONFIG}: it must have "peft_type", a string')
    return config


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: it must be JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it must be a JSON object")
    return found


def _modules(folder: Path, fields: tuple[str, ...], optional: str = "") -> tuple[dict[str, dict[str, str]], list[str]]:
    """Of a PEFT file: path of a module -> field -> name of the tensor; and the names of all other tensors."""
    modules: dict[str, dict[str, str]] = {}
    others = []
    for name in TensorFolder(folder / _WEIGHTS):
        module, _, field = name.rpartition(".")
        if field in fields:
            modules.setdefault(module, {})[field] = name
        else:
            others.append(name)
    if not modules and not others:
        raise ValueError(f"{folder / _WEIGHTS}: it has no tensors")
    for module, found in modules.items():
        if missing := [field for field in fields if field not in found and field != optional]:
            raise ValueError(f"{folder / _WEIGHTS}: {module} has no {missing[0]}")
    return modules, others


def _add_saved_modules(
    parts: dict[str, AdapterTensor], path: Path, tensors: TensorFolder, names: list[str], weights: _Weights
) -> dict[str, AdapterTensor]:
    """And what PEFT's `modules_to_save` hold, as differences from the base."""
    for name in names:
        own = canonical(name)
        part, _ = changes(own, weights[own], tensors[name], None)
        if part is not None:
            _put(path, parts, own, part)
    return parts


def _whole(name: str, positions: torch.Tensor) -> torch.Tensor:
    """As int64. Refuses with ValueError what is no whole number."""
    if not torch.equal(positions.long().to(positions.dtype), positions):
        raise ValueError(f"{name}: positions must be whole numbers")
    return positions.long()


def _put(path: Path, parts: dict[str, AdapterTensor], name: str, part: AdapterTensor) -> None:
    if name in parts:
        raise ValueError(f"{path}: it has the tensor {name!r} twice")
    parts[name] = part


def _peft_shira(folder: Path, weights: _Weights, progress: Progress) -> dict[str, AdapterTensor]:
    tensors = TensorFolder(folder / _WEIGHTS)
    modules, others = _modules(folder, ("shira_weight", "shira_indices"))
    parts: dict[str, AdapterTensor] = {}
    for done, (module, fields) in enumerate(modules.items()):
        name = canonical(f"{module}.weight")
        progress(done, len(modules), name)
        weight, values = weights[name], tensors[fields["shira_weight"]]
        places = tensors[fields["shira_indices"]]
        if weight.dim() != 2 or places.dim() != 2 or places.shape[0] != 2:
            raise ValueError(f"{name}: rows and columns must be [2, nnz] for a matrix, got {list(places.shape)}")
        rows, columns = _whole(name, places)  # float32 in files that were written on Windows
        if rows.numel() and not (
            0 <= int(rows.min()) <= int(rows.max()) < weight.shape[0]
            and 0 <= int(columns.min()) <= int(columns.max()) < weight.shape[1]
        ):
            raise ValueError(f"{name}: rows and columns must lie in the weight, {tuple(weight.shape)}")
        part = weights.part(name, weight, rows * weight.shape[1] + columns, values.float(), "add")
        _put(folder / _WEIGHTS, parts, name, part)
    return _add_saved_modules(parts, folder / _WEIGHTS, tensors, others, weights)


def _peft_supertuning(folder: Path, weights: _Weights, progress: Progress) -> dict[str, AdapterTensor]:
    config, tensors = _peft_config(folder), TensorFolder(folder / _WEIGHTS)
    modules, others = _modules(folder, ("supertuning_values", "supertuning_indices"), "supertuning_indices")
    parts: dict[str, AdapterTensor] = {}
    recomputed = 0
    for done, (module, fields) in enumerate(modules.items()):
        name = canonical(f"{module}.weight")
        progress(done, len(modules), name)
        # PEFT rounds the changes to the weight's type before it adds them.
        weight = weights[name]
        values = tensors[fields["supertuning_values"]].to(weight.dtype)
        if "supertuning_indices" in fields:
            indices = tensors[fields["supertuning_indices"]]
        else:
            indices = _supertuning_indices(name, weight, config, values.numel())
            recomputed += 1
        _put(folder / _WEIGHTS, parts, name, weights.part(name, weight, indices, values, "add"))
    if recomputed:
        warnings.warn(
            f"{folder}: the positions of {recomputed} weights are not in the file and were found anew from the base's "
            "magnitudes; with another base, or where magnitudes are equal, they may be others than in training",
            stacklevel=4,
        )
    return _add_saved_modules(parts, folder / _WEIGHTS, tensors, others, weights)


def _supertuning_indices(name: str, weight: torch.Tensor, config: Mapping[str, Any], count: int) -> torch.Tensor:
    """As PEFT finds them, in the order of torch.topk, which is that of the values."""
    sparsity = config.get("sparsity")
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{name}: the positions are not in the file, and {_CONFIG} has no sparsity from 0 to below 1")
    k = int(weight.numel() * (1 - sparsity))
    if k != count:
        raise ValueError(f"{name}: sparsity {sparsity} gives {k} positions, but there are {count} values")
    return weight.abs().flatten().topk(k, largest=bool(config.get("select_top", True))).indices


def _patch(path: Path, weights: _Weights, progress: Progress) -> dict[str, AdapterTensor]:
    tensors = TensorFolder(path)
    stems = [name.removesuffix(".indices") for name in tensors if name.endswith(".indices")]
    parts: dict[str, AdapterTensor] = {}
    for done, stem in enumerate(stems):
        name = canonical(stem)
        progress(done, len(stems), name)
        indices, values, weight = tensors[f"{stem}.indices"], tensors[f"{stem}.values"], weights[name]
        if indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{path}: {stem}.indices must be int32 or int64, got {indices.dtype}")
        if values.dtype != weight.dtype:
            raise ValueError(f"{path}: {stem}.values are {values.dtype}, but {weight.dtype} in the base")
        _put(path, parts, name, weights.part(name, weight, indices, values, "replace"))
    return parts


def _merged(
    folder: Path, base: Base, top: float | None, progress: Progress
) -> tuple[dict[str, AdapterTensor], Energies]:
    """Each layer of the adapter merged by PEFT, compared with what it was, and put back."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    if (kind := _peft_config(folder)["peft_type"]) not in peft.PeftType.__members__:
        raise ValueError(f"{folder / _CONFIG}: peft_type {kind!r} is none that PEFT {peft.__version__} has")
    with _as_value_errors(f"{folder}: PEFT cannot load this adapter"):
        config = peft.PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{folder}: an adapter of type {kind} changes no weights and cannot be merged")
    model = base if isinstance(base, nn.Module) else _model(base, config.task_type)
    stored = None if isinstance(base, nn.Module) else {canonical(name) for name in open_tensors(base)}
    names = first_names(model)
    parts: dict[str, AdapterTensor] = {}
    energies: Energies = {}

    def compare(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        part, energy = changes(name, old, new.to(old.dtype), top)
        if part is None:
            return
        if name in parts and not _same(parts[name], part):
            raise ValueError(f"{folder}: two parts of the adapter change {name}, and differently")
        if stored is not None and name not in stored:
            raise ValueError(f"{name}: the base has no tensor of this name")
        parts[name], energies[name] = part, energy

    # What the file has whole, such as biases and `modules_to_save`: PEFT may load it into the model itself.
    weights = {name: parameter for parameter, name in names.items()}
    file = TensorFolder(folder / _WEIGHTS)
    whole = {canonical(key): key for key in file if canonical(key) in weights}
    before = {name: weights[name].detach().clone() for name in whole}
    users = Counter(names[parameter] for _, parameter in model.named_parameters(remove_duplicate=False))
    merged: set[str] = set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # PEFT puts its layers into other modules than the model's, around the same parameters.
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    try:
        with _as_value_errors(f"{folder}: PEFT cannot load this adapter"):
            tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model, shared), folder)
            # It does not say which tensors it missed, or had no place for; loading the file once more does.
            keys = tuned.load_adapter(folder, "default")
        layers = [(name, layer) for name, layer in tuned.named_modules() if isinstance(layer, BaseTunerLayer)]
        _check_all_loaded(folder / _WEIGHTS, tuned, keys.missing_keys, keys.unexpected_keys)
        for name, key in whole.items():
            weights[name].data.copy_(before[name])
            compare(name, before[name], file[key])
        for done, (name, layer) in enumerate(layers):
            progress(done, len(layers), canonical(name))
            for parameter, new in _merged_layer(folder, name, layer):
                if parameter not in names:
                    raise ValueError(f"{folder}: merging {name} changes what is no weight of the model")
                compare(names[parameter], parameter.detach(), new)
                users[names[parameter]] -= 1
                merged.add(names[parameter])
    finally:
        for name in whole:
            weights[name].data.copy_(before[name])
        for parameter in trained:
            parameter.requires_grad_(True)
    tied = [name for name in parts if name in merged and users[name] > 0]
    if tied:
        warnings.warn(
            f"{folder}: {tied[0]} is tied to another layer, which the adapter does not change but its merge does",
            stacklevel=5,
        )
    if not layers and not whole:
        raise ValueError(f"{folder}: PEFT finds no layer of the model to merge this adapter into")
    return parts, energies


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


def _same(one: AdapterTensor, other: AdapterTensor) -> bool:
    return torch.equal(one.indices, other.indices) and torch.equal(as_bits(one.values), as_bits(other.values))


def _merged_layer(folder: Path, name: str, layer: Any) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The weights of a layer, which hold what they did before, and what they are when the adapter is merged."""
    parameters = dict(layer.get_base_layer().named_parameters(recurse=False))
    held = [(parameter, parameter.data, parameter.detach().clone()) for parameter in parameters.values()]
    try:
        with _as_value_errors(f"{folder}: PEFT cannot merge {name}"):
            layer.merge()
        after = dict(layer.get_base_layer().named_parameters(recurse=False))  # of another layer, if PEFT exchanges it
        if {f: p.shape for f, p in after.items()} != {f: p.shape for f, p in parameters.items()}:
            raise ValueError(f"{folder}: merging {name} gives other parameters, not other values of them")
        return [(parameter, after[field].detach().clone()) for field, parameter in parameters.items()]
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
    config = _json_object(path)
    if task in _CLASSES:
        found = getattr(transformers, _CLASSES[task])
    else:
        found = _named_class(path, config.get("architectures"))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # it has a long report, also of what is not used
    try:
        with _as_value_errors(f"{base}: transformers cannot load this model as {found.__name__}"):
            model: nn.Module
            model, report = found.from_pretrained(
                base, dtype="auto", use_safetensors=True, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
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


def _write_peft_shira(adapter: Adapter, path: Path, base: Base | None, force: bool) -> None:
    for name, part in adapter.items():
        if len(part.shape) != 2 or not name.endswith(".weight"):
            raise ValueError(f"{name}: PEFT's SHiRA has weights of linear layers only, not a tensor of {part.shape}")
    rank = max((math.ceil(part.nnz / sum(part.shape)) for part in adapter.values()), default=1) or 1
    arrays: dict[str, torch.Tensor] = {}
    for (label, part), (name, (indices, values)) in zip(
        adapter.items(), deltas(adapter, base, force=force).items(), strict=True
    ):
        count = rank * sum(part.shape)
        if count > part.numel:
            raise ValueError(
                f"{label}: PEFT gives all layers r (rows + columns) entries, here with r = {rank}, and {part.shape} "
                f"has fewer than {count}: the densest layers need another file"
            )
        unused = torch.ones(part.numel, dtype=torch.bool)
        unused[indices.long()] = False
        filled, order = torch.cat([indices.long(), unused.nonzero().view(-1)[: count - part.nnz]]).sort()
        places = torch.stack([filled // part.shape[1], filled % part.shape[1]]).int()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        padded = torch.cat([values.float(), torch.zeros(count - part.nnz)])
        arrays |= {f"{module}.shira_weight": padded[order], f"{module}.shira_indices": places.contiguous()}
    config = {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": str(base) if isinstance(base, (str, os.PathLike)) else None,
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",  # of which PEFT keeps nothing: the positions are those of the file
        "random_seed": None,
        "target_modules": sorted(canonical(name).removesuffix(".weight") for name in adapter),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    with written_whole(path) as temporary:
        temporary.mkdir()
        save_tensors(arrays, temporary / _WEIGHTS)
        (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_patch(adapter: Adapter, path: Path, base: Base | None, force: bool) -> None:
    weights = None if base is None else _Weights(base, trusted=False)
    arrays: dict[str, torch.Tensor] = {}
    for label, part in adapter.items():
        name, values = canonical(label), part.values
        if part.kind == "add" and weights is None:
            raise ValueError(f"{label}: a patch has the new values, and this part is a change of the old: give `base`")
        if weights is not None:
            weight = weights[name]
            check_fits(label, part, weight)
            entries = entries_of(weight, part.indices)
            if not force:
                check_base(label, part, entries)
            if part.kind == "add":
                wide = torch.promote_types(part.dtype, torch.float32)
                values = (entries.to(wide) + values.to(wide)).to(part.dtype)
        indices = part.indices.int() if part.numel < 2**31 else part.indices.long()
        arrays |= {f"{name}.indices": indices.clone(), f"{name}.values": values.clone()}
    with written_whole(path) as temporary:
        save_tensors(arrays, temporary)
