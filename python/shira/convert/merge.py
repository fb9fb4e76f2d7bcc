"""Adapters written into a checkpoint on disk, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shira.adapter.adapter import Adapter, describe
from shira.adapter.base import BaseTensors, check_base, check_fits, entries_of, same_bits
from shira.adapter.checksum import checksum_of
from shira.adapter.fusion import checked_strength
from shira.adapter.placed import placed
from shira.adapter.tensor import AdapterTensor, check_strengths, same_entries
from shira.files.checkpoint import Base, TensorFolder
from shira.files.errors import AdapterFormatError, Argument, ArgumentError, warn
from shira.files.output import check_apart, check_free, check_replaceable, written_whole
from shira.files.progress import Progress, no_progress
from shira.files.reading import check_inside
from shira.model.names import canonical
from shira.serving import arena
from shira_kernels import scatter_apply
from shira_kernels.bits import as_bits
from shira_kernels.dtypes import index_dtype

# Weights in other formats: they would still be those of the base.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_OTHER_INDEXES = ("pytorch_model.bin.index.json", "flax_model.msgpack.index.json", "tf_model.h5.index.json")


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` wrote.

    Attributes:
        tensors: names in the checkpoint of the tensors that were written to.
        entries: how many entries the adapters have in them, an entry of several adapters counted for each.
        files: that hold weights, by their names in the folder.
        left_out: files of the base's folder that hold other weights, or are hidden, and were not copied.
    """

    tensors: list[str]
    entries: int
    files: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class Fit:
    """Whether an adapter was made for a base.

    Attributes:
        fits: True if every tensor's checksum is that of the base's entries; False if one is not, or the base lacks a
            tensor or has it with another shape or dtype; None if nothing speaks against it but a checksum is missing.
        reason: the same in words.
    """

    fits: bool | None
    reason: str


@torch.no_grad()
def fit_of(adapter: Adapter | str | os.PathLike[str], base: Base) -> Fit:
    """Whether an adapter, or that of a file, was made for a base: a model whose weights hold it now, a state dict, or
    the path of a safetensors file or of a folder of them, of which one tensor is in memory at a time.

    A file without indices whose mask the base does not give is called one of another base, though it may be damaged:
    nothing tells the two apart.

    Raises:
        ValueError: `base` is none of these, or a file of it is damaged; a file is not a valid adapter
            (AdapterFormatError).
        OSError: something cannot be read.
    """
    weights = BaseTensors(base)
    if not isinstance(adapter, Adapter):
        has_indices = describe(adapter)[1]
        try:
            adapter = Adapter.load(adapter, base=base)
        except AdapterFormatError as error:
            if has_indices:
                raise
            return Fit(False, f"another base: {error}")
    other, unknown = 0, 0
    for label, tensor in adapter.items():
        if canonical(label) not in weights:
            return Fit(False, f"another model: it has no tensor {label}")
        weight = weights.of_shape(canonical(label), tensor.shape)
        try:
            check_fits(label, tensor, weight)
        except ValueError as error:
            return Fit(False, f"another model: {error}")
        if tensor.checksum is None:
            unknown += 1
        else:
            other += tensor.checksum != checksum_of(entries_of(weight, tensor.indices))
    if other:
        return Fit(False, f"another base: {other} of {len(adapter)} tensors differ where the adapter changes them")
    if unknown:
        return Fit(None, "shapes and types fit, checksums are not known")
    return Fit(True, "the one that the adapter was made for")


