"""The masks: functions that choose entries of a weight. The package's docstring says what they have in common."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from shira.masks.hashing import GAMMA, hashes_up_to, mix_of
from shira.masks.ranking import budget, entries_of, first_runs, run_scores, top_runs


class Mask(Protocol):
    """What `ShiraConfig` takes as `mask`: any function with these arguments and this result.

    The package's docstring says what each of them means.
    """

    def __call__(
        self,
        weight: torch.Tensor,
        density: float,
        *,
        k: int | None = None,
        grad: torch.Tensor | None = None,
        seed: int = 0,
        skip: int = 0,
        granularity: int = 1,
    ) -> torch.Tensor: ...


def struct(
    weight: torch.Tensor,
    density: float,
    *,
    k: int | None = None,
    grad: torch.Tensor | None = None,
    seed: int = 0,
    skip: int = 0,
    granularity: int = 1,
    axis: int = 0,
    offset: int = 0,
    diagonal: bool = True,
) -> torch.Tensor:
    """Takes every f-th row or column, and the main diagonal (paper, appendix B.1: SHiRA-Struct).

    The weight counts as a matrix: rows are its first dimension, columns all others. The ranking begins with the main
    diagonal; then come rows 0, f, 2f, ..., then rows 1, 1 + f, ..., and so on, each from left to right, without what
    lies on the diagonal. f is the number of rows over how many rows are needed for k entries beside the diagonal, each
    of `new` entries: columns, less one with the diagonal, but at least 1:

        f = max(1, rows // max(1, ceil((k - diagonal) / new)))

    So a mask holds exactly k entries: the last row is cut where they are reached. A run is ranked by its first entry.

    Args:
        weight, density, k, granularity: as in the package's docstring.
        skip: as there. The families share no entry, so only the first has the diagonal.
        axis: 0 for rows, 1 for columns; then rows and columns change places in all of the above.
        offset: from 0 to f - 1: the rows begin with this one instead of 0, so that masks of one k share no row, but the
            diagonal, as in lemma 4.5 of the paper.
        diagonal: False leaves the diagonal out of the ranking's beginning, so that its entries count with their rows.
        grad, seed: not used.

    Raises:
        ValueError: naming the argument.
    """
    take, leave = budget(weight, density, k, seed, skip, granularity)
    if type(axis) is not int or axis not in (0, 1):
        raise ValueError(f"axis must be 0 (rows) or 1 (columns), got {axis!r}")
    if type(diagonal) is not bool:
        raise ValueError(f"diagonal must be True or False, got {diagonal!r}")
    shape = (weight.shape[0], weight.numel() // weight.shape[0]) if weight.dim() else (1, 1)
    lines, width = shape[axis], shape[1 - axis]
    on_diagonal = min(shape) if diagonal else 0
    f = max(1, lines // max(1, math.ceil((take * granularity - on_diagonal) / max(1, width - diagonal))))
    if type(offset) is not int or not 0 <= offset < f:
        raise ValueError(f"offset must lie in [0, {f}), the distance of the lines, got {offset!r}")
    needed = min((leave + take) * granularity, weight.numel())  # entries of leave + take runs
    numbers = torch.arange(lines, device=weight.device)
    order = ((numbers - offset) % f).argsort(stable=True)
    # A line loses at most one entry to the diagonal.
    count = math.ceil(max(0, needed - on_diagonal) / max(1, width - 1)) if width > 1 else lines
    line = order[:count, None]
    across = torch.arange(width, device=weight.device)
    entries = line * width + across if axis == 0 else across * lines + line
    if on_diagonal:
        entries = entries[line != across]
        entries = torch.cat([numbers[:on_diagonal] * (shape[1] + 1), entries])
    entries = entries.view(-1)[:needed]
    return entries_of(first_runs(entries, granularity)[leave : leave + take].sort().values, granularity, weight)


def wm(
    weight: torch.Tensor,
    density: float,
    *,
    k: int | None = None,
    grad: torch.Tensor | None = None,
    seed: int = 0,
    skip: int = 0,
    granularity: int = 1,
) -> torch.Tensor:
    """Takes the entries of largest magnitude, |w| (paper, section 3.1: SHiRA-WM).

    Arguments and result as in the package's docstring; `grad` and `seed` are not used.
    """
    return _ranked("wm", weight, grad, *budget(weight, density, k, seed, skip, granularity), granularity)


def grad(
    weight: torch.Tensor,
    density: float,
    *,
    k: int | None = None,
    grad: torch.Tensor | None = None,
    seed: int = 0,
    skip: int = 0,
    granularity: int = 1,
) -> torch.Tensor:
    """Takes the entries of largest gradient, |g| (paper, section 3.1: SHiRA-Grad).

    Arguments and result as in the package's docstring; `grad` must be given, `seed` is not used.
    """
    return _ranked("grad", weight, grad, *budget(weight, density, k, seed, skip, granularity), granularity)


def snip(
    weight: torch.Tensor,
    density: float,
    *,
    k: int | None = None,
    grad: torch.Tensor | None = None,
    seed: int = 0,
    skip: int = 0,
    granularity: int = 1,
) -> torch.Tensor:
    """Takes the entries of largest sensitivity, |w g| (paper, section 3.1: SHiRA-SNIP), computed in at least float32.

    Arguments and result as in the package's docstring; `grad` must be given, `seed` is not used. With the sum of the
    batches' |g| as `grad` this is the sum of the batches' |w g|.
    """
    return _ranked("snip", weight, grad, *budget(weight, density, k, seed, skip, granularity), granularity)


def small(
    weight: torch.Tensor,
    density: float,
    *,
    k: int | None = None,
    grad: torch.Tensor | None = None,
    seed: int = 0,
    skip: int = 0,
    granularity: int = 1,
) -> torch.Tensor:
    """Takes the entries of smallest magnitude, |w| (SaRA).

    Arguments and result as in the package's docstring; `grad` and `seed` are not used.
    """
    return _ranked("small", weight, grad, *budget(weight, density, k, seed, skip, granularity), granularity)


def rand(
    weight: torch.Tensor,
    density: float,
    *,
    k: int | None = None,
    grad: torch.Tensor | None = None,
    seed: int = 0,
    skip: int = 0,
    granularity: int = 1,
) -> torch.Tensor:
    """Draws entries uniformly without replacement: those with the smallest hashes (docs/format.md, "Random masks").

    The hash of entry i is output i (from 0) of the generator splitmix64 whose state starts at `key`, and `key` is the
    first output of splitmix64 started at `seed`. All of it is arithmetic of unsigned 64-bit integers:

        mix(z)  = z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
        key     = mix(seed + 0x9E3779B97F4A7C15)
        hash(i) = mix(key + (i + 1) * 0x9E3779B97F4A7C15)

    The ranking is by hash, as unsigned numbers; no two are equal. So a mask depends on the number of elements, k, seed,
    skip and granularity only: not on the device, the version of torch or the weight's values. Runs hash their number
    (the first is 0). Arguments and result as in the package's docstring; `grad` is not used.
    """
    take, leave = budget(weight, density, k, seed, skip, granularity)
    count = math.ceil(weight.numel() / granularity)
    needed = leave + take
    # Only hashes below a threshold are kept, so memory is O(chunk + k) for a weight of any size. Six standard
    # deviations above the expected number nearly always suffice; otherwise more are kept. The result is the same.
    kept = needed + 6 * math.isqrt(needed) + 16
    while True:
        limit = min(2**64 * kept // count, 2**64 - 1)
        runs, order = hashes_up_to(limit, count, mix_of(seed + GAMMA), weight.device)
        if runs.numel() >= needed:
            break
        kept *= 2
    chosen = runs[order.argsort()[leave:needed]]
    return entries_of(chosen.sort().values, granularity, weight)


MASKS: dict[str, Mask] = {
    "struct": struct,
    "rand": rand,
    "wm": wm,
    "grad": grad,
    "snip": snip,
    "small": small,
}
"""The masks by the names that `ShiraConfig` takes."""


def _ranked(
    mask: str, weight: torch.Tensor, grad: torch.Tensor | None, take: int, leave: int, granularity: int
) -> torch.Tensor:
    return entries_of(top_runs(run_scores(mask, weight, grad, granularity), leave, take), granularity, weight)
