"""Adapters from and to PEFT and weight patches, proven by logits of small models."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import bits
from safetensors.torch import load_file, save_file

import shira
from shira import Adapter, AdapterTensor, ResidentAdapters, convert
from shira.adapter import checksum_of
from shira.files.checkpoint import TensorFolder

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.arange(24).view(2, 12) % 50
pytestmark = [
    pytest.mark.filterwarnings("ignore:not sparse"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False"),
]


def make_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return folder


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(base, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def save_peft(base: Path, config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Saves a PEFT adapter of random numbers; returns the logits of the model with it."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load(base, dtype), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "shira" not in name and "supertuning" not in name and "ia3" not in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def with_adapter(base: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = load(base, dtype)
    bank = ResidentAdapters(model)
    bank.add("it", adapter, force=True)
    bank.switch("it")
    return logits(model)


def assert_close(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Close, measured by how far the adapter moves the logits, which it must."""
    moved = float((expected - base).abs().max())
    assert moved > 1e-3
    assert float((found - expected).abs().max()) < tolerance * moved


TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(base: Path) -> Adapter:
    """Kind replace, 2 % to 6 % of some weights."""
    draw = torch.Generator().manual_seed(2)
    weights = TensorFolder(base)
    parts = {}
    for place, name in enumerate(n for n in weights if any(f"{target}.weight" in n for target in TARGETS)):
        weight = weights[name]
        indices = (torch.rand(weight.numel(), generator=draw) < 0.02 + 0.008 * place).nonzero().view(-1).int()
        old = weight.view(-1)[indices.long()]
        values = old + 0.3 * torch.randn(old.shape, generator=draw)
        parts[name] = AdapterTensor(indices, values, tuple(weight.shape), weight.dtype, checksum=checksum_of(old))
    return Adapter(parts)


