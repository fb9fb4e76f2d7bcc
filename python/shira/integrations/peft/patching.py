"""Which methods of PEFT's classes are replaced, how they come back, and for which versions of PEFT that is known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

try:
    import peft
except ImportError as error:
    raise ImportError("shira.integrations.peft needs PEFT: pip install 'shira-kernels[peft]'") from error

from peft.tuners.shira.layer import Linear as ShiraLinear
from peft.tuners.shira.model import ShiraModel

from shira.integrations.peft import layers, loading, mixed
from shira.integrations.peft.entries import Kind, Shira, SuperTuning

KNOWN = ("0.18", "0.19", "0.20", "0.21")  # the versions whose layers were compared with ours

_lock = threading.Lock()
_ABSENT = object()
_originals: dict[tuple[type, str], Any] = {}  # what was replaced, as the class had it


class Accelerated:
    """What `accelerate` gives: at the end of a `with` all is as it was before."""

    def __init__(self, was_on: bool) -> None:
        self._was_on = was_on

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._was_on:
            restore()


def accelerate() -> Accelerated:
    """Makes PEFT's SHiRA and Super-Tuning layers of this process use the kernels, those there and those to come.

    Methods of PEFT's classes are replaced, so this takes no time whatever the model, and a second call changes nothing.
    What layers prepare at their first forward stays with them.

    - forward: the base layer called as it is (its hooks run, a quantised one stays so), plus a sparse product for each
      active adapter. Neither the weight nor a dense gradient is copied or made; the gradient of an adapter's values is
      computed at its entries alone. It cannot be differentiated twice.
    - merge keeps the entries that it replaces, in the weight's dtype, and unmerge writes them back bit for bit, also
      where adapters overlap. With `safe_merge` nothing is written to a layer before all its adapters were checked. A
      quantised base, and a Super-Tuning adapter with a LoRA part, are merged by PEFT's own method.
    - `adapter_names`, which PEFT drops for these methods: in evaluation each row of a batch gets the adapter named for
      it, "__base__" for none, also in `generate` with beams.
    - `PeftModel.from_pretrained` and `load_adapter` draw no random mask for a SHiRA adapter, whose positions come from
      the file; a file without positions for a layer is refused.

    Returns:
        A context manager: after `with accelerate():` everything is as it was before.

    Raises:
        RuntimeError: a version of PEFT that this version of the library does not know.
    """
    with _lock:
        if _originals:
            return Accelerated(was_on=True)
        check_version()
        for owner, name, replacement in list(_replacements()):  # all are made before the first is put in place
            _originals[owner, name] = owner.__dict__.get(name, _ABSENT)
            setattr(owner, name, replacement)
        return Accelerated(was_on=False)


def restore() -> None:
    """Puts PEFT's own methods back. What is merged stays merged, and what was prepared for a layer stays with it."""
    with _lock:
        for (owner, name), original in _originals.items():
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _originals.clear()


def check_version() -> None:
    """Raises RuntimeError for a version of PEFT whose layers are not known."""
    if peft.__version__.rpartition(".")[0] not in KNOWN:
        raise RuntimeError(
            f"peft {peft.__version__} is not known to this version of shira-kernels, which knows {', '.join(KNOWN)}: "
            "its layers may compute something else, so install one of these"
        )


def _replacements() -> Iterator[tuple[type, str, Any]]:
    yield ShiraModel, "_create_and_replace", loading.create_and_replace(ShiraModel._create_and_replace)
    yield peft.PeftModel, "from_pretrained", loading.from_pretrained(peft.PeftModel.__dict__["from_pretrained"])
    yield peft.PeftModel, "load_adapter", loading.load_adapter(peft.PeftModel.load_adapter)
    kinds: list[tuple[type, type, Kind]] = [(ShiraModel, ShiraLinear, Shira())]
    try:
        from peft.tuners.supertuning.layer import Linear as SuperTuningLinear
        from peft.tuners.supertuning.model import SupertuningModel
    except ImportError:  # before 0.21
        pass
    else:
        kinds.append((SupertuningModel, SuperTuningLinear, SuperTuning()))
    for model, owner, kind in kinds:
        yield model, "_enable_peft_forward_hooks", mixed.enable_hooks(kind, owner)
        for name, make in (("forward", layers.forward), ("merge", layers.merge), ("unmerge", layers.unmerge)):
            yield owner, name, make(kind, owner.__dict__[name])
