"""The library on a model that is on a GPU: training, switching, batches, graphs, streams. Each test has the same body
on the CPU, so that it is known to be right before a GPU is there; a GPU must give what the CPU's reference gives."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import shira
from shira import ShiraAdamW
from shira.adapter import checksum_of
from shira.serving import registry
from shira.serving import rows as serving_rows
from shira_kernels import backends

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
# Code that torch.compile makes for a GPU takes many seconds, which tests of the kernels should not wait for.
each_compiler = pytest.mark.parametrize(
    ("device", "compiler"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=[*NEEDS_GPU, pytest.mark.slow_gpu])],
)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
VOCABULARY, WIDTH = 20, 16
LINEAR = ("first.weight", "second.weight")


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """Not in TensorFloat-32, and the same each time."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


class Net(nn.Module):
    """A layer of each kind that is trained in a way of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32, embedding: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH) if embedding else nn.Identity()
        self.first = nn.Linear(WIDTH, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.second = nn.Linear(24, 12)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.embedding(x)))
        return self.second(torch.tanh(self.conv(hidden.transpose(-1, -2))).transpose(-1, -2))


class Linear(Net):
    """Of linear layers alone, for vectors: what batches change."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype, embedding=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))


def vectors(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((*shape, WIDTH), generator=torch.Generator().manual_seed(seed))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().cpu().clone().view(BITS[t.element_size()]) for n, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def config(mask: str = "wm") -> shira.ShiraConfig:
    return shira.ShiraConfig(["embedding", "first", "conv", "second"], mask=mask, density=0.2, seed=3)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output.float() - 0.5).square().mean()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ShiraAdamW": lambda parameters: ShiraAdamW(parameters, lr=0.02, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
}


def train(model: nn.Module, handle: shira.Handle, optimizer: str, steps: int = 5) -> list[float]:
    """Losses of each step, the last one after all of them."""
    stepper = OPTIMIZERS[optimizer](handle.parameters())
    device = next(model.parameters()).device
    losses = []
    for step in range(steps):
        loss = loss_of(model(ids(step % 2).to(device)))
        losses.append(loss.item())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    return [*losses, loss_of(model(ids(0).to(device))).item()]


def close_values(got: shira.Adapter, want: shira.Adapter, base: nn.Module, share: float) -> None:
    """They differ by no more than a share of what training changed, on average."""
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got[name].indices, tensor.indices)
        old = base.get_parameter(name).detach().view(-1)[tensor.indices.long()].double()
        change, error = (tensor.values.double() - old).abs(), (got[name].values.double() - tensor.values.double()).abs()
        assert float(change.mean()) > 0
        assert float(error.mean()) <= share * float(change.mean()), name


@each_device
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)], ids=["fp32", "bf16"])
def test_training_is_that_of_the_reference(device: str, optimizer: str, dtype: torch.dtype, share: float) -> None:
    with backends.use("reference"):
        expected = Net(dtype)
        wanted = shira.attach(expected, config())
        losses = train(expected, wanted, optimizer)
        want = wanted.adapter()
    model = Net(dtype).to(device)
    before = bits(model)
    handle = shira.attach(model, config())
    got_losses = train(model, handle, optimizer)
    assert got_losses[-1] < got_losses[0]
    assert got_losses == pytest.approx(losses, rel=share)
    adapter = handle.adapter()
    assert all(tensor.values.device.type == tensor.indices.device.type == "cpu" for tensor in adapter.values())
    assert {tensor.values.dtype for tensor in adapter.values()} == {dtype}
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in handle.parameters()} == {device}
    close_values(adapter, want, Net(dtype), share)
    handle.detach()
    assert same(bits(model), before)
    assert {parameter.device.type for parameter in model.parameters()} == {device}


@each_device
@pytest.mark.parametrize("optimizer", ["ShiraAdamW", "SGD"])
def test_masked_gradients_train_the_same(device: str, optimizer: str) -> None:
    expected, model = Net().to(device), Net().to(device)
    before = bits(model)
    wanted, handle = shira.attach(expected, config()), shira.mask_gradients(model, config())
    train(expected, wanted, optimizer)
    train(model, handle, optimizer)
    close_values(handle.adapter(), wanted.adapter(), Net(), 1e-3)
    handle.detach()
    assert same(bits(model), before)


