"""attach: gradients, what changes, what comes back, and errors that leave the model as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from models import mlp, tiny_llama
from torch import nn
from torch.nn import functional as F

import shira
from shira.masks.choose import tensor_seed

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(BITS[tensor.element_size()])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    now = state(model)
    assert list(now) == list(expected)
    for name in expected:
        assert torch.equal(now[name], expected[name]), name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def train(model: nn.Module, handle: shira.Handle, steps: int = 4, optimizer: type = torch.optim.AdamW) -> None:
    stepper = optimizer(handle.parameters(), lr=0.05)
    x = torch.randn(7, 6)
    for _ in range(steps):
        stepper.zero_grad()
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        stepper.step()


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 3, 6), (0, 6), (2, 2, 2, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_gradient_is_the_dense_one_at_the_entries(shape: tuple[int, ...], bias: bool, needs_grad: bool) -> None:
    dense = mlp(torch.float64, bias)
    model = copy.deepcopy(dense)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=needs_grad)
    expected_x = x.detach().clone().requires_grad_(needs_grad)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.4))
    y, expected = model(x), dense(expected_x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for layer, original in ((model[0], dense[0]), (model[2], dense[2])):
        got = layer.shira_values.grad
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, original.weight.grad.view(-1)[layer.shira_indices], rtol=1e-12, atol=1e-14)
        assert layer.weight.grad is None
    if needs_grad:
        torch.testing.assert_close(x.grad, expected_x.grad)
    assert {name for name, _ in handle.named_parameters()} == {"0.shira_values", "2.shira_values"}


def test_gradcheck() -> None:
    layer = nn.Linear(4, 3).double()
    shira.attach(nn.Sequential(layer), shira.ShiraConfig("all-linear", density=0.5))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(values: torch.Tensor) -> torch.Tensor:
        layer.shira_targets[
            "weight"
        ]._marker = None  # gradcheck changes values in place and hides it from their version
        return torch.func.functional_call(layer, {"shira_values": values}, (x.detach(),))

    assert torch.autograd.gradcheck(run, layer.shira_values.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(layer, x)


def test_values_that_need_no_gradient_get_none() -> None:
    model = mlp()
    shira.attach(model, shira.ShiraConfig("all-linear", density=0.3))
    model[0].shira_values.requires_grad_(False)
    model(torch.randn(3, 6)).sum().backward()
    assert model[0].shira_values.grad is None
    assert model[2].shira_values.grad is not None
    with torch.no_grad():
        assert not model(torch.randn(3, 6)).requires_grad


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_only_the_entries_change_and_detach_gives_them_back(optimizer: type, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    before = state(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.2))
    assert all(p.dtype == torch.promote_types(dtype, torch.float32) for p in handle.parameters())
    train(model, handle, optimizer=optimizer)
    adapter = handle.adapter()
    for name in ("0.weight", "2.weight"):
        now = bits(model.get_parameter(name)).view(-1)
        changed = (now != before[name].view(-1)).nonzero().view(-1)
        assert changed.numel()
        assert set(changed.tolist()) <= set(adapter[name].indices.tolist())
        assert torch.equal(bits(adapter[name].values), now[adapter[name].indices.long()])
    assert torch.equal(bits(model[0].bias), before["0.bias"])
    handle.detach()
    assert_state(model, before)
    assert type(model[0]) is nn.Linear
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert "shira" not in repr(model).lower()
    assert not any("shira" in name for name in vars(model[0]))


def test_keep_leaves_the_tuned_weights() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.2))
    train(model, handle)
    adapter = handle.adapter()
    x = torch.randn(3, 6)
    expected = model(x).detach()
    # A step whose result no forward has written yet.
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(1.0)
    handle.detach(keep=True)
    assert torch.equal(model(x), expected)
    for name, part in adapter.items():
        assert torch.equal(model.get_parameter(name).view(-1)[part.indices], part.values)


READERS: dict[str, Callable[[nn.Module, shira.Handle], object]] = {
    "adapter": lambda model, handle: handle.adapter(),
    "state_dict": lambda model, handle: model.state_dict(),
    "write_back": lambda model, handle: handle.write_back(),
    "detach": lambda model, handle: handle.detach(keep=True),
    "forward": lambda model, handle: model(torch.zeros(1, 6)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_the_last_step_reaches_the_weights(read: Callable[[nn.Module, shira.Handle], object]) -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.2))
    train(model, handle)
    with torch.no_grad():
        model[0].shira_values.add_(1.0)  # a step of which no optimizer tells
    indices, values = model[0].shira_indices, model[0].shira_values.detach().clone()
    assert not torch.equal(model[0].weight.view(-1)[indices], values)
    read(model, handle)
    assert torch.equal(model[0].weight.view(-1)[indices], values)


def test_detach_gives_nan_payloads_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    pattern = torch.arange(16, dtype=torch.int32) + 0x7F800001
    with torch.no_grad():
        model[0].weight.view(-1).view(torch.int32).copy_(pattern)
    before = state(model)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=1.0))
    assert_state(nn.Sequential(copy.deepcopy(model[0])), {**before, **state(model)})
    with torch.no_grad():
        next(handle.parameters()).fill_(1.0)
    handle.write_back()
    assert (model[0].weight == 1).all()
    handle.detach()
    assert_state(model, before)


def test_tiny_updates_of_bf16_weights_add_up() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.25))
    optimizer = torch.optim.SGD(handle.parameters(), lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    # Each step is 1e-4, far below bfloat16's 2^-8 under 1; a hundred of them are 0.01.
    adapter = handle.adapter()["0.weight"]
    assert adapter.dtype == torch.bfloat16
    assert torch.equal(adapter.values, torch.full((4,), 0.99).to(torch.bfloat16))


def test_autocast() -> None:
    dense, x = mlp(), torch.randn(5, 6)
    model = copy.deepcopy(dense)
    shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.5))
    for net in (dense, model):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    for i in (0, 2):
        got, expected = model[i].shira_values.grad, dense[i].weight.grad.view(-1)[model[i].shira_indices]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_gradients_accumulate() -> None:
    model, x = mlp(torch.float64), torch.randn(4, 6, dtype=torch.float64)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    model(x).square().sum().backward()
    whole = [p.grad.clone() for p in handle.parameters()]
    for parameter in handle.parameters():
        parameter.grad = None
    # Both forwards before both backwards: no write may come between.
    losses = [model(part).square().sum() for part in x.chunk(2)]
    for loss in losses:
        loss.backward()
    for parameter, expected in zip(handle.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_backwards_that_interleave_with_forwards_without_a_step() -> None:
    model = mlp()
    shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    x = torch.randn(4, 6, requires_grad=True)
    first, second = model(x).sum(), model(x).sum()
    first.backward()
    model(x)  # as a pipeline does; the values are as they were, so the weight that `second` needs must not be written
    second.backward()


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (True, False):
        plain = mlp()
        model = copy.deepcopy(plain)
        x = torch.randn(4, 6, requires_grad=True)
        for net in (plain, model):
            shira.attach(net, shira.ShiraConfig("all-linear", density=0.5))
        plain(x).square().sum().backward()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(plain[0].shira_values.grad, model[0].shira_values.grad)


def test_optimizers_that_write_through_data_are_noticed() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        for parameter in handle.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.1)  # leaves the version counter as it is
    model(torch.randn(4, 6))
    assert torch.equal(model[0].weight.view(-1)[model[0].shira_indices], model[0].shira_values)


def test_compiled() -> None:
    losses = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="aot_eager")):
        torch.manual_seed(0)
        model = mlp()
        run = wrap(model)
        handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        x = torch.randn(4, 6)
        for _ in range(3):
            optimizer.zero_grad()
            loss = run(x).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:])
    assert losses[0] > losses[2]


class Reused(nn.Module):
    """What a traced forward has to follow: a layer called twice, without gradients in between, and read by others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.embedding(tokens), inplace=True).mT
        with torch.no_grad():
            plain = self.conv(x)
        return self.conv(x) + self.conv(2 * x) + plain * self.conv.weight.sum()


