"""From a folder to an adapter and back, by every command, over models whose names change when they are loaded.

What is loaded from a merged folder gives the same logits, bit for bit, as the model in memory that was trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from safetensors.torch import load_file

import shira

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 converts at load")

WORDS = [f"w{i}" for i in range(40)]
VOCABULARY = ["<unk>", "</s>", *WORDS]
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(VOCABULARY)}
IDS = torch.arange(2, 14).view(2, 6)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
IMAGE = 41  # the token that stands for a part of an image


@dataclass(frozen=True)
class Case:
    """A model class, its tiny config, and what it takes.

    task: of `shira train`; "" where the adapter is trained by `attach`. inner: the attribute whose weights are saved.
    outer_config: whether the folder's config is that of the whole model nevertheless, as of the first GPT-2.
    """

    kind: str
    config: Callable[[], Any]
    inputs: dict[str, torch.Tensor]
    task: str = ""
    inner: str = ""
    outer_config: bool = False

    def make(self) -> Any:
        torch.manual_seed(0)
        return getattr(transformers, self.kind)(self.config()).eval()

    def load(self, folder: Path) -> Any:
        kind = getattr(transformers, self.kind)
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        return model.eval()

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(**self.inputs).logits  # type: ignore[no-any-return]


def named(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**more)


def causal(name: str, **more: Any) -> Case:
    config = named(name, **{**TEXT, **TOKENS, **more})
    return Case(f"{name}ForCausalLM", config, {"input_ids": IDS}, "causal-lm")


def llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=8),
        text_config=transformers.LlamaConfig(**TEXT, **HEADS, **TOKENS),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )


WHISPER = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 8, "max_target_positions": 16, "vocab_size": len(VOCABULARY)}
CASES = {
    "llama": causal("Llama", **HEADS, tie_word_embeddings=True),
    "gpt2": Case("GPT2LMHeadModel", named("GPT2", **GPT2, **TOKENS), {"input_ids": IDS}, "causal-lm"),
    "gpt2-inner": Case(
        "GPT2LMHeadModel", named("GPT2", **GPT2, **TOKENS), {"input_ids": IDS}, "causal-lm", "transformer"
    ),
    "gpt2-old": Case(
        "GPT2LMHeadModel", named("GPT2", **GPT2, **TOKENS), {"input_ids": IDS}, "causal-lm", "transformer", True
    ),
    "qwen3": causal("Qwen3", **HEADS),
    "gemma": causal("Gemma", **HEADS),
    "phi3": causal("Phi3", num_key_value_heads=1),
    "mixtral": causal("Mixtral", **HEADS, num_local_experts=3),
    "qwen3-moe": causal("Qwen3Moe", **HEADS, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12),
    "llava": Case(
        "LlavaForConditionalGeneration",
        llava,
        {"input_ids": torch.cat([torch.full((2, 4), IMAGE), IDS], dim=1), "pixel_values": PIXELS},
    ),
    "t5": Case(
        "T5ForConditionalGeneration",
        named("T5", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=len(VOCABULARY)),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "bert": Case("BertForSequenceClassification", named("Bert", **TEXT), {"input_ids": IDS}, "classification"),
    "vit": Case("ViTForImageClassification", named("ViT", **VISION), {"pixel_values": PIXELS}),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        named("Whisper", **WHISPER, **TOKENS, decoder_start_token_id=1),
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).view(2, 8, 16), "decoder_input_ids": IDS},
    ),
}
EXPERTS = ("mixtral", "qwen3-moe")


def save(case: Case, folder: Path) -> None:
    """A folder as `save_pretrained` writes it, with a tokenizer where the command trains."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = case.make()
    (getattr(model, case.inner) if case.inner else model).save_pretrained(folder)
    if case.outer_config:
        model.config.architectures = [case.kind]
        model.config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    if case.task:
        fast.save_pretrained(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(monkeypatch, capsys)


def done(run: Run, line: str) -> Any:
    """What a command that succeeds prints with --json."""
    code, out, error = run(f"{line} --json")
    assert code == 0, error
    return json.loads(out)


def train(case: Case, run: Run) -> None:
    """Writes adapter.safetensors: by the command where it takes the model, else by `attach`."""
    if case.task:
        rows = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(8)]
        if case.task == "classification":
            rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
        Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        line = f"train base data.jsonl -o trained --task {case.task} --density 0.05 --lr 0.05 --max-steps 1"
        code, _, error = run(f"{line} --held-out 0 --max-length 8")
        assert code == 0, error
        command = next(line.strip() for line in error.splitlines() if line.strip().startswith("shira apply"))
        assert command == "shira apply base trained/adapter.safetensors -o MERGED"
        shutil.copy("trained/adapter.safetensors", "adapter.safetensors")
        return
    model = case.load(Path("base"))
    handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.05))
    optimizer = shira.ShiraAdamW(handle.parameters(), lr=0.05)
    model(**case.inputs).logits.square().mean().backward()
    optimizer.step()
    handle.adapter().save("adapter.safetensors")
    torch.save(case.logits(model), "trained.pt")
    handle.detach()


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_goes_through_every_command(name: str, run: Run) -> None:
    case = CASES[name]
    save(case, Path("base"))
    train(case, run)
    model = case.load(Path("base"))
    base = case.logits(model)
    bank = shira.ResidentAdapters(model)
    bank.add("trained", "adapter.safetensors")
    with bank.using("trained"):
        trained = case.logits(model)
    assert not torch.equal(base, trained)
    if Path("trained.pt").exists():
        assert torch.equal(trained, torch.load("trained.pt"))

    assert done(run, "info adapter.safetensors --base base")["fits"] is True
    done(run, "apply base adapter.safetensors -o merged")
    merged = case.load(Path("merged"))
    assert torch.equal(case.logits(merged), trained)

    # What the merged folder differs in, in the folder's names.
    found = done(run, "diff base merged -o difference.safetensors")
    assert found["entries"] <= shira.Adapter.load("adapter.safetensors").nnz
    assert done(run, "info difference.safetensors --base base")["fits"] is True
    bank.add("difference", "difference.safetensors")
    with bank.using("difference"):
        assert torch.equal(case.logits(model), trained)
    shira.attach(model, shira.Adapter.load("difference.safetensors")).detach()
    assert torch.equal(case.logits(model), base)

    # A model on one side, a folder on the other.
    for one, other in ((model, "merged"), ("base", merged)):
        again = shira.diff(one, other)
        assert again.nnz == found["entries"]
        again.save("again.safetensors")
        assert done(run, "info again.safetensors --base base")["fits"] is True
        assert written("apply base again.safetensors -o again --force", run) == weights("merged")

    # Through other formats and kinds.
    done(run, "convert adapter.safetensors --base base --to patch -o patch.safetensors")
    done(run, "convert patch.safetensors --base base --trust-base -o back.safetensors")
    assert written("apply base back.safetensors -o back", run) == weights("merged")
    done(run, "convert adapter.safetensors --base base --no-indices -o small.safetensors")
    assert written("apply base small.safetensors -o small", run) == weights("merged")
    if not any(len(tensor.shape) != 2 for tensor in shira.Adapter.load("difference.safetensors").values()):
        done(run, "convert difference.safetensors --base base --to peft-shira -o peft")
        names = {name.rpartition(".")[0] for name in load_file("peft/adapter_model.safetensors")}
        meant = getattr(model, case.inner) if case.inner and not case.outer_config else model
        modules = {f"base_model.model.{name}" for name, _ in meant.named_modules()}
        assert names <= modules, "PEFT's names are those of the model in memory that the folder's config names"
    done(run, "fuse adapter.safetensors difference.safetensors -w 0.5 -w 0.5 --base base -o mix.safetensors")
    assert done(run, "info mix.safetensors --base base")["fits"] is True
    assert written("apply base mix.safetensors -o mix", run).keys() == weights("merged").keys()


def weights(folder: str) -> dict[str, bytes]:
    """The bytes of each tensor."""
    found = load_file(Path(folder) / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def written(line: str, run: Run) -> dict[str, bytes]:
    """The tensors of the folder that a command writes."""
    return weights(done(run, line)["output"])
