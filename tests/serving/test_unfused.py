"""ResidentAdapters.batch: every row is what it would be alone with its adapter fused, and the model stays as it was."""

from __future__ import annotations

import asyncio
import copy
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shira
from shira.serving import layers as unfused
from shira.serving import pages
from shira.serving import rows as serving_rows

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from batches import (
    NAMES,
    Row,
    Small,
    alone,
    check_pages,
    check_rows,
    close,
    enter,
    in_another_thread,
    in_use,
    inputs,
    left_alone,
    make,
    projections,
    small_bank,
)

MIX = {"paint": 0.7, "green": 0.4}
ROWS: list[Row] = ["blue", None, MIX, "paint"]
VOCABULARY, PAD = 50, 0


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def bank_of(model: nn.Module, **options: Any) -> shira.ResidentAdapters:
    bank = shira.ResidentAdapters(model, **options)
    bank.add("blue", make(model, 1))
    bank.add("paint", make(model, 2, kind="add"))
    bank.add("green", make(model, 3, projections(model)[::2]))
    return bank


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [4, 9], padded on the left."""
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for i, padding in enumerate((0, 3, 1, 5)):
        ids[i, :padding], mask[i, :padding] = PAD, 0
    return ids, mask


@pytest.mark.parametrize("make_model", [llama, gpt2])
def test_logits_are_those_of_each_row_alone(make_model: Callable[[], Any]) -> None:
    model = make_model()
    bank, (ids, mask) = bank_of(model), prompts()
    want = alone(bank, ROWS, lambda i: model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0])
    with left_alone(model), torch.no_grad(), bank.batch(ROWS, mode="unfused"):
        got = model(input_ids=ids, attention_mask=mask).logits
    base = alone(bank, [None], lambda _: model(input_ids=ids, attention_mask=mask).logits)[0]
    for i, row in enumerate(ROWS):
        real = mask[i].bool()
        close(got[i][real], want[i][real])
        differs = float((base[i][real] - want[i][real]).abs().max())
        assert row is None or differs > 0.1 * float(want[i].abs().max())


@pytest.mark.parametrize("make_model", [llama, gpt2])
def test_bfloat16_rounds_a_little_more(make_model: Callable[..., Any]) -> None:
    """A fused layer rounds once. Unfused, the base product, the delta's entries and the sum are rounded: three times as
    much at most, beside what float32 gives with the same weights."""
    model = make_model(torch.bfloat16)
    bank, (ids, _) = bank_of(model), prompts()
    with left_alone(model), torch.no_grad(), bank.batch(ROWS, mode="unfused"):
        got = model(input_ids=ids).logits
    for i, row in enumerate(ROWS):
        with bank.using(row), torch.no_grad():
            fused = model(input_ids=ids[i : i + 1]).logits[0].float()
            exact_model = make_model()
            exact_model.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
            exact = exact_model(input_ids=ids[i : i + 1]).logits[0]
        error, fused_error = ((logits - exact).square().mean().sqrt() for logits in (got[i].float(), fused))
        assert error < 3 * fused_error
        assert fused_error < 0.05 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    ("make_model", "options"),
    [
        (llama, {"max_new_tokens": 24}),
        (gpt2, {"max_new_tokens": 24}),
        (llama, {"num_beams": 3, "max_new_tokens": 8}),
        (gpt2, {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 6}),
    ],
    ids=["greedy llama", "greedy gpt2", "beams", "several sequences"],
)
def test_generate_gives_the_tokens_of_each_row_alone(make_model: Callable[[], Any], options: dict[str, Any]) -> None:
    model = make_model()
    bank, (ids, mask) = bank_of(model), prompts()
    options = {"do_sample": False, **options}
    many = options.get("num_return_sequences", 1)
    want = alone(bank, ROWS, lambda i: model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options))
    with left_alone(model), bank.batch(ROWS, rows="repeated", mode="unfused"):
        got = model.generate(ids, attention_mask=mask, **options)
    assert [t.tolist() for t in got.split(many)] == [t.tolist() for t in want]
    assert len({tuple(t[0, ids.shape[1] :].tolist()) for t in want}) == len(ROWS)


def test_the_demo_model_writes_the_same_200_tokens() -> None:
    """A trained model, of which each row is another text from the first tokens on."""
    from shira.cli.demo.base import load_base

    model: Any = load_base()
    bank = shira.ResidentAdapters(model)
    for seed, name in enumerate(("blue", "paint")):
        bank.add(name, make(model, seed, density=0.01, std=0.2))
    rows: list[Row] = ["blue", None, {"blue": 0.7, "paint": 0.5}, "paint"]
    prompt = torch.tensor([[0, *b"def read_records(path):"]])
    options = {"do_sample": False, "min_new_tokens": 200, "max_new_tokens": 200, "pad_token_id": 0}

    def generate(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    with bank.batch(rows, mode="unfused"):
        got = generate(prompt.expand(len(rows), -1))
    want = torch.cat(alone(bank, rows, lambda _: generate(prompt)))
    assert got.shape == (4, prompt.shape[1] + 200)
    assert torch.equal(got, want)
    assert len({tuple(row) for row in got.tolist()}) == 4


def test_samples_of_expanded_rows() -> None:
    """One row each with its adapter, many sequences: the same random numbers, so the same tokens as fused."""
    model = llama()
    bank, (ids, _) = bank_of(model), prompts()
    options = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 5}
    torch.manual_seed(5)
    with bank.batch(["blue"], mode="unfused"):
        got = model.generate(ids[:1], **options)
    torch.manual_seed(5)
    with bank.using("blue"):
        assert torch.equal(got, model.generate(ids[:1], **options))


def test_an_encoder_with_padding() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            initializer_range=0.2,
        )
    ).eval()
    names = [name for name in projections(model) if "encoder" in name]
    bank = shira.ResidentAdapters(model)
    for i, name in enumerate(("blue", "paint", "green")):
        bank.add(name, make(model, i, names))
    ids, mask = prompts()
    ids, mask = ids.flip(1), mask.flip(1)
    want = alone(bank, ROWS, lambda i: model(ids[i : i + 1], attention_mask=mask[i : i + 1]).last_hidden_state[0])
    with left_alone(model), torch.no_grad(), bank.batch(ROWS):
        got = model(ids, attention_mask=mask).last_hidden_state
    for i in range(len(ROWS)):
        close(got[i][mask[i].bool()], want[i][mask[i].bool()])


def test_rows_may_be_expanded_and_flattened_but_evenly() -> None:
    model = Small()
    bank, rows = small_bank(model), ["a0", None, "a1"]
    x = inputs(3, 4, 12)
    want = torch.cat(alone(bank, rows, lambda i: model(x[i : i + 1])))
    with torch.no_grad():
        for layout in ("first", "repeated"):
            with bank.batch(rows, rows=layout):
                close(model(x), want)
                close(model(x.view(3, 2, 2, 12)), want.view(3, 2, 2, 7))
                close(model(x.transpose(1, 2).contiguous().transpose(1, 2)), want)
                assert model(x[:0]).shape == (0, 4, 7)
                for bad in (x[:2], x.view(12, 12)[:10], x[0, 0]):
                    with pytest.raises(ValueError, match="where the 3 rows of the batch are not found"):
                        model(bad)
        with bank.batch(rows, rows="repeated"):
            close(model(x.view(12, 12)), want.view(12, 7))
        with bank.batch(rows), pytest.raises(ValueError, match="rows='repeated'"):
            model(x.view(12, 12))
    with torch.no_grad(), bank.batch(["a0"] * 5 + [None] * 3 + ["a2"] * 4):  # packed: one name for each token
        packed = model(x.view(12, 12))
    parts = alone(bank, ["a0", None, "a2"], lambda i: model(x.view(12, 12)[[0, 5, 8][i] : [5, 8, 12][i]]))
    close(packed, torch.cat(parts))
    with torch.no_grad(), bank.batch(["a0"], mode="unfused"):
        close(model(x[0, 0]), want[0, 0])


def test_the_base_row_keeps_its_bits() -> None:
    model = Small()
    bank, x = small_bank(model), inputs(4, 12)
    with torch.no_grad():
        before = model(x)
        with bank.batch([None, "a0", None, None]):
            after = model(x)
        with bank.batch([None] * 4):
            assert torch.equal(model(x), before)
    kept = [0, 2, 3]
    assert torch.equal(after[kept], before[kept])
    assert not torch.equal(after[1], before[1])


def test_many_numbers_of_tokens() -> None:
    model = Small()
    bank, rows = small_bank(model), ["a0", "a1"]
    with torch.no_grad(), bank.batch(rows):
        for length in [*range(1, 40), *range(39, 0, -1)]:
            x = inputs(2, length, 12)
            got = model(x)
            assert got.shape == (2, length, 7)
    for rows in (["a1", "a0"], [None, "a2"]):
        for length in (1, 5, 39):
            check_rows(bank, model, rows, inputs(2, length, 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = Small(dtype)
    bank, x = small_bank(model), inputs(3, 12).to(dtype)
    with bank.batch(["a0", "a1", None]), torch.no_grad():
        got = model(x)
    for i, row in enumerate(["a0", "a1", None]):
        with bank.using(row), torch.no_grad():
            # tanh in between passes on what the first layer rounded: a few units of the largest output
            close(got[i], model(x[i]), {torch.float64: 1e-14}.get(dtype, 8 * torch.finfo(dtype).eps))


def test_a_wide_layer_has_wide_columns() -> None:
    model = nn.Sequential(nn.Linear(70_000, 3), nn.Linear(3, 4))
    bank = shira.ResidentAdapters(model)
    bank.add("a", make(model, 1, density=0.01))
    x = inputs(2, 70_000)
    check_rows(bank, model, ["a", None], x)
    assert {key[2] for key in bank._batches.pages.pools} == {torch.uint16, torch.int32}


def test_autocast_and_gradients() -> None:
    model = Small()
    bank, x = small_bank(model), inputs(2, 12)
    with bank.batch(["a0", "a2"]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    with bank.using("a0"), torch.no_grad():
        close(got[0].float(), model(x[0]), 0.03)
    with bank.batch(["a0", "a2"]):
        differentiable = model(x)  # the weights require grad
    with bank.batch(["a0", "a2"]), torch.no_grad():
        close(differentiable.detach(), model(x))
    assert differentiable.requires_grad
    frozen = Small().requires_grad_(False)
    with small_bank(frozen).batch(["a0", "a2"]):
        close(frozen(x), differentiable.detach())


def test_auto_does_not_fuse_what_autocast_keeps_copies_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 0)
    model = Small()
    bank, x = small_bank(model), inputs(1, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base = model(x)
        with bank.batch(["a0"]):
            first, second = model(x), model(x)
        assert torch.equal(first, second)
        assert not torch.equal(first, base)
        with bank.using("a0"):  # nor does a switch leave rounded copies behind
            close(model(x).float(), first.float(), 0.03)
        assert torch.equal(model(x), base)


@pytest.mark.parametrize(("own", "other"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_autocast_to_the_other_short_type(own: torch.dtype, other: torch.dtype) -> None:
    model = Small(own)
    with torch.no_grad(), torch.autocast("cpu", other):
        bank = small_bank(model)
        x, rows = inputs(3, 12).to(own), ["a0", {"a1": 0.5, "a2": 1.0}, None]
        with bank.batch(rows):
            got = model(x)
        for i, row in enumerate(rows):
            with bank.using(row):
                close(got[i].float(), model(x[i : i + 1])[0].float(), 0.05)


def test_a_name_for_each_token_of_a_packed_row() -> None:
    model = Small()
    bank, x = small_bank(model), inputs(1, 5, 12)
    rows = ["a0", "a0", None, "a1", "a2"]
    want = torch.cat(alone(bank, rows, lambda i: model(x[0, i : i + 1])))
    with torch.no_grad(), bank.batch(rows, rows="packed"):
        close(model(x)[0], want)
    for names, layout in ((rows[:4], "packed"), (rows, "first")):
        with bank.batch(names, rows=layout), pytest.raises(ValueError, match="rows of the batch are not found"):
            model(x)


def test_a_model_is_not_copied_inside_a_batch() -> None:
    model = Small()
    bank = small_bank(model)
    with bank.batch(["a0", "a1"]), pytest.raises(TypeError, match=r"inside batch\(\): leave it first"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_what_a_removed_adapter_needed_is_forgotten() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2000))
    small, large = "0.weight", "1.weight"
    budget = pages.PAGE * 6 + 2000
    bank = shira.ResidentAdapters(model, device_budget=budget)
    bank.add("a", make(model, 1, [large]))
    bank.add("b", make(model, 2, [small]))
    with pytest.raises(ValueError, match="device_budget"):
        enter(bank.batch(["b", None]))
    bank.remove("a")
    check_rows(bank, model, ["b", None], inputs(2, 64))
    assert in_use(bank) <= budget
    handle = shira.attach(model, shira.ShiraConfig(["1"]))  # no longer the bank's
    enter(bank.batch(["b", None]))
    handle.detach()


def test_an_interrupt_while_leaving_waits_until_the_model_is_whole() -> None:
    """Another thread holds the bank meanwhile."""

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    model = Small()
    bank = small_bank(model)
    release = threading.Event()

    def hold() -> None:
        with bank._lock:
            held.set()
            release.wait(10)

    def leave_while_held() -> None:
        threading.Thread(target=hold).start()
        held.wait(10)
        threading.Timer(0.3, release.set).start()
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    held = threading.Event()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupt), left_alone(model), bank.batch(["a0", "a1"]):
            leave_while_held()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert type(model.first) is nn.Linear
    bank.switch("a0")
    bank.switch(None)


def test_slots_of_few_shapes_are_kept() -> None:
    model = Small()
    bank = small_bank(model)
    with torch.no_grad():
        for count in range(1, 40):
            with bank.batch([None, *["a0", "a1"] * count]):
                for length in (1, 2):
                    model(inputs(1 + 2 * count, length, 12))
    [rows] = bank._batches._rows.values()
    assert len(rows._known) == serving_rows._KEPT


def test_compiled_code_is_made_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Small()
    bank, x = small_bank(model, 6), inputs(4, 3, 12)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        base = compiled(x)  # first outside
        assert counter.frame_count == 1

        def check(rows: list[Row]) -> None:
            want = torch.cat(alone(bank, rows, lambda i: model(x[i : i + 1])))
            with bank.batch(rows, mode="unfused"):
                close(compiled(x), want)
            assert torch.equal(compiled(x), base)
            assert counter.frame_count == 2

        check(["a0", None, {"a1": 0.5, "a2": -1.0}, "a3"])
        check(["a3", "a4", "a5", None])
        bank.remove("a3")
        bank.add("a3", make(model, 99, NAMES))  # another one of the name
        check(["a3", "a3", "a1", "a0"])
        for i in range(6, 60):  # more slots and pages than there were
            bank.add(f"a{i}", make(model, i, NAMES))
        pages_before = bank.stats.pages
        for i in range(8, 60, 4):
            with bank.batch([f"a{i + k}" for k in range(4)]):
                compiled(x)
        assert bank.stats.pages > 2 * pages_before
        check(["a7", {"a8": 1.0, "a9": 1.0}, "a50", None])
        bank.switch("a7")
        fused = compiled(x)
        bank.switch(None)
        assert not torch.equal(fused, base)
        assert counter.frame_count == 2


class Mixed(nn.Module):
    """What cannot be unfused."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(2, 2, 2)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.tied_in = nn.Embedding(5, 4)
        self.tied_out = nn.Linear(4, 5, bias=False)
        self.tied_out.weight = self.tied_in.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6)
        self.own = _Own(4, 4)
        self.replaced = nn.Linear(4, 4)
        self.replaced.forward = self.replaced.forward  # type: ignore[method-assign]
        self.both = nn.Linear(4, 4, bias=False)
        self.crossed = transformers.pytorch_utils.Conv1D(4, 4)
        self.crossed.weight = self.both.weight


