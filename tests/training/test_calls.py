"""Layers that are read, called in several ways, or not at all: the gradient is the dense one, or an error tells."""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shira


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", shira.ShiraWarning)
        yield


def config(target_modules: str | list[str] = "all-linear") -> shira.ShiraConfig:
    return shira.ShiraConfig(target_modules, mask="rand", density=0.4)


def assert_dense_gradients(
    model: nn.Module, targets: str | list[str], run: Callable[[nn.Module], torch.Tensor], names: int
) -> None:
    """The values' gradients are those of a model that is trained whole, at the entries, for this many weights."""
    dense = copy.deepcopy(model).requires_grad_(True)
    handle = shira.attach(model, config(targets))
    with no_warning():
        for net in (dense, model):
            torch.manual_seed(1)
            run(net).backward()
        gradients = [values.grad for values in handle.parameters()]
        torch.optim.SGD(handle.parameters(), lr=0.0).step()
    adapter = handle.adapter()
    assert len(adapter) == names
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    for gradient, (name, tensor) in zip(gradients, adapter.items(), strict=True):
        expected = dense.get_parameter(name).grad
        assert (gradient is None) == (expected is None), name
        if expected is not None:
            expected = expected.view(-1)[tensor.indices]
            torch.testing.assert_close(gradient, expected.to(gradient), rtol=1e-5, atol=1e-7, msg=name)
    handle.detach()


def mamba() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 20, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


