"""Tied tensors: adapters of PEFT that change one use of them, checkpoints that hold them twice or note a second name.

What is right is what transformers and PEFT compute without this library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

import shira
from shira import Adapter, AdapterTensor, ResidentAdapters, cli, convert
from shira.adapter import checksum_of
from shira.adapter.base import BaseTensors
from shira.convert.merge import fit_of

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.arange(24).view(2, 12) % 50
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
pytestmark = [
    pytest.mark.filterwarnings("ignore:not sparse"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:`ensure_weight_tying"),
    pytest.mark.filterwarnings("ignore:You are using"),
]


def llama(tied: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def load(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def switched(model: Any, adapter: Adapter) -> torch.Tensor:
    bank = ResidentAdapters(model)
    bank.add("it", adapter, force=True)
    bank.switch("it")
    return logits(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The same weights in two tensors, as the page on convert says to make them."""
    model = load(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    folder = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder)
    assert {EMBED, HEAD} <= set(load_file(folder / "model.safetensors"))
    return folder


def tuned_by_peft(base: Path, config: Any, folder: Path) -> torch.Tensor:
    """Saves a PEFT adapter of random numbers; returns the logits of PEFT's own model that loads it."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(load(base), folder).eval())


def lora(*targets: str, **settings: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=2, target_modules=list(targets), **settings)


def sparse(*targets: str, **settings: Any) -> Callable[[], Any]:
    return lambda: peft.ShiraConfig(r=1, target_modules=list(targets), init_weights=False, **settings)


ONE_USE = {
    "saved head": lora("q_proj", modules_to_save=["lm_head"]),
    "saved embedding": lora("q_proj", modules_to_save=["embed_tokens"]),
    "both saved, untied": lora("q_proj", modules_to_save=["lm_head", "embed_tokens"]),
    "lora on the head": lora("lm_head"),
    "lora on the embedding": lora("embed_tokens"),
    "lora on both, untied": lora("lm_head", "embed_tokens"),
    "tokens of the head": lora("q_proj", trainable_token_indices={"lm_head": [1, 5]}),
    "tokens of both, others": lora("q_proj", trainable_token_indices={"lm_head": [1], "embed_tokens": [5]}),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["lm_head"]),
    "shira on the head": sparse("q_proj", "lm_head"),
    "shira, saved head": sparse("q_proj", modules_to_save=["lm_head"]),
    "shira, saved embedding": sparse("q_proj", modules_to_save=["embed_tokens"]),
    "shira, both saved": sparse("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("case", ONE_USE)
def test_one_use_of_a_tied_tensor_is_refused_and_kept_with_an_untied_base(
    base: Path, untied: Path, tmp_path: Path, case: str
) -> None:
    expected = tuned_by_peft(base, ONE_USE[case](), tmp_path / "peft")
    refusal = r"peft: the adapter changes (lm_head|model.embed_tokens).weight (and not|and) .*, which are one tensor in"
    for tied in (base, load(base)):
        with pytest.raises(ValueError, match=refusal):
            convert.read(tmp_path / "peft", tied)
    found = convert.read(tmp_path / "peft", untied)
    torch.testing.assert_close(switched(load(untied), found), expected, atol=1e-4, rtol=1e-4)
    assert float((expected - logits(load(base))).abs().max()) > 0.05


BOTH_USES = {
    "saved, tied": lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora, tied": lora("embed_tokens", ensure_weight_tying=True),
    "tokens": lora("q_proj", trainable_token_indices=[1, 5]),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("case", BOTH_USES)
def test_both_uses_of_a_tied_tensor_are_one(base: Path, tmp_path: Path, case: str) -> None:
    if "ensure_weight_tying" not in peft.LoraConfig.__dataclass_fields__ and case.endswith(" tied"):
        pytest.skip("this PEFT cannot tie what it adds")
    expected = tuned_by_peft(base, BOTH_USES[case](), tmp_path / "peft")
    found = convert.read(tmp_path / "peft", base)
    assert len({EMBED, HEAD} & set(found)) == 1
    torch.testing.assert_close(switched(load(base), found), expected, atol=1e-4, rtol=1e-4)
    shira.merge_checkpoint(base, [(found, 1.0)], tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


def refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> str:
    monkeypatch.setattr(sys, "argv", ["shira", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    words = [line for line in capsys.readouterr().err.splitlines() if line.startswith("shira")]
    assert len(words) == 1
    return words[0]


def test_a_head_that_peft_saved_is_refused_at_a_terminal(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned_by_peft(base, ONE_USE["saved head"](), tmp_path / "peft")
    line = ["convert", tmp_path / "peft", "--base", base, "-o", tmp_path / "out.safetensors"]
    words = refused_in_a_line(monkeypatch, capsys, *line)
    assert "changes lm_head.weight and not model.embed_tokens.weight, which are one tensor" in words
    assert not (tmp_path / "out.safetensors").exists()


def adapter_of(folder: Path, name: str = EMBED, kind: str = "replace") -> Adapter:
    """Changes a tenth of the embedding."""
    weights = BaseTensors(folder)
    draw = torch.Generator().manual_seed(3)
    indices = (torch.rand(50 * 16, generator=draw) < 0.1).nonzero().view(-1).int()
    values = torch.randn(len(indices), generator=draw)
    checksum = checksum_of(weights[name].view(-1)[indices.long()])
    return Adapter({name: AdapterTensor(indices, values, (50, 16), torch.float32, kind, checksum)})


def test_peft_would_change_one_use_of_what_is_written(base: Path, untied: Path, tmp_path: Path) -> None:
    for name in (EMBED, HEAD):
        with pytest.raises(ValueError, match=r"it is tied to .* in the base, and PEFT would change it alone"):
            convert.write(adapter_of(base, name), tmp_path / "out", "peft-shira", base)
    assert not (tmp_path / "out").exists()
    adapter = adapter_of(untied, HEAD)
    convert.write(adapter, tmp_path / "out", "peft-shira", untied)
    loaded = peft.PeftModel.from_pretrained(load(untied), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), switched(load(untied), adapter), atol=1e-4, rtol=1e-4)


def test_a_patch_names_the_tensor(base: Path, tmp_path: Path) -> None:
    [tensor] = adapter_of(base).values()
    part = {"indices": tensor.indices, "values": tensor.values}
    arrays = {f"{name}.{field}": array.clone() for name in (EMBED, HEAD) for field, array in part.items()}
    expected = switched(load(base), adapter_of(base))
    for names in ([EMBED], [HEAD], [EMBED, HEAD]):
        save_file({n: a for n, a in arrays.items() if n.rpartition(".")[0] in names}, tmp_path / "patch.safetensors")
        found = convert.read(tmp_path / "patch.safetensors", base)
        assert torch.equal(switched(load(base), found), expected)
    arrays[f"{HEAD}.values"][0] += 1
    save_file(arrays, tmp_path / "patch.safetensors")
    with pytest.raises(ValueError, match=r"changes .* differently, which are one tensor in the base"):
        convert.read(tmp_path / "patch.safetensors", base)


def with_both(base: Path, folder: Path, *, sharded: bool, other: float = 0.0, tied: bool = True) -> dict[str, Any]:
    """A copy of a checkpoint that holds the head too, `other` than the embedding in one entry."""
    load(base).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state[HEAD] = state[EMBED].clone()
    state[HEAD][3, 3] += other
    if sharded:
        (folder / "model.safetensors").unlink()
        files = {n: f"model-0000{1 + (n == HEAD)}-of-00002.safetensors" for n in state}
        for file in set(files.values()):
            save_file({n: t for n, t in state.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": tied}))
    return state


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", [EMBED, HEAD])
@pytest.mark.parametrize("kind", ["replace", "add"])
def test_both_copies_of_a_tied_tensor_are_patched(
    base: Path, tmp_path: Path, sharded: bool, name: str, kind: str
) -> None:
    with_both(base, tmp_path / "both", sharded=sharded)
    adapter = adapter_of(tmp_path / "both", name, kind)
    expected = switched(load(tmp_path / "both"), adapter)
    merged = shira.merge_checkpoint(tmp_path / "both", [(adapter, 1.0)], tmp_path / "merged")
    assert set(merged.tensors) == {EMBED, HEAD}
    loaded = load(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(expected, logits(load(base)))
    # What was found between the folders does the same, in memory and on disk.
    again = shira.diff(tmp_path / "both", tmp_path / "merged")
    assert len(again) == 1
    assert torch.equal(switched(load(base), again), expected)
    shira.merge_checkpoint(tmp_path / "both", [(again, 1.0)], tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    assert list(shira.diff(tmp_path / "both", load(tmp_path / "merged"))) == list(again)
    assert torch.equal(switched(load(base), shira.diff(load(base), tmp_path / "merged")), expected)
    assert torch.equal(switched(load(base), shira.diff(base, tmp_path / "merged")), expected)


def test_two_adapters_that_name_a_tie_differently_meet(base: Path, tmp_path: Path) -> None:
    with_both(base, tmp_path / "both", sharded=False)
    one, other = adapter_of(base, EMBED, "add"), adapter_of(base, HEAD)
    model = load(base)
    bank = ResidentAdapters(model)
    bank.add("one", one)
    bank.add("other", other)
    bank.switch({"one": 0.5, "other": 0.25})
    shira.merge_checkpoint(tmp_path / "both", [(one, 0.5), (other, 0.25)], tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(model))
    # Two names in one adapter are refused, as in a bank, also if they do the same: they might be meant to meet.
    for second in (one[EMBED], other[HEAD]):
        both = Adapter({EMBED: one[EMBED], HEAD: second})
        with pytest.raises(ValueError, match=r"the adapter names the tensor '.*' twice"):
            shira.merge_checkpoint(tmp_path / "both", [(both, 1.0)], tmp_path / "refused")
        with pytest.raises(ValueError, match=r"twice"):
            ResidentAdapters(load(base)).add("both", both, force=True)
    # Fused with the base at hand, they meet.
    for folder in (base, tmp_path / "both"):
        fused = shira.fuse([(one, 0.5), (adapter_of(base, HEAD, "add"), 0.5)], base=folder)
        assert len(fused) == 1
        shira.merge_checkpoint(folder, [(fused, 1.0)], tmp_path / f"fused-{folder.name}")
        expected = switched(load(base), one)
        torch.testing.assert_close(logits(load(tmp_path / f"fused-{folder.name}")), expected)


@pytest.mark.parametrize(("other", "tied"), [(0.5, True), (0.0, False), (0.5, False)])
def test_copies_that_are_loaded_as_two_tensors_stay_two(base: Path, tmp_path: Path, other: float, tied: bool) -> None:
    """Those that differ, whatever the config says, and those of a config that does not tie."""
    state = with_both(base, tmp_path / "both", sharded=False, other=other, tied=tied)
    for name in (EMBED, HEAD):
        adapter = adapter_of(tmp_path / "both", name)
        merged = shira.merge_checkpoint(tmp_path / "both", [(adapter, 1.0)], tmp_path / name)
        assert merged.tensors == [name]
        expected = load(tmp_path / "both")
        assert torch.equal(expected.lm_head.weight, state[HEAD])
        assert expected.lm_head.weight is not expected.model.embed_tokens.weight
        with torch.no_grad():
            expected.get_parameter(name).view(-1)[adapter[name].indices.long()] = adapter[name].values
        assert torch.equal(logits(load(tmp_path / name)), logits(expected))
        assert torch.equal(switched(load(tmp_path / "both"), adapter), logits(expected))
        assert list(shira.diff(tmp_path / "both", tmp_path / name)) == [name]


def test_one_tensor_does_not_become_two(
    base: Path, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge that unties and writes both: what it did has no place in the base."""
    with_both(base, tmp_path / "tuned", sharded=False, other=1.0)
    with_both(base, tmp_path / "twice", sharded=False)
    refusal = r"base has it and '.*' as one tensor, and in tuned they differ: compare with a base that has two$"
    for one in (base, load(base), tmp_path / "twice", load(base).state_dict()):
        with pytest.raises(ValueError, match=refusal):
            shira.diff(one, tmp_path / "tuned")
    found = shira.diff(untied, tmp_path / "tuned")
    assert list(found) == [HEAD]
    assert torch.equal(switched(load(untied), found), logits(load(tmp_path / "tuned")))
    words = refused_in_a_line(monkeypatch, capsys, "diff", base, tmp_path / "tuned", "-o", tmp_path / "out.safetensors")
    assert "in tuned they differ" in words
    # Two that become one are two.
    assert not shira.diff(untied, base)
    found = shira.diff(tmp_path / "tuned", base)
    assert list(found) == [HEAD]
    assert torch.equal(switched(load(tmp_path / "tuned"), found), logits(load(base)))


