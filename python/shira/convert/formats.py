"""Reading and writing adapters in the formats that the package's docstring lists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shira.adapter.adapter import Adapter
from shira.adapter.difference import check_top, energy_facts, warn_where_not_sparse
from shira.adapter.tensor import AdapterTensor
from shira.convert import patch, peft, peft_merged
from shira.convert.source import CONFIG, PICKLE, WEIGHTS, Weights, peft_config
from shira.files.checkpoint import Base, TensorFolder
from shira.files.errors import Argument, ArgumentError
from shira.files.output import check_free, check_replaceable
from shira.files.progress import Progress, no_progress
from shira.files.reading import check_regular

WRITTEN = ("shira", "peft-shira", "patch")
"""The formats that `write` takes as `form`."""
_SPARSE = {"SHIRA": "peft-shira", "SUPERTUNING": "peft-supertuning"}
_READERS = {"peft-shira": peft.read_shira, "peft-supertuning": peft.read_supertuning, "patch": patch.read}


def format_of(path: str | os.PathLike[str]) -> str:
    """Which of the formats an adapter has, by its content.

    Raises:
        ValueError: it is none of them, or a pickle.
        OSError: it cannot be read.
    """
    path = Path(path)
    check_regular(path)
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name in (CONFIG, WEIGHTS)) and (folder / CONFIG).exists():
        if not (folder / WEIGHTS).exists():
            pickle = f"; {PICKLE} is a pickle, which is never read: save the adapter again with PEFT as safetensors"
            raise ValueError(f"{folder}: there is no {WEIGHTS}{pickle if (folder / PICKLE).exists() else ''}")
        config = peft_config(folder)
        kind = _SPARSE.get(config["peft_type"], "peft-merged")
        return "peft-merged" if kind == "peft-supertuning" and config.get("r") is not None else kind
    if path.is_dir():
        raise ValueError(f"{path}: a folder without {CONFIG} holds no adapter")
    try:
        tensors = TensorFolder(path)
    except ValueError:
        with open(path, "rb") as file:
            head = file.read(9)
            if head.startswith((b"PK", b"\x80")) and head[8:] != b"{":  # as the header of safetensors begins
                raise ValueError(
                    f"{path}: this looks like a pickle of torch.save, which is never read: use safetensors"
                ) from None
        raise
    if any(value.startswith("shira/") for value in _metadata(path).values()):
        return "shira"
    stems = {name.removesuffix(".indices") for name in tensors if name.endswith(".indices")}
    if set(tensors) == {f"{stem}.{part}" for stem in stems for part in ("indices", "values")}:
        return "patch"
    raise ValueError(
        f"{path}: no known adapter: neither a shira file nor a patch of <name>.indices and <name>.values; "
        f"of a PEFT adapter give the folder with {CONFIG}"
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
        top: with "peft-merged", of each weight keep only the largest changes, as many as are at most this share of its
            entries. Without it every entry that the merge changes is kept, which is most of them.
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
            the tensor or with another shape or dtype, indices that are wrong, an adapter that cannot be merged; a tied
            tensor of which an adapter of PEFT changes one use alone, or several differently.
        OSError: something cannot be read.
        ImportError: PEFT or transformers is needed and not installed.

    Warns:
        ShiraWarning: weights that are not sparse; positions of Super-Tuning that were recomputed.
    """
    path = Path(path)
    form = format_of(path)
    check_top(top)
    if top is not None and form != "peft-merged":
        reason = f" is for adapters that are merged, and this one is sparse already ({form})"
        raise ArgumentError(f"{path}: ", Argument("top"), reason)
    if form == "shira":
        return Adapter.load(path, base=base)
    if base is None:
        reason = f"{path}: the format {form} does not tell the shapes and types of the weights: give "
        raise ArgumentError(reason, Argument("base"))
    folder = path if path.is_dir() else path.parent
    facts: dict[str, Any] = {"from": form, "file": os.path.basename(os.path.abspath(path))}
    tensors: Mapping[str, AdapterTensor]
    if form == "peft-merged":
        tensors, energies = peft_merged.read(folder, base, top, progress)
        warn_where_not_sparse(tensors)
        facts |= {"peft_type": peft_config(folder)["peft_type"], **energy_facts(top, energies)}
    else:
        place = path if form == "patch" else folder
        tensors = _READERS[form](place, Weights(base, trusted=trust_base), progress)
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
        ShiraWarning: the adapter has no checksum, so that it cannot be told whether it was made for this base.
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
        check_replaceable(path, (CONFIG, WEIGHTS))
        peft.write_shira(adapter, path, base, force=force_base)
    else:
        patch.write(adapter, path, base, force=force_base)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
