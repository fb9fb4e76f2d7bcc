"""ShiraAdamW: AdamW for sparse training, a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from operator import ne
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw

from shira_kernels.dtypes import ARITHMETIC, compute_dtype
from shira_kernels.ops._checks import INDEX_DTYPES
from shira_kernels.ops.masked_adamw import masked_adamw

DECAYS = ("weights", "deltas")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class SparseTarget(Protocol):
    """Where a vector of trained values belongs: what a parameter `values` [nnz] carries as `values.shira_target`.

    weight: the live weight, contiguous, requires_grad False. indices: [nnz] int32 or int64, flat, sorted, unique.
    base: [nnz], the weight's original entries. `values` are float32 (float64 for a float64 weight).

    It may also have `plain`, a tensor with the values' memory and version counter, where the parameter is a subclass
    that is slow to ask; and `values_arena` and `indices_arena`, one-dimensional tensors in whose memory its values and
    indices lie beside those of other targets, though each may have a storage of its own.
    """

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def indices(self) -> torch.Tensor: ...
    @property
    def base(self) -> torch.Tensor: ...

    def wrote(self, values: torch.Tensor) -> None:
        """Called when `values` and the weight's entries were both written: no further write-back is needed."""


@dataclass
class _Part:
    """What one step of masked_adamw takes of one parameter."""

    parameter: torch.Tensor  # or a plain tensor of its memory
    target: SparseTarget | None  # None for a dense parameter with listed entries
    weight: torch.Tensor
    indices: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]


