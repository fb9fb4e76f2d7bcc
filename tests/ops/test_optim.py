from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracle import bits, sorted_indices

import shira
import shira_kernels
from shira_kernels import ShiraAdamW, backends

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Target:
    """What attach gives a vector of values; the tests' own."""

    weight: torch.Tensor
    indices: torch.Tensor
    base: torch.Tensor
    written: list[torch.Tensor] = field(default_factory=list)

    def wrote(self, values: torch.Tensor) -> None:
        self.written.append(values)


def vectors(
    sizes: tuple[int, ...] = (300, 40, 700),
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    one_arena: bool = True,
) -> list[torch.nn.Parameter]:
    """Trained vectors of a model with a weight of each size, a third of it listed, in one arena as attach makes it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    lists = [sorted_indices(size, size // 3, index_dtype, size) for size in sizes]
    base = [weight[index.long()] for weight, index in zip(weights, lists, strict=True)]
    counts = [len(index) for index in lists]
    compute = torch.promote_types(dtype, torch.float32)
    if one_arena:
        lists = list(torch.cat(lists).split(counts))
        # `.data`: each vector counts its own versions.
        values = [part.data for part in torch.cat(base).to(compute, copy=True).split(counts)]
    else:
        values = [entries.to(compute, copy=True) for entries in base]
    parameters = [torch.nn.Parameter(part) for part in values]
    for parameter, weight, index, old in zip(parameters, weights, lists, base, strict=True):
        parameter.shira_target = Target(weight, index, old)
    return parameters


def give_gradients(parameters: list[torch.Tensor], seed: int, chance: float = 1.0) -> None:
    """The same gradients for the same seed; each parameter gets one by chance, else None."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.grad = grad if torch.rand((), generator=generator) < chance else None


def assert_written(parameters: list[torch.nn.Parameter]) -> None:
    """Weights hold the rounded values, and nothing else of them changed."""
    for parameter, before in zip(parameters, vectors_like(parameters), strict=True):
        target, index = parameter.shira_target, parameter.shira_target.indices.long()
        assert torch.equal(bits(target.weight[index]), bits(parameter.detach().to(target.weight.dtype)))
        rest = torch.ones(target.weight.numel(), dtype=torch.bool)
        rest[index] = False
        assert torch.equal(bits(target.weight[rest]), bits(before.shira_target.weight[rest]))


