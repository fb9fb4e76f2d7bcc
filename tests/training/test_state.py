"""What moves beside trained values: buffers, values that others write through `.data`, the random state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from shira_kernels import extract_changed

CONFIG = shira.ShiraConfig("all-linear", density=0.5)
ATTACH = [shira.attach, shira.mask_gradients]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normed() -> nn.Sequential:
    """Layers with running statistics, one without, and one whose buffers are in no state dict."""
    torch.manual_seed(0)
    hidden = nn.BatchNorm1d(8, track_running_stats=False)
    hidden.register_buffer("angles", torch.ones(3), persistent=False)
    last = nn.BatchNorm1d(8, momentum=None)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), hidden, nn.Linear(8, 8), last, nn.Linear(8, 5))


def train(model: nn.Module, handle: shira.Handle, steps: int = 50, batch: torch.Tensor | None = None) -> None:
    optimizer = shira.ShiraAdamW(handle.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)) * 3 + 1 if batch is None else batch
        model(x).square().mean().backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(expected)
    for name, tensor in now.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def patched(base: dict[str, torch.Tensor], adapter: shira.Adapter) -> dict[str, torch.Tensor]:
    """A base with an adapter's entries, by indexing."""
    result = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in adapter.items():
        result[name].view(-1)[tensor.indices.long()] = tensor.values
    return result


@pytest.mark.parametrize("attach", ATTACH)
def test_running_statistics_are_in_the_adapter_and_go_back(attach: Callable, tmp_path: Path) -> None:
    model, x = normed(), torch.randn(7, 6)
    base = state(model)
    handle = attach(model, CONFIG)
    train(model, handle)
    trained = model.eval()(x)
    handle.adapter().save(tmp_path / "a.safetensors")
    adapter = shira.Adapter.load(tmp_path / "a.safetensors")
    statistics = [f"{layer}.running_{kind}" for layer in (1, 4) for kind in ("mean", "var")]
    assert list(adapter) == ["0.weight", "3.weight", "5.weight", *statistics]  # and no num_batches_tracked

    fresh = normed()
    fresh.load_state_dict(patched(base, adapter))
    assert torch.equal(fresh.eval()(x), trained)

    going_on = normed()
    second = attach(going_on, adapter)
    assert torch.equal(going_on.eval()(x), trained)
    again = second.adapter()
    assert list(again) == list(adapter)
    for name, tensor in again.items():
        assert torch.equal(tensor.indices, adapter[name].indices)
        assert torch.equal(tensor.values, adapter[name].values)
        assert tensor.checksum == adapter[name].checksum
    train(going_on.train(), second, 2)
    for each, net in ((handle, model), (second, going_on)):
        each.detach()
        assert_state(net, base)  # num_batches_tracked, too


def test_statistics_that_stay_are_not_in_the_adapter() -> None:
    model = normed().eval()
    handle = shira.attach(model, CONFIG)
    train(model, handle, 2)
    assert list(handle.adapter()) == ["0.weight", "3.weight", "5.weight"]
    model.train()
    train(model, handle, 1)
    kept = state(model)
    handle.detach(keep=True)
    assert_state(model, {name: tensor for name, tensor in kept.items() if "shira" not in name})


def test_statistics_move_with_the_model_and_resume_over_another_base() -> None:
    whole = normed()
    base = state(whole)
    handle = shira.attach(whole, shira.ShiraConfig("all-linear", mask="rand", density=0.5))
    train(whole, handle, 3)
    checkpoint = copy.deepcopy(whole.state_dict())
    # Whatever the model holds now, as a model that was built from a checkpoint does: the base is the checkpoint's.
    other = normed()
    with torch.no_grad():
        for tensor in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
            tensor.add_(1)
    resumed = shira.attach(other, shira.ShiraConfig("all-linear", mask="rand", density=0.5))
    other.load_state_dict(checkpoint)
    for name, tensor in resumed.adapter().items():
        assert torch.equal(tensor.values, handle.adapter()[name].values)
        assert tensor.checksum == handle.adapter()[name].checksum
    resumed.detach()
    assert_state(other, base)

    whole.double()
    twin, twin_handle = copy.deepcopy((whole, handle))
    for net, each in ((whole, handle), (twin, twin_handle)):
        assert each.adapter()["1.running_mean"].dtype == torch.float64
        each.detach()
        assert_state(net, {n: t.double() if t.is_floating_point() else t for n, t in base.items()})


def test_statistics_of_modules_to_save_stay_with_them() -> None:
    model = normed()
    handle = shira.attach(model, shira.ShiraConfig(["0", "3"], density=0.5, modules_to_save=["4"]))
    train(model, handle, 3)
    moved = model[4].running_mean.clone()
    assert [name for name in handle.adapter() if "running" in name] == ["1.running_mean", "1.running_var"]
    handle.detach()
    assert torch.equal(model[4].running_mean, moved)