@torch.no_grad()
def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[Adapter | str | os.PathLike[str], float]],
    output: str | os.PathLike[str],
    *,
    force_base: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Merged:
    """Writes a checkpoint with adapters in its weights: as many files, the same names, order and metadata.

    The weights are bit for bit those that `ResidentAdapters.switch` writes for adapters of the same strengths: of one
    adapter at strength 1 its values, else base + the sum of strength (value - base), in float32 and rounded once. One
    tensor is in memory at a time. `output` is there whole or not at all, whenever the process ends.

    Args:
        base: a safetensors file, or a folder of them such as a Hugging Face model's.
        adapters: pairs of an adapter, or its file, and its strength.
        output: a file or folder like the base. Of a folder everything else is copied too, such as config and tokenizer,
            but for hidden files and weights in other formats, which would still be the base's.
        force_base: take also adapters that were made for another base.
        overwrite: replace the file `output`, or the folder if it holds no other files than will be written.
        progress: called before each file and tensor, with how many are done, how many there are, and which comes.

    Returns:
        What was written: `tensors` (names), `entries` (how many), `files`, and `left_out`, files that were not copied.

    Raises:
        ValueError: naming the tensor: the base lacks it, has it with another shape or dtype, or with other entries than
            an adapter was made for; a tensor whose entries can only be replaced (of another dtype than float64,
            float32, bfloat16 and float16) would be scaled or mixed; no adapter, a strength that is not finite, `output`
            is there, or lies in the base or around it; a damaged file; a link that leads out of the base's folder, but
            for those of Hugging Face's cache. Nothing was written then.
        OSError: something cannot be read or written.

    Warns:
        ShiraWarning: an adapter has no checksum, so that it cannot be told whether it was made for this base.
    """
    base, output = Path(base), Path(output)
    folder = TensorFolder(base)
    loaded = [_loaded(Argument("adapters", position), *pair, base) for position, pair in enumerate(adapters)]
    if not loaded:
        raise ValueError("adapters must hold at least one pair of an adapter and its strength")
    weights = BaseTensors(folder)
    for position, (adapter, _) in enumerate(loaded):
        _check_once(Argument("adapters", position), adapter, weights)
    loaded = [
        (placed(adapter, weights, force=force_base, argument=(Argument("adapters", position), ": ")), strength)
        for position, (adapter, strength) in enumerate(loaded)
    ]
    changed = _by_tensor([adapter for adapter, _ in loaded], weights)
    strengths = [strength for _, strength in loaded]
    _warn_of_twins(changed, weights)
    for name, tensors in changed.items():
        uses = [(Argument("adapters", position), strengths[position]) for position in tensors]
        check_strengths(name, tensors[min(tensors)].dtype, uses)

    files = sorted(set(folder.files.values()))
    others, left_out = _others(base, files) if base.is_dir() else ([], [])
    inputs = [base, *(Path(adapter) for adapter, _ in adapters if not isinstance(adapter, Adapter))]
    _check_output(base.is_dir(), output, [str(file.relative_to(base)) for file in (*files, *others)], inputs, overwrite)
    _warn_of_unknown([adapter for adapter, _ in loaded])
    total, done = len(files) + len(changed), 0
    with written_whole(output, folder=base.is_dir()) as temporary:
        for file in others:
            _copy(file, temporary / file.relative_to(base))
        for file in files:
            progress(done, total, file.name)
            done += 1
            copy = temporary / file.relative_to(base) if base.is_dir() else temporary
            _copy(file, copy)
            with open(copy, "r+b") as target:
                begins = _data_offsets(target)
                for name in (name for name in changed if folder.files[name] == file):
                    progress(done, total, name)
                    done += 1
                    if name not in begins:
                        raise ValueError(f"{file}: it has no tensor {name!r}, which the index says is in it")
                    target.seek(begins[name])
                    # Given no name, so that it is gone before the next is read.
                    target.write(
                        as_bits(_switched(name, folder[name], changed[name], strengths, force_base)).numpy().data
                    )
        progress(total, total, "")
    return Merged(
        list(changed),
        sum(tensor.nnz for by_adapter in changed.values() for tensor in by_adapter.values()),
        [str(file.relative_to(base)) if base.is_dir() else output.name for file in files],
        left_out,
    )


def _loaded(
    argument: Argument, adapter: Adapter | str | os.PathLike[str], strength: float, base: Path
) -> tuple[Adapter, float]:
    strength = checked_strength((argument, ": the strength"), strength)
    return adapter if isinstance(adapter, Adapter) else Adapter.load(adapter, base=base), strength


def _check_output(is_folder: bool, output: Path, planned: Collection[str], inputs: list[Path], overwrite: bool) -> None:
    check_free(output, overwrite)
    check_apart(output, inputs)
    if output.is_dir():
        if not is_folder:
            raise ValueError(f"{output}: the base is a file, so the output must be one, and there is a folder")
        check_replaceable(output, planned)
    elif is_folder and output.exists():
        raise ValueError(f"{output}: the base is a folder, so the output must be one, and there is a file")


def _warn_of_unknown(adapters: Sequence[Adapter]) -> None:
    for position, adapter in enumerate(adapters):
        unknown = sum(tensor.checksum is None for tensor in adapter.values())
        if unknown:
            reason = f": no checksum in {unknown} of {len(adapter)} tensors, so it may be of another base"
            warn(Argument("adapters", position), reason)


