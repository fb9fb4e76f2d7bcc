"""What transformers does to the names and tensors of a checkpoint when it loads it, and undoes when it saves it.

The tables and the code are its own (`transformers.conversion_mapping`, `core_model_loading`): they run on traced
tensors, so that every model class which renames, merges, splits or permutes at load is covered as it is loaded there.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shira.files.checkpoint import TensorFolder
from shira.files.reading import read_inside
from shira.model.boxes import Box
from shira.model.names import bare_model, canonical, canonical_in, state_buffers
from shira.model.pretrained import bounds_of, check_model_folder, no_larger_than, sealed
from shira.model.tracing import Sources, traced

CONFIG = "config.json"
_MOST_EXPERTS = 100_000  # of all layers, counted in each of their tensors: each takes a third of a millisecond


Shape = tuple[int, ...]
Form = tuple[Shape, "Sources | None"]  # of a checkpoint's tensor, and where its elements come from


@dataclass(frozen=True)
class Placed:
    """Where the elements of a checkpoint's tensor lie in a model.

    Attributes:
        shape: of the checkpoint's tensor.
        parts: names of the model's tensors, and which piece of the checkpoint's tensor lies where in them.
    """

    shape: Shape
    parts: Sources


def _of_shape(shape: Shape | None, forms: Iterator[Placed]) -> Placed | None:
    """The first form that has this shape, else the first that there is."""
    first = None
    for form in forms:
        if shape is None or form.shape == tuple(shape):
            return form
        first = first or form
    return first


class Loading:
    """How names and positions of checkpoints and of a model belong together.

    A model that is not one of transformers has its checkpoints' own names; tied tensors are one, under the first name.

    Args:
        model: any module, also on the meta device, and with wrappers of PEFT, torch.compile, FSDP or
            DistributedDataParallel around it.
    """

    def __init__(self, model: nn.Module) -> None:
        bare = canonical_in(model)
        self.tensors: dict[str, torch.Tensor] = {}  # by the first name
        self._first: dict[str, str] = {}
        seen: dict[torch.Tensor, str] = {}
        for own, tensor in _named_tensors(model):
            name = seen.setdefault(tensor, bare(own))
            self.tensors.setdefault(name, tensor)
            self._first.setdefault(bare(own), name)
        self._uses: dict[str, list[str]] = {}
        for use, name in self._first.items():
            self._uses.setdefault(name, []).append(use)
        self._host = _host(model)
        self._saved: dict[str, list[Form]] = {}
        self._renamings: list[Any] = []
        self._prefix = ""
        if self._host is not None:
            self._prefix = f"{self._host.base_model_prefix}." if self._host.base_model_prefix else ""
            self._learn(self._host)
        # The same tensor of other checkpoints, whose older names are renamed to the same.
        self._by_renamed: dict[str, str | None] = {}
        for name in self._saved:
            renamed = self._renamed(name)
            self._by_renamed[renamed] = None if renamed in self._by_renamed else name

    def find(self, name: str, shape: Shape | None = None) -> Placed | None:
        """Where a tensor lies, given by its name in the model or in a checkpoint; None if the model has none such.

        shape: tells which is meant where the model and its checkpoints have the same name for two forms, as of experts
        that are transposed at load; of those that it does not tell, and without it, the model's own is meant.

        Raises ValueError if its values are changed when it is loaded.
        """
        return _of_shape(shape, self._forms(canonical(name)))

    def uses(self, name: str) -> list[str]:
        """The model's names of a tensor, of which a tied one has several, given by one of them or by a name that it may
        have in a checkpoint; the given one comes first. Empty if no tensor of the model is the whole of it."""
        for spelling in (*self._spellings(name), *self._spellings(self._renamed(name))):
            if spelling in self._first:
                return [spelling, *(use for use in self._uses[self._first[spelling]] if use != spelling)]
        return []

    def find_stored(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Placed]]:
        """Gives the tensors of a checkpoint, by its names, that the model loads, but for those whose values change."""
        for name, shape in shapes.items():
            with contextlib.suppress(ValueError):
                if (found := _of_shape(shape, self._stored_forms(name))) is not None:
                    yield name, found

    @property
    def saved(self) -> dict[str, Placed]:
        """The tensors of a checkpoint as transformers saves it, but for those whose values it changes."""
        return {
            name: Placed(shape, [(own, box.reversed) for own, box in sources])
            for name, [(shape, sources), *_] in self._saved.items()
            if sources is not None
        }

    def _spellings(self, name: str) -> list[str]:
        """A checkpoint of the inner model has no prefix, and one of a model with a head has it."""
        if not self._prefix:
            return [name]
        return [name, name.removeprefix(self._prefix) if name.startswith(self._prefix) else self._prefix + name]

    def _forms(self, name: str) -> Iterator[Placed]:
        """What a name may mean, the likeliest first."""
        for spelling in self._spellings(name):
            yield from self._in_model(spelling)
            yield from self._on_disk(spelling)

    def _stored_forms(self, name: str) -> Iterator[Placed]:
        """What the name of a checkpoint's tensor may mean, the likeliest first."""
        for spelling in self._spellings(name):
            yield from self._on_disk(spelling)
            yield from self._in_model(spelling)

    def _in_model(self, name: str) -> Iterator[Placed]:
        if name in self._first:
            shape = tuple(self.tensors[self._first[name]].shape)
            yield Placed(shape, [(self._first[name], Box.whole(shape))])

    def _as_saved(self, name: str | None) -> Iterator[Placed]:
        for shape, sources in self._saved.get(name or "", ()):
            if sources is None:
                reason = "its values are changed when it is loaded, so its entries lie nowhere in a model"
                raise ValueError(f"{name}: {reason}")
            yield Placed(shape, [(own, box.reversed) for own, box in sources])

    def _on_disk(self, name: str) -> Iterator[Placed]:
        yield from self._as_saved(name)
        for spelling in self._spellings(self._renamed(name)):
            yield from self._in_model(spelling)
            yield from self._as_saved(self._by_renamed.get(spelling))

    def _renamed(self, name: str) -> str:
        """The name that transformers gives it before it joins or splits tensors."""
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _learn(self, host: Any) -> None:
        """Asks transformers for its renamings, and for what it would save."""
        try:
            from transformers import conversion_mapping, core_model_loading
        except ImportError:  # before transformers 5 nothing is converted at load but the prefix
            return
        every = conversion_mapping.get_model_conversion_mapping(host)
        self._renamings = [one for one in every if isinstance(one, core_model_loading.WeightRenaming)]
        standard = conversion_mapping.get_model_conversion_mapping(host, add_legacy=False)
        prefix_change = getattr(core_model_loading, "PrefixChange", ())
        standard = [one for one in standard if not isinstance(one, prefix_change)]
        # What this model was loaded from counts more than what its class saves. Some tensors are transposed at load if
        # their shape says so, and saved as they are: that form too.
        used = copy.deepcopy(getattr(host, "_weight_conversions", None))
        for conversions in (used, copy.deepcopy(standard), _transposed(standard)):
            for name, form in self._reverted(core_model_loading, host, conversions or []).items():
                forms = self._saved.setdefault(name, [])
                if form not in forms:
                    forms.append(form)

    def _reverted(self, core_model_loading: Any, host: Any, conversions: list[Any]) -> dict[str, Form]:
        """What a checkpoint holds that is saved with these conversions undone."""
        if not conversions:
            return {}
        state = {
            name: traced(first, self.tensors[first].shape, self.tensors[first].dtype)
            for name, first in self._first.items()
        }
        # All that it needs of a model; conversions are of one use.
        stand_in = SimpleNamespace(
            config=host.config,
            base_model_prefix=host.base_model_prefix,
            get_parameter=host.get_parameter,
            _weight_conversions=conversions,
        )
        try:
            reverted = core_model_loading.revert_weight_conversion(stand_in, state)
        except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError):
            return {}  # a conversion that only loads: names of the checkpoint then mean nothing
        return {name: (tuple(tensor.shape), getattr(tensor, "sources", None)) for name, tensor in reverted.items()}