def test_a_compiled_layer_is_used_in_several_ways() -> None:
    torch._dynamo.reset()
    model = Reused()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    config = shira.ShiraConfig(["embedding", "conv"], density=0.5)
    tokens = torch.tensor([[3, 1, 0, 3, 6]])
    results = []
    for run, net in ((model, model), (compiled, twin)):
        handle = shira.attach(net, config)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            output = run(tokens)
            output.square().sum().backward()
            optimizer.step()
        results.append((output, run(tokens), *handle.parameters()))
        assert isinstance(net.conv.weight, nn.Parameter)
        handle.detach()
        assert isinstance(net.conv.weight, nn.Parameter)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][1])


def test_a_deep_copy_is_independent() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle)  # the last step is not written yet
    twin, twin_handle = copy.deepcopy((model, handle))
    x = torch.randn(3, 6)
    expected = model(x).detach()
    assert torch.equal(twin(x), expected)
    train(twin, twin_handle)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    base = {id(m): state(m) for m in (model,)}
    twin_handle.detach()
    assert_state(model, base[id(model)])
    handle.detach()
    assert_state(twin, state(model))


def test_training_resumes_from_a_state_dict() -> None:
    model = mlp()
    fresh = copy.deepcopy(model)
    base = state(model)
    config = shira.ShiraConfig("all-linear", density=0.5)
    handle = shira.attach(model, config)
    train(model, handle)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert saved["0.shira_indices"].dtype == torch.int32
    assert torch.equal(saved["0.shira_base"], fresh[0].weight.view(-1)[saved["0.shira_indices"]])
    for assign in (False, True):
        again = copy.deepcopy(fresh)
        resumed = shira.attach(again, config)
        again.load_state_dict(saved, assign=assign)
        x = torch.randn(3, 6)
        assert torch.equal(again(x), model(x))
        assert torch.equal(resumed.adapter()["0.weight"].values, handle.adapter()["0.weight"].values)
        resumed.detach()
        assert_state(again, base)