class _Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("embedding.weight", "the weight .* of 'embedding', a Embedding"),
        ("conv.weight", "of 'conv', a Conv1d"),
        ("linear.bias", r"it is the bias \(torch.float32\) of 'linear', a Linear"),
        ("norm.weight", "of 'norm', a LayerNorm"),
        ("tied_in.weight", "of 'tied_in', a Embedding"),
        ("tied_out.weight", "of 'tied_in', a Embedding"),
        ("attention.in_proj_weight", "in_proj_weight"),
        ("attention.out_proj.weight", "reads it without calling"),
        ("layer.linear1.weight", "reads it without calling"),
        ("layer.linear2.weight", "reads it without calling"),
        ("own.weight", "of 'own', a _Own"),
        ("replaced.weight", "forward of 'replaced' was replaced"),
        ("both.weight", "transposed"),
    ],
)
def test_what_cannot_be_unfused_is_refused_by_name(tensor: str, message: str) -> None:
    model = Mixed()
    bank = shira.ResidentAdapters(model)
    bank.add("odd", make(model, 1, ["linear.weight", tensor]))
    bank.add("fine", make(model, 2, ["linear.weight"]))
    with left_alone(model):
        for rows in (["fine", "odd"], ["fine", {"fine": 0.5, "odd": 0.5}]):
            match = rf"'odd' cannot be unfused: {tensor}: .*{message}.*; use switch"
            with pytest.raises(ValueError, match=match), bank.batch(rows):
                raise AssertionError
        with pytest.raises(ValueError, match="cannot be unfused"), bank.batch(["odd"], mode="unfused"):
            raise AssertionError
        with bank.batch(["fine", None]):
            pass
        with bank.batch(["odd", "odd"]):  # one owner: fused
            assert bank.active == "odd"
        assert bank.active is None
    bank.remove("odd")
    with pytest.raises(ValueError, match="no adapter named 'odd'"), bank.batch(["odd"]):
        raise AssertionError


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "names is empty"),
        ("a0", {}, "batch takes a list .* got 'a0'"),
        ({"a0": 1.0}, {}, "batch takes a list"),
        (None, {}, "batch takes a list"),
        ([3], {}, "batch takes a name, strengths by name, or None, got 3"),
        (["a0", "zz"], {}, "no adapter named 'zz'"),
        (["a0", {}], {}, "at least one adapter"),
        (["a0", {"a1": float("nan")}], {}, "strength of 'a1' must be a finite"),
        (["a0", {"a1": "1"}], {}, "strength of 'a1'"),
        (["a0"], {"mode": "fast"}, "mode must be one of auto, fused, unfused, got 'fast'"),
        (["a0", "a1"], {"mode": "fused"}, "'fused', but the batch has 2 different targets"),
        (["a0", None], {"mode": "fused"}, "2 different targets"),
        (["a0"], {"tokens": -1}, "tokens must be an integer"),
        (["a0"], {"tokens": 1.5}, "tokens must be an integer"),
    ],
)
def test_bad_arguments_change_nothing(names: Any, options: dict[str, Any], message: str) -> None:
    model = Small()
    bank = small_bank(model)
    with left_alone(model):
        with pytest.raises(ValueError, match=message), bank.batch(names, **options):
            raise AssertionError
        assert bank.stats.pages_used == 0
    with bank.batch(["a0", None]):
        pass


