"""PEFT's SHiRA and Super-Tuning layers on our kernels, against PEFT's own computation."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft", reason="needs peft")

import shira.integrations.peft as ours  # noqa: E402
from shira.integrations.peft import patching  # noqa: E402
from shira.masks import MASKS  # noqa: E402


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    ours.restore()


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20, dtype=dtype)
        self.second = nn.Linear(20, 8, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def config_of(kind: str, **options: Any) -> Any:
    targets = ["first", "second"]
    if kind == "shira":
        return peft.ShiraConfig(r=2, target_modules=targets, init_weights=False, **options)
    if not hasattr(peft, "SupertuningConfig"):
        pytest.skip(f"peft {peft.__version__} has no Super-Tuning")
    rank = {"r": 2, "lora_alpha": 3} if kind == "supra" else {}
    return peft.SupertuningConfig(sparsity=0.6, target_modules=targets, init_weights=False, **rank, **options)


KINDS = ("shira", "supertuning", "supra")


def model_of(kind: str, adapters: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with adapters "one", "two", "three" of random values, all active; those of SHiRA overlap."""
    torch.manual_seed(seed)
    names, seeds = ["one", "two", "three"][:adapters], {}
    for place, name in enumerate(names):
        if kind == "shira":
            seeds = {"random_seed": 10 * seed + place}
        if place == 0:
            model = peft.get_peft_model(Net(dtype), config_of(kind, **seeds), adapter_name=name)
        else:
            model.add_adapter(name, config_of(kind, **seeds))
    model.base_model.set_adapter(names)
    if dtype == torch.float64:
        for name, parameter in model.named_parameters():
            if "shira_" in name or "supertuning_" in name:
                parameter.data = parameter.data.double()
    return model