def test_a_base_that_is_loaded_under_the_values_is_overwritten_again() -> None:
    model = mlp()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle)
    x = torch.randn(3, 6)
    expected = model(x).detach()
    model.load_state_dict(base, strict=False)
    assert torch.equal(model(x), expected)


def test_a_state_dict_with_other_entries_is_refused() -> None:
    model, other = mlp(), mlp()
    shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.5))
    shira.attach(other, shira.ShiraConfig("all-linear", mask="rand", density=0.5, seed=1))
    before = model[0].shira_values.detach().clone()
    with pytest.raises(RuntimeError, match="other entries"):
        model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].shira_values, before)


def test_casting_the_model_leaves_values_and_indices() -> None:
    model = mlp()
    before = state(copy.deepcopy(model).to(torch.bfloat16))
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle)
    values = model[0].shira_values.detach().clone()
    model.to(torch.bfloat16)
    assert model[0].shira_indices.dtype == torch.int32
    assert torch.equal(model[0].shira_values, values)
    assert model(torch.zeros(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(handle.adapter()["0.weight"].values, values.to(torch.bfloat16))
    model.float()
    assert torch.equal(handle.adapter()["0.weight"].values, values)
    model.bfloat16()
    handle.detach()
    assert_state(model, before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


@pytest.mark.parametrize("target_modules", [["first", "second"], ["first"], ["second"]])
def test_layers_that_share_a_weight_share_the_values(target_modules: list[str]) -> None:
    dense = Tied().double()
    model = copy.deepcopy(dense)
    before = state(model)
    x = torch.randn(4, 5, dtype=torch.float64)
    handle = shira.attach(model, shira.ShiraConfig(target_modules, density=0.4))
    assert [name for name, _ in handle.named_parameters()] == ["first.shira_values"]
    assert [name for name in model.state_dict() if "shira" in name] == [
        "first.shira_values",
        "first.shira_indices",
        "first.shira_base",
    ]
    for net in (dense, model):
        net(x).square().sum().backward()
    expected = dense.first.weight.grad.view(-1)[model.first.shira_indices]
    torch.testing.assert_close(model.first.shira_values.grad, expected)
    torch.optim.SGD(handle.parameters(), lr=0.1).step()
    copy.deepcopy(model)(x)
    assert list(handle.adapter()) == ["first.weight"]
    handle.detach()
    assert_state(model, before)
    assert model.first.weight is model.second.weight


def test_an_adapter_goes_on_training() -> None:
    model = mlp()
    base = state(model)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle)
    adapter = handle.adapter()
    x = torch.randn(3, 6)
    expected = model(x).detach()
    handle.detach()
    again = shira.attach(model, adapter)
    assert torch.equal(model(x), expected)
    assert again.adapter().config == adapter.config
    assert again.adapter()["0.weight"].checksum == adapter["0.weight"].checksum
    train(model, again)
    assert not torch.equal(model(x), expected)
    assert torch.equal(adapter["0.weight"].indices, again.adapter()["0.weight"].indices)
    again.detach()
    assert_state(model, base)


def test_an_additive_adapter_without_checksum_warns() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    weight = model[0].weight.detach().clone()
    delta = shira.AdapterTensor(torch.tensor([2, 7]), torch.tensor([1.0, -1.0]), (3, 3), torch.float32, "add")
    with pytest.warns(UserWarning, match="no checksum"):
        handle = shira.attach(model, shira.Adapter({"0.weight": delta}))
    weight.view(-1)[[2, 7]] += delta.values
    assert torch.equal(model[0].weight, weight)
    assert handle.adapter()["0.weight"].kind == "replace"


def test_the_adapter_is_a_copy() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    adapter = handle.adapter()
    indices = model[0].shira_indices.clone()
    adapter["0.weight"].values.zero_()
    adapter["0.weight"].indices.zero_()
    assert torch.equal(model[0].shira_indices, indices)
    assert model[0].weight.view(-1)[indices].ne(0).all()


def test_modules_to_save_stay_trainable() -> None:
    model = mlp()
    model.requires_grad_(False)
    handle = shira.attach(model, shira.ShiraConfig(["0"], density=0.5, modules_to_save=["2"]))
    assert [name for name, _ in handle.named_parameters()] == ["0.shira_values", "2.weight", "2.bias"]
    assert all(parameter.requires_grad for parameter in handle.parameters())
    assert not model[0].bias.requires_grad
    before = model[2].weight.detach().clone()
    train(model, handle)
    assert not torch.equal(model[2].weight, before)
    handle.detach()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_equal_layers_get_other_random_masks() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.3, seed=5))
    assert model[0].shira_indices.tolist() != model[1].shira_indices.tolist()
    expected = shira.masks.rand(model[1].weight, 0.3, seed=tensor_seed(5, "1.weight"))
    assert torch.equal(model[1].shira_indices, expected)


class Renamed(nn.Linear):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(tokens)


def test_a_subclass_keeps_its_class_and_forward() -> None:
    model = nn.Sequential(Renamed(4, 3))
    x = torch.randn(2, 4)
    expected = model(x).detach()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    assert isinstance(model[0], Renamed)
    assert torch.equal(model(x), expected)
    handle.detach()
    assert type(model[0]) is Renamed


