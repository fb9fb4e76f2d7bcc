"""The masks themselves; the package's docstring says what they have in common."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from shira_kernels import topk_indices

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 16  # entries hashed at a time: what fits a cache


class Mask(Protocol):
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
    """Every f-th row or column, and the main diagonal (paper, appendix B.1: SHiRA-Struct).

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
    needed = min((leave + take) * granularity, weight.numel())  # entries of so many runs
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
    return entries_of(_first_runs(entries, granularity)[leave : leave + take].sort().values, granularity, weight)


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
    """The entries of largest magnitude, |w| (paper, section 3.1: SHiRA-WM).

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
    """The entries of largest gradient, |g| (paper, section 3.1: SHiRA-Grad).

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
    """The entries of largest sensitivity, |w g| (paper, section 3.1: SHiRA-SNIP), computed in at least float32.

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
    """The entries of smallest magnitude, |w| (SaRA).

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
    """Entries drawn uniformly without replacement: those with the smallest hashes (docs/format.md, "Random masks").

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
        runs, order = _hashes_up_to(limit, count, _mix_int(seed + _GAMMA), weight.device)
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


def budget(
    weight: torch.Tensor, density: float, k: int | None, seed: int, skip: int, granularity: int
) -> tuple[int, int]:
    """How many runs to take and how many of the ranking to leave out before them."""
    if weight.dtype not in _DTYPES or weight.is_meta or not weight.numel():
        raise ValueError(
            "weight must be float64, float32, bfloat16 or float16 and hold data, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    numel = weight.numel()
    for argument, value in (("k", 1 if k is None else k), ("skip", skip), ("granularity", granularity), ("seed", seed)):
        if type(value) is not int:
            raise ValueError(f"{argument} must be a whole number, got {value!r}")
    if k is None:
        if type(density) not in (int, float) or not 0.0 < density <= 1.0:
            raise ValueError(f"density must be above 0 and at most 1, got {density!r}")
        k = max(1, round(density * numel))
    if not 1 <= k <= numel:
        raise ValueError(f"k must lie in [1, {numel}], the number of elements, got {k}")
    if granularity < 1:
        raise ValueError(f"granularity must be at least 1, got {granularity}")
    count = math.ceil(numel / granularity)
    take, leave = max(1, round(k / granularity)), round(skip / granularity)
    if skip < 0 or leave + take > count:
        raise ValueError(f"skip must lie in [0, {(count - take) * granularity}], so that k entries follow, got {skip}")
    return take, leave


def needs_gradient(mask: object) -> bool:
    """Whether the mask of this name ranks by the gradient."""
    return isinstance(mask, str) and mask in ("grad", "snip")


def run_scores(mask: str, weight: torch.Tensor, grad: torch.Tensor | None, granularity: int) -> torch.Tensor:
    """[runs]: what the masks wm, grad, snip and small rank the runs of a weight by, the largest first.

    A run's score is the sum of its entries', in at least float32.
    """
    weight = weight.detach()
    if needs_gradient(mask):
        if not isinstance(grad, torch.Tensor):
            raise ValueError(f"grad must be given: mask {mask!r} ranks by the gradient")
        if grad.shape != weight.shape or grad.device != weight.device or not grad.is_floating_point():
            raise ValueError(
                f"grad must be floating point {tuple(weight.shape)} on {weight.device} like the weight, "
                f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
            )
        grad = grad.detach()
    if mask == "grad":
        assert grad is not None
        score = grad.abs()
    elif mask == "snip":
        assert grad is not None
        compute = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
        score = torch.mul(weight.to(compute), grad).abs_()
    else:
        score = weight.abs()
        score = score.neg_() if mask == "small" else score
    score = score.reshape(-1)
    if granularity > 1:
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        score = torch.nn.functional.pad(score, (0, -score.numel() % granularity)).view(-1, granularity).sum(1)
    return score


def top_runs(score: torch.Tensor, leave: int, take: int) -> torch.Tensor:
    """Of a ranking by score, of equal ones the first, those from `leave` on, `take` of them: sorted, int64.

    Raises ValueError for NaN scores.
    """
    first = _top(score, leave + take)
    if not leave:
        return first
    kept = torch.ones(first.numel(), dtype=torch.bool, device=score.device)
    kept[torch.searchsorted(first, _top(score, leave))] = False
    return first[kept]


def _top(score: torch.Tensor, k: int) -> torch.Tensor:
    refused = False
    try:
        top = topk_indices(score, k).long()
        # NaN comes first where the op does not refuse it, on a GPU.
        refused = score.device.type != "cpu" and bool(score[top].isnan().any())
    except RuntimeError:
        if not bool(score.isnan().any()):
            raise
        refused = True
    if refused:
        raise ValueError("NaN scores are refused: neither weight nor grad may hold NaN (or infinity times 0)")
    return top


def _ranked(
    mask: str, weight: torch.Tensor, grad: torch.Tensor | None, take: int, leave: int, granularity: int
) -> torch.Tensor:
    return entries_of(top_runs(run_scores(mask, weight, grad, granularity), leave, take), granularity, weight)


def _first_runs(entries: torch.Tensor, granularity: int) -> torch.Tensor:
    """The runs of a ranking's entries, each once, where its first entry is."""
    if granularity == 1:
        return entries
    runs, position = (entries // granularity).unique(return_inverse=True)
    places = torch.arange(entries.numel(), device=entries.device)
    first = torch.full_like(runs, entries.numel()).scatter_reduce_(0, position, places, "amin")
    return runs[first.argsort()]


def entries_of(runs: torch.Tensor, granularity: int, weight: torch.Tensor) -> torch.Tensor:
    """The flat positions of the given runs (int64, sorted)."""
    if granularity > 1:
        runs = (runs[:, None] * granularity + torch.arange(granularity, device=runs.device)).view(-1)
        runs = runs[runs < weight.numel()]
    return runs.to(torch.int32 if weight.numel() < 2**31 else torch.int64)


_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix_int(z: int) -> int:
    z %= 2**64
    for shift, multiplier in _MULTIPLIERS:
        z = ((z ^ (z >> shift)) * multiplier) % 2**64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    """The int64 with the bits of z modulo 2^64."""
    return (z + 2**63) % 2**64 - 2**63


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """z >> bits without the copies of the sign that int64 shifts in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in _MULTIPLIERS:
        z = (z ^ _shift_right(z, shift)) * _signed(multiplier)
    return z ^ _shift_right(z, 31)


def _hashes_up_to(limit: int, count: int, key: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers below `count` whose hash is at most `limit`, in order, and their hashes less 2^63.

    torch has no arithmetic of uint64, so this is int64 that wraps around; less 2^63, signed order is unsigned order.
    """
    numbers, hashes = [], []
    for start in range(0, count, _CHUNK):
        number = torch.arange(start, min(start + _CHUNK, count), device=device)
        hashed = _mix(number * _signed(_GAMMA) + _signed(key + _GAMMA)) ^ _signed(2**63)
        low = hashed <= limit - 2**63
        numbers.append(number[low])
        hashes.append(hashed[low])
    return torch.cat(numbers), torch.cat(hashes)
