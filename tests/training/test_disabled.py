"""`Handle.disabled`: the base bit for bit inside the block, and everything as it was behind it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shira

ATTACH = pytest.mark.parametrize("attach", [shira.attach, shira.mask_gradients])


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm = nn.Embedding(12, 8), nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.conv, self.down, self.head = nn.Conv1d(16, 16, 1), nn.Linear(16, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(self.embed(ids))).relu()
        return self.head(self.down(self.conv(x[..., None])[..., 0]))


CONFIG = shira.ShiraConfig(["embed", "up", "conv", "down"], density=0.2)
IDS = torch.arange(12)


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(IDS).float(), (IDS * 5 + 1) % 12)


def trained(
    attach: Callable = shira.attach, dtype: torch.dtype = torch.float32
) -> tuple[Network, shira.Handle, torch.optim.Optimizer]:
    model = Network(dtype)
    handle = attach(model, CONFIG)
    optimizer = shira.ShiraAdamW(handle.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model, handle, optimizer


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@ATTACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_is_the_base_and_behind_it_is_what_was(attach: Callable, dtype: torch.dtype) -> None:
    model, handle, _ = trained(attach, dtype)
    base, before = Network(dtype), contents(model)
    versions = {name: tensor._version for name, tensor in model.named_parameters()}
    with handle.disabled():
        assert_equal({n: t.detach() for n, t in model.named_parameters() if "shira" not in n}, contents_of(base))
        assert torch.equal(model.norm.running_mean, base.norm.running_mean)
        for mode in (False, True):
            output = model.train(mode)(IDS)
            with torch.no_grad():
                assert torch.equal(output, base.train(mode)(IDS))
            assert not output.requires_grad
        with handle.disabled():
            model(IDS)
        assert torch.equal(model.up.weight, base.up.weight)
    assert_equal(contents(model), before)
    assert {name: tensor._version for name, tensor in model.named_parameters()} == versions
    assert torch.is_grad_enabled()


def contents_of(base: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in base.named_parameters()}


@ATTACH
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_loss_from_before_the_block_is_backpropagated_after_it(attach: Callable, reentrant: bool | None) -> None:
    def gradients(with_block: bool) -> list[torch.Tensor]:
        model, handle, _ = trained(attach)
        start = model.embed(IDS)
        x = model.up(start) if reentrant is None else checkpoint(model.up, start, use_reentrant=reentrant)
        loss = model.head(model.down(model.conv(model.norm(x)[..., None])[..., 0])).square().mean()
        if with_block:
            with handle.disabled():
                model(IDS)
        for values in handle.parameters():
            values.grad = None
        loss.backward()
        return [values.grad for values in handle.parameters()]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, expected)


def test_a_preference_loss_equals_that_of_a_copied_reference() -> None:
    def run(copied: bool) -> tuple[list[torch.Tensor], Network, shira.Handle]:
        model = Network()
        reference = copy.deepcopy(model)
        handle = shira.attach(model, CONFIG)
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
        for _ in range(4):
            policy = model(IDS).log_softmax(-1)
            if copied:
                with torch.no_grad():
                    base = reference(IDS).log_softmax(-1)
            else:
                with handle.disabled():
                    base = model(IDS).log_softmax(-1)
            margin = (policy - base)[:, 0] - (policy - base)[:, 1]
            optimizer.zero_grad()
            (-nn.functional.logsigmoid(margin)).mean().backward()
            optimizer.step()
        return [values.detach() for values in handle.parameters()], model, handle

    expected, *_ = run(True)
    got, model, handle = run(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    handle.detach()
    assert_equal(dict(model.state_dict()), dict(Network().state_dict()))


@ATTACH
def test_a_backward_inside_of_a_graph_from_outside_is_refused(attach: Callable) -> None:
    model, handle, _ = trained(attach)
    loss = loss_of(model)
    with handle.disabled(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CALLS: dict[str, Callable] = {
    "step": lambda model, handle, optimizer: optimizer.step(),
    "adapter": lambda model, handle, optimizer: handle.adapter(),
    "write_back": lambda model, handle, optimizer: handle.write_back(),
    "detach": lambda model, handle, optimizer: handle.detach(),
    "state_dict": lambda model, handle, optimizer: model.state_dict(),
    "deepcopy": lambda model, handle, optimizer: copy.deepcopy(model),
    "pickle": lambda model, handle, optimizer: pickle.dumps(model.up),
    "grad": lambda model, handle, optimizer: torch.enable_grad()(model)(IDS),
}


@ATTACH
@pytest.mark.parametrize("call", CALLS)
def test_other_calls_are_refused_inside(attach: Callable, call: str) -> None:
    model, handle, optimizer = trained(attach)
    before = contents(model)
    with handle.disabled(), pytest.raises(RuntimeError, match=r"inside handle\.disabled\(\)"):
        CALLS[call](model, handle, optimizer)
    assert_equal(contents(model), before)
    CALLS[call](model, handle, optimizer)


def test_loading_is_refused_inside() -> None:
    model, handle, _ = trained()
    state, before = model.state_dict(), contents(model)
    with handle.disabled(), pytest.raises(RuntimeError, match=r"inside handle\.disabled\(\)"):
        model.load_state_dict(state)
    assert_equal(contents(model), before)


def test_an_error_inside_leaves_everything_as_it_was() -> None:
    model, handle, _ = trained()
    before = contents(model)
    with pytest.raises(KeyboardInterrupt), handle.disabled():
        raise KeyboardInterrupt
    assert_equal(contents(model), before)
    handle.adapter()


def test_values_and_a_dtype_that_changed_inside_are_written_behind_it() -> None:
    model, handle, _ = trained()
    loss = loss_of(model)
    with handle.disabled():
        for values in handle.parameters():
            values.data.add_(1.0)
    name, tensor = next(iter(handle.adapter().items()))
    assert name == "embed.weight"
    assert torch.equal(tensor.values, next(handle.parameters()).detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    model, handle, _ = trained()
    expected = copy.deepcopy(model).half()(IDS)
    with handle.disabled():
        model.half()
        assert torch.equal(model(IDS), Network().half()(IDS))
    assert torch.equal(copy.deepcopy(model)(IDS), expected)


def test_the_base_is_the_one_under_an_adapter_that_training_started_from() -> None:
    model, handle, _ = trained()
    adapter = handle.adapter()
    model = Network()
    handle = shira.attach(model, adapter)
    assert not torch.equal(model.up.weight, Network().up.weight)
    with handle.disabled():
        assert torch.equal(model.up.weight, Network().up.weight)
        assert torch.equal(model.norm.running_mean, Network().norm.running_mean)
    assert torch.equal(model.up.weight.detach().view(-1)[model.up.shira_indices], adapter["up.weight"].values)


def test_values_that_were_changed_unseen_count() -> None:
    model, handle, _ = trained()
    values = next(handle.parameters())
    values.detach().numpy()[:] += 1.0
    with handle.disabled():
        pass
    assert torch.equal(model.embed.weight.detach().view(-1)[model.embed.shira_indices], values.detach())


@ATTACH
def test_autocast_keeps_no_rounded_weights_over_the_edges_of_the_block(attach: Callable) -> None:
    model, handle, _ = trained(attach)
    model.eval()

    def output() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(IDS).detach()

    with handle.disabled():
        base = output()
    tuned = output()
    assert not torch.equal(base, tuned)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(IDS)
        with handle.disabled():
            inside = model(IDS)
        behind = model(IDS)
    assert torch.equal(before, tuned)
    assert torch.equal(inside, base)
    assert torch.equal(behind, tuned)


def test_a_detached_handle_is_refused() -> None:
    _, handle, _ = trained()
    handle.detach()
    with pytest.raises(RuntimeError, match="detached"), handle.disabled():
        pass