class ShiraAdamW(torch.optim.Optimizer):
    """AdamW for three kinds of parameters, side by side in any parameter groups.

    1. Vectors of `shira.attach(...).parameters()`: the update and the writing into the live weights are one
       `shira::masked_adamw` for all vectors that lie side by side in memory.
    2. Dense parameters listed in `indices`: only the listed entries move; no momentum or decay reaches the others. The
       moments are as long as the list, entries of bfloat16 and float16 parameters have float32 masters in the state,
       and the dense gradient is released (`.grad = None`) by the step. A master overrules what others write into its
       entry after the first step.
    3. All others: as `torch.optim.AdamW`, to the same bits.

    1 and 2 compute in float32 (float64 for float64 weights) and agree with `torch.optim.AdamW` on the entries as a
    vector to rounding: within 1e-5, relative, over 1000 steps. `state_dict()` resumes to the same bits; that of a
    torch.optim.AdamW can be loaded for parameters of kinds 1 and 3.

    Args:
        params: parameters or groups, as for every torch optimizer. A group may set any of the options below, and with
            `indices` list entries of its own parameters.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        indices: dense parameter -> [nnz] int32 or int64, flat positions, sorted and unique.
        decay: what weight decay shrinks: "weights", as AdamW does; or "deltas", the difference of kinds 1 and 2 to what
            the entries were before training (kind 3 has no such base: its weights decay).

    Raises:
        ValueError: an option, a parameter or a list of indices is wrong.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        indices: Mapping[torch.Tensor, torch.Tensor] | None = None,
        decay: str = "weights",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decay": decay,
        }
        _check_options(defaults)
        super().__init__(params, defaults)
        self._list_entries(indices or {}, [p for group in self.param_groups for p in group["params"]])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for every optimizer; the group's `indices` list entries of its dense parameters."""
        param_group = dict(param_group)
        indices = param_group.pop("indices", {})
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _check_options(group)
            for p in group["params"]:
                if p.is_complex():
                    raise ValueError(f"params must be real, got {p.dtype}")
            self._list_entries(indices, group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def _list_entries(self, indices: Mapping[torch.Tensor, torch.Tensor], params: list[torch.Tensor]) -> None:
        known = set(params)
        for p, index in indices.items():
            if p not in known:
                raise ValueError(f"indices: a tensor of shape {tuple(p.shape)} is not among the parameters")
            if "indices" in self.state.get(p, {}):
                raise ValueError(f"indices of a parameter of shape {tuple(p.shape)} are given twice")
            _check_entries(p, index)
        for p, index in indices.items():
            self.state[p] = {"indices": index.detach().to(p.device, copy=True)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for all parameters that have a gradient. Returns what `closure`, called first, returns.

        Raises:
            RuntimeError: a gradient is sparse, or decay="deltas" was chosen after the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if (grad := p.grad) is not None and grad.layout != torch.strided:
                    raise RuntimeError("ShiraAdamW does not take sparse gradients")
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        vectors: dict[Any, list[_Part]] = {}
        listed: dict[Any, list[_Part]] = {}
        ordinary: list[torch.Tensor] = []
        for p in group["params"]:
            if (grad := p.grad) is None:
                continue
            state, target = self.state[p], getattr(p, "shira_target", None)
            if "indices" in state:
                if state["indices"].device != p.device:  # the parameter was moved before the first step
                    state["indices"] = state["indices"].to(p.device)
                if group["decay"] == "deltas" and "step" in state and "base" not in state:
                    raise RuntimeError("decay='deltas' must be chosen before the first step: the base is gone")
                if group["maximize"]:
                    grad = grad.reshape(-1)[state["indices"]].neg_()
                part = _Part(p, None, p, state["indices"], grad.contiguous(), state)
                kind = listed
            elif target is not None:
                grad = grad.neg() if group["maximize"] else grad.contiguous()
                part = _Part(getattr(target, "plain", p), target, target.weight, target.indices, grad, state)
                kind = vectors
            else:
                ordinary.append(p)
                continue
            key = (part.weight.dtype, part.indices.dtype, part.weight.device, grad.dtype)
            kind.setdefault(key, []).append(part)
        for parts in vectors.values():
            _start(parts, group)
            for run in _runs(parts, adjacent=True):
                self._step_vectors(run, group)
        for parts in listed.values():
            _start(parts, group)
            for run in _runs(parts, adjacent=False):
                self._step_listed(run, group)
        self._step_ordinary(ordinary, group)

    def _step_vectors(self, run: list[_Part], group: dict[str, Any]) -> None:
        if group["decay"] == "deltas":
            for part in run:
                assert part.target is not None
                part.parameter.lerp_(part.target.base.to(part.parameter.dtype), group["lr"] * group["weight_decay"])
        values = _joined_values(run)
        assert values is not None
        self._masked_adamw(run, values, group)
        torch.autograd.graph.increment_version([part.parameter for part in run])
        for part in run:
            assert part.target is not None
            part.target.wrote(part.parameter)

    def _step_listed(self, run: list[_Part], group: dict[str, Any]) -> None:
        master = _arena(run, "master") if "master" in run[0].state else None
        if group["decay"] == "deltas":
            for part in run:
                true = part.state["master"] if master is not None else part.weight.view(-1)[part.indices]
                true = true.lerp_(part.state["base"], group["lr"] * group["weight_decay"])
                if master is None:
                    part.weight.view(-1)[part.indices] = true
        self._masked_adamw(run, master, group)
        for part in run:
            part.parameter.grad = None

    def _masked_adamw(self, run: list[_Part], master: torch.Tensor | None, group: dict[str, Any]) -> None:
        borders = [0]
        for part in run:
            borders.append(borders[-1] + part.indices.numel())
        beta1, beta2 = group["betas"]
        steps = [part.state["step"] for part in run]
        masked_adamw(
            [part.weight for part in run],
            torch.tensor(borders, device="cpu"),
            _lists(run),
            [part.grad for part in run],
            _arena(run, "exp_avg"),
            _arena(run, "exp_avg_sq"),
            master,
            steps[0] + 1,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            0.0 if group["decay"] == "deltas" else group["weight_decay"],
        )
        torch._foreach_add_(steps, 1)

    def _step_ordinary(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
                self.state[p].update((name, torch.zeros_like(p)) for name in _MOMENTS)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict()` was taken, to the same bits.

        Raises:
            ValueError: the state is of other parameters, other indices or another optimizer. Nothing was changed.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be what state_dict() gave, got {type(state_dict).__name__}")
        loaded: dict[torch.Tensor, dict[str, Any]] = {}

        def check(_: Any, state_dict: dict[str, Any]) -> None:
            loaded.update(self._checked_state(state_dict))

        def restore(_: Any) -> None:
            # What the base class loads is rounded to the parameters' dtype, and lacks indices of parameters that had no
            # step yet.
            self.state.update(loaded)

        hooks = [
            self.register_load_state_dict_pre_hook(check),  # after other hooks, so it sees what they changed
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("decay", "weights")

    def _checked_state(self, state_dict: dict[str, Any]) -> dict[torch.Tensor, dict[str, Any]]:
        """Copies of the saved states, each in the dtype that its parameter needs."""
        saved_groups, saved = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(saved_groups, list) or not isinstance(saved, Mapping):
            raise ValueError(
                "state_dict must be what an optimizer's state_dict() gave: param_groups or state is missing"
            )
        sizes = [len(group.get("params", ())) if isinstance(group, Mapping) else None for group in saved_groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("state_dict has other parameter groups, or groups of other sizes, than this optimizer")
        result = {}
        for number, (saved_group, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            try:
                options = {"maximize": False, "decay": "weights", **saved_group}
                _check_options(options)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"state_dict: group {number} has no valid options of AdamW: {error}") from None
            if options.get("amsgrad"):
                raise ValueError(f"state_dict: group {number} has amsgrad, which ShiraAdamW has not")
            for place, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
                name = f"state_dict: parameter {place} of group {number}"
                if entry := self._checked_entry(name, p, saved.get(key, {}), options["decay"]):
                    result[p] = entry
        return result

    def _checked_entry(self, name: str, p: torch.Tensor, saved: Any, decay: str) -> dict[str, Any]:
        own = self.state.get(p, {}).get("indices")
        shape, dtype = (p.shape, p.dtype) if own is None else (own.shape, compute_dtype(p.dtype))
        state: dict[str, Any] = {} if own is None else {"indices": own}
        if not isinstance(saved, Mapping):
            raise ValueError(f"{name}: must be a mapping, got {type(saved).__name__}")
        if own is not None and saved:
            theirs = saved.get("indices")
            if not isinstance(theirs, torch.Tensor) or not torch.equal(theirs.to(own), own):
                raise ValueError(f"{name}: was saved with other indices")
        elif "indices" in saved:
            raise ValueError(f"{name}: was saved with indices, but is listed with none here")
        names = set(saved) - {"indices"}
        if not names:
            return state
        expected = {"step", *_MOMENTS}
        if own is not None:
            expected |= ({"master"} if dtype != p.dtype else set()) | ({"base"} if decay == "deltas" else set())
        if names - {"base"} != expected - {"base"} or not expected <= names:
            raise ValueError(
                f"{name}: must hold {', '.join(sorted(expected))}, got {', '.join(sorted(map(str, names)))}"
            )
        for key in sorted(names):
            value = saved[key]
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{name}: {key} must be a tensor, got {type(value).__name__}")
            if value.shape != (wanted := torch.Size() if key == "step" else shape):
                raise ValueError(f"{name}: {key} must have shape {tuple(wanted)}, got {tuple(value.shape)}")
            if not value.is_floating_point():
                raise ValueError(f"{name}: {key} must be floating point, got {value.dtype}")
            where, kind = ("cpu", torch.float32) if key == "step" else (p.device, dtype)
            state[key] = value.detach().to(where, kind, copy=True)
        return state


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not (_is_number(options[name]) and math.isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name} must be a finite number and not negative, got {options[name]!r}")
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if options["decay"] not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {options['decay']!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _check_entries(p: torch.Tensor, index: torch.Tensor) -> None:
    where = f"indices of a parameter of shape {tuple(p.shape)}"
    if hasattr(p, "shira_target"):
        raise ValueError(f"{where}: it is itself a vector of listed entries")
    if p.dtype not in ARITHMETIC or not p.is_contiguous():
        raise ValueError(f"{where}: it must be contiguous float64, float32, bfloat16 or float16, got {p.dtype}")
    if not isinstance(index, torch.Tensor) or index.dtype not in INDEX_DTYPES or index.dim() != 1:
        raise ValueError(f"{where} must be a 1-D tensor, int32 or int64")
    if index.numel() and not (bool((index[1:] > index[:-1]).all()) and index[0] >= 0 and index[-1] < p.numel()):
        raise ValueError(f"{where} must be sorted, unique and in [0, {p.numel()})")


def _start(parts: list[_Part], group: dict[str, Any]) -> None:
    """Gives parameters at their first step a state; the moments of all of them lie side by side."""
    new = [part for part in parts if "step" not in part.state]
    if not new:
        return
    dtype, device = compute_dtype(new[0].weight.dtype), new[0].weight.device
    sizes = [part.indices.numel() for part in new]
    for part in new:
        part.state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    for name in _MOMENTS:
        moments = torch.zeros(sum(sizes), dtype=dtype, device=device).split(sizes)
        for part, moment in zip(new, moments, strict=True):
            part.state[name] = moment
    for part in new:
        if part.target is None:
            entries = part.weight.detach().view(-1)[part.indices].to(dtype)
            if dtype != part.weight.dtype:
                part.state["master"] = entries
            if group["decay"] == "deltas":
                part.state["base"] = entries.clone()


def _runs(parts: list[_Part], adjacent: bool) -> list[list[_Part]]:
    """Cuts the parts where the number of steps differs or (`adjacent`) where parameters do not lie side by side."""
    steps = [part.state["step"].item() for part in parts]
    if len(set(steps)) == 1 and not (adjacent and _joined_values(parts) is None):
        return [parts]
    runs = [parts[:1]]
    for part, steps_differ in zip(parts[1:], map(ne, steps, steps[1:]), strict=True):
        # Vectors may be empty: the last one that is not says where the run ends.
        last = next((p for p in reversed(runs[-1]) if p.parameter.numel()), part)
        if steps_differ or (adjacent and _joined_values([last, part]) is None):
            runs.append([])
        runs[-1].append(part)
    return runs


def _joined_values(parts: list[_Part]) -> torch.Tensor | None:
    return _joined([part.parameter for part in parts], getattr(parts[0].target, "values_arena", None))


def _joined(tensors: list[torch.Tensor], arena: torch.Tensor | None = None) -> torch.Tensor | None:
    """1-D tensors as one, without a copy; None unless each begins where the one before ends, in the memory of the arena
    or of the first one's storage."""
    full = [tensor for tensor in tensors if tensor.numel()]
    if not full:
        return tensors[0].detach()
    first = full[0]
    end = begin = first.data_ptr()
    for tensor in full:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    for memory in (first, arena):
        if memory is None or memory.dtype != first.dtype:
            continue
        storage = memory.untyped_storage()
        if storage.data_ptr() <= begin and end <= storage.data_ptr() + storage.nbytes():
            size = first.element_size()
            return memory.detach().as_strided(((end - begin) // size,), (1,), (begin - storage.data_ptr()) // size)
    return None  # allocations that happen to meet


def _lists(run: list[_Part]) -> torch.Tensor:
    """The lists of a run as one; those of attached vectors lie side by side."""
    if run[0].target is None:
        return _arena(run, "indices")
    lists = [part.indices for part in run]
    joined = _joined(lists, getattr(run[0].target, "indices_arena", None))
    return torch.cat(lists) if joined is None else joined


def _arena(run: list[_Part], name: str) -> torch.Tensor:
    """A state of all parts of a run as one tensor, of which each part's is then a view."""
    states = [part.state[name] for part in run]
    joined = _joined(states)
    if joined is None:
        joined = torch.cat(states)
        for part, view in zip(run, joined.split([state.numel() for state in states]), strict=True):
            part.state[name] = view
    return joined
