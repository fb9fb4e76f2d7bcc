"""Rows of a batch in models that lay them out in other ways: right, or an error that names the layer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import shira
from shira.serving import trial

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from batches import Row, Small, alone, close, enter, inputs, left_alone, make, small_bank
from transformers.pytorch_utils import Conv1D

ROWS: list[Row] = ["blue", None, {"blue": 0.6, "paint": 0.5}, "paint"]
VOCABULARY = 50
Tensors = dict[str, torch.Tensor]


def ids(rows: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def made(name: str, **options: Any) -> Any:
    """A model of transformers with small sizes."""
    torch.manual_seed(0)
    config = getattr(transformers, re.sub("(For[A-Z]|Model).*", "Config", name))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    options = sizes | text | {"initializer_range": 0.3, "image_size": 16, "patch_size": 4} | options
    return getattr(transformers, name)(config(**options)).eval()


def linears(model: nn.Module) -> list[str]:
    """Weights of linear layers that are no other module's."""
    shared = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and shared.count(id(module.weight)) == 1
    ]


def bank_of(model: nn.Module, names: list[str] | None = None) -> shira.ResidentAdapters:
    bank = shira.ResidentAdapters(model)
    bank.add("blue", make(model, 1, names or linears(model)))
    bank.add("paint", make(model, 2, names or linears(model), kind="add"))
    return bank


def output_of(model: nn.Module, given: Tensors) -> torch.Tensor:
    out = model(**given)
    return next(value for value in out.values() if isinstance(value, torch.Tensor))


def row_of(given: Tensors, i: int) -> Tensors:
    return {name: tensor[i : i + 1] for name, tensor in given.items()}


ENCODED = {"input_ids": ids(), "decoder_input_ids": ids(4, 5, 1)}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "init_std": 0.3,
    "decoder_start_token_id": 1,
}
MOE = {"num_key_value_heads": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}