@pytest.mark.parametrize("budget", [0, -5, 1.5, "1GB", True])
def test_bad_budgets(budget: Any) -> None:
    with pytest.raises(ValueError, match="device_budget must be a positive number of bytes or None"):
        shira.ResidentAdapters(Small(), device_budget=budget)


@pytest.mark.parametrize("options", [{}, {"mode": "fused"}, {"mode": "unfused"}])
def test_nesting_is_refused_where_it_makes_no_sense(options: dict[str, Any]) -> None:
    model = Small()
    bank = small_bank(model)
    actions: list[Callable[[], object]] = [
        lambda: bank.switch("a1"),
        lambda: bank.switch(None),
        lambda: enter(bank.using("a1")),
        lambda: enter(bank.batch(["a1"])),
    ]
    with left_alone(model):
        with bank.batch(["a0", "a0"], **options):
            for action in actions:
                with pytest.raises(RuntimeError, match=r"leave batch\(\) first"):
                    action()
                with pytest.raises(RuntimeError, match=r"another thread or task is inside batch\(\)"):
                    in_another_thread(action)
            with pytest.raises(ValueError, match="'a0' is in use"):
                bank.remove("a0")
            bank.stage({"a1": 1.0, "a2": 1.0})
            bank.remove("a1")
            bank.add("new", make(Small(), 5, NAMES))
            bank.verify_base()
        bank.stage(None)
        with bank.using("a2"), pytest.raises(RuntimeError, match=r"'a2' is in the weights: switch\(None\) first"):
            enter(bank.batch(["a0"]))
        with bank.using(None), bank.batch(["new", "a0"]), pytest.raises(RuntimeError, match="leave batch"):
            bank.switch("a0")
        with bank.using(None), pytest.raises(RuntimeError, match="another thread or task is inside using"):
            in_another_thread(lambda: enter(bank.batch(["a0"])))
    in_another_thread(lambda: enter(bank.batch(["a0"])))
    bank.switch("a0")