@each_device
def test_training_gives_the_same_bits_each_time(device: str) -> None:
    results = []
    for _ in range(2):
        model = Net().to(device)
        handle = shira.attach(model, config())
        train(model, handle, "ShiraAdamW")
        results.append(handle.adapter())
    for name in results[0]:
        assert torch.equal(results[0][name].values, results[1][name].values), name


@each_device
def test_equal_tokens_add_up_in_one_order(device: str) -> None:
    """The gradient of an embedding of few tokens, each there thousands of times."""
    gradients = []
    for _ in range(3):
        model = nn.Sequential(nn.Embedding(3, 64)).to(device)
        with torch.no_grad():
            model[0].weight.zero_()
        handle = shira.attach(model, shira.ShiraConfig(["0"], mask="rand", density=1.0))
        tokens = torch.randint(0, 3, (20_000,), generator=torch.Generator().manual_seed(0))
        scale = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
        (model(tokens.to(device)) * scale.to(device)).sum().backward()
        [values] = handle.parameters()
        gradients.append(values.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    want = torch.zeros(3, 64, dtype=torch.float64).index_add_(0, tokens, scale.double())
    torch.testing.assert_close(gradients[0].cpu().double().view(3, 64), want, rtol=1e-4, atol=1e-3)


@each_device
def test_the_scaler_of_float16_skips_what_overflows(device: str) -> None:
    model = Net().to(device)
    before = bits(model)
    handle = shira.attach(model, config())
    stepper = ShiraAdamW(handle.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000, backoff_factor=2.0**-20)
    changed = []
    start = [p.detach().clone() for p in handle.parameters()]
    for _ in range(5):
        stepper.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = loss_of(model(ids().to(device)))
        scaler.scale(loss).backward()
        scaler.unscale_(stepper)
        torch.nn.utils.clip_grad_norm_(list(handle.parameters()), 1.0)
        scaler.step(stepper)
        scaler.update()
        changed.append(not all(torch.equal(a, b) for a, b in zip(start, handle.parameters(), strict=True)))
    assert changed[0] is False
    assert changed[-1] is True
    assert scaler.get_scale() == 2.0**20
    assert all(bool(p.isfinite().all()) for p in handle.parameters())
    handle.detach()
    assert same(bits(model), before)


@each_compiler
def test_compiled_training(device: str, compiler: str) -> None:
    torch._dynamo.reset()
    expected, model = Net().to(device), Net().to(device)
    wanted, handle = shira.attach(expected, config()), shira.attach(model, config())
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    train(expected, wanted, "ShiraAdamW", steps=3)
    train(compiled, handle, "ShiraAdamW", steps=3)
    close_values(handle.adapter(), wanted.adapter(), Net(), 1e-3)


@each_device
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_the_same_gradients(device: str, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = Linear().to(device)
        handle = shira.attach(model, shira.ShiraConfig(["first", "second"], mask="rand", density=0.3))
        x = vectors(4).to(device).requires_grad_()
        output = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        loss_of(output).backward()
        grads.append([x.grad, *(parameter.grad for parameter in handle.parameters())])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@each_device
def test_an_adapter_is_saved_loaded_and_trained_on(device: str, tmp_path: Path) -> None:
    model = Net(torch.bfloat16).to(device)
    before = bits(model)
    handle = shira.attach(model, config("rand"))
    train(model, handle, "ShiraAdamW")
    adapter, trained = handle.adapter(), bits(model)
    adapter.save(tmp_path / "a.safetensors")
    handle.detach()
    adapter.save(tmp_path / "b.safetensors", indices=False, base=model)  # recomputed from the config
    for name in ("a", "b"):
        loaded = shira.Adapter.load(tmp_path / f"{name}.safetensors", base=model)
        for tensor_name, tensor in adapter.items():
            assert torch.equal(loaded[tensor_name].indices, tensor.indices)
            assert torch.equal(loaded[tensor_name].values.view(torch.int16), tensor.values.view(torch.int16))
        handle = shira.attach(model, loaded)
        now = bits(model)
        assert all(torch.equal(now[name], trained[name]) for name in before)
        train(model, handle, "ShiraAdamW", steps=1)
        handle.detach()
        assert same(bits(model), before)


@each_device
def test_a_model_is_moved_after_attach(device: str) -> None:
    """The arenas, the gradients and the columns of the entries move too."""
    expected, model = Net().to(device), Net()
    wanted, handle = shira.attach(expected, config()), shira.attach(model, config())
    loss_of(model(ids())).backward()
    kept = list(handle.parameters())
    model.to(device)
    assert all(a is b for a, b in zip(kept, handle.parameters(), strict=True))
    assert {p.grad.device.type for p in handle.parameters() if p.grad is not None} == {device}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
    train(expected, wanted, "ShiraAdamW")
    train(model, handle, "ShiraAdamW")
    close_values(handle.adapter(), wanted.adapter(), Net(), 1e-3)
    assert all(b.data_ptr() == a.data_ptr() + a.nbytes for a, b in itertools.pairwise(handle.parameters()))
    model.cpu()
    loss_of(model(ids())).backward()
    handle.detach()
    assert same(bits(model), bits(Net()))


@each_device
def test_a_state_dict_goes_from_one_device_to_another(device: str) -> None:
    model, other = Net().to(device), Net()
    handle, twin = shira.attach(model, config()), shira.attach(other, config())
    stepper, twins_stepper = OPTIMIZERS["ShiraAdamW"](handle.parameters()), OPTIMIZERS["ShiraAdamW"](twin.parameters())
    for step in range(3):
        stepper.zero_grad()
        loss_of(model(ids(step).to(device))).backward()
        stepper.step()
    other.load_state_dict(model.state_dict())
    twins_stepper.load_state_dict(copy.deepcopy(stepper.state_dict()))
    assert same(bits(model), bits(other))
    for where, which in ((device, model), ("cpu", other)):
        loss_of(which(ids(7).to(where))).backward()
    for parameter, twins in zip(handle.parameters(), twin.parameters(), strict=True):
        states = stepper.state[parameter], twins_stepper.state[twins]
        for name in ("exp_avg", "exp_avg_sq"):
            assert states[0][name].device.type == device
            assert states[1][name].device.type == "cpu"
            assert torch.equal(states[0][name].cpu(), states[1][name])
        twins.grad = parameter.grad.cpu()  # so that both step alike
    stepper.step()
    twins_stepper.step()
    for parameter, twins in zip(handle.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().cpu(), twins.detach(), rtol=1e-5, atol=1e-7)
    model.load_state_dict(other.state_dict())
    assert same(bits(model), bits(other))


@each_device
def test_states_lie_side_by_side_whatever_the_groups_and_the_schedule(device: str) -> None:
    model, expected = Net().to(device), Net().to(device)
    handle, wanted = shira.attach(model, config()), shira.attach(expected, config())
    groups = []
    for which in (handle, wanted):
        parameters = list(which.parameters())
        groups.append([{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:], "betas": (0.8, 0.9)}])
    steppers = ShiraAdamW(groups[0], lr=0.03, weight_decay=0.2), torch.optim.AdamW(groups[1], lr=0.03, weight_decay=0.2)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(stepper, 6) for stepper in steppers]
    for step in range(6):
        for net, stepper, schedule in zip((model, expected), steppers, schedules, strict=True):
            stepper.zero_grad()
            loss_of(net(ids(step).to(device))).backward()
            stepper.step()
            schedule.step()
    for parameter, wants in zip(handle.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(parameter, wants, rtol=1e-3, atol=1e-4)
    for group in groups[0]:
        for name in ("exp_avg", "exp_avg_sq"):
            states = [steppers[0].state[parameter][name] for parameter in group["params"]]
            assert {state.device.type for state in states} == {device}
            assert len({state.untyped_storage().data_ptr() for state in states}) == 1
    with torch.no_grad():
        assert same(bits(model), bits(model))
        output = model(ids().to(device))
    shira.attach(trained := Net().to(device), handle.adapter())
    with torch.no_grad():
        assert torch.equal(trained(ids().to(device)), output)


# Switching


def make(model: nn.Module, seed: int, names: tuple[str, ...] = LINEAR, kind: str = "replace") -> shira.Adapter:
    """An adapter of random entries for a model that holds its base."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        weight = model.get_parameter(name).detach().cpu()
        indices = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 6].sort().values
        base = weight.view(-1)[indices]
        change = (torch.randn(indices.numel(), generator=generator) * 0.3).to(weight.dtype)
        values = change if kind == "add" else base + change
        tensors[name] = shira.AdapterTensor(indices, values, tuple(weight.shape), weight.dtype, kind, checksum_of(base))
    return shira.Adapter(tensors)


def bank_of(model: nn.Module, **options: Any) -> shira.ResidentAdapters:
    bank = shira.ResidentAdapters(model, **options)
    bank.add("blue", make(model, 1))
    bank.add("paint", make(model, 2, kind="add"))
    bank.add("green", make(model, 3, LINEAR[:1]))
    return bank


TARGETS: list[Any] = [
    None,
    "blue",
    "paint",
    "green",
    {"blue": 0.7, "paint": 0.4},
    {"green": -1.0},
    {"blue": 1.0, "green": 2.0},
]


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switches_are_those_of_the_cpu_and_the_base_comes_back(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with backends.use("reference"):
        twin = Linear(dtype)
        twins_bank = bank_of(twin)
        expected = []
        for target in TARGETS:
            with twins_bank.using(target):
                expected.append(bits(twin))
    model = Linear(dtype).to(device)
    before = bits(model)
    bank = shira.ResidentAdapters(model)
    for name, adapter in (
        ("blue", make(model, 1)),
        ("paint", make(model, 2, kind="add")),
        ("green", make(model, 3, LINEAR[:1])),
    ):
        adapter.save(tmp_path / f"{name}.safetensors")
        bank.add(name, tmp_path / f"{name}.safetensors", on_host=name == "green")
    order = random.Random(0)
    for turn in range(60):
        which = order.randrange(len(TARGETS))
        if turn % 3 == 0:
            bank.stage(TARGETS[which])
        if turn % 5 == 0:
            bank.switch(None)
            with bank.using(TARGETS[which]):
                assert same(bits(model), expected[which])
        else:
            bank.switch(TARGETS[which])
            assert same(bits(model), expected[which])
            assert bank.active == TARGETS[which]
    bank.verify_base()
    bank.switch(None)
    bank.verify_base()
    assert same(bits(model), before)
    with torch.no_grad():
        model.first.weight.view(-1)[int(make(model, 1)["first.weight"].indices[0])] += 1
    with pytest.raises(ValueError, match=r"blue: first.weight: the base entries changed"):
        bank.verify_base()


@contextlib.contextmanager
def own_stream(device: str) -> Iterator[None]:
    """Where there is a GPU, a stream of one's own, that is waited for at the end alone."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@each_device
def test_threads_with_streams_of_their_own_switch_one_after_the_other(device: str) -> None:
    model = Linear().to(device)
    before, bank = bits(model), bank_of(model)
    failed: list[BaseException] = []

    def run(seed: int) -> None:
        order = random.Random(seed)
        stream = torch.cuda.Stream() if device == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                for _ in range(40):
                    bank.switch(order.choice(TARGETS))
                    if order.random() < 0.2:
                        bank.stage(order.choice(TARGETS))
                    scratch = [torch.full((order.randrange(1, 200),), -7.0, device=device) for _ in range(5)]
                    del scratch  # memory that is freed on one stream and still read on another would show
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    bank.switch(None)
    assert same(bits(model), before)
    assert bank.active is None


@each_device
def test_a_switch_on_a_side_stream_while_the_model_runs_on_another(device: str) -> None:
    """In the order that docs/serving.md asks for: each waits for the other."""
    model, x = Linear().to(device), vectors(64).to(device)
    bank, expected = bank_of(model), []
    with torch.no_grad():
        for target in TARGETS:
            with bank.using(target):
                expected.append(model(x))
        got = []
        for target in TARGETS:
            with own_stream(device):
                if device == "cuda":
                    torch.cuda._sleep(2_000_000)
                bank.switch(target)
            got.append(model(x))
    for one, want in zip(got, expected, strict=True):
        assert torch.equal(one, want)


class Replayed:
    """`run()` as a CUDA graph; on the CPU, run anew at each replay, after a run that a bank thinks is captured."""

    def __init__(self, device: str, run: Callable[[], torch.Tensor], **options: Any) -> None:
        self._device, self._run = device, run
        if device == "cpu":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(serving_rows, "is_captured", lambda _: True)
                self.output = run().clone()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # warms up
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, **options):
            self.output = run()

    def __call__(self) -> torch.Tensor:
        if self._device == "cpu":
            self.output.copy_(self._run())
        else:
            self._graph.replay()
        return self.output.clone()


