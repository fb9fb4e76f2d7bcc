"""How adapters interfere, as numbers."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shira.adapter.adapter import Adapter
from shira.adapter.metrics import Interference, Overlap, as_deltas, energy_of, interference_of, overlap_of, pairs
from shira.files.checkpoint import Base
from shira.files.errors import ShiraWarning


@dataclass(frozen=True)
class Comparison:
    """How adapters interfere.

    Attributes:
        adapters: by name; of kind "add" if `has_deltas`.
        overlaps: (name, name) -> tensor -> their overlap; with `has_deltas` their interference.
        has_deltas: whether a base was there for all adapters that need one.
        notes: what is missing or doubtful, a sentence each.
    """

    adapters: dict[str, Adapter]
    overlaps: dict[tuple[str, str], dict[str, Overlap]]
    has_deltas: bool
    notes: list[str]

    def total(self, pair: tuple[str, str]) -> Overlap:
        """The overlap, or interference, of the whole adapters."""
        return sum(self.overlaps[pair].values(), Interference() if self.has_deltas else Overlap())

    @cached_property
    def tensors(self) -> list[str]:
        """All names, those of one kind together: they differ in nothing but numbers, and are ordered by these."""
        names = dict.fromkeys(name for overlaps in self.overlaps.values() for name in overlaps)
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(map(kind_of, names)))}
        return sorted(names, key=lambda name: (kinds[kind_of(name)], [int(n) for n in re.findall(r"\d+", name)]))

    @cached_property
    def spans(self) -> list[tuple[int, int, str]]:
        """For each kind, where its names begin and end in `tensors`, and the kind."""
        spans, start = [], 0
        for kind, names in itertools.groupby(self.tensors, kind_of):
            end = start + len(list(names))
            spans.append((start, end, kind))
            start = end
        return spans

    def energies(self, name: str) -> dict[str, float]:
        """The energy of an adapter's deltas, by tensor."""
        by_name = {tensor: changed for tensor, changed, _ in pairs(self.adapters[name], Adapter({}))}
        return {tensor: energy_of(by_name.get(tensor)) for tensor in self.tensors}

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON types."""
        adapters = {}
        for name, adapter in self.adapters.items():
            adapters[name] = {"tensors": len(adapter), "entries": adapter.nnz, "density": adapter.density}
            if self.has_deltas:
                adapters[name]["energy"] = sum(self.energies(name).values())
        return {
            "adapters": adapters,
            "pairs": [
                {"adapters": list(pair), **_numbers(self.total(pair))}
                | {"tensors": {name: _numbers(overlap) for name, overlap in overlaps.items()}}
                for pair, overlaps in self.overlaps.items()
            ],
            "notes": self.notes,
        }


def kind_of(name: str) -> str:
    """The tensor's name without numbers of layers: "layers.3.mlp.up_proj.weight" -> "layers.*.mlp.up_proj.weight"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def compare(
    adapters: Mapping[str, Adapter], base: Base | None, progress: Callable[[int, int, str], None] = lambda *_: None
) -> Comparison:
    """Compares each adapter with each other one.

    Without a base that some of them need to become deltas, there is only their overlap, and a note says so. Without any
    base, another note names pairs that have no tensor of the same name.

    Args:
        adapters: by name, at least two.
        base: as in `shira.awom`.
        progress: called before each tensor of each pair, with how many are done, how many there are, and which it is.

    Raises:
        ValueError: as in `shira.awom`.
        OSError: the base cannot be read.
    """
    notes = []
    needy = [name for name, adapter in adapters.items() if any(tensor.kind == "replace" for tensor in adapter.values())]
    has_deltas = not needy or base is not None
    if not has_deltas:
        notes.append(
            f"Only the overlap is known. AWOM, AWOR, conflicts of sign and energies need the base, --base: "
            f"{', '.join(needy)} {'holds' if len(needy) == 1 else 'hold'} tuned weights, not what they add to it."
        )
    else:
        found = {}
        for name, adapter in adapters.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found[name] = as_deltas(adapter, base)
            ours = [warning for warning in caught if issubclass(warning.category, ShiraWarning)]
            if ours:
                notes.append(f"Adapter {name}: {ours[0].message} ({len(ours)} of {len(adapter)} tensors).")
        adapters = found
    tasks = [
        ((a, b), tensor, first, second)
        for a, b in itertools.combinations(adapters, 2)
        for tensor, first, second in pairs(adapters[a], adapters[b])
    ]
    overlaps: dict[tuple[str, str], dict[str, Overlap]] = {pair: {} for pair in itertools.combinations(adapters, 2)}
    for done, (pair, tensor, first, second) in enumerate(tasks):
        progress(done, len(tasks), f"{' and '.join(pair)}: {tensor}")
        overlaps[pair][tensor] = interference_of(first, second) if has_deltas else overlap_of(first, second)
    for pair, by_tensor in overlaps.items() if base is None else ():
        shared = any(all(overlap.entries) for overlap in by_tensor.values())
        if not shared and all(sum(by_tensor.values(), Overlap()).entries):
            notes.append(
                f"{' and '.join(pair)} have no tensor of the same name. If their names are those of different "
                "checkpoints of one model, --base finds what they share."
            )
    return Comparison(dict(adapters), overlaps, has_deltas, notes)


def _numbers(overlap: Overlap) -> dict[str, Any]:
    numbers: dict[str, Any] = {"entries": list(overlap.entries), "common": overlap.common, "overlap": overlap.overlap}
    if isinstance(overlap, Interference):
        numbers |= {
            "awom": overlap.awom,
            "relative_awom": overlap.relative_awom,
            "awor": overlap.awor,
            "opposite": overlap.opposite,
            "sign_conflicts": overlap.sign_conflicts,
            "energy": list(overlap.energy),
        }
    return numbers