def test_tasks_exclude_each_other() -> None:
    bank = small_bank(Small())
    refused = []

    async def other() -> None:
        try:
            bank.switch("a1")
        except RuntimeError as error:
            refused.append(str(error))

    async def main() -> None:
        with bank.batch(["a0", "a1"]):
            await asyncio.create_task(other())

    asyncio.run(main())
    assert refused == ["another thread or task is inside batch()"]
    bank.switch("a1")


def test_forwards_of_other_threads_see_the_batch() -> None:
    model = Small()
    bank, x, results = small_bank(model), inputs(2, 12), []
    want = torch.cat(alone(bank, ["a0", "a1"], lambda i: model(x[i : i + 1])))

    def run() -> None:
        with torch.no_grad():
            results.append(model(x))

    with bank.batch(["a0", "a1"]):
        in_another_thread(run)
    close(results[0], want)


LAYER: Any = SimpleNamespace(shira_name="layer", shira_table=None)


def test_two_threads_forget_what_is_too_much() -> None:
    """The second has more numbers of tokens, too, while the first forgets some."""
    rows, second = (
        serving_rows.Rows(torch.device("cpu")),
        threading.Thread(target=lambda: rows.of(torch.empty(1, 40, 4), LAYER)),
    )

    class Captured(set[int]):
        def __contains__(self, item: object) -> bool:
            if second.ident is None:
                second.start()
                second.join(0.2)  # it may have to wait
            return super().__contains__(item)

    rows.set([3], None)
    rows._captured = Captured()
    for tokens in range(1, 20):
        assert rows.of(torch.empty(1, tokens, 4), LAYER).tolist() == [3] * tokens
    second.join()
    assert len(rows._by_tokens) == serving_rows._KEPT + 1  # the batch's own slots are one more