def gradients(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), found | {"x": x.grad}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_peft(kind: str, adapters: int) -> None:
    model = model_of(kind, adapters, torch.float64)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        if kind == "shira":
            layer.set_scale("one", 0.5)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    expected, expected_gradients = gradients(model, x)
    ours.accelerate()
    found, found_gradients = gradients(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_the_exact_sum_rounded(kind: str) -> None:
    model = model_of(kind, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    layer, exact_layer = model.base_model.model.first, exact.base_model.model.first
    expected = exact_layer(x.float())
    with ours.accelerate():
        torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=4e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert exact_layer(x.float()).dtype == torch.bfloat16


def test_positions_in_any_order_and_repeated() -> None:
    model = model_of("shira", dtype=torch.float64)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        indices = layer.shira_indices["one"]
        layer.shira_indices["one"] = indices[:, torch.randperm(indices.shape[1])]
    x = torch.randn(5, 12, dtype=torch.float64)
    for repeated in (False, True):
        if repeated:
            for layer in (model.base_model.model.first, model.base_model.model.second):
                layer.shira_indices["one"][:, :7] = layer.shira_indices["one"][:, 7:14].clone()
        expected, expected_gradients = gradients(model, x)
        with ours.accelerate():
            found, found_gradients = gradients(model, x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_positions_that_change_are_read_again() -> None:
    model = model_of("shira")
    layer, other = model.base_model.model.first, model_of("shira", seed=1).base_model.model.first
    x = torch.randn(5, 12)
    with ours.accelerate():
        layer(x)
        layer.shira_indices["one"] = other.shira_indices["one"]  # another tensor
        found = layer(x)
        layer.shira_indices["one"].copy_(model_of("shira", seed=2).base_model.model.first.shira_indices["one"])
        changed = layer(x)
    torch.testing.assert_close(changed, layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, changed)


def test_wrong_positions_are_refused() -> None:
    model = model_of("shira")
    layer = model.base_model.model.first
    x, indices = torch.randn(5, 12), layer.shira_indices["one"]
    ours.accelerate()
    layer.shira_indices["one"] = indices.clone().index_fill_(1, torch.tensor([3]), 12)
    with pytest.raises(ValueError, match=r"adapter 'one': positions lie outside of a layer's weight \[20, 12\]"):
        layer(x)
    layer.shira_indices["one"] = indices[:, :-1]
    with pytest.raises(ValueError, match=r"adapter 'one': a layer .* has 64 values and 63 positions"):
        layer(x)
    del layer.shira_indices["one"]
    with pytest.raises(ValueError, match=r"adapter 'one': a layer .* has values and no positions"):
        layer(x)


def test_hooks_of_the_base_layer_run() -> None:
    model = model_of("shira")
    layer, x = model.base_model.model.first, torch.randn(5, 12)
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    with ours.accelerate():
        torch.testing.assert_close(layer(x), expected + 1, rtol=1e-5, atol=1e-5)


def test_what_an_evaluation_in_inference_mode_prepared_serves_training() -> None:
    model = model_of("shira")
    layer, x = model.base_model.model.first, torch.randn(5, 12)
    layer(x).sum().backward()
    (values,) = layer.shira_weight.values()
    expected, values.grad = values.grad, None
    with ours.accelerate():
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    torch.testing.assert_close(values.grad, expected)


def test_no_dense_gradient_or_weight_is_made() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(300, 400)), peft.ShiraConfig(r=1, target_modules=["0"]))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and out._is_view() is False:
                self.numel = max(self.numel, out.numel())
            return out

    x = torch.randn(4, 300, requires_grad=True)
    ours.accelerate()
    model(x).sum().backward()  # what is prepared once
    with Largest() as largest:
        model(x).sum().backward()
    assert 0 < largest.numel <= 4 * 400


def test_leaving_puts_everything_back_and_nests() -> None:
    replacements = patching.__dict__["_replacements"]
    before = {(owner, name): owner.__dict__.get(name) for owner, name, _ in replacements()}
    with ours.accelerate():
        with ours.accelerate():
            pass
        assert all(owner.__dict__.get(name) is not method for (owner, name), method in before.items())
    assert all(owner.__dict__.get(name) is method for (owner, name), method in before.items())
    ours.accelerate()
    ours.accelerate()
    ours.restore()
    ours.restore()
    assert all(owner.__dict__.get(name) is method for (owner, name), method in before.items())


def test_what_was_prepared_stays_and_is_not_pickled() -> None:
    model = model_of("shira")
    x = torch.randn(5, 12)
    with ours.accelerate():
        model(x)
    prepared = model.base_model.model.first._shira_prepared["one"]
    with ours.accelerate():
        model(x)
        assert model.base_model.model.first._shira_prepared["one"] is prepared
        layer = copy.deepcopy(model.base_model.model.first)
        torch.testing.assert_close(layer(x), model.base_model.model.first(x))
    assert b"shira.integrations" not in pickle.dumps(model.base_model.model.first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_merge_is_that_of_peft_and_unmerge_gives_every_bit_back(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, adapters=3, dtype=dtype)
    theirs, before = copy.deepcopy(model), weights(model)
    theirs.merge_adapter()
    ours.accelerate()
    for _ in range(3):
        model.merge_adapter()
        assert model.base_model.model.first.merged_adapters == ["one", "two", "three"]
        assert same_bits(weights(model), weights(theirs))
        model.unmerge_adapter()
        assert model.base_model.model.first.merged_adapters == []
        assert same_bits(weights(model), before)


def test_merging_in_steps_and_by_copies() -> None:
    model = model_of("shira", adapters=2, dtype=torch.bfloat16)
    before = weights(model)
    ours.accelerate()
    model.merge_adapter(["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: already merged
        model.merge_adapter(["one"])
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model.base_model.model.first))
    for each in (model, copied):
        each.unmerge_adapter()
        assert same_bits(weights(each), before)
    pickled.unmerge()
    assert torch.equal(pickled.base_layer.weight, model.base_model.model.first.base_layer.weight)


def test_unmerge_keeps_what_others_wrote() -> None:
    model = model_of("shira")
    layer = model.base_model.model.first
    before = layer.base_layer.weight.detach().clone()
    ours.accelerate()
    layer.merge()
    with torch.no_grad():
        layer.base_layer.weight[3] += 1
    layer.unmerge()
    expected = before.clone()
    expected[3] += 1
    torch.testing.assert_close(layer.base_layer.weight.detach(), expected, rtol=1e-5, atol=1e-5)
    rest = torch.arange(20) != 3
    assert torch.equal(layer.base_layer.weight[rest], before[rest])


def test_what_peft_merged_or_unmerged_itself() -> None:
    model = model_of("shira", adapters=2)
    before = weights(model)
    model.merge_adapter()
    with ours.accelerate():
        model.unmerge_adapter()
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, before[name], rtol=1e-5, atol=1e-5)
        before = weights(model)
        model.merge_adapter(["one"])
    model.unmerge_adapter()
    model.merge_adapter(["two"])
    with ours.accelerate():
        model.unmerge_adapter()
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_safe_merge_writes_nothing_where_it_refuses(kind: str) -> None:
    model = model_of(kind, adapters=2)
    layer = model.base_model.model.first
    values = layer.shira_weight if kind == "shira" else layer.supertuning_values
    with torch.no_grad():
        values["two"][0] = float("nan")
    before = weights(model)
    ours.accelerate()
    with pytest.raises(ValueError, match="The adapter two seems to be broken"):
        layer.merge(safe_merge=True)
    if kind != "supra":
        assert layer.merged_adapters == []
        assert same_bits(weights(model), before)
    layer.merge()  # and an unsafe one can be taken back
    layer.unmerge()
    if kind != "supra":
        assert same_bits(weights(model), before)


def test_disabling_while_merged_unmerges_as_in_peft() -> None:
    model = model_of("shira")
    x, before = torch.randn(5, 12), weights(model)
    with model.disable_adapter():
        expected = model(x)
    ours.accelerate()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert same_bits(weights(model), before)
    assert not model.base_model.model.first.merged


def test_an_unknown_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.99.1")
    with pytest.raises(RuntimeError, match=r"peft 0\.99\.1 is not known"):
        ours.accelerate()


def save(folder: Path) -> tuple[Any, Any]:
    """A saved adapter's model, and the base for it."""
    torch.manual_seed(5)
    base = Net()
    saved = copy.deepcopy(base)
    model = peft.get_peft_model(saved, config_of("shira", random_seed=3))
    model.save_pretrained(folder)
    return model, base


def test_loading_draws_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = save(tmp_path)
    x = torch.randn(5, 12)
    expected = model(x)
    drawn = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(1) or randperm(*args, **kwargs))
    with ours.accelerate():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        loaded.load_adapter(tmp_path, "again")
        assert not drawn
        loaded.add_adapter("new", config_of("shira"))
        assert drawn
        assert loaded.peft_config["again"].mask_fn is not None
        for adapter in ("default", "again"):
            loaded.set_adapter(adapter)
            torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
            layer, other = loaded.base_model.model.first, model.base_model.model.first
            assert torch.equal(layer.shira_indices[adapter], other.shira_indices["default"])
            assert torch.equal(layer.shira_weight[adapter], other.shira_weight["default"])


