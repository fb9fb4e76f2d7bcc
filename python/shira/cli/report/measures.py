"""The measures of interference: columns of the tables, panels of the picture."""

from __future__ import annotations

from dataclasses import dataclass

from shira.adapter.metrics import Overlap
from shira.cli.report.compare import Comparison


@dataclass(frozen=True)
class Measure:
    """A column of the tables, a panel of the picture."""

    attribute: str
    title: str
    meaning: str
    percent: bool = True

    def of(self, overlap: Overlap) -> float:
        value: float = getattr(overlap, self.attribute)
        return value

    def text(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"

    def known(self, overlap: Overlap) -> bool:
        """Whether the value means something: not where there is nothing to compare."""
        return overlap.common > 0 if self.attribute == "sign_conflicts" else all(overlap.entries)


OVERLAP = Measure("overlap", "Overlap", "of the entries that at least one adapter changes, the share that both change")
AWOM = Measure("awom", "AWOM", "the norm of A1^T A2: 0 is orthogonal; it grows with the energies", percent=False)
RELATIVE = Measure(
    "relative_awom",
    "Relative AWOM",
    "AWOM over the largest that deltas of these energies can have, so that strong and weak adapters compare",
)
AWOR = Measure("awor", "AWOR", "the share of zeros in A1^T A2: 100 % is orthogonal")
CONFLICTS = Measure("sign_conflicts", "Conflicts of sign", "of the common entries, the share with opposite signs")
SHARES = (OVERLAP, AWOR, CONFLICTS)  # their bars and colours end at 100 %, those of others at the largest
DELTA_MEASURES = (AWOM, RELATIVE, AWOR, CONFLICTS)


def measures_of(found: Comparison) -> tuple[Measure, ...]:
    return (OVERLAP, *DELTA_MEASURES) if found.has_deltas else (OVERLAP,)