@each_device
def test_a_captured_forward_follows_the_switches(device: str) -> None:
    model, x = Linear().to(device), vectors(5).to(device)
    bank = bank_of(model)
    with torch.no_grad():
        replay = Replayed(device, lambda: model(x))
        for target in [*TARGETS, "blue", None]:
            bank.switch(target)
            close(replay(), model(x))
        x.copy_(vectors(5, seed=9).to(device))
        close(replay(), model(x))


class Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: reads of an element, and shapes that depend on data."""

    SUSPECTS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in (args[1] if name in ("index", "index_put_") else ()) if t is not None]
        scalar_step = name == "_local_scalar_dense" and args[0].dtype == torch.float32  # an optimizer's, on the CPU
        if (name.startswith(self.SUSPECTS) and not scalar_step) or any(t.dtype == torch.bool for t in masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Fails if the CPU has to wait for a GPU."""
    if device == "cpu":
        with Waits() as waits:
            yield
        assert not waits.found
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_device
def test_nothing_waits_for_the_gpu_in_a_switch_a_step_or_a_batch(device: str) -> None:
    model, x = Linear().to(device), vectors(4).to(device)
    bank = bank_of(model)
    mix = {"blue": 0.7, "paint": 0.4}
    for _ in range(2):  # the first one makes tables, code and the mix
        bank.switch("blue")
        bank.switch("green")
        bank.switch(None)
        with torch.no_grad(), bank.batch(["blue", None, "paint", "green"]):
            model(x)
        bank.switch(mix)
        bank.switch(None)
    for target in ("blue", "green", "paint", None):
        with no_waits(device):
            bank.switch(target)
    bank.switch(mix)
    with no_waits(device):
        bank.switch({"blue": 0.1, "paint": -0.4})
        bank.switch(None)
    with torch.no_grad(), no_waits(device), bank.batch(["paint", "green", "blue", "paint"]):
        model(x)
    trained = Net().to(device)
    handle = shira.attach(trained, config())
    stepper = ShiraAdamW(handle.parameters(), lr=0.1)
    tokens = ids().to(device)
    for step in range(3):
        with no_waits(device) if step == 2 else contextlib.nullcontext():
            stepper.zero_grad()
            loss_of(trained(tokens)).backward()
            stepper.step()