@pytest.mark.parametrize("tied", [True, False])
def test_llama_all_linear(tied: bool) -> None:
    model = tiny_llama(tied)
    base = state(model)
    ids = torch.randint(0, 40, (2, 10))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.1))
    assert len(handle.adapter()) == 14
    assert "lm_head.weight" not in handle.adapter()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    handle.detach()
    assert_state(model, base)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], 2),
        (["layers.1.self_attn.q_proj"], 1),
        ([r".*q_proj"], 0),
        (r".*\.[qv]_proj", 4),
        (r"q_proj", 0),
    ],
)
def test_target_modules(target_modules: str | list[str], expected: int) -> None:
    model = tiny_llama()
    config = shira.ShiraConfig(target_modules, density=0.1)
    if not expected:
        with pytest.raises(ValueError, match="matches no module"):
            shira.attach(model, config)
        return
    assert len(shira.attach(model, config).adapter()) == expected


def test_peft_names_are_those_of_the_bare_model() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_llama()
    handle = shira.attach(model, shira.ShiraConfig(["q_proj"], mask="rand", density=0.1))
    adapter = handle.adapter()
    handle.detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj", "q_proj"]))
    config = shira.ShiraConfig(r"model\.layers\.\d\.self_attn\.q_proj", mask="rand", density=0.1)
    for what in (config, adapter):
        handle = shira.attach(wrapped, what)
        again = handle.adapter()
        handle.detach()
        assert list(again) == list(adapter)
        for name in adapter:
            assert torch.equal(again[name].indices, adapter[name].indices)
            assert torch.equal(again[name].values, adapter[name].values)


def test_a_parent_with_an_nn_multihead_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(shira.attach(model, shira.ShiraConfig("all-linear", density=0.1)).adapter()) == {
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }


def with_adapter(**changes: object) -> Callable[[nn.Module], shira.Adapter]:
    def make(model: nn.Module) -> shira.Adapter:
        name = str(changes.get("name", "2.weight"))
        weight = model.get_submodule("2").weight
        part = shira.AdapterTensor(
            torch.tensor([1, 3]),
            torch.zeros(2, dtype=changes.get("dtype", weight.dtype)),
            changes.get("shape", tuple(weight.shape)),
            changes.get("dtype", weight.dtype),
            checksum=changes.get("checksum", shira.adapter.checksum_of(weight.detach().reshape(-1)[[1, 3]])),
        )
        return shira.Adapter({name: part})

    return make


def config(*arguments: object, **fields: object) -> Callable[[nn.Module], shira.ShiraConfig]:
    return lambda model: shira.ShiraConfig(*arguments, **fields)


class Packed(torch.Tensor):
    """As the tensors of quantization libraries, which say that they are float32."""


def bad_models() -> Iterator[tuple[str, nn.Module, Callable, str]]:
    yield "not a config", mlp(), lambda model: {"target_modules": "all-linear"}, "ShiraConfig or an Adapter"
    yield "no match", mlp(), config(["nope"]), "matches no module"
    yield "another module", mlp(), config(["0", "1"]), "1: only nn.Linear, nn.Conv1d, .* can be trained, got ReLU"
    yield "k too large", mlp(), config("all-linear", k=45), r"2\.weight: k must"
    yield "nothing to save", mlp(), config(["0"], modules_to_save=["x"]), "modules_to_save: 'x'"
    yield "target saved", mlp(), config("all-linear", modules_to_save=["2"]), "modules_to_save: '2'"
    yield "no such tensor", mlp(), with_adapter(name="3.weight"), "no parameter '3.weight'"
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.LayerNorm(8))
    yield "another module's", model, with_adapter(), "2: only nn.Linear.* got LayerNorm"
    yield "shape", mlp(), with_adapter(shape=(8, 5)), r"2\.weight: the adapter's shape"
    yield "dtype", mlp(), with_adapter(dtype=torch.float64), r"2\.weight: the adapter's dtype"
    yield "another base", mlp(), with_adapter(checksum="0" * 32), "another base"
    yield "empty adapter", mlp(), lambda model: shira.Adapter({}), "no tensors"
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    yield "nan", model, config("all-linear"), r"2\.weight: .*NaN"
    model = mlp()
    model[2] = nn.Linear(8, 5, device="meta")
    yield "meta", model, config("all-linear"), "meta"
    model = mlp()
    model[2] = nn.LazyLinear(5)
    yield "lazy", model, config("all-linear"), "not initialized"
    model = mlp()
    model[2].weight = nn.Parameter(torch.randn(8, 5).t())
    yield "strides", model, config("all-linear"), "contiguous"
    yield "strides of an adapter's", model, with_adapter(), "contiguous"
    model = mlp()
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    yield "parametrized", model, config(["0", "2"]), "plain parameter"
    model = Tied()
    model.norm = nn.LayerNorm((5, 5))
    model.norm.weight = model.first.weight
    yield "tied to another module", model, config(["first"]), r"norm: only .* got LayerNorm \(first.weight is shared"
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].bias = model[0].weight
    yield "tied as another", model, config(["0"]), r"1.bias: only the weight of Linear can be trained, not its bias"
    for option in ({"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}):
        name = next(iter(option))
        yield name, nn.Sequential(nn.Embedding(5, 4, **option)), config(["0"]), f"0: an nn.Embedding with {name}"
    model = mlp()
    model[2].weight = nn.Parameter(torch.ones(5, 8, dtype=torch.int8), requires_grad=False)
    yield "quantized", model, config("all-linear"), r"2\.weight: the weight must be float64, .* got torch.int8"
    model = mlp()
    model[2].weight = nn.Parameter(torch.randn(5, 8).as_subclass(Packed))
    yield "a tensor of another class", model, config("all-linear"), r"2\.weight: .* plain tensor, got Packed"


@pytest.mark.parametrize(("model", "what", "message"), [pytest.param(*case[1:], id=case[0]) for case in bad_models()])
def test_an_error_leaves_the_model_untouched(model: nn.Module, what: Callable, message: str) -> None:
    def snapshot() -> list:
        modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
        return [modules, [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]]

    argument = what(model)
    before = snapshot()
    with pytest.raises(ValueError, match=message):
        shira.attach(model, argument)
    assert snapshot() == before


def test_attach_twice_and_use_after_detach() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig(["0"], density=0.1))
    before = state(model)
    with pytest.raises(RuntimeError, match="attached already"):
        shira.attach(model, shira.ShiraConfig(["2"], density=0.1))
    assert_state(model, before)
    handle.detach()
    for use in (handle.detach, handle.adapter, handle.write_back, lambda: list(handle.parameters())):
        with pytest.raises(RuntimeError, match="detached"):
            use()
    shira.attach(model, shira.ShiraConfig(["2"], density=0.1)).detach()


def test_a_checkpoint_of_values_can_be_written() -> None:
    model = mlp()
    shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))