def wavlm() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
    off = {"layerdrop": 0.0, "mask_time_prob": 0.0, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
    return transformers.WavLMModel(transformers.WavLMConfig(**sizes, **layers, **off))


def test_mamba_reads_dt_proj() -> None:
    ids = torch.randint(20, (2, 7))
    assert_dense_gradients(mamba(), "all-linear", lambda net: net(input_ids=ids, labels=ids).loss, 8)


def test_wavlm_reads_its_projections() -> None:
    x = torch.randn(2, 400)
    assert_dense_gradients(
        wavlm(), ["q_proj", "k_proj", "v_proj", "out_proj"], lambda net: net(x).last_hidden_state.square().sum(), 8
    )


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_layer_reads_out_proj(training: bool) -> None:
    """In evaluation it would take a way of its own if nothing required grad."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().train(training)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_dense_gradients(model, "all-linear", lambda net: net(x).pow(3).sum(), 3)


def test_what_is_read_without_gradients_is_up_to_date() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    handle = shira.attach(model, config())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        for values in handle.parameters():
            values.add_(1.0)
        after = model(x)
    handle.detach(keep=True)
    with torch.no_grad():
        assert torch.equal(model(x), after)
    assert not torch.allclose(before, after)


class Reads(nn.Module):
    """Reads weights, calls the layers too, with inputs of several shapes, and has a layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.read, self.both = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.conv, self.blocks = nn.Conv1d(6, 6, 3, padding=1), nn.ModuleList([nn.Linear(6, 6)] * 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + F.linear(x, self.read.weight) + self.both.weight.square().mean()
        x = x + self.both(x) + self.both(x[:, :1]) + self.both(x.mean((0, 1))) + self.conv.weight.sum(-1)[0]
        for block in self.blocks:
            x = block(x).tanh() + self.conv(x.mT).mT
        return F.linear(x, self.embedding.weight)


TOKENS = torch.tensor([[3, 1, 0, 3], [6, 6, 8, 1]])
CALLED = ["embedding", "read", "both", "conv", "blocks.0"]


@pytest.mark.parametrize("way", ["plain", "forward", "compiled", "checkpoint", "reentrant"])
def test_layers_are_read_and_called_in_many_ways(way: str) -> None:
    torch._dynamo.reset()
    model = Reads().double()

    def run(net: nn.Module) -> torch.Tensor:
        if way == "compiled":
            net = torch.compile(net, backend="aot_eager", fullgraph=True)
        if way in ("checkpoint", "reentrant"):
            x = torch.ones(1, requires_grad=True)
            call = lambda x: net(TOKENS) * x  # noqa: E731
            return checkpoint(call, x, use_reentrant=way == "reentrant").square().sum()
        return (net.forward if way == "forward" else net)(TOKENS).square().sum()

    assert_dense_gradients(model, CALLED, run, 5)


def test_outside_of_forwards_a_weight_is_the_parameter() -> None:
    model = Reads()
    handle = shira.attach(model, config(CALLED))
    for name in CALLED:
        layer = model.get_submodule(name)
        assert layer.weight is model.get_parameter(f"{name}.weight") is layer._parameters["weight"]
        assert layer.weight.grad is None
    handle.detach()


def test_layers_that_are_not_used_are_named_once() -> None:
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abc"})
    handle = shira.attach(model, config())
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    bypass = F.linear(torch.randn(2, 6), model["c"]._parameters["weight"])
    model["b"](torch.randn(2, 6))  # called, but the loss does not need it
    (model["a"](torch.randn(2, 6)) + bypass).sum().backward()
    with pytest.warns(shira.ShiraWarning, match=r"^c\.weight had no part in .* use mask_gradients"):
        optimizer.step()
    model["a"](torch.randn(2, 6)).sum().backward()
    with no_warning():
        optimizer.step()
    handle.detach()
    handle = shira.mask_gradients(model, config())  # sees every use
    (model["a"](torch.randn(2, 6)) + F.linear(torch.ones(6), model["c"]._parameters["weight"])).sum().backward()
    assert [values.grad is None for values in handle.parameters()] == [False, True, False]
    with no_warning():
        torch.optim.SGD(handle.parameters(), lr=0.1).step()


class Twice(nn.Linear):
    """Put in the place of a layer's forward, or of its class's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


def test_a_forward_that_is_replaced_after_attach() -> None:
    model, x = mlp().double(), torch.randn(3, 6, dtype=torch.float64)
    dense = copy.deepcopy(model)
    handle = shira.attach(model, config())
    inner = model[2].forward
    model[2].forward = lambda x: 3 * inner(x)  # as hooks that wrap it
    for net in (model, dense):
        net[0].forward = types.MethodType(Twice.forward, net[0])
    (dense(x) * 3).sum().backward()
    model(x).sum().backward()
    for i in (0, 2):
        expected = dense[i].weight.grad.view(-1)[model[i].shira_indices]
        torch.testing.assert_close(model[i].shira_values.grad, expected)
    with pytest.raises(RuntimeError, match="0: its forward was replaced after attach"):
        handle.detach()
    assert len(handle.adapter()) == 2
    del model[0].forward
    model[2].forward = inner  # as hooks put it back
    handle.detach()
    assert all("forward" not in vars(layer) for layer in model)
    assert torch.equal(model(x), model[2](model[0](x).relu()))


def test_a_forward_that_is_replaced_in_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", Twice.forward)
    x = torch.randn(3, 6)
    assert_dense_gradients(mlp(), "all-linear", lambda net: net(x).square().sum(), 2)


def test_functional_call() -> None:
    model, x = mlp(torch.float64), torch.randn(3, 6, dtype=torch.float64)
    dense = copy.deepcopy(model)
    shira.attach(model, config())
    own = dict(model.named_parameters())
    others = {name: value.detach() + 1 for name, value in own.items() if "shira_values" in name}
    for value in others.values():
        value.requires_grad_()
    with torch.no_grad():
        for i in (0, 2):
            dense[i].weight.view(-1)[model[i].shira_indices] += 1
    for given in (own, others):
        torch.func.functional_call(model, given, (x,)).square().sum().backward()
    dense(x).square().sum().backward()
    for i in (0, 2):
        expected = dense[i].weight.grad.view(-1)[model[i].shira_indices]
        torch.testing.assert_close(others[f"{i}.shira_values"].grad, expected)
    weights = {name: value.detach().clone() for name, value in own.items()}
    with pytest.raises(RuntimeError, match=r"0\.weight: the weight was replaced .* functional_call"):
        torch.func.functional_call(model, weights, (x,))
    assert torch.equal(weights["0.weight"], own["0.weight"])


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def called(model: nn.Module, x: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda given: torch.func.functional_call(model, given, (x,)).sum()


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "grad of parameters": lambda net, x: torch.func.grad(called(net, x))(parameters_of(net)),
    "grad of inputs": lambda net, x: torch.func.grad(lambda x: net(x).sum())(x),
    "vmap": lambda net, x: torch.func.vmap(net)(x),
    "vmap of parameters": lambda net, x: torch.func.vmap(called(net, x))(
        {name: p.expand(2, *p.shape) for name, p in parameters_of(net).items()}
    ),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x,)),
}


@pytest.mark.parametrize("attach", [shira.attach, shira.mask_gradients])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(attach: Callable, name: str) -> None:
    transform = TRANSFORMS[name]
    model, x = mlp(), torch.randn(3, 6)
    expected = None if "parameters" in name else transform(copy.deepcopy(model), x)
    handle = attach(model, config())
    if attach is shira.mask_gradients and expected is not None:  # nothing is in the way of the inputs' derivatives
        torch.testing.assert_close(transform(model, x), expected)
    else:
        with pytest.raises(
            RuntimeError, match=r"0\.weight: torch\.func transforms \(grad, vmap, jvp\) cannot go through"
        ):
            transform(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    handle.detach()


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs(layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    dense = copy.deepcopy(model)
    rows = [torch.randn(length, 6, dtype=torch.float64) for length in (3, 1, 4)]
    shira.attach(model, config())
    output = model(torch.nested.nested_tensor(rows, layout=layout))
    sum(part.square().sum() for part in output.unbind()).backward()
    dense(torch.cat(rows)).square().sum().backward()
    for i in (0, 1):
        expected = dense[i].weight.grad.view(-1)[model[i].shira_indices]
        torch.testing.assert_close(model[i].shira_values.grad, expected)


def test_jagged_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 4)).double()
    dense = copy.deepcopy(model)
    rows = [torch.tensor([1, 3, 3]), torch.tensor([8])]
    shira.attach(model, config(["0"]))
    model(torch.nested.nested_tensor(rows, layout=torch.jagged)).values().square().sum().backward()
    dense(torch.cat(rows)).square().sum().backward()
    expected = dense[0].weight.grad.view(-1)[model[0].shira_indices]
    torch.testing.assert_close(model[0].shira_values.grad, expected)


@pytest.mark.parametrize("attach", [shira.attach, shira.mask_gradients])
def test_models_without_data(attach: Callable) -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match=r"0\.weight: the weight holds no data"):
        attach(model, config())
    with pytest.raises(ValueError, match="the weight holds no data"):
        attach(nn.Sequential(nn.LazyLinear(3)), config())
    model = mlp()
    handle = attach(model, config())
    for lose in (lambda: model.to("meta"), lambda: model.to_empty(device="cpu")):
        with pytest.raises(RuntimeError, match="would be lost"):
            lose()
    handle.detach()


def experts() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


@pytest.mark.parametrize("attach", [shira.attach, shira.mask_gradients])
def test_all_linear_says_what_it_leaves_out(attach: Callable) -> None:
    model = experts()
    count = sum(p.numel() for name, p in model.named_parameters() if "experts" in name or "mlp.gate." in name)
    share = count / sum(p.numel() for p in model.parameters())
    assert share > 0.5
    expected = rf"leaves out {share:.0%} of the model, {count} entries .*: .*experts\.gate_up_proj, .* and 3 more"
    with pytest.warns(shira.ShiraWarning, match=expected) as caught:
        handle = attach(model, config())
    assert caught[0].filename == __file__
    handle.detach()
    with no_warning():
        attach(model, config(["q_proj"])).detach()


def test_all_linear_of_ordinary_models_says_nothing() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    models = [
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20)),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True)),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
        transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.LayerNorm((4, 4))),
        mlp(),
    ]
    with no_warning():
        for model in models:
            shira.attach(model, config())
