"""The adapters of a bank: checked, laid out in pieces, and where the weights that they change were when they came."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from shira.adapter.adapter import Adapter
from shira.adapter.base import check_base, check_fits
from shira.adapter.checksum import checksum_of
from shira.adapter.fusion import checked_strength
from shira.adapter.placed import placed_in_model
from shira.adapter.tensor import check_strengths
from shira.model.claims import check_claim, claim
from shira.model.modules import sharded
from shira.model.names import resolve_state, state_names
from shira.serving.arena import Arena, Kept, Key, Mix, Piece, Pieces, base_entries, offsets_of
from shira_kernels.bits import as_bits, joined
from shira_kernels.dtypes import ARITHMETIC, index_dtype

# Where the model has a weight (of a parameter the first place): the module, and what it calls it; and what it was.
Home = tuple[list[tuple[nn.Module, str]], Key]


class Registry:
    """The adapters that are there, by name, and the parameters and buffers of the model that they change.

    Args:
        model: the one whose state dict adapters name.
        owner: the bank that claims weights. It is held weakly: a weight keeps the bank whose entries it holds, but a
            bank that is forgotten must be freed at once, with its adapters.

    Attributes:
        gpus: where weights of adapters are, or were.
        homes: of weights that adapters change, where they were when the first such adapter came.
    """

    def __init__(self, model: nn.Module, owner: object) -> None:
        self.model = model
        self.gpus: set[torch.device] = set()
        self.homes: dict[torch.Tensor, Home] = {}
        self._owner = weakref.ref(owner)
        self._adapters: dict[str, Pieces] = {}  # that an adapter is there is told by this alone
        self._users: Counter[torch.Tensor] = Counter()  # how many adapters change each weight
        self._unused: set[torch.Tensor] = set()  # weights with a home that no adapter changes any more

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return list(self._adapters)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each adapter's indices and values."""
        return {name: sum(piece.nbytes for piece in _each(pieces)) for name, pieces in self._adapters.items()}

    @property
    def pieces(self) -> Iterator[Piece]:
        """The pieces of all adapters."""
        for pieces in self._adapters.values():
            yield from _each(pieces)

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """What is kept from call to call: each adapter's indices and values."""
        for piece in self.pieces:
            yield from (piece.arena.indices, piece.values)

    def pieces_of(self, name: str) -> Pieces:
        """The pieces of an adapter, on the host or where its weights are."""
        return self._adapters[name]

    def needs_merge(self, mix: Mix) -> bool:
        """Whether values are computed before they are written: several adapters, or one of several pieces."""
        return len(mix) > 1 or any(len(group) > 1 for name, _ in mix for group in self._adapters[name].values())

    def mix_of(self, target: str | Mapping[str, float] | None, caller: str = "switch") -> Mix:
        """Gives a target as a mix, in the given order.

        Raises ValueError if it is none, names an adapter that is not there, or a strength is not a finite number; or if
        it would scale or mix a tensor whose entries can only be replaced.
        """
        if target is None:
            return ()
        if isinstance(target, str):
            self.check_names([target])
            return ((target, 1.0),)
        if not isinstance(target, Mapping):
            raise ValueError(f"{caller} takes a name, strengths by name, or None, got {target!r}")
        strengths = dict(target)
        if not strengths:
            raise ValueError("a mix must name at least one adapter; the base is None")
        self.check_names(strengths)
        mix = tuple(
            (name, checked_strength(f"the strength of {name!r}", strength)) for name, strength in strengths.items()
        )
        self._check_strengths(mix)
        return mix

    def _check_strengths(self, mix: Mix) -> None:
        """Raises ValueError if a mix would scale or mix a tensor whose entries can only be replaced."""
        uses: dict[torch.Tensor, list[tuple[str, float]]] = {}
        names: dict[torch.Tensor, str] = {}
        for name, strength in mix:
            pieces = self._adapters[name]
            for piece in (piece for key in pieces if key[0] not in ARITHMETIC for piece in pieces[key]):
                for tensor_name, weight in zip(piece.names, piece.arena.weights, strict=True):
                    uses.setdefault(weight, []).append((repr(name), strength))
                    names[weight] = tensor_name
        for weight, adapters in uses.items():
            check_strengths(names[weight], weight.dtype, adapters)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ValueError for a name that no adapter has."""
        for name in names:
            if name not in self._adapters:
                raise ValueError(f"there is no adapter named {name!r}; there are {self.names}")

    def check_free(self, name: str) -> None:
        """Raises ValueError if an adapter has the name."""
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} was added already")

    def prepare(self, adapter: Adapter, kept: Kept, *, force: bool, on_host: bool) -> Pieces:
        """Checks an adapter's tensors and lays them out in as few pieces as can be. Nothing is changed.

        Args:
            adapter: its tensors may have any of the names that the model's parameters and buffers have.
            kept: the base's entries that the weights do not hold now.
            force: take it also if it was made for another base.
            on_host: lay it out in host memory, pinned for weights on a GPU.

        Raises ValueError and RuntimeError as `ResidentAdapters.add` and `ResidentAdapters.switch` do.
        """
        self._put_back_buffers(self.homes)
        adapter = self._in_model(adapter, kept, force)
        first = state_names(self.model)
        rank = {weight: i for i, weight in enumerate(first)}
        names = self._names_by_weight(adapter, first)
        # A buffer that no adapter changes may be a view of a weight: it follows the weight, there and back.
        changeable = {w: n for w, n in first.items() if isinstance(w, nn.Parameter) or w in names or w in self.homes}
        _check_memory(changeable, names)
        self.check_weights(weight for weight in names if weight in self.homes)

        checksums: dict[torch.Tensor, str] = {}
        alike: dict[tuple[Key, bool, torch.dtype], list[torch.Tensor]] = {}
        for weight in sorted(names, key=rank.__getitem__):
            tensor = adapter[names[weight]]
            base = base_entries(weight, tensor.indices.to(weight.device), kept)
            if not force:
                check_base(names[weight], tensor, base)
            compared = None if force else tensor.checksum
            checksums[weight] = compared or checksum_of(base)
            kind = ((weight.dtype, weight.device), tensor.kind == "add", tensor.values.dtype)
            alike.setdefault(kind, []).append(weight)

        pieces: Pieces = {}
        for (key, additive, _), weights in alike.items():
            # All adapters must have the same: one op takes the entries of two.
            largest = max((weight.numel() for weight in first if (weight.dtype, weight.device) == key), default=0)
            home = torch.device("cpu") if on_host else key[1]
            tensors = [adapter[names[weight]] for weight in weights]
            entries = Arena(
                tuple(rank[weight] for weight in weights),
                weights,
                offsets_of([tensor.nnz for tensor in tensors]),
                torch.cat([tensor.indices for tensor in tensors]).to(home, index_dtype(largest)),
            )
            piece = Piece(
                [names[weight] for weight in weights],
                [checksums[weight] for weight in weights],
                entries if additive else entries.in_runs(),
                joined(tensor.values for tensor in tensors).to(home),
                additive,
            )
            pieces.setdefault(key, []).append(piece if home == key[1] else piece.pinned())
        return pieces

    def _in_model(self, adapter: Adapter, kept: Kept, force: bool) -> Adapter:
        """Gives an adapter of a checkpoint the model's names and positions; one that has them stays as it is."""

        def entries(name: str, indices: torch.Tensor) -> torch.Tensor:
            weight = resolve_state(self.model, name)
            return base_entries(weight, indices.to(weight.device), kept)

        return placed_in_model(adapter, self.model, entries, force=force)

    def _names_by_weight(self, adapter: Adapter, first: Mapping[torch.Tensor, str]) -> dict[torch.Tensor, str]:
        """Gives the adapter's name of each weight that it changes, all of which it may change."""
        names: dict[torch.Tensor, str] = {}
        for name, tensor in adapter.items():
            weight = resolve_state(self.model, name)
            check_whole(name, weight)
            check_fits(name, tensor, weight)
            check_claim(name, weight, self._owner())
            if weight in names:
                raise ValueError(f"{name}: the adapter names the tensor {first[weight]!r} twice")
            names[weight] = name
        return names

    def add(self, name: str, pieces: Pieces) -> None:
        """Keeps what `prepare` gave, and notes where its weights are."""
        keys = {weight: key for key, group in pieces.items() for piece in group for weight in piece.arena.weights}
        self._users.update(keys.keys())
        self._unused.difference_update(keys)
        places: dict[torch.Tensor, list[tuple[nn.Module, str]]] = {w: [] for w in keys if w not in self.homes}
        for module in self.model.modules():
            for attribute, weight in itertools.chain(module._parameters.items(), module._buffers.items()):
                if weight is not None and weight in places:
                    places[weight].append((module, attribute))
        for weight, found in places.items():
            self.homes[weight] = (found[:1] if isinstance(weight, nn.Parameter) else found, keys[weight])
        self.gpus.update(device for _, device in pieces if device.type == "cuda")
        self._adapters[name] = pieces

    def remove(self, name: str) -> None:
        """Forgets an adapter; `trim` forgets its weights."""
        weights = [weight for piece in _each(self._adapters.pop(name)) for weight in piece.arena.weights]
        self._users.subtract(weights)
        self._unused.update(weight for weight in weights if not self._users[weight])

    def trim(self, others: Collection[torch.Tensor]) -> None:
        """Forgets weights that no adapter changes and that are not among `others`."""
        for weight in self._unused.difference(others):
            self.homes.pop(weight, None)
            self._users.pop(weight, None)
            self._unused.discard(weight)

    def recount(self) -> None:
        """Finds the weights that no adapter changes by looking at all adapters."""
        self._users = Counter(weight for piece in self.pieces for weight in piece.arena.weights)
        self._unused = self.homes.keys() - self._users.keys()

    def check_weights(self, weights: Iterable[torch.Tensor]) -> None:
        """Raises RuntimeError if one of them is not the model's any more, is of another dtype or on another device than
        when its first adapter came, or is being changed by others."""
        owner, weights = self._owner(), list(weights)
        self._put_back_buffers(weights)
        for weight in weights:
            places, key = self.homes[weight]
            for module, attribute in places:
                held = _held(module, attribute)
                now = weight if held is None or isinstance(weight, nn.Parameter) else held
                if (now.dtype, now.device) != key:
                    raise RuntimeError(
                        f"the {attribute} of a {type(module).__name__} was {key[0]} on {key[1]} when an adapter was "
                        f"added, and is {now.dtype} on {now.device}: move it back, or remove its adapters and add them "
                        "again"
                    )
                if held is not weight:
                    raise RuntimeError(
                        f"the {attribute} of a {type(module).__name__} was replaced since an adapter was added"
                    )
            check_claim("switch", weight, owner)

    def _put_back_buffers(self, weights: Iterable[torch.Tensor]) -> None:
        """Gives the model its own buffers again where it has copies of them: `model.to` makes new ones, also back."""
        for weight in weights:
            if isinstance(weight, nn.Parameter):
                continue
            for module, attribute in self.homes[weight][0]:
                held = _held(module, attribute)
                if held is not None and held is not weight and _same_bits(held, weight):
                    module._buffers[attribute] = weight

    def claim(self, weights: Iterable[torch.Tensor]) -> None:
        """Notes that the bank changes the weights, which then keep the bank; `claims.claim(weight, None)` ends it."""
        owner = self._owner()
        for weight in weights:
            claim(weight, owner)

    def verify(self, kept: Kept) -> None:
        """Compares the base under every adapter with what it was when the adapter was added.

        Raises ValueError naming the first adapter and tensor whose base entries are others. kept: as for `prepare`.
        """
        for name, pieces in self._adapters.items():
            for piece in _each(pieces):
                entries = piece.arena.single()
                parts = zip(piece.names, piece.checksums, entries.parts, strict=True)
                for tensor_name, checksum, (weight, part) in parts:
                    indices = entries.indices[part].to(weight.device)
                    if checksum_of(base_entries(weight, indices, kept)) != checksum:
                        raise ValueError(f"{name}: {tensor_name}: the base entries changed since the adapter was added")


