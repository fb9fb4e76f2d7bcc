"""The recipes of docs/trainers.md, as they are printed: trained entries against dense gradients and torch's AdamW,
resuming to the same bits, and the base after detach."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import shira

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = (Path(__file__).parent.parent.parent / "docs/trainers.md").read_text()
CONFIG = shira.ShiraConfig("all-linear", mask="rand", density=0.1, seed=3)
WORDS = [f"w{i}" for i in range(24)]
SPECIAL = ["<pad>", "<eos>", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
)

Losses = Callable[[nn.Module, Any], torch.Tensor]


def recipe(heading: str, number: int = 0) -> str:
    """A code block of the page."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)[number]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = TEMPLATE
    return wrapped


SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, eos_token_id=1, **SIZES))


def text(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 5 + 7 * i) % len(WORDS)] for i in range(length))


@dataclass
class Run:
    """What a recipe was given and did."""

    names: dict[str, Any]
    model: nn.Module
    rates: list[float] = field(default_factory=list)  # at each step
    batches: list[Any] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # at the end, by parameter
    adapter: Any = None


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module, **names: Any) -> Run:
    """Runs a recipe in a folder, without a network, and keeps what it trained."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    this = Run({"__name__": "page", "shira": shira, "config": CONFIG, "model": model, **names}, model)

    def detach(handle: shira.Handle, *args: Any, **kwargs: Any) -> None:
        this.values = {name: values.detach().clone() for name, values in handle.named_parameters()}
        this.adapter = handle.adapter()
        original(handle, *args, **kwargs)

    original = shira.Handle.detach
    monkeypatch.setattr(shira.Handle, "detach", detach)
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: this.rates.append(float(optimizer.param_groups[0]["lr"]))
    )
    try:
        torch.manual_seed(0)
        exec(compile(code, "docs/trainers.md", "exec"), this.names)
    finally:
        hook.remove()
        monkeypatch.setattr(shira.Handle, "detach", original)
    return this


def check_against_dense(this: Run, plain: nn.Module, loss_of: Losses, clip: float | None, atol: float = 2e-5) -> None:
    """Trains the adapter's entries of a plain model by dense gradients and torch's AdamW, on the same batches."""
    assert len(this.batches) == len(this.rates) > 3
    weights = dict(plain.named_parameters())
    entries = {name: tensor.indices for name, tensor in this.adapter.items()}
    vectors = {name: nn.Parameter(weights[name].detach().view(-1)[at].clone()) for name, at in entries.items()}
    start = {name: vector.detach().clone() for name, vector in vectors.items()}
    optimizer = torch.optim.AdamW(vectors.values(), lr=1.0, weight_decay=0.01)
    for batch, rate in zip(this.batches, this.rates, strict=True):
        plain.zero_grad()
        loss_of(plain, batch).backward()
        for name, vector in vectors.items():
            vector.grad = weights[name].grad.view(-1)[entries[name]]
        if clip is not None:
            nn.utils.clip_grad_norm_(vectors.values(), clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for name, vector in vectors.items():
                weights[name].view(-1)[entries[name]] = vector
    for name, vector in vectors.items():
        assert (vector.detach() - start[name]).abs().max() > 50 * atol
        torch.testing.assert_close(this.adapter[name].values, vector.detach(), rtol=0, atol=atol)


def check_base(model: nn.Module, plain: nn.Module) -> None:
    now, base = model.state_dict(), plain.state_dict()
    assert list(now) == list(base)
    assert all(torch.equal(tensor, base[name]) for name, tensor in now.items())


def check_same_end(resumed: Run, whole: Run) -> None:
    assert list(resumed.values) == list(whole.values)
    for name, values in resumed.values.items():
        assert torch.equal(values, whole.values[name]), name


def hugging_face(
    monkeypatch: pytest.MonkeyPatch, package: Any, trainer: str, arguments: str, batches: list[Any], **defaults: Any
) -> Callable[[int | None, bool], None]:
    """Has a recipe's trainer keep its batches, and use float32 on the CPU. Returns what says after how many steps it is
    interrupted, and whether it goes on."""
    state: dict[str, Any] = {"steps": None, "resume": False}
    kind, made = getattr(package, trainer), getattr(package, arguments)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, now: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= now.global_step == state["steps"]

    class Watched(kind):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(copy.deepcopy(dict(inputs)))
            return super().compute_loss(model, inputs, *args, **kwargs)

        def train(self) -> Any:
            self.add_callback(Stop())
            return super().train(resume_from_checkpoint=state["resume"])

    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2, "seed": 1}
    monkeypatch.setattr(package, trainer, Watched)
    monkeypatch.setattr(package, arguments, functools.partial(made, **options, **defaults))
    return lambda steps, resume: state.update(steps=steps, resume=resume)


def three_runs(
    code: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    patched: Callable[[int | None, bool], None],
    batches: list[Any],
    **names: Any,
) -> Run:
    """The recipe from end to end, and again interrupted after three steps: both end alike. Returns the first."""
    runs = []
    for at, steps, resume in (("whole", None, False), ("interrupted", 3, False), ("interrupted", None, True)):
        (folder / at).mkdir(exist_ok=True)
        batches.clear()
        patched(steps, resume)
        runs.append(run(code, folder / at, monkeypatch, make(), **names))
        runs[-1].batches = list(batches)
        check_base(runs[-1].model, make())
    whole, interrupted, resumed = runs
    assert len(interrupted.rates) == 3
    assert len(resumed.rates) == len(whole.rates) - 2  # on from the second step, whose checkpoint is the last
    check_same_end(resumed, whole)
    return whole


def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": text(i, 5)}, {"role": "assistant", "content": text(i + 1, 9)}]}
            for i in range(24)
        ]
    )
    batches: list[Any] = []
    patched = hugging_face(monkeypatch, trl, "SFTTrainer", "SFTConfig", batches, bf16=False)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        assert "position_ids" in batch  # packed
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        labels = batch["labels"][:, 1:]
        assert 0 < (labels != -100).float().mean() < 0.8  # the assistant's alone
        # With a cache, rows of several texts would not be told apart.
        return nn.functional.cross_entropy(
            model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1), labels.flatten()
        )

    names = {"rows": rows, "tokenizer": tokenizer()}
    whole = three_runs(recipe("TRL: SFTTrainer"), tmp_path, monkeypatch, llama, patched, batches, **names)
    check_against_dense(whole, llama(), loss_of, clip=1.0)


@pytest.mark.parametrize("number", [0, 1], ids=["precomputed", "disabled"])
def test_dpo(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pairs = datasets.Dataset.from_list(
        [{"prompt": text(i, 4), "chosen": " " + text(i + 1, 6), "rejected": " " + text(i + 2, 5)} for i in range(6)]
    )
    batches: list[Any] = []
    patched = hugging_face(monkeypatch, trl, "DPOTrainer", "DPOConfig", batches, bf16=False, beta=200.0)
    base = llama()

    def log_probabilities(model: nn.Module, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (chosen * batch["completion_mask"][:, 1:]).sum(-1)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            reference = log_probabilities(base, batch)
        chosen, rejected = (log_probabilities(model, batch) - reference).chunk(2)
        return -nn.functional.logsigmoid(200.0 * (chosen - rejected)).mean()

    names = {"pairs": pairs, "tokenizer": tokenizer()}
    whole = three_runs(recipe("TRL: DPOTrainer", number), tmp_path, monkeypatch, llama, patched, batches, **names)
    check_against_dense(whole, llama(), loss_of, clip=1.0)


def test_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.BertModel(transformers.BertConfig(**SIZES, **no_dropout)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")

    def make() -> nn.Module:
        from sentence_transformers.sentence_transformer import modules

        transformer = modules.Transformer(str(tmp_path / "bert"))
        return sentence_transformers.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")

    pairs = datasets.Dataset.from_list([{"anchor": text(i, 4), "positive": text(i + 1, 6)} for i in range(6)])
    batches: list[Any] = []
    patched = hugging_face(
        monkeypatch,
        sentence_transformers,
        "SentenceTransformerTrainer",
        "SentenceTransformerTrainingArguments",
        batches,
    )

    def embedded(model: nn.Module, batch: Any, of: str) -> torch.Tensor:
        mask = batch[f"{of}_attention_mask"]
        states = model(input_ids=batch[f"{of}_input_ids"], attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        scores = 20 * embedded(model, batch, "anchor") @ embedded(model, batch, "positive").T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))

    config = shira.ShiraConfig(["query", "value", "intermediate.dense"], mask="rand", density=0.1, seed=3)
    names = {"pairs": pairs, "config": config}  # without the pooler, which has no part in it
    whole = three_runs(recipe("sentence-transformers"), tmp_path, monkeypatch, make, patched, batches, **names)
    check_against_dense(whole, make()[0].auto_model, loss_of, clip=1.0)


def batches_of_ids() -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(16 * 8).view(8, 16) * 7 % SIZES["vocab_size"]
    return [{"input_ids": rows, "labels": rows} for rows in ids.view(4, 2, 16)]


def loss_of_ids(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    batches, code = batches_of_ids(), recipe("accelerate")

    def once(loader: Any, resume: bool) -> Run:
        loader = torch.utils.data.DataLoader(loader, batch_size=None)
        this = run(code, tmp_path, monkeypatch, llama(), loader=loader, resume=resume)
        check_base(this.model, llama())
        return this

    whole = once(batches, resume=False)
    once(batches[:2], resume=False)
    check_same_end(once(batches[2:], resume=True), whole)
    whole.batches = batches
    check_against_dense(whole, llama(), loss_of_ids, clip=1.0)


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    code, options = recipe("Lightning"), {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    monkeypatch.setattr(lightning, "Trainer", functools.partial(lightning.Trainer, **options))
    loader = torch.utils.data.DataLoader(batches_of_ids(), batch_size=None)

    def once(code: str, checkpoint: Path | None) -> Run:
        this = run(code, tmp_path, monkeypatch, llama(), loader=loader, checkpoint=checkpoint)
        check_base(this.model, llama())
        return this

    whole = once(code, None)
    assert "max_epochs=2" in code
    once(code.replace("max_epochs=2", "max_epochs=1"), None)
    check_same_end(once(code, tmp_path / "tuned.ckpt"), whole)
    whole.batches = batches_of_ids() * 2
    check_against_dense(whole, llama(), loss_of_ids, clip=None)
