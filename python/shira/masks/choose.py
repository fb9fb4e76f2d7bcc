"""Which entries of a model's weights a config means: budgets, seeds, families, and users' own masks."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from shira.masks import ranking
from shira.masks.config import ShiraConfig
from shira.masks.functions import MASKS, Mask
from shira_kernels.dtypes import index_dtype

# Masks that are the first entries of a ranking by score, which is comparable between weights.
SCORED = ("wm", "grad", "snip", "small")


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor's mask: BLAKE2b, 8 bytes, of "<seed>/<name>" in UTF-8, as a little-endian number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def choose_entries(
    config: ShiraConfig, weights: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Chooses the entries of each weight that a config means.

    Args:
        config: which mask, how many entries.
        weights: name -> weight, any shape, floating point.
        grads: name -> gradient, of the weight's shape, for masks that rank by it; a user's function gets it if given.

    Returns:
        name -> sorted flat indices on the weight's device, as of the masks in `shira.masks`, in the order of `weights`.
        With a budget for the whole model a weight may get none. At most one weight's scores are held at a time.

    Raises:
        ValueError: naming the weight: gradients that are missing, budgets that it cannot hold, NaN scores, a user's
            function that cannot be imported or gives anything but sorted unique indices of the weight.
    """
    selection = Selection(config, weights)
    for name in weights:
        selection.add(name, None if grads is None else grads.get(name))
    return selection.result()


class Selection:
    """Chooses the entries that a config means of weights that come one by one, in any order.

    So it can be used where a gradient is there for a moment only, or a weight is read from a file.

    Args:
        config: which mask, how many entries.
        weights: name -> weight, any shape, floating point; for one on the meta device `add` gets another with data.
    """

    def __init__(self, config: ShiraConfig, weights: Mapping[str, torch.Tensor]) -> None:
        self._config, self._weights = config, weights
        self._mask = mask_of(config)
        self._is_own = isinstance(config.mask, str) and config.mask in MASKS
        self._ranks_model = config.budget == "model" and self._is_own and config.mask in SCORED
        self._chosen: dict[str, torch.Tensor] = {}
        # For a ranking of the whole model: name -> the best runs so far and their scores.
        self._best: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._k = _budgets(config, weights)
        if self._ranks_model and weights:
            g = config.granularity
            self._take = max(1, round(sum(self._k.values()) / g))
            self._leave = round(config.skip / g) + config.family * self._take
            runs = sum(math.ceil(weight.numel() / g) for weight in weights.values())
            if self._leave + self._take > runs:
                raise ValueError(
                    f"skip, family: {self._leave + self._take} runs are needed with those left out, but the weights "
                    f"have {runs}"
                )

    def add(self, name: str, grad: torch.Tensor | None, weight: torch.Tensor | None = None) -> None:
        """Ranks one weight. Neither its gradient is kept nor `weight`, which stands for one on the meta device."""
        weight = (self._weights[name] if weight is None else weight).detach()
        try:
            if ranking.needs_gradient(self._config.mask) and grad is None:
                raise ValueError(f"mask {self._config.mask!r} ranks by the gradient: calibration batches are needed")
            if self._ranks_model:
                self._rank(name, weight, grad)
            else:
                self._chosen[name] = self._choose(name, weight, grad)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def result(self) -> dict[str, torch.Tensor]:
        """Returns name -> entries, in the order of `weights`. Raises ValueError if a weight was not added."""
        if missing := [name for name in self._weights if name not in self._chosen and name not in self._best]:
            raise ValueError(f"{missing[0]}: nothing was added for this weight")
        if self._ranks_model and self._best:
            self._keep(self._leave, self._take)
            for name, (runs, _) in self._best.items():
                self._chosen[name] = ranking.entries_of(runs, self._config.granularity, self._weights[name])
        return {name: self._chosen[name] for name in self._weights}

    def _choose(self, name: str, weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        config, k = self._config, self._k[name]
        if not k:
            return torch.empty(0, dtype=index_dtype(weight.numel()), device=weight.device)
        # Counted in the runs that a mask takes and leaves, so that rounding to runs never makes two families overlap.
        g = config.granularity
        left_out = round(config.skip / g) + config.family * max(1, round(k / g))
        options: dict[str, Any] = {}
        if config.mask == "struct":
            options = {"axis": config.axis, "offset": config.offset, "diagonal": config.diagonal}
        indices = self._mask(
            weight,
            config.density if config.density is not None else k / weight.numel(),
            k=k,
            grad=grad,
            seed=tensor_seed(config.seed, name),
            skip=left_out * g,
            granularity=g,
            **options,
        )
        return indices if self._is_own else _checked(indices, weight, config.mask_name)

    def _rank(self, name: str, weight: torch.Tensor, grad: torch.Tensor | None) -> None:
        config = self._config
        assert isinstance(config.mask, str)
        ranking.budget(weight, 1.0, None, 0, 0, 1)  # for its checks of the weight
        score = ranking.run_scores(config.mask, weight, grad, config.granularity)
        needed = self._leave + self._take
        runs = ranking.top_runs(score, 0, min(needed, score.numel()))
        self._best[name] = (runs, score[runs])
        # Not after each weight: a merge costs what is kept, so it waits until twice as much is there.
        if sum(runs.numel() for runs, _ in self._best.values()) > 2 * needed:
            self._keep(0, needed)

    def _keep(self, leave: int, take: int) -> None:
        """Keeps those of the best runs that follow the first `leave` of their ranking, `take` of them.

        Of runs with equal scores that of the earlier weight comes first, and in a weight the lower one, in whatever
        order the weights were added.
        """
        names = [name for name in self._weights if name in self._best]
        home = self._best[names[0]][1].device
        dtype = torch.float32
        for name in names:
            dtype = torch.promote_types(dtype, self._best[name][1].dtype)
        counts = [self._best[name][0].numel() for name in names]
        places = ranking.top_runs(torch.cat([self._best[name][1].to(home, dtype) for name in names]), leave, take)
        ends = torch.tensor([0, *counts], device=home).cumsum(0)
        borders = torch.searchsorted(places, ends).tolist()
        for i, name in enumerate(names):
            runs, score = self._best[name]
            kept = (places[borders[i] : borders[i + 1]] - ends[i]).to(runs.device)
            self._best[name] = (runs[kept], score[kept])


def mask_of(config: ShiraConfig) -> Mask:
    """Returns the function that a config names. A user's own is imported if the config has only its name.

    Raises ValueError if that fails.
    """
    if not isinstance(config.mask, str):
        return config.mask
    if config.mask in MASKS:
        return MASKS[config.mask]
    module, _, qualified = config.mask.partition(":")
    advice = "import failed; give ShiraConfig the function itself"
    try:
        found: Any = importlib.import_module(module)
        for attribute in qualified.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"mask {config.mask!r}: {advice} ({error})") from error
    if not callable(found):
        raise ValueError(f"mask {config.mask!r}: is no function")
    return found


