"""The rows that `shira train` takes: as which tokens and labels they are trained, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import exit_code_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from shira.cli.train import run as finetune  # noqa: E402 - needs what may be missing
from shira.cli.train.examples import Encoder, Example  # noqa: E402
from shira.cli.train.rows import read_rows  # noqa: E402

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]"]
UNK, BOS, EOS, PAD, CLS, SEP = range(6)
W = 6  # the token of w0
WORDS = [f"w{i}" for i in range(20)]
ROLES = ["[user]", "[assistant]", "[system]"]
USER, ASSISTANT, SYSTEM = (W + len(WORDS) + i for i in range(3))
VOCABULARY = [*SPECIAL, *WORDS, *ROLES]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64}

# A chat is "[user] w1 [assistant] w2 </s>"; a marked template says itself what the assistant wrote.
TURN = "{{ '[' + m['role'] + '] ' + m['content'] }}{{ ' </s> ' if m['role'] == 'assistant' else ' ' }}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' </s> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(around: str = "$A", template: str | None = None, **special: str | None) -> Any:
    """A tokenizer of words; `around` is what its post-processor puts around a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, i) for i, token in enumerate(SPECIAL)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    made = wrapped(tokenizer, **{name: token for name, token in special.items() if token is not None})
    made.chat_template = template
    return made


def byte_level() -> Any:
    """As GPT-2's and Llama 3's: bytes, whose words begin with their space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the world is hello"] * 9, trainer)
    return wrapped(tokenizer, eos_token="<eos>")


def sentencepiece_like() -> Any:
    """As Llama 2's: a space is put before each text, and `<s>` before that."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL[:3], show_progress=False)
    split = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(["hello world", "the world is hello"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def encoded(tmp_path: Path) -> Callable[..., list[Example]]:
    """The examples of records, as the command makes them."""

    def make(tokenizer: Any, *records: object, length: int = 64, task: str = "causal-lm", config: Any = None) -> Any:
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
        make.encoder = Encoder(tokenizer, config, length)  # type: ignore[attr-defined]
        return make.encoder.encode(read_rows(tmp_path / "data.jsonl", task))  # type: ignore[attr-defined]

    return make


def w(*numbers: int) -> list[int]:
    return [W + i for i in numbers]


def learned(example: Example) -> list[int]:
    """The tokens that are learned."""
    assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))
    assert example["attention_mask"] == [1] * len(example["input_ids"])
    return [label for label in example["labels"] if label != -100]


AROUND = {
    "none": ("$A", [], [EOS]),
    "bos": ("<s> $A", [BOS], [EOS]),
    "eos": ("$A </s>", [], [EOS]),
    "both": ("<s> $A </s>", [BOS], [EOS]),
    "cls_sep": ("[CLS] $A [SEP]", [CLS], [SEP, EOS]),
    "two": ("[CLS] <s> $A", [CLS, BOS], [EOS]),
}


@pytest.mark.parametrize(("around", "begin", "end"), AROUND.values(), ids=AROUND.keys())
def test_special_tokens_are_around_the_whole(
    encoded: Callable[..., list[Example]], around: str, begin: list[int], end: list[int]
) -> None:
    pair, text, ended, begun, late = encoded(
        words(around),
        {"prompt": "w0 w1", "completion": "w2"},
        {"text": "w0 w1 w2"},
        {"text": "w0 w1 </s>"} if end == [EOS] else {"text": "w0 w1"},
        {"text": "<s> w0 w1"} if begin == [BOS] else {"text": "w0 w1"},
        {"prompt": "w0 w1", "completion": " w2 </s>"} if end == [EOS] else {"prompt": "w0 w1", "completion": " w2"},
    )
    assert pair["input_ids"] == [*begin, *w(0, 1, 2), *end]
    assert learned(pair) == [*w(2), *end]
    assert text["input_ids"] == learned(text) == [*begin, *w(0, 1, 2), *end]
    assert ended["input_ids"] == begun["input_ids"] == [*begin, *w(0, 1), *end], "those in the text are not doubled"
    assert late == pair