def test_only_a_weight_can_be_trained_from_an_adapter() -> None:
    model = mlp()
    before = state(model)
    tensor = shira.AdapterTensor(torch.tensor([1]), torch.ones(1), (8,), torch.float32)
    with pytest.raises(ValueError, match=r"0\.bias: only the weight of Linear can be trained, not its bias"):
        shira.attach(model, shira.Adapter({"0.bias": tensor}))
    assert_state(model, before)


def test_a_step_through_data_after_an_evaluation_is_seen() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.2))
    model(torch.randn(3, 6)).sum().backward()
    with torch.no_grad():
        model(torch.randn(3, 6))  # between gradient and step
    for values in handle.parameters():
        values.data.add_(1.0)
    for name, tensor in handle.adapter().items():
        values = dict(handle.named_parameters())[name.replace("weight", "shira_values")]
        assert torch.equal(tensor.values, values.detach())


def test_values_changed_without_a_gradient_are_in_the_adapter() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.2))
    values = next(handle.parameters())
    values.data.fill_(7.0)  # as swapping in an average does
    assert (handle.adapter()["0.weight"].values == 7).all()
    values.data.fill_(8.0)
    assert (model.state_dict()["0.weight"] == 8).sum() == values.numel()


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    model = mlp()
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match="0: its forward was replaced"):
        shira.attach(model, shira.ShiraConfig("all-linear"))
    assert type(model[2]) is nn.Linear


def test_inference_mode_is_refused() -> None:
    model = mlp()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        shira.attach(model, shira.ShiraConfig("all-linear"))
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor, scale: float = 3.0) -> torch.Tensor:
        return super().forward(input) * scale