def _transposed(conversions: list[Any]) -> list[Any]:
    """The same conversions, transposing whatever they may, if any does so by the shape; else none."""
    found = False
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            if getattr(operation, "check_dims", False):
                operation.check_dims, found = False, True
    return conversions if found else []


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state dict has: parameters, and the buffers that are saved."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from state_buffers(model)


def _host(model: nn.Module) -> Any:
    """The model of transformers that this one is, or wraps; None if there is none."""
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None:  # no model can be one of it then
        return None
    bare = bare_model(model)
    return bare if isinstance(bare, loaded.PreTrainedModel) else None


def model_of(checkpoint: TensorFolder) -> nn.Module | None:
    """The model that the config.json of a checkpoint names, on the meta device: no weights are read or made.

    checkpoint: a folder, or a file with its config.json beside it. The class is one of transformers; no code of the
    folder is run, and nothing is fetched. None if there is no config, no transformers, no such class, or what
    `check_model_folder` refuses, and for a model that is far larger than the checkpoint.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if not (folder / CONFIG).is_file():
        return None
    try:
        import transformers
    except ImportError:
        return None
    try:
        check_model_folder(folder)
        settings = read_inside(folder, CONFIG)
        with sealed(), no_larger_than(*bounds_of(checkpoint)), torch.device("meta"):
            config = transformers.CONFIG_MAPPING[settings["model_type"]](**settings)
            if getattr(config, "use_pretrained_backbone", False):
                config.use_pretrained_backbone = False  # whose weights would be fetched
            model: nn.Module = _class_of(transformers, config, settings.get("architectures"))(config)
    except Exception:  # noqa: BLE001 - a config that is damaged makes the library raise errors of any type
        return None
    experts = sum(len(tensor) for name, tensor in model.named_parameters() if "expert" in name and tensor.dim() > 2)
    return model if experts <= _MOST_EXPERTS else None


def _class_of(transformers: Any, config: Any, architectures: Any) -> Any:
    """The class that the config names, else the one for its type without a head."""
    for name in architectures if isinstance(architectures, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel._model_mapping[type(config)]