@each_device
def test_no_memory_while_an_adapter_is_added(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of the calls that allocate."""
    model = Linear().to(device)
    bank, before = bank_of(model), bits(model)
    bank.switch("blue")
    stats, homes = bank.stats, dict(bank._registry.homes)
    new = make(Linear(), 5)
    places = [(registry, "base_entries"), (registry, "checksum_of"), (registry.Arena, "in_runs"), (torch, "cat")]
    for owner, function in places:
        for at in range(3):
            real, calls = getattr(owner, function), iter(range(100))

            def fail(*args: Any, real: Any = real, calls: Any = calls, at: int = at, **options: Any) -> Any:
                if next(calls) == at:
                    raise torch.OutOfMemoryError("no memory")
                return real(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(owner, function, fail)
                try:
                    bank.add("new", new, force=True)
                except torch.OutOfMemoryError:
                    assert bank.names == ["blue", "paint", "green"]
                    assert bank.stats == stats
                    assert bank._registry.homes == homes
                else:
                    assert at
                    bank.remove("new")
    bank.switch("paint")
    bank.switch(None)
    assert same(bits(model), before)
    with bank.batch(["blue", "paint"]), torch.no_grad():
        model(vectors(2).to(device))


@each_device
def test_what_cannot_be_written_in_place_is_refused(device: str) -> None:
    adapter = make(Linear(), 1, LINEAR[:1])
    model = Linear().to(device)
    model.first.weight = nn.Parameter(model.first.weight.detach().t().contiguous().t())
    with pytest.raises(ValueError, match=r"first.weight: the model's tensor must be contiguous, got strides"):
        shira.ResidentAdapters(model).add("blue", adapter)
    with pytest.raises(ValueError, match="must be contiguous"):
        shira.attach(model, shira.ShiraConfig(["first"]))
    images = nn.Sequential(nn.Conv2d(4, 4, 3)).to(device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"0.weight|0: .*must be contiguous"):
        shira.attach(images, shira.ShiraConfig(["0"]))
    images = nn.Sequential(nn.Conv2d(4, 4, 3)).to(device)
    handle = shira.attach(images, shira.ShiraConfig(["0"], density=0.2))
    images.to(memory_format=torch.channels_last)
    assert images[0].weight.is_contiguous()
    images(torch.ones(1, 4, 5, 5, device=device).to(memory_format=torch.channels_last)).sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


@each_device
def test_a_model_that_was_moved_is_refused_until_it_is_back(device: str) -> None:
    model = Linear().to(device)
    bank, before = bank_of(model), bits(model)
    bank.switch("blue")
    active = bits(model)

    def move(away: bool) -> None:
        if device == "cuda":
            model.to("cpu" if away else "cuda")
        else:
            model.to(torch.float64 if away else torch.float32)

    move(True)
    for action in (lambda: bank.switch(None), lambda: bank.switch("paint"), lambda: bank.add("new", make(model, 4))):
        with pytest.raises(RuntimeError, match=r"Linear was torch.float32 on .* move it back"):
            action()
    move(False)
    assert same(bits(model), active)
    bank.switch(None)
    assert same(bits(model), before)
    move(True)
    with pytest.raises(RuntimeError, match="move it back"), bank.batch(["blue", "paint"]):
        raise AssertionError
    for name in bank.names:
        bank.remove(name)
    bank.add("new", make(model, 4))
    bank.switch("new")
    bank.switch(None)
    move(False)
    assert same(bits(model), before)


# Batches

ROWS: list[Any] = ["blue", None, {"blue": 0.7, "green": -0.5}, "paint"]


def alone(bank: shira.ResidentAdapters, model: nn.Module, rows: list[Any], x: torch.Tensor) -> torch.Tensor:
    """Each row with its adapter fused."""
    outputs = []
    for i, row in enumerate(rows):
        with bank.using(row):
            outputs.append(model(x[i : i + 1]))
    return torch.cat(outputs)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """bfloat16: the base's product, the delta and the sum are rounded in each of two layers."""
    share = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=share * float(want.float().abs().max()))


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 200_000], ids=["all", "budget"])
def test_rows_of_a_batch_are_those_of_each_adapter_fused(device: str, dtype: torch.dtype, budget: int | None) -> None:
    model = Linear(dtype).to(device)
    bank, before = bank_of(model, device_budget=budget), bits(model)
    with torch.no_grad():
        for length in (1, 40):
            for rows in (ROWS, ["green", "paint", None, "blue"], [None, None, "blue", None]):
                x = vectors(4, length).to(device, dtype)
                want = alone(bank, model, rows, x)
                with bank.batch(rows, mode="unfused"):
                    close(model(x), want, dtype)
                assert not torch.equal(want, model(x))
    assert same(bits(model), before)
    tensors = [
        *bank._batches.pages.tensors,
        *(tensor for rows in bank._batches._rows.values() for tensor in rows.tensors),
    ]
    assert {tensor.device.type for tensor in tensors} == {device}


