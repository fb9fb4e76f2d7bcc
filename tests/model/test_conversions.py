"""Merged experts and renamed tensors: entries of a checkpoint and of the model that loads it, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shira
from shira import Adapter, AdapterTensor
from shira.adapter.base import BaseTensors
from shira.adapter.checksum import checksum_of
from shira.convert.merge import Fit, fit_of
from shira.files.checkpoint import TensorFolder
from shira.model.conversions import Loading, model_of
from shira.model.placement import boxes_from_modules, identity, localise

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 converts at load")

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 20, "max_position_embeddings": 16}
IDS = torch.arange(1, 9).view(2, 4)
MOE = "model.layers.0.block_sparse_moe.experts"


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3)).eval()


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    return transformers.Qwen3MoeForCausalLM(config).eval()


MODELS = {"mixtral": mixtral, "qwen3-moe": qwen3_moe}


@torch.no_grad()
def tuned(model: Any) -> Any:
    """Every weight of the experts and the first layer's attention with some entries changed."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "experts" in name or "q_proj" in name:
            places = torch.randperm(parameter.numel(), generator=draw)[: parameter.numel() // 20 + 1]
            parameter.view(-1)[places] += 1
    return model


@pytest.fixture(params=MODELS)
def folders(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In the current folder base/ and tuned/, of a model whose experts are merged at load. Gives what makes it."""
    monkeypatch.chdir(tmp_path)
    make = MODELS[request.param]
    make().save_pretrained("base")
    tuned(make()).save_pretrained("tuned")
    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_a_difference_on_disk_meets_the_model_in_memory(folders: Any) -> None:
    adapter = shira.diff("base", "tuned")
    assert sum("experts" in name for name in adapter) == 9, "on disk each expert has three tensors"
    model, expected = folders(), logits(tuned(folders()))
    bank = shira.ResidentAdapters(model)
    bank.add("disk", adapter)
    assert not torch.equal(logits(model), expected)
    with bank.using("disk"):
        assert torch.equal(logits(model), expected)
    bank.add("one expert", Adapter({name: adapter[name] for name in adapter if "experts.1." in name}))
    bank.switch("one expert")
    assert not any("experts" not in name for name in shira.diff(folders(), model))
    down = shira.diff(folders(), model)["model.layers.0.mlp.experts.down_proj"]
    assert set((down.indices // (down.numel // 3)).tolist()) == {1}, "entries of the second of three experts"


def test_a_difference_in_memory_meets_the_folder(folders: Any) -> None:
    adapter = shira.diff(folders(), tuned(folders()))
    assert sum("experts" in name for name in adapter) == 2, "in memory the experts are two tensors"
    assert fit_of(adapter, "base") == Fit(True, "the one that the adapter was made for")
    assert fit_of(adapter, "tuned").fits is False
    shira.merge_checkpoint("base", [(adapter, 1.0)], "merged")
    merged, expected = load_file("merged/model.safetensors"), load_file("tuned/model.safetensors")
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)

    on_disk = shira.diff("base", "tuned")
    mixed = shira.fuse([(adapter, 0.5), (on_disk, 0.5)], base="base")
    assert set(mixed) == set(on_disk)
    assert mixed.nnz == on_disk.nnz == adapter.nnz
    # Both sides of a difference in other forms.
    for base, other in ((folders(), "tuned"), ("base", tuned(folders()))):
        found = shira.diff(base, other)
        assert found.nnz == adapter.nnz
        assert set(found) == set(on_disk if base == "base" else adapter)


def test_another_base_is_refused_whatever_the_names(folders: Any) -> None:
    in_memory, on_disk = shira.diff(folders(), tuned(folders())), shira.diff("base", "tuned")
    other = tuned(folders())
    with pytest.raises(ValueError, match=r"experts.*: the adapter belongs to another base"):
        shira.ResidentAdapters(other).add("disk", Adapter({n: on_disk[n] for n in on_disk if "experts" in n}))
    shira.ResidentAdapters(other).add("disk", on_disk, force=True)
    experts = Adapter({n: in_memory[n] for n in in_memory if "experts" in n})
    with pytest.raises(ValueError, match=r"^adapters\[0\]: model.*experts.*: the adapter belongs to another base"):
        shira.merge_checkpoint("tuned", [(experts, 1.0)], "merged")
    assert not Path("merged").exists()
    shira.merge_checkpoint("tuned", [(experts, 1.0)], "merged", force_base=True)


def test_a_name_that_means_two_forms_is_told_by_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of Qwen3-VL-MoE have one name, and are transposed at load where their shape says so."""
    monkeypatch.chdir(tmp_path)
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    text = {**sizes, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    vision = {"hidden_size": 8, "intermediate_size": 12, "depth": 1, "num_heads": 2, "out_hidden_size": 8}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    made = kind(config)
    for folder, model in (("base", made), ("tuned", tuned(copy.deepcopy(made)))):
        model.save_pretrained(folder)
        state = load_file(f"{folder}/model.safetensors")
        experts = {name: tensor.transpose(1, 2).contiguous() for name, tensor in state.items() if "experts" in name}
        save_file({**state, **experts}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    model, changed = kind.from_pretrained("base"), kind.from_pretrained("tuned")
    expert = "model.language_model.layers.0.mlp.experts.down_proj"
    in_memory, on_disk = shira.diff(model, changed), shira.diff("base", "tuned")
    assert (in_memory[expert].shape, on_disk[expert].shape) == ((3, 8, 12), (3, 12, 8))
    for adapter in (in_memory, on_disk, shira.diff(model, "tuned"), shira.diff("base", changed)):
        assert adapter.nnz == in_memory.nnz
        assert fit_of(adapter, "base").fits is True
        shira.merge_checkpoint("base", [(adapter, 1.0)], "merged", overwrite=True)
        merged, expected = load_file("merged/model.safetensors"), load_file("tuned/model.safetensors")
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
        bank = shira.ResidentAdapters(model)
        bank.add("one", adapter)
        with bank.using("one"):
            assert all(torch.equal(tensor, changed.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_boxes_give_the_checkpoint_that_transformers_saves(folders: Any) -> None:
    model = tuned(folders())
    boxes, saved = boxes_from_modules(model), load_file("tuned/model.safetensors")
    assert set(boxes) == set(saved)
    for name, tensor in saved.items():
        copied, found = torch.full_like(tensor, torch.nan), 0
        for runtime, box in boxes[name]:
            box.reversed.copy(runtime.detach(), copied)
            kept, local = localise(torch.arange(tensor.numel()), [box])
            assert torch.equal(runtime.detach().view(-1)[local], tensor.view(-1)[kept])
            found += len(kept)
        assert torch.equal(copied, tensor)
        assert found == tensor.numel()
    assert set(identity(model)) == {name for name, _ in model.named_parameters()}
    assert set(boxes_from_modules(torch.nn.Linear(2, 3))) == {"weight", "bias"}


def moved(name: str = f"{MOE}.0.w1.weight", kind: str = "replace", **more: Any) -> Adapter:
    """Three entries of an expert of mixtral's, or of what `more` says."""
    tensor = AdapterTensor(torch.tensor([0, 5, 95]), torch.arange(3.0), (12, 8), torch.float32, kind)
    return Adapter({name: tensor, **more})


@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_what_cannot_be_placed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mixtral().save_pretrained("base")
    state = load_file("base/model.safetensors")
    up = "model.layers.0.mlp.experts.gate_up_proj"
    entries = AdapterTensor(torch.tensor([0, 2 * 24 * 8 + 3]), torch.ones(2), (3, 24, 8), torch.float32)

    def refused(adapter: Adapter, message: str) -> None:
        before = sorted(Path().iterdir())
        with pytest.raises(ValueError, match=message):
            shira.merge_checkpoint("base", [(adapter, 1.0)], "merged")
        assert sorted(Path().iterdir()) == before

    # One expert is not there.
    left = {name: tensor for name, tensor in state.items() if "experts.2." not in name}
    save_file(left, "base/model.safetensors", metadata={"format": "pt"})
    refused(Adapter({up: entries}), rf"^adapters\[0\]: {up}: 1 entries lie nowhere in the base, the first at 387$")
    save_file(state, "base/model.safetensors", metadata={"format": "pt"})

    # The same entry in two ways, with different values.
    refused(
        moved(**{up: entries}), r"^adapters\[0\]: .*gate_up_proj: the adapter names the tensor '.*w1.weight' twice$"
    )
    inner = f"{MOE}.0.w1.weight".removeprefix("model.")
    two = moved(inner, **{up: entries})
    model = mixtral()
    with pytest.raises(
        ValueError, match=r"the adapter names the tensor 'model.layers.0.mlp.experts.gate_up_proj' twice"
    ):
        shira.ResidentAdapters(model).add("two", two)

    # Another shape, and a name of no model.
    wrong = AdapterTensor(torch.tensor([0]), torch.ones(1), (4, 24, 8), torch.float32)
    refused(Adapter({up: wrong}), r"gate_up_proj: the adapter's shape is \(4, 24, 8\), the model's \(3, 24, 8\)$")
    refused(Adapter({"model.layers.7.mlp.experts.down_proj": wrong}), "the base has no tensor of this name$")

    # The folder's config belongs to another model.
    settings = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**settings, "intermediate_size": 6}))
    refused(moved("layers.0.mlp.experts.gate_up_proj"), "shape is")


def test_values_that_change_at_load_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Halved(ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
            [[tensor]] = input_dict.values()
            return {target_patterns[0]: tensor / 2}

        @property
        def reverse_op(self) -> Any:
            return self

    model = mixtral()
    name = "model.layers.0.self_attn.o_proj.weight"
    model._weight_conversions = [WeightConverter("o_proj.halved", "o_proj.weight", [Halved()])]
    loading = Loading(model)
    assert loading.find(name) is not None
    with pytest.raises(ValueError, match=r"its values are changed when it is loaded, so its entries lie nowhere"):
        loading.find("model.layers.0.self_attn.o_proj.halved")
    tensor = AdapterTensor(torch.tensor([3]), torch.ones(1), (8, 8), torch.float32)
    with pytest.raises(ValueError, match=r"its values are changed when it is loaded"):
        shira.ResidentAdapters(model).add("one", Adapter({"model.layers.0.self_attn.o_proj.halved": tensor}))


def test_a_tied_tensor_that_a_folder_has_twice_gets_both_patched_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained("base")
    state = load_file("base/model.safetensors")
    inner = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    inner["lm_head.weight"] = inner["wte.weight"].clone()
    save_file(inner, "base/model.safetensors", metadata={"format": "pt"})
    indices = torch.tensor([4, 9])
    old = inner["wte.weight"].view(-1)[indices]
    tensor = AdapterTensor(indices, torch.ones(2), (20, 8), torch.float32, checksum=checksum_of(old))
    adapter = Adapter({"transformer.wte.weight": tensor})
    shira.merge_checkpoint("base", [(adapter, 1.0)], "merged")
    merged = load_file("merged/model.safetensors")
    for name in ("wte.weight", "lm_head.weight"):
        assert merged[name].view(-1)[indices].tolist() == [1, 1]
    (fused,) = shira.fuse([(adapter, 1.0)], base="base").values()
    assert fused.indices.tolist() == [4, 9]
    assert fused.values.tolist() == (1 - old).tolist()
    inner["lm_head.weight"].view(-1)[9] += 1
    save_file(inner, "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"transformer.wte.weight: the base has it under two names, with different values$"
    ):
        shira.merge_checkpoint("base", [(adapter, 1.0)], "again")


def test_a_folder_that_tells_nothing_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert model_of(TensorFolder(tmp_path)) is None
    for text in (
        "[]",
        "{",
        '{"model_type": 3}',
        '{"model_type": "none such"}',
        '{"model_type": "gpt2", "n_layer": -3.5}',
    ):
        (tmp_path / "config.json").write_text(text)
        assert model_of(TensorFolder(tmp_path)) is None or text.endswith("-3.5}")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1000000000}')
    assert model_of(TensorFolder(tmp_path)) is None
    assert "b.weight" not in BaseTensors(tmp_path)
    # A pipe would be read for ever, and each of these numbers is of what is made one by one.
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert "b.weight" not in BaseTensors(tmp_path)
    (tmp_path / "config.json").unlink()
    for more in (
        {"num_labels": 10**9},
        {"num_hidden_layers": 4096},
        {"num_hidden_layers": 40, "num_local_experts": 4096},
        {"num_hidden_layers": 2, "num_local_experts": 10**5},
    ):
        settings = {"model_type": "mixtral", "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, **more}
        (tmp_path / "config.json").write_text(json.dumps({**settings, "num_key_value_heads": 2, "vocab_size": 4}))
        assert "b.weight" not in BaseTensors(tmp_path)
    # Code of the folder is never run, whatever its config says.
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    for kind in ("own", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": kind}))
        model_of(TensorFolder(tmp_path))
    assert not (tmp_path / "ran").exists()
    assert not any(name.rpartition(".")[2] == "code" and "transformers_modules" in name for name in sys.modules)