def test_a_forward_that_outlasts_its_batch_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, spread = serving_rows.Rows(torch.device("cpu")), serving_rows.repeated
    rows.set([0, 1, 2, 3], None, "repeated")
    following = threading.Thread(target=rows.set, args=([7, 5], None, "repeated"))

    def slow_spread(slots: torch.Tensor, tokens: int) -> torch.Tensor:
        if following.ident is None:
            following.start()
            following.join(0.2)  # it may have to wait
        return spread(slots, tokens)

    monkeypatch.setattr(serving_rows, "repeated", slow_spread)
    rows.of(torch.empty(8, 4), LAYER)
    following.join()
    assert rows.of(torch.empty(8, 4), LAYER).tolist() == [7] * 4 + [5] * 4


def test_everything_is_as_before_after_an_exception() -> None:
    model = Small()
    bank, x = small_bank(model), inputs(2, 12)
    for error in (RuntimeError("x"), KeyboardInterrupt()):
        with left_alone(model):
            with pytest.raises(type(error)), bank.batch(["a0", "a1"]):
                raise error
            with pytest.raises(ValueError, match="are not found"), bank.batch(["a0", "a1"]):
                model(x[:1])
    check_rows(bank, model, ["a0", "a1"], x)


def test_others_who_change_weights_are_kept_out() -> None:
    model = Small()
    bank, other = small_bank(model), small_bank(model)
    config = shira.ShiraConfig(["first"], mask="rand", density=0.1)
    with bank.batch(["a0", "a1"]):
        for action in (
            lambda: other.switch("a0"),
            lambda: enter(other.batch(["a0", "a1"])),
            lambda: shira.attach(model, config),
        ):
            with pytest.raises(RuntimeError, match="ResidentAdapters is changing this weight"):
                action()
    other.switch("a0")
    with left_alone_of(bank, model), pytest.raises(RuntimeError, match="ResidentAdapters is changing this weight"):
        enter(bank.batch(["a0", "a1"]))
    other.switch(None)
    handle = shira.attach(model, config)
    with pytest.raises(RuntimeError, match="attach is changing this weight"):
        enter(bank.batch(["a0", "a1"]))
    handle.detach()
    model.second.forward = model.second.forward
    with pytest.raises(RuntimeError, match="forward of a Conv1D was replaced"):
        enter(bank.batch(["a0", "a1"]))
    del model.second.forward
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    with pytest.raises(RuntimeError, match="weight of a Linear was replaced"):
        enter(bank.batch(["a0", "a1"]))