@each_device
@pytest.mark.parametrize("budget", [None, 200_000], ids=["all", "budget"])
def test_a_captured_batch_follows_the_batches(device: str, budget: int | None) -> None:
    model, x = Linear().to(device), vectors(4, 3).to(device)
    bank = bank_of(model, device_budget=budget)
    others = [vectors(4, length).to(device) for length in range(4, 24)]

    def other_shapes() -> None:
        with torch.no_grad():
            for each in others:
                model(each)

    def in_a_thread(action: Callable[[], object]) -> None:
        thread = threading.Thread(target=action)
        thread.start()
        thread.join()

    with bank.batch([*bank.names, ROWS[2]]):
        pass  # room for all
    with torch.no_grad():
        base = model(x)
        with bank.batch(ROWS, mode="unfused"):
            replay = Replayed(device, lambda: model(x))
            in_a_thread(other_shapes)
            close(replay(), model(x))
        close(replay(), base)
        for turn, rows in enumerate((["paint", None, "green", "blue"], ROWS, [None, "blue", "blue", None])):
            want = alone(bank, model, rows, x)
            with bank.batch(rows, mode="unfused"):
                in_a_thread(other_shapes)
                close(replay(), model(x))
                close(replay(), want)
            for count in range(5, 25):
                with bank.batch(["green", *[None] * count]):
                    pass
            bank.remove("green")
            bank.add("green", make(model, 10 + turn, LINEAR[:1]))
        bank.switch("paint")
        close(replay(), model(x))
        bank.switch(None)
    bank.forget_graphs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_another_thread_makes_the_bank_forget_shapes_while_a_batch_is_captured() -> None:
    model, x = Linear().to("cuda"), vectors(4, 3).to("cuda")
    bank = bank_of(model)
    with torch.no_grad(), bank.batch(ROWS, mode="unfused"):
        [rows] = bank._batches._rows.values()
        table = bank._batches.pages.tables[model.first.weight]
        model(x)
        for length in range(4, 24):
            model(vectors(4, length).to("cuda"))  # what the capture needs was forgotten before

        def forget() -> None:
            for tokens in range(2, 60):
                rows.of(torch.empty(4, tokens, WIDTH, device="cuda"), table)

        def run() -> torch.Tensor:
            thread = threading.Thread(target=forget)
            hidden = torch.tanh(model.first(x))
            thread.start()
            thread.join()
            return model.second(hidden)

        replay = Replayed("cuda", run, capture_error_mode="thread_local")
        close(replay(), model(x))
    with torch.no_grad(), bank.batch(["paint", None, None, "blue"], mode="unfused"):
        close(replay(), model(x))


