"""Masks: which entries of a weight are trained.

Each mask is a function `(weight, density, *, k=None, grad=None, seed=0, skip=0, granularity=1) -> indices`:

- weight: any shape, floating point. The mask holds `k` entries, or max(1, round(density * numel)) if `k` is None.
- grad: the weight's gradient, for masks that rank by it.
- seed: any integer, for masks that draw; taken modulo 2^64.
- skip: leave out the first `skip` entries of the ranking and take those that follow, so that masks of one ranking
  with skips of 0, k, 2k, ... share no entry.
- granularity: rank aligned runs of that many flat entries instead of single ones. `k` and `skip` are rounded to whole
  runs (`k` to at least one); a shorter run at the end counts as a run, and a mask that holds it has fewer entries.
- indices: flat row-major positions, sorted and unique, on the weight's device; int32 for weights below 2^31 elements,
  else int64.

All raise ValueError naming the argument.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

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
    """The entries of largest magnitude, |w| (paper, section 3.1: SHiRA-WM); of equal ones the lower index goes first.

    A run's rank is the sum of its magnitudes. Arguments and result as in the module's docstring; ValueError also if the
    weight holds a NaN. `grad` and `seed` are not used.
    """
    take, leave = _budget(weight, density, k, seed, skip, granularity)
    score = weight.detach().abs().view(-1) if weight.is_contiguous() else weight.detach().abs().reshape(-1)
    if score.isnan().any():
        raise ValueError("weight must not hold NaN: magnitudes could not be ranked")
    if granularity > 1:
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        score = torch.nn.functional.pad(score, (0, -score.numel() % granularity)).view(-1, granularity).sum(1)
    chosen = _top(score, leave + take)
    if leave:
        chosen[_top(score, leave)] = False
    return _entries(chosen.nonzero().view(-1), granularity, weight)


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
    (the first is 0). Arguments and result as in the module's docstring; `grad` is not used.
    """
    take, leave = _budget(weight, density, k, seed, skip, granularity)
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
    return _entries(chosen.sort().values, granularity, weight)


MASKS: dict[str, Mask] = {"wm": wm, "rand": rand}


def _budget(
    weight: torch.Tensor, density: float, k: int | None, seed: int, skip: int, granularity: int
) -> tuple[int, int]:
    """How many runs to take and how many of the ranking to leave out before them."""
    if not weight.is_floating_point() or weight.is_meta or not weight.numel():
        raise ValueError(f"weight must be floating point and hold data, got {weight.dtype} {tuple(weight.shape)}")
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


def _top(score: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest are, as bool; of equal ones the first."""
    least = score.topk(k, sorted=False).values.min()
    chosen = score > least
    ties = (score == least).nonzero().view(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen


def _entries(runs: torch.Tensor, granularity: int, weight: torch.Tensor) -> torch.Tensor:
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
