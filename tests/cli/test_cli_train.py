"""`shira train`, as at a terminal: adapter, numbers and picture; what is refused leaves no file."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import exit_code_of

import shira
from shira import cli

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from shira.cli.train import run as finetune  # noqa: E402 - needs what may be missing
from shira.cli.train.examples import Encoder  # noqa: E402
from shira.cli.train.model import load_tokenizer  # noqa: E402
from shira.cli.train.rows import read_rows  # noqa: E402

WORDS = [f"w{i}" for i in range(24)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code_of(monkeypatch, "train", *arguments)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models llama and bert, and their data."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(WORDS) + 2, "max_position_embeddings": 256}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **sizes))
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(id2label={0: "low", 1: "high"}, label2id={"low": 0, "high": 1}, **sizes)
    )
    for name, model in (("llama", llama.to(torch.bfloat16)), ("bert", bert)):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    (folder / "count.txt").write_text(" ".join(WORDS * 30))
    pairs = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    # The first word tells; half of the labels are numbers.
    texts = [(i % 2, f"{['w0', 'w1'][i % 2]} w{2 + i % 20}") for i in range(48)]
    labels = [
        {"text": text, "label": high if i < 24 else ["low", "high"][high]} for i, (high, text) in enumerate(texts)
    ]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_text_becomes_an_adapter_that_improves_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(folder)
    arguments = (folder / "llama", folder / "count.txt", "--lr", 0.1, "--max-length", 24, "--density", 0.2)
    for name in ("one", "two"):
        assert run(monkeypatch, *arguments, "-o", tmp_path / name, "--json") == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out) == json.loads((tmp_path / name / "training.json").read_text())
    assert f"shira apply {folder / 'llama'} {tmp_path / 'two/adapter.safetensors'} -o" in shown.err
    assert files_in(folder) == before, "the model's folder is only read"
    assert (tmp_path / "one/training.png").read_bytes().startswith(b"\x89PNG")

    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert one["losses"] == two["losses"], "the same seed gives the same bits"
    adapters = [shira.Adapter.load(tmp_path / name / "adapter.safetensors") for name in ("one", "two")]
    assert all(torch.equal(adapters[0][name].values, adapters[1][name].values) for name in adapters[0])
    assert one["examples"] + one["held_out_examples"] == 30
    assert one["held_out_examples"] == 3
    assert len(one["losses"]) == 3 * -(-27 // 8)
    assert one["task"] == "causal-lm"
    assert one["entries"] == adapters[0].nnz
    assert adapters[0].config.density == 0.2

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="auto")
    ids = torch.arange(2, 26)[None]
    bank = shira.ResidentAdapters(model)
    bank.add("one", adapters[0])
    losses = []
    for target in (None, "one"):
        bank.switch(target)
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[1] < losses[0] - 0.3
    assert one["held_out_after"]["loss"] < one["held_out_before"]["loss"] - 0.3


def test_only_completions_are_learned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = load_tokenizer(folder / "llama")
    rows = read_rows(folder / "pairs.jsonl", "causal-lm")
    assert len(rows) == 20
    examples = Encoder(tokenizer, config, 256).encode(rows)
    assert examples[3] == {"input_ids": [5, 6, 7, 1], "attention_mask": [1] * 4, "labels": [-100, -100, 7, 1]}
    out = tmp_path / "out"
    assert (
        run(monkeypatch, folder / "llama", folder / "pairs.jsonl", "-o", out, "--max-steps", 3, "--mask", "rand") == 0
    )
    assert len(json.loads((out / "training.json").read_text())["losses"]) == 3


@pytest.mark.parametrize("mask", ["wm", "snip"])
def test_a_classifier_learns_its_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str
) -> None:
    options = ("--mask", mask, "--density", 0.2, "--lr", 0.03, "--epochs", 8, "--held-out", 0.25)
    targets = ("--target-modules", "query, value,dense")
    assert run(monkeypatch, folder / "bert", folder / "labels.jsonl", "-o", tmp_path / "out", *options, *targets) == 0
    found = json.loads((tmp_path / "out/training.json").read_text())
    assert found["task"] == "classification"
    assert found["losses"][-1] < found["losses"][0]
    assert found["held_out_after"]["loss"] < found["held_out_before"]["loss"]
    assert found["held_out_after"]["accuracy"] > 0.8
    names = set(shira.Adapter.load(tmp_path / "out/adapter.safetensors"))
    assert names
    assert all(name.endswith(("query.weight", "value.weight", "dense.weight")) for name in names)


def jsonl(*records: Any) -> bytes:
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records).encode()


TEXT = {"text": "w1 w2"}
BAD_DATA = {
    "not_json": ("llama", "x.jsonl", jsonl(TEXT, "{"), "line 2: not JSON"),
    "no_text": ("llama", "x.jsonl", jsonl(TEXT, {"words": "w1"}), 'line 2: must be an object with "text"'),
    "half_a_pair": ("llama", "x.jsonl", jsonl(TEXT, {"prompt": "w1"}), 'line 2: must be an object with "text"'),
    "text_is_no_string": ("llama", "x.jsonl", jsonl(TEXT, {"text": 3}), "line 2: 'text' must be a string, got 3"),
    "nothing_to_learn": ("llama", "x.jsonl", jsonl(TEXT, {"text": ""}), "line 2: 'text' is empty"),
    "no_tokens": ("bert", "x.jsonl", jsonl({"text": "", "label": 1}), "line 1: 'text' is empty"),
    "long_prompt": ("llama", "x.jsonl", jsonl(TEXT, {"prompt": "w1 " * 300, "completion": "w2"}), "line 2: the prompt"),
    "one_example": ("llama", "x.jsonl", jsonl(TEXT), "two are needed, or --held-out 0"),
    "empty": ("llama", "x.txt", b"", "x.txt: is empty"),
    "one_token": ("llama", "x.txt", b"w1", "has 0 example(s)"),
    "not_text": ("llama", "x.txt", b"\xff\xfe\x00", "not UTF-8 text"),
    "text_for_a_classifier": ("bert", "x.txt", b"w1 w2", 'JSON lines with "text" and "label"'),
    "no_label": ("bert", "x.jsonl", jsonl(TEXT), "line 1: a classifier needs"),
    "unknown_label": ("bert", "x.jsonl", jsonl({**TEXT, "label": "middle"}), "no class 'middle'; it has 2: high, low"),
    "label_out_of_range": ("bert", "x.jsonl", jsonl({**TEXT, "label": 2}), "line 1: the model has no class 2"),
}


@pytest.mark.parametrize(("model", "name", "content", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_refused_in_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(monkeypatch, folder / model, tmp_path / name, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = {
    "mask": (("--mask", "best"), "mask must be one of"),
    "mask_is_a_function": (("--mask", "os:system"), "--mask must be one of"),
    "epochs": (("--epochs", 0), "--epochs must be above 0 and at most 1000000000, got 0.0"),
    "negative_epochs": (("--epochs", -1), "--epochs must be above 0"),
    "infinite_epochs": (("--epochs", "inf"), "--epochs must be above 0 and at most"),
    "nan_epochs": (("--epochs", "nan"), "--epochs must be above 0"),
    "steps": (("--max-steps", 10**30), "--max-steps must be at most 1000000000"),
    "negative_steps": (("--max-steps", -1), "--max-steps"),
    "huge_batch_size": (("--batch-size", 10**30), "--batch-size must be at most 1000000000"),
    "learning_rate": (("--lr", 0), "--learning-rate must be finite and above 0, got 0.0"),
    "negative_learning_rate": (("--lr", -1e-3), "--learning-rate must be finite and above 0"),
    "infinite_learning_rate": (("--lr", "inf"), "--learning-rate must be finite and above 0"),
    "nan_learning_rate": (("--lr", "nan"), "--learning-rate must be finite and above 0"),
    "held_out": (("--held-out", 0.95), "--held-out"),
    "nan_held_out": (("--held-out", "nan"), "--held-out"),
    "seed": (("--seed", 2**32), "--seed"),
    "negative_seed": (("--seed", -1), "--seed"),
    "length": (("--max-length", 1), "--max-length"),
    "nan_density": (("--density", "nan"), "density must be a number above 0"),
    "density": (("--density", 2), "density must be a number above 0"),
    "targets": (("--target-modules", "nowhere"), "'nowhere' matches no module"),
    "task": (("--task", "translation"), "task must be one of causal-lm, classification"),
    "other_task": (("--task", "classification"), "a classifier needs JSON lines"),
    "batch_size": (("--batch-size", 0), "--batch-size"),
    "diverges": (("--lr", 1e38, "--density", 1, "--max-steps", 4), "the loss is not finite"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused_in_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    assert run(monkeypatch, folder / "llama", folder / "count.txt", "-o", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_nothing_is_held_out_if_so_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    data = folder / {"llama": "pairs.jsonl", "bert": "labels.jsonl"}[model]
    drawn: list[finetune.Training] = []
    picture = finetune.picture
    monkeypatch.setattr(finetune, "picture", lambda found: (drawn.append(found), picture(found))[1])
    assert run(monkeypatch, folder / model, data, "-o", tmp_path, "--held-out", 0, "--max-steps", 1) == 0
    assert "no example was held out" in capsys.readouterr().err
    found = json.loads((tmp_path / "training.json").read_text())
    assert (found["examples"], found["held_out_examples"]) == ({"llama": 20, "bert": 48}[model], 0)
    assert found["held_out_before"] == found["held_out_after"] == drawn[0].held_out_after == {}
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_at_the_end_can_be_pasted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "my [bold]model", tmp_path / "its output"
    shutil.copytree(folder / "llama", model)
    assert run(monkeypatch, model, folder / "pairs.jsonl", "-o", output, "--max-steps", 1) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("  shira apply"))
    command = shlex.split(line.replace("MERGED", shlex.quote(str(tmp_path / "merged"))))
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    for name, part in shira.Adapter.load(output / "adapter.safetensors").items():
        assert torch.equal(merged.get_parameter(name).detach().view(-1)[part.indices.long()], part.values)


def test_bad_folders_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "llama/config.json").read_text())
    cases = {
        data: "not a model folder: it has no config.json",
        encoder: "its architecture is BertModel, neither a causal",
        bare: "cannot be loaded",
    }
    for name, change, message in (
        ("typed", {"hidden_size": "wide"}, "cannot be loaded: "),
        ("wide", {"hidden_size": 64}, "have another shape than its config.json says"),
        ("headless", {"num_attention_heads": 0}, "cannot be loaded: ZeroDivisionError"),
        ("coded", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "code of its own, which is never run"),
    ):
        shutil.copytree(folder / "llama", tmp_path / name)
        config = json.loads((folder / "llama/config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        cases[tmp_path / name] = message
    shutil.copytree(folder / "llama", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    cases[tmp_path / "cut"] = "model.safetensors: not a whole safetensors file: "
    for model, message in cases.items():
        assert run(monkeypatch, model, folder / "count.txt", "-o", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (data / "x.jsonl").write_bytes(jsonl(*[{"text": "w1 w2", "label": 1}] * 2))
    arguments = (folder / "llama", data / "x.jsonl", "--task", "classification", "-o", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 2
    assert "an adapter does not hold a new head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_replaced_only_by_force(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "training.json").write_text("mine")
    arguments = (folder / "llama", folder / "pairs.jsonl", "-o", tmp_path, "--max-steps", 1)
    assert run(monkeypatch, *arguments) == 2
    assert "training.json: there already; --force" in capsys.readouterr().err
    assert (tmp_path / "training.json").read_text() == "mine"
    assert run(monkeypatch, *arguments, "--force") == 0
    assert json.loads((tmp_path / "training.json").read_text())["task"] == "causal-lm"


def test_an_output_that_cannot_be_used_is_refused_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(folder)
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(finetune, "load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    (tmp_path / "file").touch()
    for output, message in {
        tmp_path / "file": "file: not a folder",
        tmp_path / "file/new/deep": f"deep: {tmp_path / 'file'} is not a folder",
        folder / "llama": "must be apart from",
        folder / "llama/new": "must be apart from",
        Path("/proc/new"): "/proc",
    }.items():
        assert run(monkeypatch, folder / "llama", folder / "count.txt", "-o", output) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert files_in(folder) == before


def test_an_interrupted_or_unwritable_training_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while it trains, and a disk that is full when it writes; a limit on the size of files is the disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    arguments = (folder / "llama", folder / "pairs.jsonl", "-o", tmp_path / "deep/out", "--max-steps", 1)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", interrupt)
        assert run(monkeypatch, *arguments) == 130
    assert capsys.readouterr() == ("", "")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        assert run(monkeypatch, *arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    expected = f"shira: {tmp_path / 'deep/out/adapter.safetensors'}: File too large\n"
    assert capsys.readouterr() == ("", expected)
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_outlives_a_failure_of_the_picture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(found: object) -> bytes:
        raise ValueError("no picture")

    monkeypatch.setattr(finetune, "picture", fail)
    assert run(monkeypatch, folder / "llama", folder / "pairs.jsonl", "-o", tmp_path / "out", "--max-steps", 1) == 2
    assert shira.Adapter.load(tmp_path / "out/adapter.safetensors").nnz


def test_examples_are_no_longer_than_the_model_takes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    for name, positions, vocabulary in (("short", 64, len(WORDS) + 2), ("few", 256, len(WORDS))):
        config = transformers.GPT2Config(n_positions=positions, vocab_size=vocabulary, **sizes)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    arguments = (folder / "count.txt", "--max-steps", 1, "-o", tmp_path / "out")
    assert run(monkeypatch, tmp_path / "short", *arguments) == 0
    assert "examples have at most 64 tokens: the model takes no longer ones" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/training.json").read_text())["recipe"]["max_length"] == 64
    assert run(monkeypatch, tmp_path / "few", *arguments, "--force") == 2
    expected = f"its tokenizer gives the token {len(WORDS) + 1} (w{len(WORDS) - 1}), and the model has {len(WORDS)}: "
    assert expected in capsys.readouterr().err