def as_given(mix: Mix) -> str | dict[str, float]:
    """Gives a mix of at least one adapter as `switch` takes it."""
    [(name, strength), *others] = mix
    return name if strength == 1.0 and not others else dict(mix)


def check_whole(name: str, weight: torch.Tensor) -> None:
    """Raises ValueError for a parameter of which each process holds a shard."""
    if reason := sharded(weight):
        raise ValueError(f"{name}: {reason}: a bank takes the whole model, as it is before fully_shard")


def _check_memory(first: Mapping[torch.Tensor, str], changed: Collection[torch.Tensor]) -> None:
    """Refuses with ValueError a weight to be changed that shares memory with another one of `first`, whose base would
    change with it."""
    reach, reaching = 0, None
    for weight in sorted((w for w in first if w.numel() and not w.is_meta), key=torch.Tensor.data_ptr):
        if reaching is not None and weight.data_ptr() < reach and (weight in changed or reaching in changed):
            raise ValueError(f"{first[weight]}: shares memory with {first[reaching]!r}, but is not the same parameter")
        last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        end = weight.data_ptr() + (last + 1) * weight.element_size()
        if end > reach:
            reach, reaching = end, weight


def _held(module: nn.Module, attribute: str) -> torch.Tensor | None:
    """The parameter or buffer that a module has under a name."""
    return module._parameters.get(attribute, module._buffers.get(attribute))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = all(getattr(one, field) == getattr(other, field) for field in ("layout", "dtype", "device", "shape"))
    return alike and one.is_contiguous() and torch.equal(as_bits(one.detach()), as_bits(other.detach()))


def _each(pieces: Pieces) -> Iterator[Piece]:
    return itertools.chain.from_iterable(pieces.values())