def test_peft_shira_in(base: Path, tmp_path: Path) -> None:
    expected = save_peft(base, peft.ShiraConfig(r=2, target_modules=TARGETS, init_weights=False), tmp_path / "peft")
    assert convert.format_of(tmp_path / "peft") == "peft-shira"
    found = convert.read(tmp_path / "peft", base)
    assert len(found) == 6
    assert {part.kind for part in found.values()} == {"add"}
    assert {part.checksum for part in found.values()} == {None}
    assert found.provenance == {"converted": {"from": "peft-shira", "file": "peft"}}
    assert_close(with_adapter(base, found), expected, logits(load(base)))
    # The file in the folder is the folder; a trusted base gives its checksums.
    trusted = convert.read(tmp_path / "peft/adapter_model.safetensors", load(base), trust_base=True)
    for name, part in trusted.items():
        assert torch.equal(part.indices, found[name].indices)
        assert torch.equal(part.values, found[name].values)
        assert part.checksum == checksum_of(TensorFolder(base)[name].view(-1)[part.indices.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_shira_out_and_in_again(base: Path, adapter: Adapter, tmp_path: Path, dtype: torch.dtype) -> None:
    """PEFT loads what we write, and its logits are ours; what we read back is what we wrote, and changes of 0."""
    model = load(base, dtype)
    if dtype != torch.float32:
        weights = {name: TensorFolder(base)[name].to(dtype) for name in adapter}
        adapter = Adapter(
            {
                name: AdapterTensor(
                    part.indices, part.values.to(dtype), part.shape, dtype,
                    checksum=checksum_of(weights[name].view(-1)[part.indices.long()]),
                )
                for name, part in adapter.items()
            }
        )  # fmt: skip
    plain = logits(model)
    expected = with_adapter(base, adapter, dtype)
    convert.write(adapter, tmp_path / "peft", "peft-shira", model)
    loaded = peft.PeftModel.from_pretrained(load(base, dtype), tmp_path / "peft").eval()
    assert_close(logits(loaded), expected, plain, 1e-4 if dtype == torch.float32 else 0.05)
    assert_close(logits(loaded.merge_and_unload()), expected, plain, 1e-4 if dtype == torch.float32 else 0.05)

    again = convert.read(tmp_path / "peft", model)
    rank = json.loads((tmp_path / "peft/adapter_config.json").read_text())["r"]
    for name, part in again.items():
        assert part.nnz == rank * sum(part.shape)
        changed = part.values != 0
        assert set(part.indices[changed].tolist()) <= set(adapter[name].indices.tolist())
    result = {name: tensor.clone() for name, tensor in load(base, dtype).state_dict().items() if name in adapter}
    for name, part in again.items():
        flat = result[name].view(-1)
        flat[part.indices.long()] = (flat[part.indices.long()].float() + part.values).to(dtype)
        # Rounding in float32 may differ by one unit; bfloat16 comes back bit for bit.
        close = torch.equal if dtype == torch.bfloat16 else torch.allclose
        assert close(flat[adapter[name].indices.long()], adapter[name].values)


@pytest.mark.parametrize("with_indices", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_supertuning_in(base: Path, tmp_path: Path, with_indices: bool, dtype: torch.dtype) -> None:
    config = peft.SupertuningConfig(
        sparsity=0.95, target_modules=TARGETS, init_weights=False, save_precomputed_indices=with_indices
    )
    expected = save_peft(base, config, tmp_path / "peft", dtype)
    assert convert.format_of(tmp_path / "peft") == "peft-supertuning"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = convert.read(tmp_path / "peft", load(base, dtype))
    texts = [str(warning.message) for warning in seen if warning.filename == __file__]
    assert ["found anew" in text for text in texts] == ([] if with_indices else [True])
    assert {part.kind for part in found.values()} == {"add"}
    # Bit for bit the same weights as PEFT's merge.
    merged = peft.PeftModel.from_pretrained(load(base, dtype), tmp_path / "peft").merge_and_unload().state_dict()
    model = load(base, dtype)
    bank = ResidentAdapters(model)
    bank.add("it", found, force=True)
    bank.switch("it")
    for name, tensor in model.state_dict().items():
        assert torch.equal(bits(tensor), bits(merged[name])), name
    assert_close(logits(model), expected, logits(load(base, dtype)), 1e-4 if dtype == torch.float32 else 0.05)


MERGED = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=3, target_modules=TARGETS, use_dora=True),
    "supra": lambda: peft.SupertuningConfig(sparsity=0.95, target_modules=TARGETS, init_weights=False, r=2),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "lora with all biases": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], bias="all"),
    "lora with trained tokens": lambda: peft.LoraConfig(
        r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 7]}
    ),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "lora with saved modules": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"]),
}


@pytest.mark.parametrize("kind", MERGED)
def test_any_adapter_that_peft_can_merge(base: Path, tmp_path: Path, kind: str) -> None:
    expected = save_peft(base, MERGED[kind](), tmp_path / "peft")
    assert convert.format_of(tmp_path / "peft") == "peft-merged"
    found = convert.read(tmp_path / "peft", base)
    assert {part.kind for part in found.values()} == {"replace"}
    assert_close(with_adapter(base, found), expected, logits(load(base)))
    for name, part in found.items():
        assert part.checksum == checksum_of(TensorFolder(base)[name].view(-1)[part.indices.long()])


def test_a_model_as_base_is_put_back(base: Path, tmp_path: Path) -> None:
    """Also what PEFT loads into the model itself, and what required grad."""
    save_peft(base, MERGED["lora with all biases"](), tmp_path / "peft")
    model = load(base)
    model.model.norm.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    found = convert.read(tmp_path / "peft", model)
    assert any(name.endswith(".bias") for name in found)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


