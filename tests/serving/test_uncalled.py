"""A layer whose weight is read without a call in a batch: an error, never the base; its form may be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import shira

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from batches import alone, close, left_alone, make
from transformers.pytorch_utils import Conv1D

X = torch.linspace(-1, 1, 24).view(2, 3, 4).sin()


class Reads(nn.Module):
    """Calls a layer, and does something with its weight, or with that of another one."""

    def __init__(self, use: Callable[[nn.Module, torch.Tensor], torch.Tensor], conv1d: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called = nn.Linear(4, 4)
        self.read = Conv1D(4, 4) if conv1d else nn.Linear(4, 4)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.read, self.called(x))


USES: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "linear": lambda layer, x: nn.functional.linear(x, layer.weight),
    "matmul": lambda layer, x: x @ layer.weight.T,
    "called too": lambda layer, x: layer(x) + layer.weight.sum(),
    "data": lambda layer, x: x @ layer.weight.data,
    "another dtype": lambda layer, x: x @ layer.weight.to(torch.float32),
    "a pointer": lambda layer, x: x + float(layer.weight.data_ptr() > 0),
    "numbers": lambda layer, x: x + layer.weight.tolist()[0][0],
}
FORMS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "dtype": lambda layer, x: layer(x.to(layer.weight.dtype)),
    "to": lambda layer, x: layer(x.to(layer.weight)),
    "shape": lambda layer, x: layer(x) * layer.weight.shape[0] / layer.weight.size(-1) * layer.weight.dim(),
    "device": lambda layer, x: layer(x.to(layer.weight.device)) * isinstance(layer.weight, torch.Tensor),
    "like": lambda layer, x: layer(x) + torch.zeros_like(layer.weight)[0] + layer.weight.new_zeros(4),
}


def bank_of(model: nn.Module, prefix: str = "") -> shira.ResidentAdapters:
    bank = shira.ResidentAdapters(model)
    for i, name in enumerate(("blue", "paint")):
        bank.add(name, make(model, i, [f"{prefix}called.weight", f"{prefix}read.weight"], density=0.5))
    return bank


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_weight_that_is_read_is_refused(use: Callable[[nn.Module, torch.Tensor], torch.Tensor], conv1d: bool) -> None:
    model = Reads(use, conv1d)
    bank = bank_of(model)
    for rows in (["blue", None], ["blue", "paint"], ["blue", "blue"]):
        with (
            left_alone(model),
            torch.no_grad(),
            bank.batch(rows),
            pytest.raises(RuntimeError, match="batch: the model reads the weight of 'read' without calling the layer"),
        ):
            model(X)
    with torch.no_grad(), bank.using("blue"):
        want = model(X)
    with torch.no_grad(), bank.batch(["blue"] * 2, mode="fused"):
        assert torch.equal(model(X), want)
    with bank.batch(["blue", None]):
        assert model.read.weight is model.get_parameter("read.weight")  # outside of a forward


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("use", FORMS.values(), ids=FORMS.keys())
def test_its_form_may_be_read(
    use: Callable[[nn.Module, torch.Tensor], torch.Tensor], conv1d: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    model = Reads(use, conv1d)
    bank, rows = bank_of(model), ["blue", "paint"]
    want = torch.cat(alone(bank, rows, lambda i: model(X[i : i + 1])))
    run = torch.compile(model, backend="eager") if compiled else model
    with left_alone(model), torch.no_grad(), bank.batch(rows):
        close(run(X), want)


def test_compiled_code_does_not_read_it_either() -> None:
    torch._dynamo.reset()
    model = Reads(USES["linear"])
    bank, run = bank_of(model), torch.compile(model, backend="eager")
    with torch.no_grad():
        run(X)
        with bank.batch(["blue", None]), pytest.raises(Exception, match="reads the weight of 'read'"):
            run(X)


def test_what_a_compiled_model_leaves_to_python_is_refused_in_the_same_words() -> None:
    """Dynamo gives up the frames around an error, and is not let into the trial that then begins."""
    torch._dynamo.reset()
    model = nn.Sequential(Reads(USES["linear"]))
    bank, run = bank_of(model, "0."), torch.compile(model, backend="eager")
    with torch.no_grad(), bank.batch(["blue", None]), pytest.raises(RuntimeError, match=r"the weight of '0\.read'"):
        run(X)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs_are_refused(layout: torch.layout) -> None:
    model = Reads(FORMS["dtype"])
    bank, rows = bank_of(model), torch.nested.nested_tensor([X[0], X[1, :2]], layout=layout)
    with torch.no_grad(), bank.batch(["blue", "paint"]), pytest.raises(ValueError, match="got a nested tensor"):
        model(rows)


def test_mamba() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 3}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    bank = shira.ResidentAdapters(model)
    bank.add("all", make(model, 0, [f"backbone.layers.0.mixer.{name}.weight" for name in ("dt_proj", "in_proj")]))
    bank.add("called", make(model, 1, ["backbone.layers.0.mixer.in_proj.weight"]))
    ids = torch.randint(20, (2, 7))
    with (
        torch.no_grad(),
        bank.batch(["all", None]),
        pytest.raises(RuntimeError, match=r"weight of 'backbone\.layers\.0\.mixer\.dt_proj' without calling"),
    ):
        model(ids)
    bank.remove("all")
    want = torch.cat(alone(bank, ["called", None], lambda i: model(ids[i : i + 1]).logits))
    with torch.no_grad(), bank.batch(["called", None]):
        close(model(ids).logits, want)


def test_a_forward_that_is_replaced_in_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 2 * forward(self, input))
    model = Reads(FORMS["dtype"])
    bank = bank_of(model)
    with pytest.raises(ValueError, match=r"'blue' cannot be unfused: called\.weight"), bank.batch(["blue", None]):
        raise AssertionError