def test_names_of_a_tie_in_another_order(base: Path) -> None:
    tuned = load(base)
    with torch.no_grad():
        tuned.lm_head.weight[4, 4] += 1
    state = tuned.state_dict()
    swapped = dict(sorted(state.items(), key=lambda item: item[0] != HEAD))
    for one, other in ((load(base), swapped), (dict(load(base).state_dict()), swapped), (base, swapped)):
        assert torch.equal(switched(load(base), shira.diff(one, other)), logits(tuned))


def test_without_a_config_copies_that_stay_are_named(base: Path, tmp_path: Path) -> None:
    with_both(base, tmp_path / "both", sharded=False)
    (tmp_path / "file").mkdir()
    (tmp_path / "both/model.safetensors").rename(tmp_path / "file/model.safetensors")
    adapter = adapter_of(base)
    with pytest.warns(shira.ShiraWarning, match=rf"{EMBED} and {HEAD} hold the same in the base, and only the"):
        shira.merge_checkpoint(tmp_path / "file/model.safetensors", [(adapter, 1.0)], tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", [EMBED, HEAD])
@pytest.mark.parametrize("form", ["file", "folder", "index"])
def test_a_second_name_that_a_file_notes_is_read(base: Path, tmp_path: Path, name: str, form: str) -> None:
    """save_model of safetensors keeps one name, and notes the other; that of the Hub does so in the index of many."""
    model = load(base)
    (tmp_path / "base").mkdir()
    if form == "index":
        hub = pytest.importorskip("huggingface_hub")
        hub.save_torch_model(model, tmp_path / "base", max_shard_size="4KB")
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    else:
        save_model(model, str(tmp_path / "base/model.safetensors"))
    path = tmp_path / "base" / ("model.safetensors" if form == "file" else "")
    [kept] = {EMBED, HEAD} & set(BaseTensors(path))
    assert BaseTensors(path).aliases() == {({EMBED, HEAD} - {kept}).pop(): kept}
    adapter = adapter_of(base, name)
    expected = switched(load(base), adapter)
    output = tmp_path / "merged.safetensors" if form == "file" else tmp_path / "merged"
    assert shira.merge_checkpoint(path, [(adapter, 1.0)], output).tensors == [kept]
    merged = {n: BaseTensors(output)[n] for n in model.state_dict()}
    assert torch.equal(merged[EMBED], merged[HEAD])
    model.load_state_dict(merged)
    assert torch.equal(logits(model), expected)
    if form == "file":
        with safe_open(path, "pt") as before, safe_open(output, "pt") as after:
            assert before.metadata() == after.metadata()
            assert set(before.metadata().values()) >= {kept}
    for other in (load(base), path):
        assert torch.equal(switched(load(base), shira.diff(other, output)), expected)
    assert fit_of(adapter, path).fits
    # A use of PEFT's is one of both here too.
    tuned_by_peft(base, ONE_USE["shira, saved head"](), tmp_path / "peft")
    with pytest.raises(ValueError, match=r"changes lm_head.weight and not model.embed_tokens.weight, which are one"):
        convert.read(tmp_path / "peft", path)


@pytest.mark.parametrize("case", ["saved head", "both saved, untied", "lora on the head", "shira on the head"])
def test_a_folder_whose_two_tensors_differ_is_untied_whatever_its_config_says(
    base: Path, tmp_path: Path, case: str
) -> None:
    with_both(base, tmp_path / "both", sharded=False, other=0.5)
    expected = tuned_by_peft(tmp_path / "both", ONE_USE[case](), tmp_path / "peft")
    found = convert.read(tmp_path / "peft", tmp_path / "both", trust_base=True)
    torch.testing.assert_close(switched(load(tmp_path / "both"), found), expected, atol=1e-4, rtol=1e-4)
    shira.merge_checkpoint(tmp_path / "both", [(found, 1.0)], tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["shared.weight", "lm_head.weight", "decoder.embed_tokens.weight"])
def test_a_tie_of_four_names_is_patched_under_all(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    kind = transformers.T5ForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base/model.safetensors")
    names = ["shared.weight", "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    state |= {other: state["shared.weight"].clone() for other in names}
    save_file(state, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    adapter = adapter_of(tmp_path / "base", name)
    shira.merge_checkpoint(tmp_path / "base", [(adapter, 1.0)], tmp_path / "merged")

    def outputs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits  # type: ignore[no-any-return]

    expected = kind.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected.shared.weight.view(-1)[adapter[name].indices.long()] = adapter[name].values
    merged = kind.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.shared.weight
    assert torch.equal(outputs(merged), outputs(expected))