class Doubled(nn.Linear):
    def forward(self, tokens: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
        return 2 * F.linear(tokens, self.weight, self.bias if bias else None)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gpt2_conv1d() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    return pytorch_utils.Conv1D(5, 6)


TOKENS = torch.tensor([[3, 1, 0, 3, 6], [3, 3, 8, 0, 5]])
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Conv1D": (gpt2_conv1d, lambda: floats(2, 3, 6)),
    "own forward": (lambda: Doubled(6, 5), lambda: floats(2, 3, 6)),
    "super's forward": (lambda: Renamed(6, 5), lambda: floats(4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), lambda: floats(2, 4, 6, 7)),
    "conv, all options": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1, dilation=2, groups=2, padding_mode="reflect"),
        lambda: floats(2, 4, 7, 8),
    ),
    "conv, same": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), lambda: floats(4, 5, 5)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3, padding_mode="circular", padding=1), lambda: floats(2, 4, 6)),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2), lambda: floats(1, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: TOKENS),
    "embedding, int32": (lambda: nn.Embedding(9, 4), lambda: TOKENS.int()),
    "embedding, padding": (lambda: nn.Embedding(9, 4, padding_idx=3), lambda: TOKENS),
    "embedding, no token": (lambda: nn.Embedding(9, 4, padding_idx=3), lambda: TOKENS[:, :0]),
    "embedding, one token": (lambda: nn.Embedding(9, 4), lambda: TOKENS[1, 2]),
    "scaled embedding": (lambda: Scaled(9, 4, padding_idx=0), lambda: TOKENS),
}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize(("make", "input"), KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_layer(make: Callable, input: Callable, backend: str | None) -> None:
    dense = nn.Sequential(make()).double()
    model, x = copy.deepcopy(dense), input()
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    handle = shira.attach(model, shira.ShiraConfig(["0"], mask="rand", density=0.6))
    torch._dynamo.reset()
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    expected, y = dense(x), run(x)
    assert torch.equal(y, expected)
    for output in (y, expected):
        (output - 1).square().sum().backward()
    gradient, indices = dense[0].weight.grad.reshape(-1), model[0].shira_indices
    assert y.numel() == 0 or gradient[indices].any()
    torch.testing.assert_close(model[0].shira_values.grad, gradient[indices], rtol=1e-12, atol=1e-13)
    assert model[0].weight.grad is None
    with torch.no_grad():
        assert torch.equal(model(x), expected)

    torch.optim.SGD(handle.parameters(), lr=0.1).step()
    with torch.no_grad():
        dense[0].weight.view(-1)[indices] -= 0.1 * gradient[indices]
    torch.testing.assert_close(run(x), dense(x), rtol=1e-12, atol=1e-13)
    adapter = handle.adapter()
    handle.detach()
    assert_state(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any("shira" in name or name == "weight" for name in vars(model[0]))
    again = shira.attach(model, adapter)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-13)
    again.detach()
    assert_state(model, before)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 4, 1), lambda: nn.Linear(4, 4), lambda: Doubled(4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(make: Callable, dtype: torch.dtype) -> None:
    for weights, autocast in ((dtype, None), (torch.float32, torch.bfloat16)):
        dense = make().to(weights)
        x = torch.randn(5, 4, 1, 1, dtype=weights) if isinstance(dense, nn.Conv2d) else torch.randn(5, 4, dtype=weights)
        model = nn.Sequential(copy.deepcopy(dense))
        shira.attach(model, shira.ShiraConfig(["0"], density=0.5))
        for net in (dense, model):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                net(x).float().square().sum().backward()
        got = model[0].shira_values.grad
        assert got.dtype == torch.float32
        expected = dense.weight.grad.view(-1)[model[0].shira_indices].float()
        torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)


def test_the_largest_narrow_and_the_smallest_wide_column() -> None:
    for columns, dtype in ((65535, torch.uint16), (65537, torch.int32)):
        layer = nn.Linear(columns, 2, bias=False)
        indices = torch.tensor([0, columns - 1, 2 * columns - 1], dtype=torch.int32)
        base = layer.weight.detach().view(-1)[indices]
        part = shira.AdapterTensor(indices, base, (2, columns), torch.float32, checksum=shira.adapter.checksum_of(base))
        model = nn.Sequential(layer)
        shira.attach(model, shira.Adapter({"0.weight": part}))
        assert layer.shira_targets["weight"].csr[1].dtype == dtype
        x = torch.randn(3, columns)
        model(x).sum().backward()
        torch.testing.assert_close(layer.shira_values.grad, x.sum(0)[[0, columns - 1, columns - 1]])


def test_a_head_tied_to_an_embedding() -> None:
    for target_modules in (["lm_head"], ["embed_tokens"], r".*embed_tokens|.*q_proj"):
        dense = tiny_llama().double()
        model = copy.deepcopy(dense)
        before = state(model)
        handle = shira.attach(model, shira.ShiraConfig(target_modules, mask="rand", density=0.2))
        assert next(iter(handle.adapter())) == "model.embed_tokens.weight"
        ids = torch.randint(0, 40, (2, 10))
        for net in (dense, model):
            net(input_ids=ids, labels=ids).loss.backward()
        embedding = model.model.embed_tokens
        expected = dense.lm_head.weight.grad.view(-1)[embedding.shira_indices]
        torch.testing.assert_close(embedding.shira_values.grad, expected, rtol=1e-9, atol=1e-12)
        torch.optim.SGD(handle.parameters(), lr=0.1).step()
        twin = copy.deepcopy(model)
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
        assert twin.lm_head.shira_targets["weight"] is twin.model.embed_tokens.shira_targets["weight"]
        head = copy.deepcopy(model.lm_head)
        assert torch.equal(head(torch.eye(16).double()), model.lm_head(torch.eye(16).double()))
        handle.detach()
        assert_state(model, before)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_linear_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.1))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(handle.adapter()) == [f"transformer.h.0.{name}.weight" for name in names]


def spans(tensors: list[torch.Tensor]) -> bool:
    """Whether tensors lie one behind the other, each with a storage of its own."""
    ends = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in tensors]
    own = all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    return own and [tensor.data_ptr() for tensor in tensors[1:]] == ends[:-1]


