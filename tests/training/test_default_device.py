"""The library's calls give the same bits, in the same places, whatever torch's default device and dtype are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from shira_kernels import backends

META = torch.device("meta")  # nothing that is made there by mistake has data


@contextlib.contextmanager
def device_set() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def dtype_set(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "set_default_device": device_set,
    "with torch.device": lambda: META,
    "float64": lambda: dtype_set(torch.float64),
    "bfloat16": lambda: dtype_set(torch.bfloat16),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(12, 8, device="cpu", dtype=dtype),
        nn.Linear(8, 12, device="cpu", dtype=dtype),
        nn.Conv1d(5, 5, 3, device="cpu", dtype=dtype),
        nn.Linear(10, 6, device="cpu", dtype=dtype),
    )
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(draw(*p.shape, seed=number))
    return model


def ids(count: int = 3) -> torch.Tensor:
    return torch.arange(count * 5, device="cpu").view(count, 5) * 7 % 12


def training(dtype: torch.dtype, folder: Path) -> Iterator[object]:
    for mask in ("wm", "rand", "struct", "grad", "snip", "small"):
        by_gradient = {"calibration": [ids(2)], "loss": lambda y, _: y.float().square().mean()}
        model = network(dtype)
        config = shira.ShiraConfig(
            ["0", "1", "2", "3"], mask=mask, density=0.2, budget="model" if mask == "wm" else "tensor", granularity=2
        )
        handle = shira.attach(model, config, **(by_gradient if mask in ("grad", "snip") else {}))
        decay = "deltas" if mask == "wm" else "weights"
        optimizer = shira.ShiraAdamW(handle.parameters(), lr=0.02, weight_decay=0.1, decay=decay)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(ids()).float().square().mean()
            loss.backward()
            optimizer.step()
        yield loss
        optimizer.load_state_dict(optimizer.state_dict())
        model.load_state_dict(model.state_dict())
        adapter = handle.adapter()
        adapter.save(folder / f"{mask}.safetensors")
        yield from shira.Adapter.load(folder / f"{mask}.safetensors").items()
        handle.detach()
        shira.mask_gradients(model, adapter).detach()
        if mask in ("rand", "small", "struct") and config.budget == "tensor":
            adapter.save(folder / "short.safetensors", indices=False, base=model)
            yield from shira.Adapter.load(folder / "short.safetensors", base=model).items()
        yield from model.state_dict().items()


def listed(dtype: torch.dtype, folder: Path) -> Iterator[object]:
    weight = nn.Parameter(draw(6, 8, dtype=dtype))
    bias = nn.Parameter(draw(6, dtype=dtype))
    indices = torch.tensor([1, 5, 40], device="cpu")
    optimizer = shira.ShiraAdamW([weight, bias], lr=0.1, indices={weight: indices}, decay="deltas")
    for _ in range(2):
        (draw(3, 8, dtype=dtype) @ weight.T + bias).square().sum().backward()
        optimizer.step()
    yield weight
    yield bias


def serving(dtype: torch.dtype, folder: Path) -> Iterator[object]:
    tuned = network(dtype)
    adapters = {}
    for name, seed in (("a", 20), ("b", 21)):
        base, tuned = network(dtype), network(dtype)
        with torch.no_grad():
            for layer in (1, 3):
                changed = tuned[layer].weight.view(-1)[seed - 20 :: 3]
                changed += draw(*changed.shape, seed=seed, dtype=dtype)
        adapters[name] = shira.diff(base, tuned)
    yield from adapters["a"].items()
    adapters["a"].save(folder / "a.safetensors")
    model = network(dtype)
    bank = shira.ResidentAdapters(model)
    bank.add("a", folder / "a.safetensors")
    bank.add("b", adapters["b"])
    for target in ("a", {"a": 0.7, "b": 0.5}, "b", None):
        bank.switch(target)
        yield from model.state_dict().items()
    bank.verify_base()
    for unfused in (["a", None, "b"], [{"a": 0.5, "b": 2.0}, "a", "a"]):
        with bank.batch(unfused):
            yield model(ids())
    for policy in ("sum", "mean", "last", "ties"):
        yield from shira.fuse([(adapters["a"], 0.7), (adapters["b"], 0.3)], policy=policy, base=model).items()
    for metric in (shira.awom, shira.awor):
        yield metric(adapters["a"], adapters["b"], base=model)
    yield shira.overlap(adapters["a"], adapters["b"])
    yield from shira.diff(model, tuned, top=0.05).items()


def files(dtype: torch.dtype, folder: Path) -> Iterator[object]:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    base, tuned = nn.Sequential(*network(dtype))[1:2], nn.Sequential(*network(dtype))[1:2]
    with torch.no_grad():
        tuned[0].weight.view(-1)[::3] += 1
    for name, model in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        safetensors.save_file(model.state_dict(), folder / name / "model.safetensors")
    adapter = shira.diff(folder / "base", folder / "tuned")
    adapter.save(folder / "a.safetensors")
    shira.merge_checkpoint(folder / "base", [(folder / "a.safetensors", 0.5)], folder / "merged")
    yield from safetensors.load_file(folder / "merged" / "model.safetensors").items()
    for form in ("patch", "peft-shira"):
        shira.convert.write(adapter, folder / form, form, base=folder / "base")
        yield from shira.convert.read(folder / form, folder / "base").items()


def taken(results: Iterator[object]) -> list[object]:
    """The results, with tensors copied as they are."""

    def flat(value: object) -> object:
        if isinstance(value, torch.Tensor):
            assert value.device.type == "cpu"
            return value.detach().clone()
        if isinstance(value, shira.AdapterTensor):
            return [flat(value.indices), flat(value.values), value.shape, value.dtype, value.checksum]
        if isinstance(value, (tuple, list)):
            return [flat(each) for each in value]
        if isinstance(value, Mapping):
            return [[name, flat(each)] for name, each in value.items()]
        return value

    return [flat(result) for result in results]


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


CALLS = [training, listed, serving, files]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("calls", CALLS)
def test_defaults_change_nothing(calls: Callable, dtype: torch.dtype, backend: str | None, tmp_path: Path) -> None:
    results = {}
    for name, default in {"": contextlib.nullcontext, **DEFAULTS}.items():
        (tmp_path / (name or "none")).mkdir()
        with default(), backends.use(backend) if backend else contextlib.nullcontext():
            results[name] = taken(calls(dtype, tmp_path / (name or "none")))
    for name in DEFAULTS:
        assert_same(results[name], results[""])