@each_compiler
def test_a_compiled_batch(device: str, compiler: str) -> None:
    torch._dynamo.reset()
    model, x = Linear().to(device), vectors(4, 3).to(device)
    bank = bank_of(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    with torch.no_grad():
        base = compiled(x)
        for rows in (ROWS, ["green", None, None, "blue"]):
            want = alone(bank, model, rows, x)
            with bank.batch(rows, mode="unfused"):
                close(compiled(x), want)
        close(compiled(x), base)


@each_device
def test_a_batch_that_fuses_on_the_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 60)
    model, x = Linear().to(device), vectors(2).to(device)
    bank, before = bank_of(model), bits(model)
    with torch.no_grad():
        want = alone(bank, model, ["blue", "blue"], x)
        with bank.batch(["blue", "blue"]):
            for _ in range(4):
                close(model(x), want)
            assert bank.active == "blue"
    assert bank.active is None
    assert same(bits(model), before)


@each_device
@pytest.mark.parametrize("mask", ["struct", "rand", "wm", "grad", "snip", "small"])
def test_masks_are_those_of_the_cpu(device: str, mask: str) -> None:
    weight = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(60, 50, generator=torch.Generator().manual_seed(1))
    options = {"grad": grad} if mask in ("grad", "snip") else {}
    make_mask = getattr(shira.masks, mask)
    want = make_mask(weight, 0.05, seed=4, **options)
    got = make_mask(weight.to(device), 0.05, seed=4, **{key: value.to(device) for key, value in options.items()})
    assert got.device.type == device
    assert torch.equal(got.cpu(), want)


