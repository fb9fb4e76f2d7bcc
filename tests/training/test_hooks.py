"""mask_gradients: any parameter of any module, through its dense gradient."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import shira

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone().view(BITS[t.element_size()]) for name, t in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    now = state(model)
    assert list(now) == list(expected)
    for name in expected:
        assert torch.equal(now[name], expected[name]), name


class Mixed(nn.Module):
    """Modules that attach does not know, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 8))
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lstm(x)[0] + self.position
        h = self.attention(h, h, h)[0]
        return self.head(self.up(h.transpose(1, 2)).transpose(1, 2))


TARGETS = ["position", "weight_ih_l0", "lstm.weight_hh_l0", "in_proj_weight", "out_proj", "up"]
NAMES = {
    "position": "shira_values_position",
    "lstm.weight_ih_l0": "lstm.shira_values_weight_ih_l0",
    "lstm.weight_hh_l0": "lstm.shira_values_weight_hh_l0",
    "attention.in_proj_weight": "attention.shira_values_in_proj_weight",
    "attention.out_proj.weight": "attention.out_proj.shira_values",
    "up.weight": "up.shira_values",
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def config(target_modules: list[str] | str = TARGETS, **fields: object) -> shira.ShiraConfig:
    return shira.ShiraConfig(target_modules, **{"mask": "rand", "density": 0.3, **fields})


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_any_parameter_is_trained_as_its_dense_gradient_says(backend: str | None) -> None:
    torch._dynamo.reset()
    dense = Mixed().double()
    model = copy.deepcopy(dense)
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    handle = shira.mask_gradients(model, config())
    assert dict(handle.named_parameters()).keys() == set(NAMES.values())
    assert all(
        values.numel() < 0.31 * dense.get_parameter(name).numel() + 1
        for name, values in zip(NAMES, handle.parameters(), strict=True)
    )
    run = model if backend is None else torch.compile(model, backend=backend)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    twins = {
        name: dense.get_parameter(name).detach().view(-1)[part.indices].clone().requires_grad_()
        for name, part in handle.adapter().items()
    }
    oracle = torch.optim.AdamW(twins.values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        dense.zero_grad()
        for part in x:  # gradients accumulate over two backwards
            run(part[None]).square().sum().backward()
            dense(part[None]).square().sum().backward()
            assert all(model.get_parameter(name).grad is None for name in NAMES)
        for name, part in handle.adapter().items():
            twins[name].grad = dense.get_parameter(name).grad.view(-1)[part.indices]
            got = model.get_parameter(NAMES[name]).grad
            torch.testing.assert_close(got, twins[name].grad, rtol=1e-9, atol=1e-12)
        optimizer.step()
        oracle.step()
        with torch.no_grad():
            for name, part in handle.adapter().items():
                dense.get_parameter(name).view(-1)[part.indices] = twins[name]
        torch.testing.assert_close(run(x), dense(x), rtol=1e-9, atol=1e-12)
    assert list(handle.adapter()) == list(NAMES)
    adapter = handle.adapter()
    handle.detach()
    assert_state(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model(x).sum().backward()
    assert model.position.grad is not None
    model.zero_grad()
    again = shira.mask_gradients(model, adapter)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-12)
    again.detach(keep=True)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-12)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def test_the_same_gradients_as_attach() -> None:
    model, x = mlp(), torch.randn(4, 6)
    twin = copy.deepcopy(model)
    handles = [shira.attach(model, config("all-linear")), shira.mask_gradients(twin, config("all-linear"))]
    for net in (model, twin):
        net(x).square().sum().backward()
    for a, b in zip(*(handle.parameters() for handle in handles), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_an_optimizer_of_all_parameters_leaves_the_dense_ones() -> None:
    model = mlp()
    before = state(model)
    handle = shira.mask_gradients(model, config(["0", "2"], modules_to_save=[]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    for name, part in handle.adapter().items():
        changed = (state(model)[name] != before[name]).view(-1).nonzero().view(-1)
        assert changed.numel()
        assert set(changed.tolist()) <= set(part.indices.tolist())
    assert torch.equal(model[0].bias.view(torch.int32), before["0.bias"])


def test_modules_to_save_clipping_and_scaler() -> None:
    model = mlp()
    handle = shira.mask_gradients(model, config(["0"], modules_to_save=["2"]))
    assert [name for name, _ in handle.named_parameters()] == ["0.shira_values", "2.weight", "2.bias"]
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(4, 6)
    scaler.scale(model(x).square().sum()).backward()
    scaled = model[0].shira_values.grad.clone()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model[0].shira_values.grad, scaled / 8)
    assert torch.nn.utils.clip_grad_norm_(handle.parameters(), 0.1) > 0.1
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(before, model[0].weight)


def test_copies_casts_and_checkpoints() -> None:
    model = mlp()
    handle = shira.mask_gradients(model, config("all-linear"))
    twin, twin_handle = copy.deepcopy((model, handle))
    x = torch.randn(4, 6)
    for net, its in ((model, handle), (twin, twin_handle)):
        optimizer = torch.optim.SGD(its.parameters(), lr=0.1)
        net(x).square().sum().backward()
        assert net[0].weight.grad is None
        optimizer.step()
    assert torch.equal(model(x), twin(x))
    values = model[0].shira_values.detach().clone()
    model.bfloat16()
    assert torch.equal(model[0].shira_values, values)
    model(x.bfloat16()).sum().backward()
    assert model[0].shira_values.grad.dtype == torch.float32
    for assign in (False, True):
        torch.manual_seed(0)
        fresh = mlp()
        shira.mask_gradients(fresh, config("all-linear"))
        fresh.load_state_dict(twin.state_dict(), assign=assign)
        assert torch.equal(fresh(x), twin(x))
        weight = fresh[0].weight.detach().clone()
        weight.view(-1)[fresh[0].shira_indices] = fresh[0].shira_base
        fresh.load_state_dict({"0.weight": weight}, strict=False, assign=assign)
        assert torch.equal(fresh(x), twin(x))
        fresh(x).sum().backward()
        assert fresh[0].weight.grad is None
        assert fresh[0].shira_values.grad is not None


def test_values_that_need_no_gradient_get_none() -> None:
    model = mlp()
    shira.mask_gradients(model, config("all-linear"))
    model[0].shira_values.requires_grad_(False)
    model(torch.randn(4, 6)).sum().backward()
    assert model[0].shira_values.grad is None
    assert model[0].weight.grad is None


def test_a_sparse_gradient() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    dense = copy.deepcopy(model)
    shira.mask_gradients(model, config(["0"]))
    tokens = torch.tensor([1, 1, 5, 0])
    for net in (model, dense):
        net(tokens).square().sum().backward()
    expected = dense[0].weight.grad.to_dense().view(-1)[model[0].shira_indices]
    torch.testing.assert_close(model[0].shira_values.grad, expected)


def test_changes_without_an_optimizer_are_written_before_a_forward() -> None:
    model = mlp()
    shira.mask_gradients(model, config("all-linear"))
    with torch.no_grad():
        model[0].shira_values.fill_(3.0)
    model(torch.randn(1, 6))
    assert (model[0].weight == 3).sum() == model[0].shira_values.numel()


def test_a_model_without_handle_is_freed() -> None:
    model = mlp()
    shira.mask_gradients(model, config("all-linear"))
    model(torch.randn(2, 6)).sum().backward()
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None


def shared() -> nn.Module:
    model = mlp()
    model[2].weight = nn.Parameter(torch.ones(5, 8, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "what", "message"),
    [
        (mlp, config(["nope"]), "matches no module or parameter"),
        (Mixed, config(["attention"]), "attention: MultiheadAttention has no parameter 'weight'"),
        (shared, config(["2"]), r"2\.weight: the weight must be float64"),
        (mlp, config(["0"], density=None, k=100), r"0\.weight: k must"),
        (mlp, config(["0"], modules_to_save=["0"]), "modules_to_save: '0'"),
        (mlp, {"target_modules": "all-linear"}, "ShiraConfig or an Adapter"),
        (lambda: nn.Sequential(nn.Linear(3, 3, device="meta")), config(["0"]), "meta device"),
    ],
)
def test_errors_leave_the_model_untouched(make: Callable, what: object, message: str) -> None:
    model = make()
    before = [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        shira.mask_gradients(model, what)
    assert [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()] == before


def test_twice() -> None:
    model = mlp()
    shira.attach(model, config(["0"]))
    with pytest.raises(RuntimeError, match="attached already"):
        shira.mask_gradients(model, config(["2"]))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    shira.mask_gradients(model, config("all-linear"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"\d\.weight: mask_gradients trains in one process only"):
        model(torch.randn(4, 6)).sum().backward()
