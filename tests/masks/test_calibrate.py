"""Calibration: the gradients that grad and snip rank by, and that nothing of the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shira
from shira.masks import calibrate as module
from shira.masks.calibrate import calibrate
from shira.masks.choose import choose_entries


class Model(nn.Module):
    """Dropout, BatchNorm, a buffer that each call replaces, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.checkpoints = False

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.calls += 1
        self.last = x.detach().sum().view(1)
        x = self.drop(self.norm(self.first(x)).tanh())
        for layer in (self.second, self.tied):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
            x = x.tanh()
        output = self.head(x)
        if labels is None:
            return {"output": output}
        return {"output": output, "loss": nn.functional.cross_entropy(output, labels)}


NAMES = ("first", "second", "head")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model().train()
    model(torch.randn(16, 6))
    return model


def weights_of(model: Model) -> dict[str, nn.Parameter]:
    return {f"{name}.weight": getattr(model, name).weight for name in NAMES}


def make_batches(number: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(5, 6, generator=generator),
            "labels": torch.randint(3, (5,), generator=generator),
        }
        for _ in range(number)
    ]


def expected_gradients(model: Model, batches: list, calibration: str = "sum") -> dict[str, torch.Tensor]:
    """By the usual loop, on a copy in evaluation mode."""
    model = copy.deepcopy(model).eval()
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        model.zero_grad()
        model(**batch)["loss"].backward()
        for name, weight in weights_of(model).items():
            gradient = weight.grad.abs() if calibration == "abs" else weight.grad
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()
    return sums


def config(**fields) -> shira.ShiraConfig:
    return shira.ShiraConfig("all-linear", **{"mask": "grad", "density": 0.2, **fields})