def vectors_like(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    sizes = tuple(parameter.shira_target.weight.numel() for parameter in parameters)
    return vectors(sizes, parameters[0].shira_target.weight.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("one_arena", [True, False])
def test_vectors_are_updated_and_written_as_one(dtype: torch.dtype, one_arena: bool) -> None:
    """Against torch.optim.AdamW on copies of the vectors."""
    ours, theirs = vectors(dtype=dtype, one_arena=one_arena), vectors(dtype=dtype)
    optimizer = ShiraAdamW(ours, lr=1e-2)
    reference = torch.optim.AdamW(theirs, lr=1e-2)
    before = backends.calls()
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        versions = [p._version for p in ours]
        optimizer.step()
        reference.step()
        assert all(p._version > old for p, old in zip(ours, versions, strict=True))
    assert sum((backends.calls() - before).values()) == 20 * (1 if one_arena else 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert [p is a for p in a.shira_target.written] == [True] * 20
    assert_written(ours)


def test_a_thousand_steps_are_torchs() -> None:
    ours, theirs = vectors((3000,)), vectors((3000,))
    goal = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    optimizer, reference = ShiraAdamW(ours, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3)
    for step in range(1000):
        noise = torch.rand(1000, generator=torch.Generator().manual_seed(step))
        for p in (*ours, *theirs):
            p.grad = (p.detach() - goal) * noise
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("one_arena", [True, False])
def test_vectors_without_a_gradient_are_skipped(one_arena: bool) -> None:
    """Each vector has its own number of steps; moments that no longer lie side by side are moved together."""
    ours, theirs = vectors(one_arena=one_arena), vectors()
    optimizer = ShiraAdamW(ours, lr=1e-2)
    reference = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(30):
        chance = 0.6 if step < 20 else 1.0
        give_gradients(ours, step, chance)
        give_gradients(theirs, step, chance)
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            assert ("step" in optimizer.state[a]) == ("step" in reference.state[b])
            if "step" in optimizer.state[a]:
                assert optimizer.state[a]["step"] == reference.state[b]["step"]
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert_written(ours)


def test_ordinary_parameters_are_torchs_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, dtypes = ((5, 7), (), (3, 2, 2), (11,)), (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator).to(d)) for s, d in zip(shapes, dtypes, strict=True)]
    theirs = copy.deepcopy(ours)
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "maximize": True}
    optimizer = ShiraAdamW([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.1}], **options)
    reference = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.1}], **options)
    for step in range(10):
        give_gradients(ours, step, 0.8)
        give_gradients(theirs, step, 0.8)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    loaded = ShiraAdamW([{"params": ours[:2]}, {"params": ours[2:]}])
    loaded.load_state_dict(reference.state_dict())
    assert loaded.param_groups[1]["lr"] == 0.1
    assert torch.equal(loaded.state[ours[0]]["exp_avg"], reference.state[theirs[0]]["exp_avg"])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_only_listed_entries_of_dense_parameters_move(dtype: torch.dtype, maximize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((30, 20), (7, 9), (50,))]
    before = [p.detach().clone() for p in ours]
    indices = {
        p: sorted_indices(p.numel(), p.numel() // 4, kind, p.numel())
        for p, kind in zip(ours, (torch.int32, torch.int64, torch.int32), strict=True)
    }
    compute = torch.promote_types(dtype, torch.float32)
    theirs = [torch.nn.Parameter(p.detach().view(-1)[indices[p].long()].to(compute)) for p in ours]
    optimizer = ShiraAdamW(ours, lr=1e-2, weight_decay=0.1, maximize=maximize, indices=indices)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, maximize=maximize)
    for step in range(10):
        give_gradients(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.view(-1)[indices[a].long()].to(compute)
        optimizer.step()
        reference.step()
        assert all(p.grad is None for p in ours), "dense gradients are released"
    for a, b, old in zip(ours, theirs, before, strict=True):
        state, index = optimizer.state[a], indices[a].long()
        assert state["exp_avg"].shape == index.shape
        assert state["exp_avg"].dtype == compute
        assert ("master" in state) == (compute != dtype)
        torch.testing.assert_close(state.get("master", a.detach().view(-1)[index]), b.detach(), rtol=1e-5, atol=1e-6)
        assert ("master" in state) == (dtype in (torch.bfloat16, torch.float16))
        if "master" in state:
            assert torch.equal(a.detach().view(-1)[index], state["master"].to(dtype))
        rest = torch.ones(a.numel(), dtype=torch.bool)
        rest[index] = False
        assert torch.equal(bits(a.detach().view(-1)[rest]), bits(old.view(-1)[rest]))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decay_on_deltas_pulls_towards_the_base(dtype: torch.dtype, listed: bool) -> None:
    lr, decay = 0.1, 0.5
    if listed:
        p = torch.nn.Parameter(torch.randn(30, generator=torch.Generator().manual_seed(0)).to(dtype))
        index = sorted_indices(30, 10)
        base = p.detach()[index].float()
        optimizer = ShiraAdamW([p], lr=lr, weight_decay=decay, decay="deltas", indices={p: index})
    else:
        (p,) = vectors((30,), dtype)
        index, base = slice(None), p.detach().clone()
        optimizer = ShiraAdamW([p], lr=lr, weight_decay=decay, decay="deltas")
    expected = torch.nn.Parameter(base.clone())
    reference = torch.optim.AdamW([expected], lr=lr, weight_decay=0.0)
    for step in range(8):
        p.grad = (torch.ones_like(p) if step < 4 else torch.zeros_like(p)).mul_(1e-6 if step == 4 else 1)
        expected.grad = p.grad[index].float()
        with torch.no_grad():
            expected.lerp_(base, lr * decay)
        optimizer.step()
        reference.step()
    true = optimizer.state[p].get("master", p.detach()[index])
    torch.testing.assert_close(true, expected.detach(), rtol=1e-5, atol=1e-6)
    if not listed:
        assert_written([p])


class Model:
    """All three kinds of parameters, and what is needed to go on: weights, values and the optimizer's state."""

    def __init__(self, dtype: torch.dtype, decay: str = "weights") -> None:
        generator = torch.Generator().manual_seed(5)
        self.vectors = vectors(dtype=dtype)
        self.head = torch.nn.Parameter(torch.randn(4, 6, generator=generator).to(dtype))
        self.dense = [torch.nn.Parameter(torch.randn(20, 10, generator=generator).to(dtype)) for _ in range(2)]
        lists = {p: sorted_indices(200, 30, torch.int32, i) for i, p in enumerate(self.dense)}
        groups = [{"params": [*self.vectors, self.head]}, {"params": self.dense, "lr": 0.02, "indices": lists}]
        self.optimizer = ShiraAdamW(groups, lr=1e-2, decay=decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.parameters = [*self.vectors, self.head, *self.dense]

    def train(self, steps: range) -> None:
        for step in steps:
            give_gradients(self.parameters, step, 0.8)
            self.optimizer.step()
            self.schedule.step()

    def tensors(self) -> list[torch.Tensor]:
        return [*(p.detach() for p in self.parameters), *(p.shira_target.weight for p in self.vectors)]


@pytest.mark.parametrize("decay", ["weights", "deltas"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_resumes_to_the_same_bits(dtype: torch.dtype, decay: str) -> None:
    straight, first, second = Model(dtype, decay), Model(dtype, decay), Model(dtype, decay)
    straight.train(range(20))
    first.train(range(10))
    file = io.BytesIO()
    torch.save(
        {
            "model": [tensor.clone() for tensor in first.tensors()],
            "optimizer": copy.deepcopy(first.optimizer.state_dict()),
            "schedule": first.schedule.state_dict(),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for tensor, value in zip(second.tensors(), saved["model"], strict=True):
        tensor.copy_(value)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.schedule.load_state_dict(saved["schedule"])
    for a, b in zip(first.parameters, second.parameters, strict=True):
        for (name, x), (other, y) in itertools.zip_longest(
            sorted(first.optimizer.state[a].items()), sorted(second.optimizer.state[b].items())
        ):
            assert name == other
            assert x.dtype == y.dtype
            assert torch.equal(bits(x), bits(y))
            assert name == "indices" or x.data_ptr() != y.data_ptr()
    second.train(range(10, 20))
    for a, b in zip(straight.tensors(), second.tensors(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_options_of_a_group_hooks_closures_and_schedulers() -> None:
    a, b = vectors((300, 40))
    optimizer = ShiraAdamW([{"params": [a], "lr": 0.0, "weight_decay": 0.0}], lr=1e-1)
    optimizer.add_param_group({"params": [b]})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    before = a.detach().clone(), b.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before[0].square().sum() + before[1].square().sum()
    assert seen == ["before", "after"]
    assert torch.equal(a, before[0])
    assert not torch.equal(b, before[1])
    schedule.step()
    after = b.detach().clone()
    optimizer.step(closure)
    assert torch.equal(b, after)
    optimizer.zero_grad()
    assert a.grad is b.grad is None


def test_clipping_and_gradient_scaling() -> None:
    ours, theirs = vectors(), vectors()
    optimizers = ShiraAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in optimizers]
    for step in range(6):
        for parameters, optimizer, scaler in zip((ours, theirs), optimizers, scalers, strict=True):
            give_gradients(parameters, step)
            for p in parameters:
                p.grad *= scaler.scale(torch.ones(()))
            if step == 3:
                parameters[1].grad[2] = torch.inf
            before = [p.detach().clone() for p in parameters]
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
            skipped = all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
            assert skipped == (step == 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert_written(ours)


def test_values_that_moved_in_memory_are_still_written() -> None:
    ours, theirs = vectors(), vectors()
    optimizer, reference = ShiraAdamW(ours), ShiraAdamW(theirs)
    for step in range(6):
        if step == 3:
            for p in ours:
                p.data = p.data.clone()
                p.shira_target.indices = p.shira_target.indices.clone()
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert_written(ours)
    lonely = copy.deepcopy(ours[0])
    assert not hasattr(lonely, "shira_target")
    lonely.grad = torch.ones_like(lonely)
    ShiraAdamW([lonely]).step()


def test_lists_that_are_not_side_by_side_are_joined_and_follow_a_change() -> None:
    ours = vectors()
    for p in ours:
        p.shira_target.indices = p.shira_target.indices.clone()
    optimizer = ShiraAdamW(ours)
    for step in range(3):
        give_gradients(ours, step)
        optimizer.step()
    assert_written(ours)
    for p in ours:
        p.shira_target.indices = p.shira_target.indices - p.shira_target.indices[0]  # others, as a new mask would be
    give_gradients(ours, 4)
    optimizer.step()
    for p in ours:
        assert torch.equal(p.shira_target.weight[p.shira_target.indices.long()], p.detach())


def test_empty_vectors_and_no_gradients() -> None:
    ours = vectors((300, 2, 700))
    assert ours[1].numel() == 0
    optimizer = ShiraAdamW(ours)
    optimizer.step()
    assert all(not state for state in optimizer.state.values())
    give_gradients(ours, 0)
    before = backends.calls()
    optimizer.step()
    assert sum((backends.calls() - before).values()) == 1
    assert_written(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number and not negative, got -1.0"),
        ({"lr": float("nan")}, "lr must be a finite"),
        ({"eps": -1e-8}, "eps must be a finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in"),
        ({"betas": (0.9,)}, "betas must be two numbers in"),
        ({"decay": "both"}, "decay must be one of weights, deltas, got 'both'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiraAdamW(vectors(), **options)
    optimizer = ShiraAdamW(vectors())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": vectors(), **options})
    assert len(optimizer.param_groups) == 1


def test_bad_parameters_and_lists() -> None:
    p, other = torch.nn.Parameter(torch.zeros(4, 5)), torch.nn.Parameter(torch.zeros(3))
    turned = torch.nn.Parameter(torch.zeros(4, 5).t())
    vector = vectors((30,))[0]
    good = torch.tensor([1, 5])
    for params, indices, message in (
        ([p], {other: good}, r"indices: a tensor of shape \(3,\) is not among the parameters"),
        ([p], {p: torch.tensor([5, 1])}, r"shape \(4, 5\) must be sorted, unique and in \[0, 20\)"),
        ([p], {p: torch.tensor([5, 5])}, "must be sorted, unique"),
        ([p], {p: torch.tensor([5, 20])}, "must be sorted, unique"),
        ([p], {p: torch.tensor([-1, 5])}, "must be sorted, unique"),
        ([p], {p: torch.tensor([1.0])}, "must be a 1-D tensor, int32 or int64"),
        ([p], {p: good.view(1, 2)}, "must be a 1-D tensor"),
        ([turned], {turned: good}, "must be contiguous"),
        ([vector], {vector: good}, "is itself a vector of listed entries"),
    ):
        with pytest.raises(ValueError, match=message):
            ShiraAdamW(params, indices=indices)
        with pytest.raises(ValueError, match=message.replace("the parameters", ".*")):
            ShiraAdamW([{"params": params, "indices": indices}])
    with pytest.raises(ValueError, match=r"params must be real, got torch\.complex64"):
        ShiraAdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    sparse = torch.nn.Parameter(torch.zeros(3))
    sparse.grad = torch.zeros(3).to_sparse()
    give_gradients([vector], 0)
    before = vector.detach().clone()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        ShiraAdamW([vector, sparse]).step()
    assert torch.equal(vector, before)


def foreign_states() -> dict[str, tuple[Any, str]]:
    """name -> (what is done to a good state dict, what the error says)"""

    def momentum(state: dict) -> dict:
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.ones(3)
        optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.9)
        optimizer.step()
        return {
            **state,
            "param_groups": [{**optimizer.param_groups[0], "params": g["params"]} for g in state["param_groups"]],
        }

    def changed(key: int, name: str, value: Any) -> Any:
        def change(state: dict) -> dict:
            entry = {k: v for k, v in state["state"][key].items() if k != name}
            return {**state, "state": {**state["state"], key: entry if value is None else {**entry, name: value}}}

        return change

    return {
        "no groups": (lambda state: {"state": state["state"]}, "param_groups or state is missing"),
        "fewer groups": (lambda s: {**s, "param_groups": s["param_groups"][:1]}, "other parameter groups"),
        "SGD's groups": (momentum, "group 0 has no valid options of AdamW: 'eps'"),
        "amsgrad": (
            lambda s: {**s, "param_groups": [{**g, "amsgrad": True} for g in s["param_groups"]]},
            "group 0 has amsgrad",
        ),
        "another length": (changed(0, "exp_avg", torch.zeros(7)), r"0 of group 0: exp_avg must have shape \(100,\)"),
        "another shape": (changed(3, "exp_avg_sq", torch.zeros(6, 4)), r"3 of group 0: exp_avg_sq must have shape"),
        "no second moment": (changed(1, "exp_avg_sq", None), "1 of group 0: must hold exp_avg, exp_avg_sq, step, got"),
        "a momentum": (changed(1, "momentum_buffer", torch.zeros(13)), "must hold .*, got .*momentum_buffer"),
        "no step": (changed(2, "step", None), "2 of group 0: must hold"),
        "step is a vector": (changed(2, "step", torch.zeros(2)), r"step must have shape \(\)"),
        "a number": (changed(2, "exp_avg", 1.0), "exp_avg must be a tensor, got float"),
        "integers": (changed(0, "exp_avg", torch.zeros(100, dtype=torch.int32)), "exp_avg must be floating point"),
        "other indices": (changed(4, "indices", torch.arange(30)), "0 of group 1: was saved with other indices"),
        "no indices": (changed(4, "indices", None), "was saved with other indices"),
        "listed there only": (changed(0, "indices", torch.arange(100)), "is listed with none here"),
        "no master": (changed(5, "master", None), "1 of group 1: must hold exp_avg, exp_avg_sq, master, step"),
    }


@pytest.mark.parametrize("case", foreign_states())
def test_a_foreign_state_is_refused_and_changes_nothing(case: str) -> None:
    source, model = Model(torch.bfloat16), Model(torch.bfloat16)
    for one, seed in ((source, 0), (model, 1)):
        give_gradients(one.parameters, seed)
        one.optimizer.step()
    change, message = foreign_states()[case]
    before = copy.deepcopy(model.optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        model.optimizer.load_state_dict(change(source.optimizer.state_dict()))
    assert "\n" not in str(error.value)
    after = model.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())
    assert not model.optimizer._optimizer_load_state_dict_pre_hooks
    assert not model.optimizer._optimizer_load_state_dict_post_hooks


def test_it_is_one_class() -> None:
    assert shira.ShiraAdamW is shira_kernels.ShiraAdamW


def test_an_empty_vector_between_others_does_not_join_them() -> None:
    ours = vectors()
    empty = torch.nn.Parameter(torch.empty(0))
    empty.shira_target = Target(torch.ones(3), torch.empty(0, dtype=torch.int32), torch.empty(0))
    optimizer = ShiraAdamW([{"params": [ours[0], empty, ours[2]]}, {"params": [ours[1]]}])
    before = [p.detach().clone() for p in ours]
    give_gradients(ours, 0)
    empty.grad = torch.empty(0)
    optimizer.step()
    assert_written(ours)
    assert all(not torch.equal(p, old) for p, old in zip(ours, before, strict=True))


def test_lists_are_copies_and_are_given_once() -> None:
    p, index = torch.nn.Parameter(torch.zeros(8)), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="given twice"):
        ShiraAdamW([{"params": [p], "indices": {p: index}}], indices={p: index})
    optimizer = ShiraAdamW([p], indices={p: index})
    index += 5
    p.grad = torch.ones(8)
    optimizer.step()
    assert p.nonzero().view(-1).tolist() == [1, 2]


def test_decay_on_deltas_needs_the_base_from_the_first_step_on() -> None:
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = ShiraAdamW([p], indices={p: torch.tensor([1, 2])})
    p.grad = torch.ones(8)
    optimizer.step()
    optimizer.param_groups[0]["decay"] = "deltas"
    p.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"lr": "x"}, "lr must be a finite"),
        ({"eps": None}, "eps must be"),
    ],
)
def test_options_of_wrong_types(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiraAdamW([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("state", [None, {}, {"param_groups": [1], "state": {}}, {"param_groups": [{}], "state": {}}])
def test_what_is_no_state_dict(state: object) -> None:
    with pytest.raises(ValueError, match="state_dict"):
        ShiraAdamW([torch.nn.Parameter(torch.ones(2))]).load_state_dict(state)