def test_without_an_end_of_text_token_texts_end_as_the_tokenizer_ends_them(
    encoded: Callable[..., list[Example]],
) -> None:
    tokenizer = words("[CLS] $A [SEP]", eos_token=None)
    (pair,) = encoded(tokenizer, {"prompt": "w0", "completion": "w1"})
    assert pair["input_ids"] == [CLS, *w(0, 1), SEP]
    (text,) = encoded(words("<s> $A", eos_token=None), {"text": "w0"})
    assert text["input_ids"] == [BOS, *w(0)]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_a_prompt_is_tokenized_as_alone_and_the_completion_as_what_follows(
    encoded: Callable[..., list[Example]], make: Callable[[], Any]
) -> None:
    tokenizer = make()
    pairs = [("hello", " world"), ("the world is", " hello world"), ("", "hello"), ("hello wor", "ld")]
    examples = encoded(tokenizer, *({"prompt": prompt, "completion": rest} for prompt, rest in pairs))
    for (prompt, rest), example in zip(pairs, examples, strict=True):
        alone = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.bos_token_id] * (make is sentencepiece_like)
        assert example["input_ids"][: len(alone)] == alone
        assert learned(example) == [*example["input_ids"][len(alone) :]]
        assert example["input_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == prompt + rest
    assert len(tokenizer("hello world", add_special_tokens=False)["input_ids"]) == 2, "so a token spans the last pair"
    assert encoded.encoder.apart == 1  # type: ignore[attr-defined]
    assert "1 of 4 prompts end within a token" in encoded.encoder.notes(4)[0]  # type: ignore[attr-defined]


def test_a_text_file_has_the_special_tokens_once(encoded: Callable[..., list[Example]], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfw0 w1 w2\r\nw3 </s>\n")
    examples = Encoder(words("<s> $A </s>"), None, 4).encode(read_rows(tmp_path / "x.txt", "causal-lm"))
    assert [example["input_ids"] for example in examples] == [[BOS, *w(0, 1, 2)], [*w(3), EOS]]


CHAT = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w0 w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT
]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marked"])
@pytest.mark.parametrize("around", ["$A", "<s> $A </s>"])
def test_of_chats_the_assistants_turns_are_learned(
    encoded: Callable[..., list[Example]], template: str, around: str
) -> None:
    examples = encoded(words(around, template), {"messages": CHAT}, {"conversations": SHARED}, {"conversations": CHAT})
    for example in examples:
        assert example["input_ids"] == [
            *(SYSTEM, *w(9), USER, *w(0, 1), ASSISTANT, *w(2), EOS, USER, *w(3), ASSISTANT, *w(4, 5), EOS)
        ], "nothing is added to what the template writes"
        assert learned(example) == [*w(2), EOS, *w(4, 5), EOS]


def test_turns_of_a_chat_are_found_between_bytes(encoded: Callable[..., list[Example]]) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " world \N{SNOWMAN}"}]
    (example,) = encoded(tokenizer, {"messages": chat})
    assert tokenizer.decode(example["input_ids"]) == "user:hello\nassistant: world \N{SNOWMAN}\n"
    assert tokenizer.decode(learned(example)) == " world \N{SNOWMAN}\n"