def check_equal(chosen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(chosen) == list(expected)
    for name, indices in chosen.items():
        assert indices.tolist() == expected[name].tolist(), name


@pytest.mark.parametrize("mask", ["grad", "snip"])
@pytest.mark.parametrize("budget", ["tensor", "model"])
@pytest.mark.parametrize("calibration", ["sum", "abs"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("max_bytes", [1, 1 << 30])
def test_entries_are_those_of_the_usual_loop(model, mask, budget, calibration, number, max_bytes) -> None:
    fields, batches = config(mask=mask, budget=budget, calibration=calibration), make_batches(number)
    expected = choose_entries(fields, weights_of(model), expected_gradients(model, batches, calibration))
    check_equal(calibrate(model, fields, weights_of(model), iter(batches), max_bytes=max_bytes), expected)


def test_sum_and_abs_differ(model: Model) -> None:
    batches = make_batches(3)
    sums = calibrate(model, config(), weights_of(model), batches)
    absolute = calibrate(model, config(calibration="abs"), weights_of(model), batches)
    assert any(not torch.equal(sums[name], absolute[name]) for name in sums)


def test_only_the_weights_get_gradients(model: Model) -> None:
    batches, scale = make_batches(1), nn.Parameter(torch.ones(()))
    batches[0]["x"].requires_grad_()
    expected = choose_entries(config(), weights_of(model), expected_gradients(model, make_batches(1)))
    loss = lambda output, batch: scale * output["loss"]  # noqa: E731
    check_equal(calibrate(model, config(), weights_of(model), batches, loss), expected)
    assert batches[0]["x"].grad is None
    assert scale.grad is None


def test_activation_checkpoints(model: Model) -> None:
    expected = calibrate(model, config(), weights_of(model), make_batches(2))
    model.checkpoints = True
    check_equal(calibrate(model, config(), weights_of(model), make_batches(2)), expected)


@pytest.mark.parametrize("number", [1, 3])
def test_dense_gradients_are_never_there_together(model: Model, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen, hooks = weights_of(model), [], []
    real = module._call

    def watch(model: Model, batch: dict) -> object:
        seen.append([name for name, weight in weights.items() if weight.requires_grad])
        assert all(parameter.grad is None for parameter in model.parameters())
        while hooks:  # of the batch before: those of now come after ours
            hooks.pop().remove()
        for weight in weights.values():
            if weight.requires_grad:
                count = lambda _: seen.append(sum(w.grad is not None for w in weights.values()))  # noqa: E731
                hooks.append(weight.register_post_accumulate_grad_hook(count))
        return real(model, batch)

    monkeypatch.setattr(module, "_call", watch)
    calibrate(model, config(), weights, make_batches(number), max_bytes=4 * (48 + 64))
    groups = [list(weights)] if number == 1 else [["first.weight", "second.weight"]] * 3 + [["head.weight"]] * 3
    assert [entry for entry in seen if isinstance(entry, list)] == groups
    assert {entry for entry in seen if isinstance(entry, int)} == {0}


def snapshot(model: Model) -> list:
    return [
        [(name, id(p), p.requires_grad, id(p.grad), p._version) for name, p in model.named_parameters()],
        [p.detach().clone().tolist() for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [(name, id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()],
        [(name, m.training) for name, m in model.named_modules()],
        [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("fails", ["", "model", "loss", "backward", "unused"])
def test_the_model_is_as_before(model: Model, number: int, fails: str) -> None:
    model.first.weight.requires_grad_(False)
    model.drop.eval()
    model(**make_batches(1)[0])["loss"].backward()
    calls = 0

    def loss(output: dict, batch: dict) -> torch.Tensor:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if fails == "loss" and calls == number:
            raise ArithmeticError("loss")
        value = output["loss"]
        if fails == "backward":
            value.register_hook(lambda _: 1 / 0)
        return value

    batches, weights = make_batches(number), weights_of(model)
    if fails == "model":
        batches[-1] = {"wrong": 1}
    if fails == "unused":
        weights["unused.weight"] = model.unused.weight
    before = snapshot(model)
    errors = {"model": TypeError, "loss": ArithmeticError, "backward": ZeroDivisionError, "unused": ValueError}
    if fails:
        with pytest.raises(errors[fails]):
            calibrate(model, config(), weights, batches, loss)
    else:
        calibrate(model, config(), weights, batches, loss)
    assert snapshot(model) == before


def test_batches_are_called_by_their_kind() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    weights = {"weight": model.weight}
    fields = shira.ShiraConfig("all-linear", mask="grad", k=4)

    def loss(output: torch.Tensor, batch: object) -> torch.Tensor:
        return output.pow(2).sum()

    results = [calibrate(model, fields, weights, [batch], loss) for batch in (x, (x,), [x], {"input": x})]
    assert all(torch.equal(result["weight"], results[0]["weight"]) for result in results)


def test_an_output_with_the_attribute_loss() -> None:
    class Output:
        def __init__(self, loss: torch.Tensor) -> None:
            self.loss = loss

    class Wrapped(nn.Linear):
        def forward(self, x: torch.Tensor) -> Output:
            return Output(super().forward(x).pow(2).sum())

    model = Wrapped(4, 3)
    fields = shira.ShiraConfig("all-linear", mask="snip", k=4)
    assert calibrate(model, fields, {"weight": model.weight}, [torch.randn(2, 4)])["weight"].numel() == 4


def test_a_users_function_gets_the_gradient(model: Model) -> None:
    def own(weight, density, *, grad, **arguments):
        return shira.masks.grad(weight, density, grad=grad, **arguments)

    batches = make_batches(2)
    expected = calibrate(model, config(), weights_of(model), batches)
    check_equal(calibrate(model, config(mask=own), weights_of(model), batches), expected)


def test_bfloat16_sums_are_float32() -> None:
    model = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    fields = shira.ShiraConfig("all-linear", mask="grad", k=1)
    # 1 + 300 * 2^-9: in bfloat16 each further step would be lost, and the other entry's 1.25 would be larger.
    batches = [torch.tensor([1.0, 1.25])] + [torch.tensor([2.0**-9, 0.0])] * 300
    chosen = calibrate(model, fields, {"weight": model.weight}, [(torch.ones(1, 1).bfloat16(),)] * 301, Steps(batches))
    assert chosen["weight"].tolist() == [0]


class Steps:
    """A loss whose gradient in call i is given."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        self.gradients = iter(gradients)

    def __call__(self, output: torch.Tensor, batch: object) -> torch.Tensor:
        return (output * next(self.gradients).bfloat16()).sum()


@pytest.mark.parametrize(
    ("fields", "batches", "loss", "message"),
    [
        ({}, [], None, "calibration: there must be at least one batch"),
        ({}, torch.ones(2, 6), None, "calibration: must be an iterable of batches, got Tensor"),
        ({}, {"x": torch.ones(2, 6)}, None, "calibration: must be an iterable of batches, got dict"),
        ({}, 3, None, "calibration: must be an iterable of batches, got int"),
        ({}, [torch.ones(2, 6)], None, "calibration: what the model gave .dict. has no loss"),
        ({}, [torch.ones(2, 6)], lambda output, batch: output["output"], "calibration: the loss must be a tensor of"),
        ({}, [torch.ones(2, 6)], lambda output, batch: 3.0, "calibration: the loss must be .* got float"),
        ({}, [torch.ones(2, 6)], lambda output, batch: torch.ones(()), "calibration: the loss does not depend"),
        ({"mask": "wm"}, make_batches(1), None, "calibration: mask 'wm' does not rank by gradients"),
    ],
)
def test_wrong_input_is_named(model: Model, fields: dict, batches: object, loss: object, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^{message}"):
        calibrate(model, config(**fields), weights_of(model), batches, loss)
    assert snapshot(model) == before


@pytest.mark.parametrize("number", [1, 2])
def test_a_weight_that_no_gradient_reaches_is_named(model: Model, number: int) -> None:
    weights = {**weights_of(model), "unused.weight": model.unused.weight}
    with pytest.raises(ValueError, match=r"^unused\.weight: no gradient reached"):
        calibrate(model, config(), weights, make_batches(number))


def test_nan_gradients_name_the_weight(model: Model) -> None:
    with pytest.raises(ValueError, match=r"weight: NaN scores are refused"):
        calibrate(model, config(), weights_of(model), make_batches(1), lambda output, _: output["loss"] * torch.nan)


def test_inference_mode_is_refused(model: Model) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        calibrate(model, config(), weights_of(model), make_batches(1))
    with torch.no_grad():
        calibrate(model, config(), weights_of(model), make_batches(1))