@contextmanager
def left_alone_of(bank: shira.ResidentAdapters, model: nn.Module) -> Iterator[None]:
    before = [type(module) for module in model.modules()]
    yield
    assert [type(module) for module in model.modules()] == before
    assert bank.active is None


# The modes


class Count:
    """Calls of the op inside a block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        real = unfused.add_sparse_delta_mm_batched

        def counted(*args: torch.Tensor) -> None:
            self.calls += 1
            real(*args)

        monkeypatch.setattr(unfused, "add_sparse_delta_mm_batched", counted)


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = Small(), Count(monkeypatch)
    bank, x = small_bank(model), inputs(2, 12)
    many = serving_rows.FUSE_AFTER_TOKENS + 1
    want = alone(bank, ["a0"], lambda _: model(x))[0]
    for row, options, fused in (
        ("a0", {"mode": "fused"}, True),
        ("a0", {"mode": "unfused", "tokens": many}, False),
        ("a0", {"tokens": many}, True),
        ("a0", {"tokens": many - 1}, False),
        ("a0", {}, False),
    ):
        count.calls = 0
        with left_alone(model), torch.no_grad(), bank.batch([row, row], **options):
            close(model(x), want)
            assert bank.active == ("a0" if fused else None)
            assert count.calls == (0 if fused else 3)
        assert bank.active is None
    with bank.batch(["a0", "a1"], tokens=many):
        assert bank.active is None


def test_auto_fuses_once_unfused_has_cost_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 16)
    monkeypatch.setattr(serving_rows, "FORWARD_TOKENS", 3)
    model, count = Small(), Count(monkeypatch)
    bank = small_bank(model)
    want = alone(bank, ["a2"], lambda _: model(inputs(2, 2, 12)))[0]
    switches = bank.stats.switches
    with left_alone(model), bank.batch(["a2", "a2"]):
        for step, calls in enumerate([3, 6, 6, 6]):
            with torch.no_grad():
                close(model(inputs(2, 2, 12)), want)
            assert count.calls == calls
            assert bank.active == ("a2" if step >= 2 else None)
        with pytest.raises(ValueError, match="in use"):
            bank.remove("a2")
    assert bank.active is None
    assert bank.stats.switches == switches + 2
    with bank.batch(["a2", "a2"]), torch.no_grad():  # one long forward: known before it runs
        model(inputs(2, 50, 12))
        assert bank.active == "a2"
    with bank.batch(["a2", "a2"]):  # never where autograd may have kept weights
        model(inputs(2, 50, 12)).sum()
        assert bank.active is None
    with bank.batch(["a2", "a1"]), torch.no_grad():  # never with two
        model(inputs(2, 50, 12))
        assert bank.active is None


def test_auto_fuses_while_several_threads_run_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 40)
    model = Small()
    bank, x = small_bank(model), inputs(2, 2, 12)
    want = alone(bank, ["a2"], lambda _: model(x))[0]
    results: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            results.extend(model(x) for _ in range(40))

    with left_alone(model), bank.batch(["a2", "a2"]):
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bank.active == "a2"
    assert len(results) == 160
    for result in results:
        close(result, want)


def test_compiled_code_goes_on_right_after_eager_code_had_it_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 5)
    torch._dynamo.reset()
    model = Small()
    bank, x = small_bank(model), inputs(2, 12)
    want = alone(bank, ["a2"], lambda _: model(x))[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with left_alone(model), torch.no_grad(), bank.batch(["a2", "a2"]):
        close(compiled(x), want)
        assert bank.active is None
        for _ in range(5):
            close(model(x), want)
        assert bank.active == "a2"
        close(compiled(x), want)


def test_nothing_is_fused_while_a_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is between a layer's product and its delta when another one's forward would have it fused."""
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 0)
    model = Small()
    bank, x = small_bank(model), inputs(2, 12)
    want = alone(bank, ["a2"], lambda _: model(x))[0]
    inside, go_on, real = threading.Event(), threading.Event(), unfused.add_sparse_delta_mm_batched
    results: list[torch.Tensor] = []

    def slow(*args: torch.Tensor) -> None:
        inside.set()
        go_on.wait(0.3)
        real(*args)

    def run() -> None:
        with torch.no_grad():
            results.append(model(x))

    monkeypatch.setattr(unfused, "add_sparse_delta_mm_batched", slow)
    with bank.batch(["a2", "a2"]):
        model.twin(x.requires_grad_(False))  # the first to run, with gradients enabled: not fused
        with torch.no_grad():
            first = threading.Thread(target=lambda: results.append(torch.no_grad()(model.first)(x)))
            first.start()
            inside.wait()
            second = threading.Thread(target=lambda: torch.no_grad()(model.twin)(x))  # would have it fused
            second.start()
            second.join(0.1)
            assert bank.active is None
            go_on.set()
            first.join()
            second.join()
        assert bank.active == "a2"
        run()
    close(results[1], want)
    with bank.using("a2"), torch.no_grad():
        close(results[0], model.first(x))