MODELS: dict[str, tuple[Callable[[], Any], Tensors, str]] = {
    "llama": (lambda: made("LlamaForCausalLM", num_key_value_heads=2), {"input_ids": ids()}, "first"),
    "qwen3": (lambda: made("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8), {"input_ids": ids()}, "first"),
    "phi3": (lambda: made("Phi3ForCausalLM", num_key_value_heads=2), {"input_ids": ids()}, "first"),
    "gpt2": (lambda: made("GPT2Model", n_inner=24), {"input_ids": ids()}, "first"),
    "bert": (lambda: made("BertModel"), {"input_ids": ids()}, "first"),
    "bert by chunks": (lambda: made("BertModel", chunk_size_feed_forward=3), {"input_ids": ids(4, 6)}, "first"),
    "opt": (lambda: made("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16), {"input_ids": ids()}, "repeated"),
    "t5": (lambda: made("T5Model", **T5), ENCODED, "first"),
    "whisper": (
        lambda: made("WhisperModel", **WHISPER),
        {"input_features": floats(4, 8, 20), "decoder_input_ids": ids(4, 5)},
        "first",
    ),
    "vit": (lambda: made("ViTModel"), {"pixel_values": floats(4, 3, 16, 16)}, "first"),
    "swin": (
        lambda: made(
            "SwinModel", embed_dim=8, depths=[2, 2], num_heads=[2, 4], num_attention_heads=[2, 4], window_size=2
        ),
        {"pixel_values": floats(4, 3, 16, 16)},
        "repeated",
    ),
    "qwen2 moe": (lambda: made("Qwen2MoeForCausalLM", **MOE), {"input_ids": ids()}, "repeated"),
    "xlnet": (lambda: made("XLNetModel", d_model=16, n_layer=2, n_head=4, d_inner=24), {"input_ids": ids()}, "second"),
}


@contextmanager
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each trial that ran went through."""
    went: list[bool] = []
    real = trial._Exchanged.__exit__

    def noted(self: Any, *reason: Any) -> None:
        went.append(not self._given_up)
        real(self, *reason)

    with monkeypatch.context() as patch:
        patch.setattr(trial._Exchanged, "__exit__", noted)
        yield went


@pytest.mark.parametrize("kind", MODELS)
def test_each_row_is_what_it_is_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model, given, layout = MODELS[kind]
    model = make_model()
    bank = bank_of(model)
    want = alone(bank, ROWS, lambda i: output_of(model, row_of(given, i))[0])
    with left_alone(model), trials(monkeypatch) as went, torch.no_grad(), bank.batch(ROWS, rows=layout):
        got = output_of(model, given)
        again = output_of(model, given)
    base = alone(bank, [None], lambda _: output_of(model, given))[0]
    for i, row in enumerate(ROWS):
        close(got[i], want[i], 1e-4)
        close(again[i], want[i], 1e-4)
        assert row is None or float((base[i] - want[i]).abs().max()) > 0.01 * float(want[i].abs().max())
    assert went == [True]
    if layout != "first":
        with left_alone(model), torch.no_grad(), bank.batch(ROWS), pytest.raises(ValueError, match=f"rows='{layout}'"):
            output_of(model, given)


@pytest.mark.parametrize(
    ("options", "parts"),
    [({"num_beams": 3}, 1), ({"num_return_sequences": 2, "num_beams": 4}, 2)],
    ids=["beams", "several sequences"],
)
@pytest.mark.parametrize("kind", ["t5", "whisper", "llama"])
def test_beams_are_repeated_rows(kind: str, options: dict[str, Any], parts: int) -> None:
    if kind == "llama":
        model, given = MODELS[kind][0](), {"input_ids": ids()}
    elif kind == "t5":
        model, given = made("T5ForConditionalGeneration", **T5), {"input_ids": ids()}
    else:
        model, given = made("WhisperForConditionalGeneration", **WHISPER), {"input_features": floats(4, 8, 20)}
    bank = bank_of(model)
    options = {"max_new_tokens": 6, "do_sample": False, **options}

    def generate(some: Tensors) -> torch.Tensor:
        return model.generate(**some, **options)

    want = alone(bank, ROWS, lambda i: generate(row_of(given, i)))
    with left_alone(model), bank.batch(ROWS, rows="repeated"):
        got = generate(given)
    assert [part.tolist() for part in got.split(parts)] == [each.tolist() for each in want]
    with left_alone(model), bank.batch(ROWS), pytest.raises(ValueError, match=r"beams.* say rows='repeated'"):
        generate(given)


# What is not made of the batch's rows, or has them elsewhere, though its shape fits


class Positions(nn.Module):
    """A layer gets positions that all rows share, beside one that gets the rows."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.table = nn.Parameter(floats(positions, 12))
        self.of_table = nn.Linear(12, 20)
        self.of_rows = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of_rows(x) @ self.of_table(self.table * 2).T


class Gathered(nn.Module):
    """Tokens reach an expert in another order than the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(12, 2)
        self.expert = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = self.router(x)[:, 0].argsort()
        return torch.zeros_like(x).index_copy_(0, order, self.expert(x[order]))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Twice(nn.Module):
    """Classifier-free guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        without, with_it = self.layer(torch.cat([x * 0.5, x])).chunk(2)
        return without + 3 * (with_it - without)


@pytest.mark.parametrize(
    ("model", "x", "layer"),
    [
        (Positions(4), floats(4, 12), "of_table"),
        (Gathered(), floats(4, 12), "expert"),
        (SequenceFirst(), floats(4, 4, 12), "layer"),
        (Twice(), floats(4, 12), "layer"),
    ],
    ids=["positions", "gathered", "sequence first", "guidance"],
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_rows_that_are_elsewhere_are_refused(
    model: nn.Module, x: torch.Tensor, layer: str, grad: bool, training: bool
) -> None:
    model.train(training)
    bank = bank_of(model)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            with (
                left_alone(model),
                pytest.raises(ValueError, match=f"batch: '{layer}' got an input of shape"),
                bank.batch(ROWS),
            ):
                model(x)
        want = torch.cat(alone(bank, ["blue"], lambda _: model(x)))
        with bank.batch(["blue"] * 4, mode="unfused"):  # one adapter for all: then it does not matter
            close(model(x).detach(), want)


def test_ways_out() -> None:
    x = floats(4, 4, 12)
    model: nn.Module = SequenceFirst()
    bank = bank_of(model)
    want = torch.cat(alone(bank, ROWS, lambda i: model(x[i : i + 1])))
    with torch.no_grad(), bank.batch(ROWS, rows="second"):
        close(model(x), want)
    model, x = Twice(), floats(4, 12)
    bank = bank_of(model)
    want = torch.cat(alone(bank, ROWS, lambda i: model(x[i : i + 1])))
    with torch.no_grad(), bank.batch(ROWS * 2):
        close(model(x), want)


def test_relative_positions_of_deberta() -> None:
    """Sixteen positions, and sixteen names."""
    deberta = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 8,
        "max_relative_positions": 16,
    }
    model = made("DebertaV2Model", **deberta)
    names = [name for name in linears(model) if "embeddings" not in name]
    bank = bank_of(model, names)
    given = {"input_ids": ids(16, 16)}
    refused = r"'encoder.layer.0.attention.self.\w+_proj' got an input of shape \[1, 16, 16\], .*only be switched to"
    for rows in (["blue", None] * 8, ["blue", "paint", None, None], ["blue", None]):
        with torch.no_grad(), bank.batch(rows), pytest.raises(ValueError, match=refused):
            output_of(model, {"input_ids": given["input_ids"][: len(rows)]})
    want = alone(bank, ["paint"], lambda _: output_of(model, given))[0]
    with torch.no_grad(), bank.batch(["paint"] * 16, mode="unfused"):
        close(output_of(model, given), want, 1e-4)
    others = [name for name in names if "_proj" not in name]
    bank = bank_of(model, others)
    want = torch.cat(alone(bank, ROWS, lambda i: output_of(model, {"input_ids": ids(4, 9)[i : i + 1]})))
    with torch.no_grad(), bank.batch(ROWS):
        close(output_of(model, {"input_ids": ids(4, 9)}), want, 1e-4)


def test_a_sequence_that_is_first_and_as_long_as_the_batch() -> None:
    model = MODELS["xlnet"][0]()
    bank, given = bank_of(model), {"input_ids": ids(4, 4)}
    with torch.no_grad(), bank.batch(ROWS), pytest.raises(ValueError, match="rows='second'"):
        output_of(model, given)
    want = torch.cat(alone(bank, ROWS, lambda i: output_of(model, row_of(given, i))))
    with torch.no_grad(), bank.batch(ROWS, rows="second"):
        close(output_of(model, given), want, 1e-4)


def test_layers_that_have_the_sequence_first_beside_others() -> None:
    """Longformer's projections do, its dense layers do not, and the batch is as long as a sequence."""
    model = made("LongformerModel", attention_window=[4, 4])
    bank, given = bank_of(model), {"input_ids": ids(4, 4)}
    for layout in ("first", "second"):
        with (
            torch.no_grad(),
            bank.batch(ROWS, rows=layout),
            pytest.raises(ValueError, match="without the batch's rows"),
        ):
            output_of(model, given)
    want = torch.cat(alone(bank, ROWS, lambda i: output_of(model, row_of(given, i))))
    with torch.no_grad(), bank.batch(ROWS, rows=lambda layer, x: "second" if ".self." in layer else "first"):
        close(output_of(model, given), want, 1e-4)


def test_positions_beside_packed_tokens() -> None:
    model = Positions(4)
    bank, x = bank_of(model), floats(1, 4, 12)
    with torch.no_grad(), bank.batch(ROWS, rows="packed"), pytest.raises(ValueError, match="'of_table' got an input"):
        model(x)
    bank = bank_of(model, ["of_rows.weight"])
    want = torch.cat(alone(bank, ROWS, lambda i: model(x[:, i])))
    with torch.no_grad(), bank.batch(ROWS, rows="packed"):
        close(model(x)[0], want)
        close(model(torch.zeros_like(x))[0], model(torch.zeros(4, 12)))


def test_experts_of_gathered_tokens() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(12, 3)
            self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, 12)
            chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
            for i, expert in enumerate(self.experts):
                self.tokens = (chosen == i).nonzero()[:, 0]
                out[self.tokens] = expert(flat[self.tokens])
            return out.view_as(x)

    model, x = Routed(), floats(4, 9, 12)
    bank = bank_of(model, [f"experts.{i}.weight" for i in range(3)])
    for layout in ("first", "repeated"):
        with (
            torch.no_grad(),
            bank.batch(ROWS, rows=layout),
            pytest.raises(ValueError, match=r"'experts\.0' got an input"),
        ):
            model(x)
    seen = []

    def rows(layer: str, x: torch.Tensor) -> torch.Tensor:
        seen.append((layer, [*x.shape]))
        return model.tokens // 9

    want = torch.cat(alone(bank, ROWS, lambda i: model(x[i : i + 1])))
    with torch.no_grad(), bank.batch(ROWS, rows=rows):
        close(model(x), want)
    assert [layer for layer, _ in seen] == ["experts.0", "experts.1", "experts.2"]


def test_a_function_gives_words_or_the_row_of_each_token() -> None:
    model, x = Small(), inputs(3, 4, 12)
    bank = small_bank(model)
    names: list[Row] = ["a0", None, "a1"]
    want = torch.cat(alone(bank, names, lambda i: model(x[i : i + 1])))

    def run(answer: Any, x: torch.Tensor = x) -> torch.Tensor:
        with torch.no_grad(), bank.batch(names, rows=lambda layer, x: answer):
            return model(x)

    close(run("first"), want)
    close(run("repeated", x.view(12, 12)), want.view(12, 7))
    order = torch.tensor([2, 0, 1, 1])
    picked = torch.stack([x[row, 0] for row in order])
    for dtype in (torch.int32, torch.int64):
        close(run(order.to(dtype), picked), torch.stack([want[row, 0] for row in order]))
    base = alone(bank, [None], lambda _: model(x[:, 0]))[0]
    close(run(torch.tensor([-1, -1, -1]), x[:, 0]), base)
    for answer, message in (
        (
            "last",
            "`rows` gave 'last' for 'first'; it must be one of first, repeated, second, packed",
        ),
        (None, "`rows` gave None"),
        (order, r"`rows` gave torch.int64 \[4\] for 'first'; it must be int32 or int64 \[12\]"),
        (torch.zeros(12), "`rows` gave torch.float32"),
        (torch.full((12,), 3), "that is not from -1 to 2"),
        (torch.full((12,), -2), "that is not from -1 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(answer)
    for bad in ("rows", None, 3):
        with left_alone(model), pytest.raises(ValueError, match=r"rows must be one of first, .*, got"):
            enter(bank.batch(names, rows=bad))


def test_packed_sequences() -> None:
    """Without padding: one row, positions that begin anew, a name for each token."""
    model = MODELS["llama"][0]()
    bank = bank_of(model)
    lengths = [3, 5, 2, 6]
    parts = [ids(1, length, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    names = [row for row, length in zip(ROWS, lengths, strict=True) for _ in range(length)]
    want = alone(bank, ROWS, lambda i: model(input_ids=parts[i]).logits[0])
    packed = {"input_ids": torch.cat(parts, 1), "position_ids": positions}
    with left_alone(model), torch.no_grad(), bank.batch(names, rows="packed"):
        got = model(**packed, use_cache=False).logits[0]
    close(got, torch.cat(want), 1e-4)
    with torch.no_grad(), bank.batch(names), pytest.raises(ValueError, match="say rows='packed'"):
        model(**packed)


def test_a_nested_tensor_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    bank = bank_of(model)
    x = torch.nested.nested_tensor([floats(3, 12), floats(5, 12)], layout=torch.jagged)
    with (
        torch.no_grad(),
        bank.batch(["blue", None]),
        pytest.raises(ValueError, match="'0' got a nested tensor: give its"),
    ):
        model(x)


# The trial itself


@pytest.mark.parametrize("within", [torch.inference_mode, torch.enable_grad], ids=["inference", "grad"])
@pytest.mark.parametrize("kind", ["llama", "qwen2 moe", "t5"])
def test_a_trial_in_other_modes(kind: str, within: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make_model, given, layout = MODELS[kind]
    model = make_model()
    bank = bank_of(model)
    want = alone(bank, ROWS, lambda i: output_of(model, row_of(given, i))[0])
    with trials(monkeypatch) as went, within(), bank.batch(ROWS, rows=layout):
        got = output_of(model, given)
    assert went == [True]
    for i in range(4):
        close(got[i].detach().clone(), want[i], 1e-4)


def test_a_trial_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rounded copies of the weights are kept, and have as many rows as the batch."""
    model, x = Twice(), floats(4, 12)
    bank = bank_of(model)
    with trials(monkeypatch) as went, torch.autocast("cpu", torch.bfloat16):
        model(x)
        with bank.batch(ROWS * 2), torch.no_grad():
            model(x)
    assert went == [False]
    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12))
    bank = bank_of(model, ["0.weight", "2.weight"])
    with trials(monkeypatch) as went, torch.autocast("cpu", torch.bfloat16):
        model(x)
        with bank.batch(ROWS), torch.no_grad():
            model(x)
    assert went == [True]


def test_two_banks_of_one_model_try_their_own_layers() -> None:
    model, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), floats(4, 12)
    first, second = bank_of(model, ["0.weight"]), bank_of(model, ["1.weight"])
    with torch.no_grad():
        want = []
        for i in range(4):
            with first.using(ROWS[i]), second.using(ROWS[3 - i]):
                want.append(model(x[i]))
        for _ in range(2):
            with left_alone(model), first.batch(ROWS), second.batch(ROWS[::-1]):
                close(model(x), torch.stack(want))
        outer, inner = first.batch(ROWS), second.batch(ROWS[::-1])
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
    assert type(model) is nn.Sequential


def test_a_class_that_refuses_subclasses_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Final(nn.Sequential):
        def __init_subclass__(cls) -> None:
            raise TypeError

    model, x = Final(nn.Linear(12, 12)), floats(4, 12)
    bank = bank_of(model)
    want = torch.cat(alone(bank, ROWS, lambda i: model(x[i : i + 1])))
    with trials(monkeypatch) as went, left_alone(model), torch.no_grad(), bank.batch(ROWS):
        close(model(x), want)
    assert not went


def test_only_the_first_forward_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Small().eval(), inputs(3, 12)
    bank = small_bank(model)
    names: list[Row] = ["a0", None, "a1"]
    with trials(monkeypatch) as went, torch.no_grad():
        for _ in range(2):
            with bank.batch(names):
                assert (type(model) is Small) is bool(went)
                model(x)
                assert type(model) is Small
        with bank.batch(["a1", "a1"], mode="unfused"):
            model(x[:2])
        assert went == [True]
        with bank.batch(names, rows="repeated"):
            model(x)
        assert went == [True, True]


def test_parts_that_are_called_alone_are_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(12, 12)), "unet": SequenceFirst()})
    bank = bank_of(model)
    with trials(monkeypatch) as went, torch.no_grad():
        for _ in range(2):
            with bank.batch(ROWS):
                model["encoder"](floats(4, 12))
                with pytest.raises(ValueError, match=r"'unet\.layer'"):
                    model["unet"](floats(4, 4, 12))
    assert len(went) == 3  # the encoder once


def test_a_cache_of_before_is_exchanged_and_left_alone() -> None:
    model = MODELS["llama"][0]()
    bank, given = bank_of(model), {"input_ids": ids()}
    config = {"config": model.config, "max_cache_len": 16}
    logits = []
    with torch.no_grad():
        for tried in (False, True):
            cache = transformers.StaticCache(**config)
            model(**given, past_key_values=cache)
            if not tried:
                with bank.batch(ROWS):
                    model(**given)
                    logits.append(model(input_ids=ids(4, 1, 5), past_key_values=cache).logits)
                bank = bank_of(model)
            else:
                with bank.batch(ROWS):
                    logits.append(model(input_ids=ids(4, 1, 5), past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_what_cannot_be_tried_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5), nn.Linear(12, 12))
    bank, x = bank_of(model), floats(4, 12)
    with trials(monkeypatch) as went, bank.batch(ROWS), torch.no_grad():
        torch.manual_seed(3)
        first = model(x)
        torch.manual_seed(3)
        assert torch.equal(first, model(x))
    assert went == [False]
    norm = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
    plain = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
    plain.load_state_dict(norm.state_dict())
    bank = bank_of(norm, ["0.weight"])
    with trials(monkeypatch) as went, bank.batch([None, None, "blue", None]), torch.no_grad():
        norm(x)
    assert went == [False]
    assert int(norm[1].num_batches_tracked) == 1


def test_compiled_functions_are_tried_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled code computes is not seen, op by op."""
    torch._dynamo.reset()
    compiles: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiles.append(1)
        return graph.forward

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.norm = nn.LayerNorm(12)
            self.norm.compile(backend=backend)
            self.activation = torch.compile(lambda x: torch.tanh(x * 2), backend=backend)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.activation(self.norm(self.first(x))))

    model, x = Compiled(), floats(4, 12)
    bank = bank_of(model, linears(model))
    with trials(monkeypatch) as went, torch.no_grad(), bank.batch(ROWS):
        first = model(x)
        assert went == [True]
        assert not compiles
        again = model(x)
        assert compiles
    want = torch.cat(alone(bank, ROWS, lambda i: model(x[i : i + 1])))
    close(first, want)
    close(again, want)
    in_place = Gathered()
    in_place.compile(backend=backend)
    for whole in (in_place, torch.compile(Gathered(), backend=backend)):
        bank = bank_of(whole)
        with torch.no_grad(), bank.batch(ROWS), pytest.raises(ValueError, match="'expert' got an input"):
            whole(x)


def test_a_model_that_is_compiled_around_the_bank_is_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, x = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12))), floats(4, 12)
    bank = bank_of(model)
    compiled = torch.compile(model, backend=counter)
    want = torch.cat(alone(bank, ROWS, lambda i: model(x[i : i + 1])))
    with torch.no_grad():
        for _ in range(3):
            with bank.batch(ROWS):
                close(compiled(x), want)
    assert counter.frame_count == 1


def test_an_interrupt_in_a_trial_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.layer(x)
            raise KeyboardInterrupt

    model = Interrupted()
    bank = bank_of(model)
    with left_alone(model), pytest.raises(KeyboardInterrupt), bank.batch(ROWS):
        model(floats(4, 12))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_another_thread_outlasts_the_batch() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            inside.set()
            go_on.wait(10)
            return x

    def run() -> None:
        model(floats(4, 12))
        modes.append(torch.utils._python_dispatch._get_current_dispatch_mode())

    inside, go_on, modes = threading.Event(), threading.Event(), []
    model = Slow()
    bank = bank_of(model)
    thread = threading.Thread(target=run)
    with bank.batch(ROWS):
        thread.start()
        inside.wait(10)
    go_on.set()
    thread.join()
    assert modes == [None]
    assert type(model) is Slow