def assert_arenas(model: nn.Module, handle: shira.Handle) -> None:
    assert spans(list(handle.parameters()))
    for kind in ("shira_indices", "shira_base"):
        assert spans([buffer for name, buffer in model.named_buffers() if name.endswith(kind)])
    targets = [values.shira_target for values in handle.parameters()]
    assert len({target.values_arena.data_ptr() for target in targets}) == 1
    assert len({target.indices_arena.data_ptr() for target in targets}) == 1
    for name, values in handle.named_parameters():
        layer = model.get_submodule(name.removesuffix(".shira_values"))
        target = values.shira_target
        assert target.weight is layer.weight
        assert target.indices is layer.shira_indices
        assert target.base is layer.shira_base
        assert target.values is values


def test_vectors_lie_in_arenas_that_survive() -> None:
    model = tiny_llama()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.1))
    assert_arenas(model, handle)
    versions = [values._version for values in handle.parameters()]
    with torch.no_grad():
        next(handle.parameters()).add_(1)
    assert [values._version for values in handle.parameters()] == [versions[0] + 1, *versions[1:]]
    before = [values.detach().clone() for values in handle.parameters()]
    indices = [buffer.clone() for name, buffer in model.named_buffers() if "shira_indices" in name]

    twin, twin_handle = copy.deepcopy((model, handle))
    assert_arenas(twin, twin_handle)
    assert next(twin.parameters()).data_ptr() != next(model.parameters()).data_ptr()
    assert not {p.data_ptr() for p in handle.parameters()} & {p.data_ptr() for p in twin_handle.parameters()}
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.load_state_dict(m.state_dict())):
        change(model)
        assert_arenas(model, handle)
        assert all(map(torch.equal, handle.parameters(), before))
        now = [buffer for name, buffer in model.named_buffers() if "shira_indices" in name]
        assert all(map(torch.equal, now, indices))
    for _ in range(2):
        model._apply(torch.clone)  # as `.to` another device: other memory
        assert_arenas(model, handle)
        assert all(map(torch.equal, handle.parameters(), before))
    model.get_submodule("model.layers.1").half()
    assert all(map(torch.equal, handle.parameters(), before))
    assert all(values.dtype == torch.float32 for values in handle.parameters())


def test_a_gradient_follows_the_values_when_the_model_is_cast() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    model(torch.randn(3, 6)).sum().backward()
    expected = [values.grad.clone() for values in handle.parameters()]
    model.bfloat16()
    for values, gradient in zip(handle.parameters(), expected, strict=True):
        assert torch.equal(values.grad, gradient)