@pytest.mark.parametrize("fault", ["absent", "outside", "count"])
def test_a_file_without_fitting_positions_is_refused(tmp_path: Path, fault: str) -> None:
    _, base = save(tmp_path)
    model = peft.get_peft_model(base, config_of("shira"))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if "first" in name and "indices" in name]
    positions = tensors.pop(name)
    if fault == "outside":
        tensors[name] = positions.index_fill(1, torch.tensor([2]), 12)
    elif fault == "count":
        tensors[name] = positions[:, 1:].contiguous()
    save_file(tensors, path)
    ours.accelerate()
    with pytest.raises(ValueError, match=r"model\.first: the file of adapter 'again' has"):
        model.load_adapter(tmp_path, "again")
    assert list(model.peft_config) == ["default"]
    assert "again" not in model.base_model.model.second.shira_weight
    model(torch.randn(5, 12))


@pytest.mark.parametrize("which", ["wm", "grad", "snip", "struct", "rand"])
def test_masks_of_this_library(which: str) -> None:
    torch.manual_seed(0)
    net = Net()
    if which in ("grad", "snip"):
        config = config_of("shira")
        config.mask_fn = ours.mask(which)
        with pytest.raises(ValueError, match="ranks by gradients, and the weight of Linear"):
            peft.get_peft_model(copy.deepcopy(net), config)
        net(torch.randn(5, 12)).square().sum().backward()
    config = config_of("shira", random_seed=7)
    config.mask_fn = ours.mask(which)
    expected = MASKS[which](net.first.weight.detach(), 0.1, k=2 * 32, grad=net.first.weight.grad, seed=7)
    rows, columns = peft.get_peft_model(net, config).base_model.model.first.shira_indices["default"]
    assert torch.equal(rows * 12 + columns, expected)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`which` must be one of"):
        ours.mask("none")
    config = config_of("shira")
    config.mask_fn = ours.mask("wm", granularity=7)
    with pytest.raises(ValueError, match=r"gives 63 entries for Linear.* and PEFT needs 64"):
        peft.get_peft_model(Net(), config)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_adapters_of_their_own(kind: str) -> None:
    model = model_of(kind, adapters=3).eval()
    names = ["two", "__base__", "one", "three", "two"]
    x = torch.randn(5, 4, 12)
    rows = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.base_model.set_adapter([name])
            rows.append(model(row[None]))
    with ours.accelerate():
        torch.testing.assert_close(model(x, adapter_names=names), torch.cat(rows), rtol=1e-5, atol=1e-5)
        model.base_model.set_adapter(["one"])
        assert torch.equal(model(x), model(x, adapter_names=["one"] * 5))
        with model.disable_adapter():
            assert torch.equal(model(x, adapter_names=names), model(x))
        with pytest.raises(ValueError, match=r"`adapter_names`: must have a name for each .* 5, got 4"):
            model(x, adapter_names=names[:4])
        with pytest.raises(ValueError, match="`adapter_names`: no layer has the adapters 'four'"):
            model(x, adapter_names=[*names[:4], "four"])
        with pytest.raises(ValueError, match="`adapter_names`: must be a list"):
            model(x, adapter_names="one")
        assert not any(module._forward_pre_hooks for module in model.modules())
        model.train()
        with pytest.raises(ValueError, match="`adapter_names`: mixed batches are for evaluation"):
            model(x, adapter_names=names)
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="`adapter_names`: an adapter is merged"):
            model(x, adapter_names=names)


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_generate_with_beams_gives_the_tokens_of_each_row_alone(architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if architecture == "decoder":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **shape))
        targets, task = ["q_proj", "v_proj", "up_proj"], "CAUSAL_LM"
    elif peft.__version__ < "0.21" and int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip(
            f"peft {peft.__version__} takes no encoder-decoder model of transformers {transformers.__version__}"
        )
    else:
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        net = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=40, **shape))
        targets, task = ["q", "v"], "SEQ_2_SEQ_LM"
    configs = [
        peft.ShiraConfig(r=3, target_modules=targets, init_weights=False, random_seed=seed, task_type=task)
        for seed in (1, 2)
    ]
    model = peft.get_peft_model(net, configs[0], adapter_name="one")
    model.add_adapter("two", configs[1])
    model.eval()
    tokens = torch.randint(3, 40, (3, 6))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    ours.accelerate()

    def generated(rows: torch.Tensor, **more: Any) -> torch.Tensor:
        return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options, **more)

    alone = []
    for row, name in zip(tokens, ["two", "__base__", "one"], strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(generated(row[None]))
        else:
            model.set_adapter(name)
            alone.append(generated(row[None]))
    assert torch.equal(generated(tokens, adapter_names=["two", "__base__", "one"]), torch.cat(alone))
    assert not torch.equal(generated(tokens), torch.cat(alone))


def test_hotswap(tmp_path: Path) -> None:
    saved, base = save(tmp_path)
    model = peft.get_peft_model(base, config_of("shira", random_seed=9))
    layer, x = model.base_model.model.first, torch.randn(5, 12)
    values, before = layer.shira_weight["default"], copy.deepcopy(model.state_dict())
    addresses = values.data_ptr(), layer.shira_indices["default"].data_ptr()
    ours.accelerate()
    assert not torch.allclose(model(x), saved(x))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    faults = {
        "absent": "second: .* must have values",
        "outside": "second: .* outside of this layer's weight",
        "more": "third.* no place",
        "merged": "first: .* is merged",
    }
    for fault, message in faults.items():
        changed = dict(tensors)
        if fault == "absent":
            changed.pop("base_model.model.second.shira_weight")
        elif fault == "outside":
            changed["base_model.model.second.shira_indices"] = tensors["base_model.model.second.shira_indices"] + 8
        elif fault == "more":
            changed["base_model.model.third.shira_weight"] = torch.zeros(3)
        else:
            layer.merge()
        save_file(changed, path)
        with pytest.raises(ValueError, match=rf"model\.{message}"):
            ours.hotswap(model, tmp_path)
        if fault == "merged":
            layer.unmerge()
        assert same_bits(model.state_dict(), before)
    save_file(tensors, path)
    ours.hotswap(model, tmp_path)
    assert layer.shira_weight["default"] is values
    assert (values.data_ptr(), layer.shira_indices["default"].data_ptr()) == addresses
    assert torch.equal(model(x), saved(x))
    with pytest.raises(ValueError, match="`adapter_name` must be that of a SHiRA adapter"):
        ours.hotswap(model, tmp_path, "none")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    torch.save({}, tmp_path / "pickled/adapter_model.bin")
    for elsewhere in ("somebody/on-a-hub", tmp_path / "pickled"):
        with pytest.raises(FileNotFoundError):
            ours.hotswap(model, elsewhere)