def test_long_rows_are_cut_and_counted(encoded: Callable[..., list[Example]]) -> None:
    long = "w0 " * 30
    rows = [{"text": long}, {"text": "w1 w2"}, {"prompt": "w1", "completion": f" {long}"}]
    rows.append({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": long}]})
    examples = encoded(words("<s> $A", PLAIN), *rows, length=10)
    assert [len(example["input_ids"]) for example in examples] == [10, 4, 10, 10]
    assert encoded.encoder.notes(4) == ["3 of 4 examples were cut to 10 tokens"]  # type: ignore[attr-defined]


CHANGED = (  # as Qwen3's, which drops what was thought in earlier turns
    "{% for m in messages %}{{ '[' + m['role'] + '] ' }}{% if loop.last and m['role'] == 'assistant' %}{{ 'w19 ' }}"
    "{% endif %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
BAD_CHATS = {
    "no_template": (None, CHAT, "the tokenizer has no chat template: save one"),
    "changes": (CHANGED, CHAT, "cannot write this chat: it writes message 3 in another way"),
    "begins": (PLAIN, [CHAT[2]], "its first turn is the assistant's"),
    "raises": ("{{ raise_exception('roles must alternate') }}", CHAT, "roles must alternate"),
    "syntax": ("{% for %}", CHAT, "cannot write this chat: "),
    "undefined": ("{{ messages[0]['x']['y'] }}", CHAT, "cannot write this chat: "),
    "no_answer": (PLAIN, CHAT[:2], "no message is the assistant's"),
    "cut_off": (PLAIN, [CHAT[1] | {"content": "w1 " * 80}, CHAT[2]], "no token to learn among the first 64"),
    "empty_answer": (PLAIN, [CHAT[1], {"role": "assistant", "content": " "}], "message 2: 'content' is empty"),
    "no_list": (PLAIN, "w1", "'messages' must be a list of messages"),
    "empty": (PLAIN, [], "'messages' must be a list of messages"),
    "strings": (PLAIN, ["w1"], 'message 1: must have "role" and "content"'),
    "parts": (PLAIN, [{"role": "user", "content": [{"type": "text", "text": "w1"}]}], "'content' must be a string"),
    "weights": (PLAIN, [*CHAT[:2], CHAT[2] | {"weight": 0}], "and nothing else; it has 'content', 'role', 'weight'"),
    "from": (PLAIN, [{"from": "nobody", "value": "w1"}], '"from" must be one of human, user, gpt'),
    "from_list": (PLAIN, [{"from": [], "value": "w1"}], '"from" must be one of human, user, gpt'),
}


@pytest.mark.parametrize(("template", "chat", "message"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_chats_that_cannot_be_right_are_refused(
    encoded: Callable[..., list[Example]], template: str | None, chat: object, message: str
) -> None:
    with pytest.raises(ValueError, match="line 1: ") as raised:
        encoded(words("$A", template), {"messages": chat})
    assert message in str(raised.value)


def test_a_chat_whose_only_answer_is_last_is_learned_by_a_template_that_changes(
    encoded: Callable[..., list[Example]],
) -> None:
    (example,) = encoded(words("$A", CHANGED), {"messages": CHAT[1:3]})
    assert learned(example) == w(19, 2)


# The model's folder, the file's name, its content, what is said of it: all before the model is loaded.
TEXT = {"text": "w1 w2"}
BAD_FILES = {
    "blank_text": ("x.jsonl", [TEXT, {"text": " \n"}], "line 2: 'text' is empty"),
    "blank_completion": ("x.jsonl", [TEXT, {"prompt": "w1", "completion": " "}], "line 2: 'completion' is empty"),
    "null": ("x.jsonl", [TEXT, {"text": None}], 'line 2: must be an object with "text"'),
    "two_forms": ("x.jsonl", [TEXT | {"messages": CHAT}], "has messages and text: a row has only one of these forms"),
    "prompt_is_a_chat": ("x.jsonl", [{"prompt": CHAT, "completion": CHAT}], "must be a string"),
    "list": ("x.jsonl", [TEXT, ["w1"]], 'line 2: must be an object with "text"'),
    "twice": ("x.jsonl", b'{"text": "w1 w2"}\n{"text": "w1", "text": "w2"}', "line 2: the key 'text' is there twice"),
    "tools": ("x.jsonl", [{"messages": CHAT, "tools": [{}]}], "line 1: 'tools' is not read"),
    "surrogate": ("x.jsonl", [TEXT, {"text": "w1 \ud800"}], "line 2: 'text' holds half of a surrogate pair"),
    "blank_file": ("x.jsonl", b"\n \n", "x.jsonl: is empty"),
    "empty_file": ("x.txt", b"", "x.txt: is empty"),
    "bom_alone": ("x.txt", b"\xef\xbb\xbf\n", "x.txt: is empty"),
    "utf_16": ("x.jsonl", '{"text": "w1"}'.encode("utf-16"), "not UTF-8 text"),
    "rows_named_txt": ("x.txt", [TEXT, TEXT], "holds rows of JSON: name the file .jsonl"),
    "json_object": ("x.json", b'{"text":\n"w1"}', "line 1: not JSON"),
    "json_list": ("x.json", json.dumps([TEXT, {"text": ""}]).encode(), "row 2: 'text' is empty"),
    "deep": ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "digits": ("x.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: "),
    "half_crlf": ("x.jsonl", b'{"text": "w1 w2"}\r\n{"text": "w1 w2"\r\n', "line 2: not JSON"),
}


def content_of(rows: bytes | list[Any]) -> bytes:
    return rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model whose tokenizer has a chat template and adds both special tokens."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **SIZES)).save_pretrained(folder)
    words("<s> $A </s>", PLAIN).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "rows", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_rows_are_refused_in_one_line_before_the_model_is_loaded(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rows: bytes | list[Any],
    message: str,
) -> None:
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / name).write_bytes(content_of(rows))
    assert exit_code_of(monkeypatch, "train", llama, tmp_path / name, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Fills with the examples that the command trains on, in the order of their tokens."""
    found: list[Example] = []
    train = finetune.train

    def watched(model: Any, tokenizer: Any, training: list[Example], *rest: Any) -> Any:
        found.extend(sorted(training, key=lambda example: example["input_ids"]))
        return train(model, tokenizer, training, *rest)

    monkeypatch.setattr(finetune, "train", watched)
    return found


def test_the_command_trains_rows_of_all_forms(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "w0 w1", "completion": "w2", "id": 7, "text": None},
        {"text": "w3 w4", "source": "here", "[bold]": 1},
        {"messages": CHAT[1:3]},
    ]
    (tmp_path / "x.JSONL").write_bytes(b"\xef\xbb\xbf" + content_of(rows).replace(b"\n", b"\r\n\r\n"))
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    for name in ("x.JSONL", "x.json"):
        examples = trained_on(monkeypatch)
        arguments = (llama, tmp_path / name, "-o", tmp_path / "out", "--held-out", 0, "--max-steps", 1, "--force")
        assert exit_code_of(monkeypatch, "train", *arguments) == 0
        assert "keys that are not read: [bold], id, source\n" in capsys.readouterr().err
        assert [example["input_ids"] for example in examples] == [
            [BOS, *w(0, 1, 2), EOS],
            [BOS, *w(3, 4), EOS],
            [USER, *w(0, 1), ASSISTANT, *w(2), EOS],
        ]
        assert [learned(example) for example in examples] == [[*w(2), EOS], [BOS, *w(3, 4), EOS], [*w(2), EOS]]


LABELS = {"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}
MANY = {"problem_type": "multi_label_classification", **LABELS}
NUMBERS = {"problem_type": "regression", **LABELS}
GOOD_LABELS = {
    "name": (LABELS, "c", 2),
    "number": (LABELS, 0, 0),
    "many_names": (MANY, ["c", "a", "c"], [1.0, 0.0, 1.0]),
    "none": (MANY, [], [0.0, 0.0, 0.0]),
    "many_hot": (MANY, [0, 1.0, 1], [0.0, 1.0, 1.0]),
    "score": ({"num_labels": 1}, -2, -2.0),
    "score_list": ({"num_labels": 1}, [0.5], 0.5),
    "scores": (NUMBERS, [0.5, -1, 3], [0.5, -1.0, 3.0]),
}
BAD_LABELS = {
    "unknown": (LABELS, "d", "no class 'd'; it has 3: a, b, c"),
    "outside": (LABELS, 3, "no class 3"),
    "negative": (LABELS, -1, "no class -1"),
    "half": (LABELS, 1.0, "no class 1.0"),
    "true": (LABELS, True, "no class True"),
    "list_for_one": (LABELS, ["a"], 'needs a model with "problem_type": "multi_label_classification"'),
    "object": (LABELS, {"a": 1}, "no class {'a': 1}"),
    "one_of_many": (MANY, "a", '"label" must be a list, of names of labels or of 3 zeros and ones'),
    "unknown_of_many": (MANY, ["a", "d"], "no class 'd'"),
    "numbers_of_many": (MANY, [2], '"label" must be a list'),
    "soft": (MANY, [0, 0.5, 1], '"label" must be a list'),
    "truths": (MANY, [True, False, True], '"label" must be a list'),
    "name_for_a_score": ({"num_labels": 1}, "a", '"label" must be a finite number'),
    "infinite": ({"num_labels": 1}, float("inf"), '"label" must be a finite number'),
    "huge": ({"num_labels": 1}, 10**400, '"label" must be a finite number'),
    "one_score": (NUMBERS, 1.0, '"label" must be a list of 3 finite numbers'),
}


@pytest.mark.parametrize(("kind", "label", "expected"), GOOD_LABELS.values(), ids=GOOD_LABELS.keys())
def test_labels(encoded: Callable[..., list[Example]], kind: dict[str, Any], label: object, expected: object) -> None:
    config = transformers.BertConfig(**kind)
    (example,) = encoded(words("[CLS] $A [SEP]"), TEXT | {"label": label}, task="classification", config=config)
    assert example["labels"] == expected
    assert type(example["labels"]) is type(expected)
    assert example["input_ids"] == [CLS, *w(1, 2), SEP]


@pytest.mark.parametrize(("kind", "label", "message"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_labels_that_the_model_does_not_have_are_refused(
    encoded: Callable[..., list[Example]], kind: dict[str, Any], label: object, message: str
) -> None:
    config = transformers.BertConfig(**kind)
    with pytest.raises(ValueError, match="line 1: ") as raised:
        encoded(words("[CLS] $A [SEP]"), TEXT | {"label": label}, task="classification", config=config)
    assert message in str(raised.value)


def test_texts_for_a_classifier(encoded: Callable[..., list[Example]]) -> None:
    def classified(tokenizer: Any, row: object, length: int = 64) -> Example:
        config = transformers.BertConfig(**LABELS)
        (example,) = encoded(tokenizer, row, length=length, task="classification", config=config)
        return example

    long = {"text": "w1 w2 w3 w4", "label": "a"}
    assert classified(words("[CLS] $A [SEP]"), long, 5)["input_ids"] == [CLS, *w(1, 2, 3), SEP]
    assert encoded.encoder.cut == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="special tokens fill --max-length 2"):
        classified(words("[CLS] $A [SEP]"), long, 2)
    with pytest.raises(ValueError, match="ends in '</s>', with which the tokenizer pads"):
        classified(words("$A </s>", pad_token="</s>"), long)
    with pytest.raises(ValueError, match="'text_pair' is not read"):
        classified(words(), long | {"text_pair": "w1"})
    with pytest.raises(ValueError, match="a classifier needs JSON lines"):
        classified(words(), {"messages": CHAT})


def far_from_uniform(model: Any) -> Any:
    """The model with larger weights, so that what it says depends on all tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model


def loss_one_by_one(folder: Path, rows: list[dict[str, Any]], targets: torch.Tensor) -> float:
    """The mean of the rows' losses in float64, each row given alone, so without any padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits for row in rows])
    if model.config.num_labels == 1:
        return float((scores[:, 0] - targets).square().mean())
    if targets.ndim == 1:
        return float(-scores.log_softmax(-1)[torch.arange(len(rows)), targets].mean())
    sure = scores.sigmoid()
    return float(-(targets * sure.log() + (1 - targets) * (1 - sure).log()).mean())


CLASSIFIERS = [
    "bert-many",
    "bert-number",
    "gpt2-one",
    "gpt2-number",
    "llama-one",
    "llama-many",
    "bart-one",
    "xlnet-one",
]


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifiers_are_scored_as_without_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """In one batch, by a tokenizer that pads left; the decoders' configs have no padding token, or another than it.

    XLNet alone must be padded on the left.
    """
    architecture, kind = case.split("-")
    torch.manual_seed(0)
    options = {"one": LABELS, "many": MANY, "number": {"num_labels": 1}}[kind]
    made = {
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options)),
        "gpt2": lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(
                n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=len(VOCABULARY), **options
            )
        ),
        "llama": lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(num_key_value_heads=1, pad_token_id=UNK, **SIZES, **options)
        ),
        "bart": lambda: transformers.BartForSequenceClassification(
            transformers.BartConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                vocab_size=len(VOCABULARY),
                max_position_embeddings=64,
                pad_token_id=PAD,
                eos_token_id=EOS,
                **options,
            )
        ),
        "xlnet": lambda: transformers.XLNetForSequenceClassification(
            transformers.XLNetConfig(
                d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=len(VOCABULARY), pad_token_id=PAD, **options
            )
        ),
    }[architecture]()
    folder = tmp_path / "model"
    far_from_uniform(made).save_pretrained(folder)
    words("<s> $A </s>" if architecture == "bart" else "$A", padding_side="left").save_pretrained(folder)
    labels = {"one": [2, "a", 1], "many": [["a", "c"], [0, 1, 0], []], "number": [0.25, -3, 1]}[kind]
    targets = {"one": torch.tensor([2, 0, 1]), "number": torch.tensor([0.25, -3, 1], dtype=torch.float64)}.get(
        kind, torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.float64)
    )
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "x.jsonl").write_bytes(content_of([*rows, *rows]))
    monkeypatch.setattr(finetune, "split", lambda examples, *_: (examples[3:], examples[:3]))
    arguments = (folder, tmp_path / "x.jsonl", "-o", tmp_path / "out", "--max-steps", 2, "--mask", "snip")
    assert exit_code_of(monkeypatch, "train", *arguments) == 0
    found = json.loads((tmp_path / "out/training.json").read_text())
    assert found["held_out_before"]["loss"] == pytest.approx(loss_one_by_one(folder, rows, targets), rel=1e-4)
    assert ("accuracy" in found["held_out_after"]) == (kind != "number")


@pytest.mark.parametrize("kind", ["many", "number"])
def test_classifiers_in_bfloat16_take_labels_that_are_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = MANY if kind == "many" else {"num_labels": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    words("[CLS] $A [SEP]").save_pretrained(tmp_path / "model")
    rows = [{"text": f"w{i} w2", "label": ["a", "c"][: i % 3] if kind == "many" else i / 4} for i in range(6)]
    (tmp_path / "x.jsonl").write_bytes(content_of(rows))
    arguments = (tmp_path / "model", tmp_path / "x.jsonl", "-o", tmp_path / "out", "--max-steps", 2)
    assert exit_code_of(monkeypatch, "train", *arguments) == 0


def test_accuracy_of_many_labels_counts_texts_with_all_of_them_right() -> None:
    scores = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 2.0]]).numpy()
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).numpy()
    predictions = transformers.EvalPrediction(predictions=scores, label_ids=labels)
    assert finetune._accuracy(predictions) == {"accuracy": 0.5}


def test_positions_that_begin_after_the_padding_token_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RoBERTa's 64 positions take 62 tokens where its padding token is 1."""
    config = transformers.RobertaConfig(pad_token_id=1, **SIZES, **LABELS)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    words("[CLS] $A [SEP]").save_pretrained(tmp_path / "model")
    rows = [{"text": "w1 " * 100, "label": "a"}, {"text": "w2", "label": "b"}]
    (tmp_path / "x.jsonl").write_bytes(content_of(rows))
    arguments = ("train", tmp_path / "model", tmp_path / "x.jsonl", "-o", tmp_path / "out", "--max-steps", 1)
    assert exit_code_of(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "takes examples of 62 tokens: --max-length 62" in error
    assert error.count("\n") == 1
    assert exit_code_of(monkeypatch, *arguments, "--max-length", 62) == 0
    assert "1 of 2 examples were cut to 62 tokens" in capsys.readouterr().err


def test_a_model_that_sees_what_follows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """BERT's language model is causal only as a decoder."""
    (tmp_path / "x.txt").write_text("w1 w2 " * 90)
    for decoder in (False, True):
        config = transformers.BertConfig(is_decoder=decoder, **SIZES)
        far_from_uniform(transformers.BertLMHeadModel(config)).save_pretrained(tmp_path / "model")
        words("[CLS] $A [SEP]", eos_token=None).save_pretrained(tmp_path / "model")
        arguments = ("train", tmp_path / "model", tmp_path / "x.txt", "-o", tmp_path / "out", "--max-steps", 1)
        assert exit_code_of(monkeypatch, *arguments) == (0 if decoder else 2)
        assert ("not a causal model" in capsys.readouterr().err) != decoder