def test_a_switch_that_fails_leaves_the_block_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_rows, "FUSE_AFTER_TOKENS", 1)
    model = Small()
    bank, x = small_bank(model), inputs(2, 12)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    for options, run in (({}, lambda: model(x)), ({"mode": "fused"}, None)):
        with left_alone(model), monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(bank._switching, "_writes", fail)
            with pytest.raises(torch.OutOfMemoryError), bank.batch(["a2", "a2"], **options):
                run()
        assert bank.active is None
    check_rows(bank, model, ["a0", "a1"], x)


# The budget


def test_a_thousand_adapters_and_a_working_set_of_32() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(False)
    adapters = [make(model, seed, density=0.05) for seed in range(20)]
    per_adapter = 2 * (pages.PAGE * 6 + 4 * (64 + 1 + 2))
    bank = shira.ResidentAdapters(model, device_budget=40 * per_adapter)
    for i in range(1000):
        bank.add(f"a{i}", adapters[i % 20])
    x = inputs(8, 64)
    outputs = torch.stack(alone(bank, [f"a{i}" for i in range(20)], lambda _: model(x)))
    generator = torch.Generator().manual_seed(0)
    for turn in range(60):
        working_set = 32 * (turn // 20)
        chosen = [working_set + i for i in torch.randint(0, 32, (8,), generator=generator).tolist()]
        with bank.batch([f"a{i}" for i in chosen], mode="unfused"):
            got = model(x)
        close(got, torch.stack([outputs[i % 20, row] for row, i in enumerate(chosen)]))
        check_pages(bank)
    stats = bank.stats
    assert stats.misses <= 96  # each of the three sets once
    assert stats.hits + stats.misses <= 60 * 8
    assert stats.evictions >= 96 - 40 - 1
    assert 32 <= len(stats.resident) <= 40
    assert stats.unfused_bytes <= 40 * per_adapter
    assert stats.pages_used == 2 * len(stats.resident)
    assert stats.adapter_bytes["a999"] == stats.adapter_bytes["a19"]


def test_the_least_recently_used_makes_room_and_the_open_batch_does_not() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    per_adapter = pages.PAGE * 6 + 4 * (64 + 1 + 2)
    bank = shira.ResidentAdapters(model, device_budget=3 * per_adapter)
    for name in "abcd":
        bank.add(name, make(model, ord(name), density=0.1))
    for rows in (["a"], ["b", "c"], ["a"], ["d", "d"]):
        with bank.batch(rows, mode="unfused"):
            pass
    assert bank.stats.resident == ["c", "a", "d"]
    with bank.batch(["c", "b"]):
        assert bank.stats.resident == ["d", "c", "b"]
    assert (bank.stats.hits, bank.stats.misses, bank.stats.evictions) == (2, 5, 2)
    need = 4 * per_adapter
    before = bank.stats
    with pytest.raises(ValueError, match=f"device_budget is {3 * per_adapter} bytes; the 4 of this batch need {need}"):
        enter(bank.batch(list("abcd")))
    assert bank.stats == before
    bank.remove("c")
    assert bank.stats.resident == ["d", "b"]
    check_pages(bank)
    check_rows(bank, model, ["a", "b", "d"], inputs(3, 64))
    tiny = shira.ResidentAdapters(model, device_budget=100)
    tiny.add("a", make(model, 1))
    with pytest.raises(ValueError, match="device_budget is 100 bytes; the 1 of this batch need"):
        enter(tiny.batch(["a", None]))
    with tiny.batch(["a"], tokens=10**6):  # fused it fits
        assert tiny.active == "a"


def test_a_slot_that_is_used_again_holds_nothing_of_before() -> None:
    model, x = Small(), inputs(2, 12)
    bank = shira.ResidentAdapters(model)
    bank.add("both", make(model, 1, NAMES))
    bank.add("one", make(model, 2, NAMES[:1]))
    check_rows(bank, model, ["both", None], x)
    number = next(iter(bank._batches.pages.residents.values())).number
    bank.remove("both")
    check_rows(bank, model, ["one", None], x)
    assert next(iter(bank._batches.pages.residents.values())).number == number


def test_mixes_are_forgotten_with_their_adapters() -> None:
    model = Small()
    bank, x = small_bank(model), inputs(2, 12)
    with bank.batch([{"a0": 1.0, "a1": 0.5}, "a2"]):
        pass
    assert bank.stats.resident == [{"a0": 1.0, "a1": 0.5}, "a2"]
    bank.remove("a1")
    assert bank.stats.resident == ["a2"]
    bank.add("a1", make(model, 77, NAMES))
    check_rows(bank, model, [{"a1": 0.5, "a0": 1.0}, "a1"], x)
    check_pages(bank)


@pytest.mark.parametrize("budget", [None, 40 * pages.PAGE], ids=["grows", "budget"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_what_fails_while_bringing_in_leaves_the_bank_whole(
    budget: int | None, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of the calls that allocate or copy."""
    model = Small()
    x = inputs(3, 12)
    rows = ["a1", {"a0": 0.5, "a2": 2.0}, "a4"]
    for function in ("_csr", "_fill", "_resize", "bring_in"):
        for at in itertools.count():
            bank = small_bank(model, 6, device_budget=budget)
            with bank.batch(["a3", "a0"]):
                pass
            owner = pages if function == "_csr" else pages.Pages
            real, calls = getattr(owner, function), itertools.count()

            def fail(*args: Any, real: Any = real, calls: Any = calls, at: int = at) -> Any:
                result = real(*args)
                if next(calls) == at:
                    raise error
                return result

            with left_alone(model), monkeypatch.context() as patch:
                patch.setattr(owner, function, fail)
                try:
                    enter(bank.batch(rows))
                    break
                except type(error):
                    pass
            check_pages(bank)
            check_rows(bank, model, rows, x)
            check_rows(bank, model, ["a3", "a0", None], x)
            check_pages(bank)
        else:
            raise AssertionError


targets = st.one_of(
    st.none(),
    st.integers(0, 5).map(lambda i: f"a{i}"),
    st.dictionaries(st.integers(0, 5).map(lambda i: f"a{i}"), st.sampled_from([0.0, 1.0, -0.5, 2.0]), min_size=1),
)
steps = st.one_of(
    st.tuples(st.just("batch"), st.lists(targets, min_size=1, max_size=5)),
    st.tuples(st.just("add"), st.integers(0, 5)),
    st.tuples(st.just("remove"), st.integers(0, 5)),
    st.tuples(st.just("switch"), targets),
)


@given(st.sampled_from([None, 20_000, 45_000, 90_000]), st.lists(steps, min_size=4, max_size=12))
@settings(max_examples=60)
def test_any_sequence(budget: int | None, sequence: list[tuple[str, Any]]) -> None:
    model, x = Small(), inputs(5, 2, 12)
    bank = small_bank(model, 2, device_budget=budget)
    for seed, (what, value) in enumerate(sequence):
        if what == "add":
            if f"a{value}" not in bank.names:
                names = [NAMES[:1], NAMES[1:], NAMES][seed % 3]
                bank.add(
                    f"a{value}", make(model, seed, names, (0.02, 0.5, 0.9)[seed % 3], ("add", "replace")[seed % 2])
                )
        elif what == "remove":
            if f"a{value}" in bank.names:
                bank.remove(f"a{value}")
        else:
            rows = value if what == "batch" else [value]
            if not all(name in bank.names for row in rows if row for name in ([row] if isinstance(row, str) else row)):
                continue
            if what == "switch":
                with bank.using(value):
                    pass
                continue
            want = torch.cat(alone(bank, rows, lambda i: model(x[i : i + 1])))
            try:
                with left_alone(model), bank.batch(rows, mode="unfused"), torch.no_grad():
                    check_pages(bank)
                    close(model(x[: len(rows)]), want)
            except ValueError as error:
                if budget is None or not str(error).startswith("device_budget"):
                    raise
        check_pages(bank)