WRONG_BASES: dict[str, tuple[Any, str]] = {
    "a list": ([1], r"config\.json: it must be a JSON object$"),
    "bad JSON": ("{oops", r"config\.json: it must be JSON$"),
    "nested deeply": ("[" * 100_000, r"config\.json: it must be JSON$"),
    "no architectures": ({"architectures": []}, "it lacks .* and 11 more, which the adapter has in a LlamaModel$"),
    "a name": ({"architectures": "LlamaForCausalLM"}, r'config\.json: "architectures" must be a list of names$'),
    "a number": ({"architectures": [3]}, r'config\.json: "architectures" must be a list of names$'),
    "an unknown class": ({"architectures": ["NoModel"]}, r"config\.json: transformers .* has no model class 'No"),
    "a function": ({"architectures": ["pipeline"]}, r"config\.json: transformers .* has no model class 'pipeline'$"),
    "a config": ({"architectures": ["LlamaConfig"]}, "has no model class 'LlamaConfig'$"),
    "a module": ({"architectures": ["models"]}, "has no model class 'models'$"),
    "another model": ({"architectures": ["ViTModel"]}, "it lacks .*, which the adapter has in a ViTModel$"),
    "a wrong type": ({"hidden_size": "many"}, "transformers cannot load this model as LlamaForCausalLM: "),
    "no heads": ({"num_attention_heads": 0}, "cannot load this model as LlamaForCausalLM: "),
    "an unknown dtype": ({"dtype": "float99", "torch_dtype": "float99"}, "cannot load this model as Llama.*float99"),
    "another size": ({"vocab_size": 60}, r"embed_tokens.weight is \(50, 32\) in the file, but \(60, 32\) by config"),
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PEFT without a task type, so that the base's config names the class."""
    folder = tmp_path_factory.mktemp("lora")
    save_peft(base, MERGED["lora"](), folder)
    return folder


@pytest.mark.parametrize("case", WRONG_BASES)
def test_a_base_that_is_no_model_is_refused(base: Path, lora: Path, tmp_path: Path, case: str) -> None:
    config, message = WRONG_BASES[case]
    shutil.copytree(base, tmp_path / "wrong")
    if isinstance(config, dict):
        config = {**json.loads((base / "config.json").read_text()), **config}
    (tmp_path / "wrong/config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        convert.read(lora, tmp_path / "wrong", top=0.1)
    assert "\n" not in str(raised.value)


def test_a_base_that_is_not_there_or_not_whole(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        convert.read(lora, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        convert.read(lora, tmp_path / "none", top=0.1)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: to merge a PEFT adapter the base must be a Hugging Face"
    ):
        convert.read(lora, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"with config\.json, or a model, got dict$"):
        convert.read(lora, {})
    shutil.copytree(base, tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file: "):
        convert.read(lora, tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").unlink()
    with pytest.raises(ValueError, match="cut: the folder has no safetensors file"):
        convert.read(lora, tmp_path / "cut")


WRONG_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "adapters of its own": (
        {"peft_type": "XLORA", "adapters": {"0": "somebody/pickled"}, "hidden_size": 64},
        r"an adapter of type XLORA names other adapters, which are not read$",
    ),
    "an unknown type": (
        {"peft_type": "NOPE"},
        "an adapter of type NOPE cannot be merged, or might load what is not in its folder$",
    ),
    "a rank that is none": ({"r": "two"}, "PEFT cannot load this adapter: TypeError: "),
    "a rank of 0": ({"r": 0}, "PEFT cannot load this adapter: ValueError: "),
    "another rank": ({"r": 5}, "PEFT cannot load this adapter: RuntimeError: .*size mismatch"),
    "a pattern that is none": ({"target_modules": "("}, "PEFT cannot load this adapter: "),
    "no such layers": ({"target_modules": ["nothing"]}, "PEFT cannot load this adapter: .*nothing"),
    "other layers": ({"target_modules": ["q_proj"]}, "PEFT finds no place in a LlamaForCausalLM for .* and 7 more$"),
    "a part that is lacking": (
        {"use_dora": True},
        "it lacks .*magnitude.*, and 5 more, which the adapter has in a Llama",
    ),
    "a module to import": (
        {"megatron_config": {"a": 1}},
        r"adapter_config\.json: an adapter with megatron_config is not read$",
    ),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_an_adapter_that_peft_cannot_load_is_refused(base: Path, lora: Path, tmp_path: Path, case: str) -> None:
    """In one line; and a model that was given as base is as it was."""
    fields, message = WRONG_ADAPTERS[case]
    shutil.copytree(lora, tmp_path / "wrong")
    config = {**json.loads((lora / "adapter_config.json").read_text()), **fields}
    (tmp_path / "wrong/adapter_config.json").write_text(json.dumps(config))
    model = load(base)
    modules = {name: type(module) for name, module in model.named_modules()}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        convert.read(tmp_path / "wrong", model, top=0.1)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "wrong") in str(raised.value)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(bits(tensor), bits(before[name][1]))


def test_an_adapter_that_peft_cannot_merge_is_refused(base: Path, tmp_path: Path) -> None:
    """Half of a layer's merge is done then; the model has none of it."""
    save_peft(base, peft.LoraConfig(r=2, target_modules=TARGETS, lora_bias=True), tmp_path / "peft")
    model = load(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"peft: PEFT cannot merge .*down_proj: RuntimeError: .*has no bias"):
        convert.read(tmp_path / "peft", model, top=0.1)
    assert all(torch.equal(bits(tensor), bits(before[name])) for name, tensor in model.state_dict().items())


def test_an_adapter_without_weights_is_refused(base: Path, lora: Path, tmp_path: Path) -> None:
    """PEFT would load it as an adapter that does nothing, with a warning."""
    shutil.copytree(lora, tmp_path / "empty")
    arrays = load_file(lora / "adapter_model.safetensors")
    for some in ({}, {key: array for key, array in arrays.items() if "lora_A" in key}):
        save_file(some, tmp_path / "empty/adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: it lacks .*lora_"):
            convert.read(tmp_path / "empty", base, top=0.1)
    (tmp_path / "empty/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"empty: there is no adapter_model\.safetensors$"):
        convert.read(tmp_path / "empty", base, top=0.1)


def test_at_a_terminal(base: Path, tmp_path: Path) -> None:
    """In a process of its own, where what PEFT and transformers print would be seen."""
    save_peft(base, MERGED["lora"](), tmp_path / "peft")
    line = ["convert", tmp_path / "peft", "--base", base, "--top", "0.1", "-o", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-m", "shira.cli", *line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "% of the energy of all changes" in done.stdout
    assert Adapter.load(tmp_path / "out").density == pytest.approx(0.1, abs=0.01)


def test_a_head_that_the_base_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=r"score.weight: the base has no tensor of this name"):
        convert.read(tmp_path / "peft", base)


def test_lora_masked_to_a_density(base: Path, tmp_path: Path) -> None:
    save_peft(base, MERGED["lora"](), tmp_path / "peft")
    before = load(base).state_dict()
    found = convert.read(tmp_path / "peft", base, top=0.1)
    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "peft").merge_and_unload().state_dict()
    facts = found.provenance["converted"]
    assert (facts["from"], facts["peft_type"], facts["top"]) == ("peft-merged", "LORA", 0.1)
    kept = total = 0.0
    for name, part in found.items():
        assert part.nnz == int(0.1 * part.numel)
        change = (merged[name] - before[name]).view(-1)
        assert torch.equal(part.values, merged[name].view(-1)[part.indices.long()])
        assert float(change[part.indices.long()].abs().min()) >= float(change.abs().topk(part.nnz).values.min())
        own, whole = float(change[part.indices.long()].double().square().sum()), float(change.double().square().sum())
        assert facts["energy"][name] == pytest.approx(own / whole, rel=1e-6)
        kept, total = kept + own, total + whole
    assert facts["energy_kept"] == pytest.approx(kept / total, rel=1e-6)
    assert 0.1 < facts["energy_kept"] < 1


def test_modules_to_save_of_peft_shira_are_differences(base: Path, tmp_path: Path) -> None:
    config = peft.ShiraConfig(r=1, target_modules=["q_proj"], init_weights=False, modules_to_save=["norm"])
    model = peft.get_peft_model(load(base), config).eval()
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight[3] = 7
    model.save_pretrained(tmp_path / "peft")
    found = convert.read(tmp_path / "peft", base)
    assert found["model.norm.weight"].kind == "replace"
    assert found["model.norm.weight"].indices.tolist() == [3]
    assert_close(with_adapter(base, found), logits(model), logits(load(base)))


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_buffers_of_modules_to_save_come_too(tmp_path: Path, kind: str) -> None:
    """BatchNorm's statistics move in training, and PEFT saves them with the module."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(8, 8)
            self.head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    torch.manual_seed(0)
    base = Model()
    config = (
        peft.LoraConfig(target_modules=["body"], modules_to_save=["head"], init_lora_weights=False)
        if kind == "lora"
        else peft.ShiraConfig(r=1, target_modules=["body"], modules_to_save=["head"], init_weights=False)
    )
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    for _ in range(3):
        tuned.train()(torch.randn(16, 8) + 3)
    tuned.save_pretrained(tmp_path / "peft")
    before = {name: bits(tensor) for name, tensor in base.state_dict().items()}
    adapter = convert.read(tmp_path / "peft", base)
    assert {f"head.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")} < set(adapter)
    assert adapter["head.1.num_batches_tracked"].values.tolist() == [3]
    assert all(torch.equal(bits(tensor), before[name]) for name, tensor in base.state_dict().items())
    bank = ResidentAdapters(base)
    bank.add("it", adapter, force=True)
    bank.switch("it")
    x = torch.randn(4, 8)
    torch.testing.assert_close(base.eval()(x), tuned.eval()(x))


def test_patches_both_ways(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    convert.write(adapter, tmp_path / "patch.safetensors", "patch")
    arrays = load_file(tmp_path / "patch.safetensors")
    assert set(arrays) == {f"{name}.{part}" for name in adapter for part in ("indices", "values")}
    for name, part in adapter.items():
        assert arrays[f"{name}.indices"].dtype == torch.int32
        assert torch.equal(arrays[f"{name}.indices"], part.indices)
        assert torch.equal(arrays[f"{name}.values"], part.values)
    assert convert.format_of(tmp_path / "patch.safetensors") == "patch"
    again = convert.read(tmp_path / "patch.safetensors", base, trust_base=True)
    for name, part in adapter.items():
        assert torch.equal(again[name].indices, part.indices)
        assert torch.equal(bits(again[name].values), bits(part.values))
        assert (again[name].kind, again[name].shape, again[name].checksum) == ("replace", part.shape, part.checksum)
    assert {p.checksum for p in convert.read(tmp_path / "patch.safetensors", base).values()} == {None}
    # Entries in another order, and int64, are as good.
    shuffled = {}
    for name, part in adapter.items():
        order = torch.randperm(part.nnz)
        shuffled |= {f"{name}.indices": part.indices[order].long(), f"{name}.values": part.values[order]}
    save_file(shuffled, tmp_path / "shuffled")
    for name, part in convert.read(tmp_path / "shuffled", base).items():
        assert torch.equal(part.indices, adapter[name].indices)
        assert torch.equal(part.values, adapter[name].values)


def test_a_patch_of_changes_has_the_new_values(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    added = shira.fuse([(adapter, 0.5)], base=base)
    convert.write(added, tmp_path / "patch", "patch", base)
    model = load(base)
    bank = ResidentAdapters(model)
    bank.add("it", added)
    bank.switch("it")
    for name, part in convert.read(tmp_path / "patch", base).items():
        assert torch.equal(part.values, model.get_parameter(name).detach().view(-1)[part.indices.long()])
    with pytest.raises(ValueError, match="give `base`"):
        convert.write(added, tmp_path / "none", "patch")


def test_a_shira_file_is_read_as_it_is(adapter: Adapter, tmp_path: Path) -> None:
    convert.write(adapter, tmp_path / "a")
    assert convert.format_of(tmp_path / "a") == "shira"
    again = convert.read(tmp_path / "a")
    assert all(torch.equal(again[name].values, part.values) for name, part in adapter.items())


def test_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.bin")
    (tmp_path / "old.bin").write_bytes(b"\x80\x02}q")
    (tmp_path / "text").write_text("hello")
    # The length of safetensors' header may begin as a pickle does.
    (tmp_path / "cut").write_bytes((640).to_bytes(8, "little") + b'{"a":')
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    save_file({"a.indices": torch.zeros(2).int(), "b.values": torch.zeros(2)}, tmp_path / "half")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "peft/adapter_model.bin").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("[1")
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"")
    for name, message in {
        "pickle.bin": "looks like a pickle of torch.save, which is never read",
        "old.bin": "looks like a pickle",
        "text": "text: not a whole safetensors file",
        "cut": "cut: not a whole safetensors file",
        "weights": "weights: no known adapter",
        "half": "half: no known adapter",
        "peft": "no adapter_model.safetensors; adapter_model.bin is a pickle, which is never read",
        "broken": "adapter_config.json: it must be JSON$",
        ".": "a folder without adapter_config.json holds no adapter",
    }.items():
        with pytest.raises(ValueError, match=message):
            convert.read(tmp_path / name, base)
    with pytest.raises(FileNotFoundError):
        convert.read(tmp_path / "none", base)


def peft_files(folder: Path, arrays: dict[str, torch.Tensor], kind: str = "SHIRA", **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({f"{Q}.shira_weight": torch.zeros(2)}, "q_proj has no shira_indices"),
        ({f"{Q}.shira_indices": torch.zeros(2, 2).int()}, "q_proj has no shira_weight"),
        (
            {f"{Q}.shira_weight": torch.zeros(1), f"{Q}.shira_indices": torch.tensor([[0], [32]]).int()},
            r"q_proj.weight: rows and columns must lie in the weight, \(32, 32\)",
        ),
        (
            {f"{Q}.shira_weight": torch.zeros(1), f"{Q}.shira_indices": torch.tensor([[-1], [3]]).int()},
            "rows and columns must lie in the weight",
        ),
        (
            {f"{Q}.shira_weight": torch.zeros(2), f"{Q}.shira_indices": torch.tensor([[1, 1], [3, 3]]).int()},
            "q_proj.weight: indices must be sorted and unique",
        ),
        (
            {f"{Q}.shira_weight": torch.zeros(3), f"{Q}.shira_indices": torch.tensor([[1, 2], [3, 3]]).int()},
            "q_proj.weight: there are 2 indices, but values of shape",
        ),
        (
            {f"{Q}.shira_weight": torch.zeros(1), f"{Q}.shira_indices": torch.tensor([[0.5], [3.0]])},
            "q_proj.weight: positions must be whole numbers",
        ),
        (
            {
                f"{prefix}model.layers.0.self_attn.q_proj.{field}": array
                for prefix in ("", "base_model.model.")
                for field, array in (("shira_weight", torch.zeros(1)), ("shira_indices", torch.zeros(2, 1).int()))
            },
            r"adapter_model\.safetensors: it has the tensor 'model.layers.0.self_attn.q_proj.weight' twice",
        ),
        (
            {
                f"{Q}.shira_weight": torch.ones(1),
                f"{Q}.shira_indices": torch.zeros(2, 1).int(),
                f"{Q}.weight": torch.ones(32, 32),
            },
            r"adapter_model\.safetensors: it has the tensor 'model.layers.0.self_attn.q_proj.weight' twice",
        ),
        ({}, r"adapter_model\.safetensors: it has no tensors"),
        ({"other.shira_weight": torch.zeros(1), "other.shira_indices": torch.zeros(2, 1).int()}, "base has no tensor"),
        ({"base_model.model.score.weight": torch.zeros(2, 2)}, "score.weight: the base has no tensor"),
    ],
)
def test_damaged_peft_files(base: Path, tmp_path: Path, arrays: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.read(peft_files(tmp_path / "peft", arrays), base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_changes_of_weights_that_can_only_be_replaced_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {"q.weight": torch.zeros(4, 4).to(dtype)}
    name, message = "base_model.model.q", r"q\.weight: the base's tensor must be float64, .* float16, got torch\."
    places = torch.tensor([[0], [1]], dtype=torch.int32)
    sparse = {f"{name}.shira_weight": torch.ones(1), f"{name}.shira_indices": places}
    tuned = {f"{name}.supertuning_values": torch.ones(8)}
    for arrays, kind, config in ((sparse, "SHIRA", {}), (tuned, "SUPERTUNING", {"sparsity": 0.5})):
        with pytest.raises(ValueError, match=message):
            convert.read(peft_files(tmp_path / "peft", arrays, kind, **config), base)


def test_other_refusals(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    good = adapter[name]
    values, indices = f"{Q}.supertuning_values", f"{Q}.supertuning_indices"
    for config, arrays, message in (
        ({}, {}, "it has no tensors"),
        ({}, {values: torch.zeros(1), indices: torch.tensor([1.5])}, "positions must be whole numbers"),
        ({}, {values: torch.zeros(5)}, "has no sparsity"),
        ({"sparsity": 0.99}, {values: torch.zeros(5)}, "gives 10 positions, but there are 5 values"),
        ({}, {values: torch.zeros(1), indices: torch.tensor([1024]).int()}, r"indices must lie in \[0, 1024\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.read(peft_files(tmp_path / "super", arrays, "SUPERTUNING", **config), base)
    peft_files(tmp_path / "prompt", {"x": torch.zeros(2)}, "PROMPT_TUNING", num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="an adapter of type PROMPT_TUNING cannot be merged"):
        convert.read(tmp_path / "prompt", base)
    with pytest.raises(ValueError, match="an adapter of type NOPE cannot be merged"):
        convert.read(peft_files(tmp_path / "nope", {"x": torch.zeros(2)}, "NOPE"), base)
    wrong = {f"{Q}.lora_A.weight": torch.zeros(2, 7), f"{Q}.lora_B.weight": torch.zeros(32, 2)}
    with pytest.raises(ValueError, match=r"PEFT cannot load this adapter: RuntimeError.*size mismatch"):
        convert.read(peft_files(tmp_path / "nope", wrong, "LORA", r=2, target_modules=["q_proj"]), base)
    save_file({f"{name}.indices": torch.zeros(1).int(), f"{name}.values": torch.zeros(1).half()}, tmp_path / "patch")
    with pytest.raises(ValueError, match=r"values are torch.float16, but torch.float32 in the base"):
        convert.read(tmp_path / "patch", base)
    with pytest.raises(ValueError, match=r"the format patch does not tell the shapes.*give `base`"):
        convert.read(tmp_path / "patch")
    with pytest.raises(ValueError, match="sparse already"):
        convert.read(tmp_path / "patch", base, top=0.1)
    with pytest.raises(ValueError, match="the format to write must be one of shira, peft-shira, patch, got 'lora'"):
        convert.write(adapter, tmp_path / "new", "lora")
    with pytest.raises(ValueError, match="there already; `overwrite` replaces it"):
        convert.write(adapter, tmp_path / "patch", "patch")
    with pytest.raises(ValueError, match="is a folder, and there is a file"):
        convert.write(adapter, tmp_path / "patch", "peft-shira", base, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").write_text("dear")
    with pytest.raises(ValueError, match="not replaced, because it holds letter"):
        convert.write(adapter, tmp_path / "full", "peft-shira", base, overwrite=True)
    with pytest.raises(ValueError, match="becomes a delta by subtracting the base"):
        convert.write(adapter, tmp_path / "new", "peft-shira")
    embedding = Adapter({"model.norm.weight": AdapterTensor(good.indices[:1] * 0, good.values[:1], (32,), good.dtype)})
    with pytest.raises(ValueError, match="weights of linear layers only"):
        convert.write(embedding, tmp_path / "new", "peft-shira", base)
    dense = shira.diff({name: torch.zeros(32, 32)}, {name: torch.ones(32, 32)})
    small = AdapterTensor(
        good.indices[:1] * 0, good.values[:1], (2, 2), good.dtype, checksum=checksum_of(torch.zeros(1))
    )
    with pytest.raises(ValueError, match="the densest layers need another file"):
        convert.write(
            Adapter({**dense, "small.weight": small}),
            tmp_path / "new", "peft-shira", {name: torch.zeros(32, 32), "small.weight": torch.zeros(2, 2)},
        )  # fmt: skip
    other = {key: tensor + 1 for key, tensor in load(base).state_dict().items()}
    for form in ("peft-shira", "patch"):
        with pytest.raises(ValueError, match="belongs to another base"):
            convert.write(adapter, tmp_path / "new", form, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "nope", "patch", "prompt", "super"]