class Amax(nn.Module):
    """Scaling by a running maximum, as fake quantisation has it, with buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor([0], dtype=torch.int32))
        self.register_buffer("low", torch.tensor([]))
        self.register_buffer("codes", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.amax = torch.maximum(self.amax, x.detach().abs().amax())  # another tensor
            self.zero_point += 1
            self.low = x.detach().amin(0)  # another shape
        return x / self.amax


def test_other_buffers_travel_or_are_named() -> None:
    model = nn.ModuleDict({"a/b": nn.BatchNorm1d(6), "up": nn.Linear(6, 6), "scale": Amax()})
    base = state(model)
    handle = shira.attach(model, shira.ShiraConfig(["up"], density=0.5))
    for module in model.values():
        module(torch.randn(4, 6) * 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = handle.adapter()
    assert list(adapter) == ["up.weight", "scale.amax"]
    assert adapter["scale.amax"].values.item() == model["scale"].amax.item() > 1
    messages = [str(warning.message) for warning in caught]
    assert [message.partition(":")[0] for message in messages] == [
        "a/b.running_mean",
        "a/b.running_var",
        "scale.zero_point",
        "scale.low",
    ]
    assert all(warning.category is shira.ShiraWarning and warning.filename == __file__ for warning in caught)
    handle.detach()
    assert_state(model, base)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attach", ATTACH)
def test_states_of_quantisation_are_kept_or_named(attach: Callable) -> None:
    qat = pytest.importorskip("torch.ao.nn.qat", reason="this torch has no training for quantisation")
    quantization = pytest.importorskip("torch.ao.quantization", reason="this torch has no training for quantisation")
    weight = quantization.FakeQuantize.with_args(
        observer=quantization.MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8
    )
    config = quantization.QConfig(activation=weight, weight=weight)
    torch.manual_seed(0)
    model = nn.Sequential(qat.Linear(6, 8, qconfig=config), config.activation())
    base = state(model)
    handle = attach(model, shira.ShiraConfig(["0"], density=0.5))
    train(model, handle, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = handle.adapter()
    names = {name.rpartition(".")[2] for name in adapter}
    named = {str(warning.message).partition(":")[0].rpartition(".")[2] for warning in caught}
    assert {"weight", "scale"} <= names
    moved = {
        name.rpartition(".")[2]
        for name, tensor in base.items()
        if tensor.shape != model.state_dict()[name].shape or not torch.equal(tensor, model.state_dict()[name])
    }
    assert moved == names | named
    handle.detach()
    assert_state(model, base)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_statistics_of_scripted_modules_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), torch.jit.script(nn.BatchNorm1d(8)))
    base = state(model)
    with pytest.warns(
        shira.ShiraWarning, match=r"1\.running_mean, 1\.running_var: buffers of scripted modules"
    ) as caught:
        handle = shira.attach(model, shira.ShiraConfig(["0"], density=0.5))
    assert caught[0].filename == __file__
    assert list(handle.adapter()) == ["0.weight"]
    handle.detach()
    assert_state(model, base)


def test_an_adapter_of_other_statistics_is_refused() -> None:
    model = normed()
    handle = shira.attach(model, CONFIG)
    train(model, handle, 2)
    adapter = handle.adapter()
    other = normed()
    other[1].running_mean.add_(1)
    before = state(other)
    with pytest.raises(ValueError, match=r"1\.running_mean: the adapter belongs to another base"):
        shira.attach(other, adapter)
    assert_state(other, before)
    added = {"0.weight": adapter["0.weight"]}
    mean = adapter["1.running_mean"]
    added["1.running_mean"] = shira.AdapterTensor(mean.indices, mean.values, mean.shape, mean.dtype, "add")
    other[1].running_mean.fill_(2)
    with pytest.warns(shira.ShiraWarning, match="no checksum"):
        shira.attach(other, shira.Adapter(added))
    assert torch.equal(other[1].running_mean[mean.indices.long()], mean.values + 2)


def test_calibration_leaves_statistics_where_they_were() -> None:
    class Training(nn.Sequential):
        def train(self, mode: bool = True) -> Training:
            return super().train(True)

    model = Training(*normed())
    base = state(model)
    batches = [torch.randn(4, 6) for _ in range(2)]
    config = shira.ShiraConfig("all-linear", mask="grad", density=0.5)
    shira.attach(model, config, calibration=batches, loss=lambda output, batch: output.square().mean()).detach()
    assert_state(model, base)


def swap_in(p: nn.Parameter, value: float) -> None:
    p.data = torch.full_like(p.data, value)


WRITES: dict[str, Callable[[nn.Parameter, float], object]] = {
    "copy_": lambda p, value: p.data.copy_(torch.full_like(p, value)),
    "mul_, add_": lambda p, value: p.data.mul_(0).add_(value),
    "foreach": lambda p, value: torch._foreach_copy_([p.data], [torch.full_like(p, value)]),
    "out": lambda p, value: torch.add(torch.zeros_like(p), value, out=p.data),
    "view": lambda p, value: p.data.view(-1)[:].fill_(value),
    "detach": lambda p, value: p.detach().fill_(value),
    "assigned": swap_in,
    "vector_to_parameters": lambda p, value: nn.utils.vector_to_parameters(torch.full_like(p.data, value), [p]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("attach", ATTACH)
def test_the_next_forward_sees_what_is_written_through_data(attach: Callable, write: Callable) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), torch.randn(4, 6)
    handle = attach(model, CONFIG)
    train(model, handle, 2)  # by an optimizer, after whose steps nothing is compared
    for value in (7.0, 8.0, 7.0):
        for values in handle.parameters():
            write(values, value)
        expected = copy.deepcopy(model).state_dict()
        for layer in ("0", "2"):
            expected[f"{layer}.weight"].view(-1)[expected[f"{layer}.shira_indices"].long()] = value
        plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        plain.load_state_dict(expected, strict=False)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        train(model, handle, 1)


def test_memory_that_others_hold_is_watched() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(4, 6)
    handle = shira.attach(model, CONFIG)
    train(model, handle, 1)
    (values,) = handle.parameters()
    held = values.data  # long before it is written
    train(model, handle, 1)
    held.fill_(3)
    model(x)
    assert (model[0].weight.view(-1)[model[0].shira_indices] == 3).all()
    whole = torch.zeros(values.numel() + 1)
    nn.utils.vector_to_parameters(whole[1:], [values])
    model(x)
    whole.fill_(4)  # `values` lies in it now
    model(x)
    assert (model[0].weight.view(-1)[model[0].shira_indices] == 4).all()


class Average:
    """An average of parameters, written as the common helpers do."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        for average, p in zip(self.shadow, self.parameters, strict=True):
            average.lerp_(p.data, 0.3)

    def swap(self) -> None:
        for average, p in zip(self.shadow, self.parameters, strict=True):
            now = p.data.clone()
            p.data.copy_(average.data)
            average.copy_(now)