class WritesBoth(torch.optim.SGD):
    """Updates values and weights by itself, as ShiraAdamW does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for values in self.param_groups[0]["params"]:
            target = values.shira_target
            values.add_(values.grad, alpha=-0.1)
            target.weight.view(-1)[target.indices] = values.to(target.weight.dtype)
            target.wrote(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda pair: pair, copy.deepcopy], ids=["as made", "copied"])
def test_an_optimizer_that_writes_the_weights_itself(
    dtype: torch.dtype, change: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp(dtype)
    model, handle = change((model, shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))))
    plain, plain_handle = copy.deepcopy((model, handle))
    x = torch.randn(4, 6, dtype=dtype)
    with torch.no_grad():
        model(x)  # a copy is written once
    writes = []
    for values in handle.parameters():
        monkeypatch.setattr(values.shira_target, "write", lambda: writes.append(1))
        monkeypatch.setattr(values.shira_target, "_differs", lambda: writes.append(2))
    optimizers = [WritesBoth(handle.parameters(), lr=0.1), torch.optim.SGD(plain_handle.parameters(), lr=0.1)]
    for _ in range(3):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).float().square().mean().backward()
            optimizer.step()
        assert torch.equal(model(x), plain(x))
    assert not writes
    monkeypatch.undo()
    assert torch.equal(model[0].shira_values, plain[0].shira_values)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_writes_without_a_forward(optimizer: type) -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle, optimizer=optimizer)
    for layer in (model[0], model[2]):
        assert torch.equal(layer.weight.view(-1)[layer.shira_indices], layer.shira_values)


def test_no_comparison_once_steps_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle)
    monkeypatch.setattr(shira.training.trained.TrainedWeight, "_differs", lambda self: pytest.fail("compared"))
    for _ in range(3):  # accumulation
        model(torch.randn(2, 6)).sum().backward()


def test_the_hook_on_steps_goes_with_the_last_handle() -> None:
    from torch.optim import optimizer

    gc.collect()
    shira.training.trained._StepHook._watched.clear()
    model, other = mlp(), mlp()
    handles = [shira.attach(net, shira.ShiraConfig("all-linear", density=0.5)) for net in (model, other)]
    before = len(optimizer._global_optimizer_post_hooks)
    handles[0].detach()
    assert len(optimizer._global_optimizer_post_hooks) == before
    train(other, handles[1])
    assert torch.equal(other[0].weight.view(-1)[other[0].shira_indices], other[0].shira_values)
    handles[1].detach()
    assert len(optimizer._global_optimizer_post_hooks) == before - 1


def test_a_model_without_handle_is_freed() -> None:
    model = mlp()
    shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    model(torch.randn(2, 6)).sum().backward()
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None


def test_pickle() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    train(model, handle)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))
    assert twin[0].shira_values.shira_target.weight is twin[0].weight
    assert type(twin[0]) is type(model[0])


def test_a_compiled_model_can_be_attached() -> None:
    model = torch.compile(mlp(), backend="aot_eager")
    before = state(model)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    assert list(handle.adapter()) == ["0.weight", "2.weight"]
    train(model, handle)
    handle.detach()
    assert_state(model, before)


def test_values_are_written_in_inference_mode_too() -> None:
    model = mlp()
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    with torch.no_grad():
        next(handle.parameters()).fill_(2.0)
    with torch.inference_mode():
        model(torch.zeros(1, 6))
    assert (model[0].weight == 2).sum() == next(handle.parameters()).numel()
    model(torch.zeros(1, 6)).sum().backward()


def test_a_checkpoint_brings_its_base() -> None:
    """The usual order of resuming: a new model, attach, load_state_dict."""
    trained, fresh = mlp(), mlp()
    base = trained[0].weight.detach().clone()
    config = shira.ShiraConfig("all-linear", mask="rand", density=0.3)
    handle = shira.attach(trained, config)
    train(trained, handle)
    resumed = shira.attach(fresh, config)
    fresh.load_state_dict(trained.state_dict())
    adapter = resumed.adapter()
    resumed.detach()
    assert torch.equal(fresh[0].weight, base)
    handle.detach()
    shira.attach(trained, adapter)  # its checksum is that of the base


def test_state_dicts_that_would_mix_two_bases_are_refused() -> None:
    model, other = (nn.Sequential(nn.Linear(9, 7)) for _ in range(2))
    plain = copy.deepcopy(other.state_dict())
    config = shira.ShiraConfig("all-linear", mask="rand", density=0.3)
    shira.attach(model, config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="load it before attach"):
        model.load_state_dict(plain, strict=False)
    shira.attach(other, config)
    values_only = {name: tensor for name, tensor in other.state_dict().items() if "shira" in name}
    with pytest.raises(RuntimeError, match="saved over another base"):
        model.load_state_dict(values_only, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, shira.ShiraAdamW])
@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_values_follow_the_weights_precision(first: torch.dtype, then: torch.dtype, optimizer: type) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(first)
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.5))
    stepper = optimizer(handle.parameters(), lr=0.1)
    for dtype in (first, then):
        model.to(dtype)
        assert {values.dtype for values in handle.parameters()} == {dtype}
        fresh = optimizer(handle.parameters(), lr=0.1) if dtype is then else stepper
        before = handle.adapter()
        model(torch.ones(3, 6, dtype=dtype)).sum().backward()
        fresh.step()
        fresh.zero_grad()
        for name, part in handle.adapter().items():
            assert part.dtype == dtype
            assert not torch.equal(part.values, before[name].values)


def test_channels_last_keeps_trained_weights_contiguous() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 8, 3))
    base = copy.deepcopy(model.state_dict())
    handle = shira.attach(model, shira.ShiraConfig(["0", "1"], mask="rand", density=0.2))
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for values in handle.parameters():
            values.add_(1)
    handle.adapter()
    handle.detach()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_graph_copies_no_gradients(kind: str) -> None:
    """As it would behind an in-place identity on a view, which a linear layer with bias gives for 3-D input."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    layer = nn.Linear(6, 5) if kind == "linear" else conv1d(5, 6)
    model = nn.Sequential(layer, nn.ReLU())
    shira.attach(model, shira.ShiraConfig(["0"], mask="rand", density=0.5))
    output = model(torch.randn(2, 3, 6, requires_grad=True))
    names, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    assert "LinearTapBackward" in names
    assert "CopySlices" not in names


def test_gradients_from_before_are_not_used() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    base = copy.deepcopy(model.state_dict())
    model(torch.ones(3, 6)).sum().backward()
    handle = shira.attach(model, shira.ShiraConfig(["0"], mask="rand", density=0.5))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    handle.detach()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    model(torch.ones(3, 6)).sum().backward()
    handle = shira.mask_gradients(model, shira.ShiraConfig(["0"], mask="rand", density=0.5))
    model(torch.zeros(3, 6)).sum().backward()
    assert all(not values.grad.any() for values in handle.parameters())


@pytest.mark.parametrize("attach", [shira.attach, shira.mask_gradients])
def test_every_name_must_match(attach: Callable) -> None:
    with pytest.raises(ValueError, match="target_modules: 'typo' matches no module"):
        attach(nn.Sequential(nn.Linear(6, 5)), shira.ShiraConfig(["0", "typo"]))


def test_what_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"model must be an nn\.Module, got int"):
        shira.attach(5, shira.ShiraConfig("all-linear"))


def test_pickled_models_train_on() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    shira.attach(model, shira.ShiraConfig("all-linear", mask="rand", density=0.5))
    twin = pickle.loads(pickle.dumps(model))
    for net in (model, twin):
        net(torch.ones(2, 6)).sum().backward()
    assert torch.equal(twin[0].shira_values.grad, model[0].shira_values.grad)