def _budgets(config: ShiraConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Returns name -> how many entries. With a budget for the whole model they are shares of it in proportion to the
    weights' sizes, and add up to it."""
    total = sum(weight.numel() for weight in weights.values())
    by_rank = {name: (config.r or 0) * _rows_and_columns(weight) for name, weight in weights.items()}
    if config.budget == "tensor":
        for name, weight in weights.items():
            wanted = config.k or by_rank[name]
            if wanted > weight.numel():
                field = "k" if config.k else f"r (rows + columns), with r = {config.r},"
                raise ValueError(f"{name}: {field} must lie in [1, {weight.numel()}], its elements, got {wanted}")
        return {
            name: config.k or by_rank[name] or max(1, round((config.density or 0.0) * weight.numel()))
            for name, weight in weights.items()
        }
    wanted = config.k or sum(by_rank.values()) or max(1, round((config.density or 0.0) * total))
    if wanted > total:
        raise ValueError(f"budget: {wanted} entries are more than the {total} elements of all weights")
    shares, end, before = {}, 0, 0
    for name, weight in weights.items():
        end += weight.numel()
        upto = (2 * wanted * end + total) // (2 * total)  # rounded in whole numbers, so that nothing is lost
        shares[name], before = upto - before, upto
    return shares


def _rows_and_columns(weight: torch.Tensor) -> int:
    rows = weight.shape[0] if weight.dim() else 1
    return rows + (weight.numel() // rows if rows else 0)


def _checked(indices: Any, weight: torch.Tensor, mask: str) -> torch.Tensor:
    """Returns what a user's function gave, as the masks here give it. Raises ValueError naming the mask."""

    def refuse(message: str) -> None:
        raise ValueError(f"mask {mask!r} must give sorted unique flat indices: {message}")

    if not isinstance(indices, torch.Tensor):
        refuse(f"got {type(indices).__name__}")
    if indices.layout != torch.strided or indices.is_meta:
        refuse("got a tensor that is sparse or holds no data")
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        refuse(f"must be 1-D int32 or int64, got {indices.dtype} {tuple(indices.shape)}")
    if not indices.numel():
        refuse("got none")
    first, last = int(indices.min()), int(indices.max())
    if first < 0 or last >= weight.numel():
        refuse(f"must lie in [0, {weight.numel()}), got {first if first < 0 else last}")
    step = indices.diff()
    if bool((step <= 0).any()):
        refuse("got repeated ones" if indices.unique().numel() < indices.numel() else "got unsorted ones")
    return indices.to(weight.device, index_dtype(weight.numel())).contiguous()