def test_an_average_is_evaluated_and_training_goes_on() -> None:
    results = []
    for averaged in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), torch.ones(4, 6)
        handle = shira.attach(model, CONFIG)
        optimizer, average = shira.ShiraAdamW(handle.parameters(), lr=0.05), Average(handle.parameters())
        outputs = []
        for step in range(4):
            optimizer.zero_grad()
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            model(batch).square().mean().backward()
            optimizer.step()
            average.update()
            if averaged:
                average.swap()
                with torch.no_grad():
                    outputs.append(model.eval()(x))
                average.swap()
                model.train()
            else:
                twin, twin_handle = copy.deepcopy((model, handle))
                with torch.no_grad():
                    for p, value in zip(twin_handle.parameters(), average.shadow, strict=True):
                        p.copy_(value)
                outputs.append(twin(x))
        results.append((torch.stack(outputs).detach(), [p.detach().clone() for p in handle.parameters()]))
    (expected, plain), (got, values) = results
    assert torch.equal(got, expected)
    assert all(map(torch.equal, values, plain))


def test_averaged_models_hold_their_own_average() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    handle = shira.attach(model, CONFIG)
    average = torch.optim.swa_utils.AveragedModel(model)
    kept = []
    for _ in range(3):
        train(model, handle, 2)
        average.update_parameters(model)
        kept.append([p.detach().clone() for p in handle.parameters()])
    average(torch.randn(2, 6))
    for at, layer in enumerate((average.module[0], average.module[2])):
        mean = torch.stack([values[at] for values in kept]).mean(0)
        torch.testing.assert_close(layer.shira_values.detach(), mean)
        assert torch.equal(layer.weight.view(-1)[layer.shira_indices], layer.shira_values)


def test_nothing_draws_from_the_random_state(tmp_path: Path) -> None:
    model = normed()
    before = torch.get_rng_state()
    for mask in ("rand", "wm", "snip"):
        batches = {"calibration": [torch.ones(4, 6)], "loss": lambda y, _: y.square().mean()} if mask == "snip" else {}
        handle = shira.attach(model, shira.ShiraConfig("all-linear", mask=mask, density=0.5), **batches)
        handle.adapter().save(tmp_path / "a.safetensors")
        handle.detach()
    bank = shira.ResidentAdapters(model)
    bank.add("a", tmp_path / "a.safetensors")
    bank.switch("a")
    bank.switch(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_as_in_the_bare_model() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 5), nn.Dropout())
    model, x = copy.deepcopy(plain), torch.randn(4, 6)
    shira.attach(model, CONFIG)
    outputs = []
    for net in (plain, model):
        torch.manual_seed(5)
        net(x).sum().backward()
        outputs.append(net(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("key", ["a/b", "a\\b", "a\nb"])
def test_a_name_that_no_file_can_hold_is_refused(attach: Callable, key: str) -> None:
    model = nn.ModuleDict({key: nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"without slashes, got .*: no adapter file could hold it; rename the module"):
        attach(model, CONFIG)
    assert type(model[key]) is nn.Linear
    shira.attach(model, shira.ShiraConfig(["c"], density=0.5)).adapter()


def test_what_is_moved_is_what_changed() -> None:
    model = normed()
    handle = shira.attach(model, CONFIG)
    base = model[1].running_var.clone()
    with torch.no_grad():
        model[1].running_var[2] = 5
    tensor = handle.adapter()["1.running_var"]
    indices, values = extract_changed(base, model[1].running_var)
    assert tensor.indices.tolist() == indices.tolist() == [2]
    assert torch.equal(tensor.values, values)