@each_device
def test_calibration_and_differences(device: str) -> None:
    """Masks by gradient of a model that is there, and what training changed."""
    model, twin = Net().to(device), Net()
    chosen = []
    for which, where in ((model, device), (twin, "cpu")):
        batches = [ids(seed).to(where) for seed in range(3)]
        handle = shira.attach(which, config("snip"), calibration=batches, loss=lambda output, _: loss_of(output))
        chosen.append({name: tensor.indices for name, tensor in handle.adapter().items()})
        assert all(parameter.device.type == where for parameter in handle.parameters())
        train(which, handle, "ShiraAdamW", steps=2)
        adapter = handle.adapter()
        handle.detach()
        base = copy.deepcopy(which.state_dict())
        with torch.no_grad():
            for name, tensor in adapter.items():
                which.get_parameter(name).view(-1)[tensor.indices.long().to(where)] = tensor.values.to(where)
        found = shira.diff(base, which.state_dict())
        for name, tensor in found.items():
            assert torch.equal(tensor.values, which.state_dict()[name].cpu().view(-1)[tensor.indices.long()])
    for name in chosen[0]:
        share = torch.isin(chosen[0][name], chosen[1][name]).float().mean()
        assert share > 0.9, name  # gradients differ in their last bits


@each_device
def test_sums_of_adapters(device: str) -> None:
    model = Linear().to(device)
    blue, paint = make(model, 1), make(model, 2)
    on_cpu = shira.fuse([(blue, 0.7), (paint, 0.3)], base=Linear())
    fused = shira.fuse([(blue, 0.7), (paint, 0.3)], base=model)
    for name, tensor in on_cpu.items():
        assert torch.equal(fused[name].indices.cpu(), tensor.indices)
        torch.testing.assert_close(fused[name].values.cpu(), tensor.values, rtol=1e-6, atol=1e-7)
    bank = shira.ResidentAdapters(model)
    bank.add("fused", fused)
    bank.switch("fused")
    bank.switch(None)