def _warn_of_twins(changed: Mapping[str, object], weights: BaseTensors) -> None:
    """Where nothing tells what is tied: tensors that stay as they are, though they hold what changed ones do."""
    written = set(changed)
    for name in map(canonical, changed):
        for other in weights.alike(name):
            if weights.layout is not None or weights.own_name(other) in written:
                continue
            weight = weights[name]
            if same_bits(weight, weights[other]) and not same_bits(weight, weight.view(-1)[:1].expand_as(weight)):
                warn(
                    f"{name} and {other} hold the same in the base, and only the first is changed: no config.json of a "
                    "model that transformers has tells whether they are tied"
                )


def _check_once(argument: Argument, adapter: Adapter, weights: BaseTensors) -> None:
    """Refuses an adapter with two names of one tensor: in a model the changes would meet."""
    seen: set[str] = set()
    for label in adapter:
        name = weights.kept_name(canonical(label))
        copies = weights.copies(name) if weights.has(name) else []
        if not seen.isdisjoint(copies):
            raise ArgumentError(argument, f": {label}: the adapter names the tensor {weights.own_name(name)!r} twice")
        seen.update(copies)


def _by_tensor(adapters: Sequence[Adapter], weights: BaseTensors) -> dict[str, dict[int, AdapterTensor]]:
    """The checkpoint's name -> position of the adapter -> what it has of the tensor, in the checkpoint's order."""
    found: dict[str, dict[int, AdapterTensor]] = {}
    for position, adapter in enumerate(adapters):
        argument = Argument("adapters", position)
        for label, tensor in adapter.items():
            name = canonical(label)
            if not weights.has(name):
                raise ArgumentError(argument, f": {label}: the base has no tensor of this name")
            for own in map(weights.own_name, weights.copies(name)):
                # `placed` may have given it both copies of what the adapter names once.
                if not same_entries(found.setdefault(own, {}).setdefault(position, tensor), tensor):
                    raise ArgumentError(argument, f": {label}: the adapter names the tensor {own!r} twice")
    return {name: found[name] for name in map(weights.own_name, weights) if name in found}


def _switched(
    name: str,
    weight: torch.Tensor,
    tensors: Mapping[int, AdapterTensor],
    strengths: Sequence[float],
    force: bool,
) -> torch.Tensor:
    """What a bank's switch to all these adapters would write into this weight, which is contiguous."""
    key, dtype = (weight.dtype, weight.device), index_dtype(weight.numel())
    pieces: dict[str, arena.Pieces] = {}
    for position, tensor in tensors.items():
        label = Argument("adapters", position), f": {name}"
        check_fits(label, tensor, weight)
        if not force and tensor.checksum is not None:
            check_base(label, tensor, entries_of(weight, tensor.indices))
        indices, values = tensor.indices.to(weight.device, dtype), tensor.values.to(weight.device)
        entries = arena.Arena((0,), [weight], arena.offsets_of([tensor.nnz]), indices)
        pieces[str(position)] = {key: [arena.Piece([name], [], entries, values, tensor.kind == "add")]}
    result = weight.clone()
    if len(strengths) == 1:
        [piece] = pieces["0"][key]
        scatter_apply(result, piece.arena.indices, piece.values, strengths[0], piece.additive)
        return result
    plan = arena.merge(pieces)
    union, by_adapter = plan.arenas[key].indices, {str(i): strength for i, strength in enumerate(strengths)}
    scatter_apply(result, union, arena.mixed(entries_of(weight, union), plan.shares[key], by_adapter))
    return result


def _data_offsets(file: Any) -> dict[str, int]:
    """Where each tensor's bytes begin in a safetensors file, which was found whole before."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _others(base: Path, weights: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files of a folder that are copied as they are, and the names of those that are left out, which linked folders
    are too. Refuses with ValueError what would be copied from elsewhere."""
    copied, left_out = [], []
    for file in sorted(base.rglob("*")):
        inner = file.relative_to(base)
        if (file.is_dir() and not file.is_symlink()) or file in weights:
            continue
        hidden = any(part.startswith(".") for part in inner.parts)
        if hidden or file.is_dir() or file.suffix in _OTHER_WEIGHTS or file.name in _OTHER_INDEXES:
            left_out.append(str(inner))
        else:
            check_inside(base, file)
            copied.append(file)
    return copied, left_out


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
