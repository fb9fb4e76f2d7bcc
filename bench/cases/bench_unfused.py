"""Unfused inference of a whole model: a batch whose rows have adapters of their own, and when fusing is cheaper.

A Llama of 4 layers, hidden 1024, all seven projections, with adapters of as many numbers as LoRA of rank 7 has (1 %).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from harness.architectures import SMALL_LLAMA, Architecture
from harness.compare import Place, Side
from harness.rotation import random_indices
from harness.switching import CHANGE, LORA, make_lora
from torch import nn

import shira
from shira.adapter import checksum_of

BASE, MIXED, MIXED_MANY, FUSED, UNFUSED = (
    "base model",
    "batch of 8 adapters (ours)",
    "batch of 8 adapters, 512 registered (ours)",
    "fused: switch, run, switch back (ours)",
    "unfused (ours)",
)
ROWS, MANY, PROMPT, VOCABULARY = 8, 512, 32, 64
BUDGET = 2**28  # bytes: room for 16 adapters and more
DIFFERENT = 8  # adapters that differ; the many are these under further names


def make_llama(architecture: Architecture, dtype: torch.dtype, device: str) -> nn.Module:
    """A random model whose projections have the architecture's shapes."""
    import transformers

    hidden, intermediate = architecture.shapes["layers.0.down_proj"]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=len(architecture.shapes) // 7,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def make_adapters(model: nn.Module, architecture: Architecture, count: int) -> list[shira.Adapter]:
    """Random adapters of the projections, with as many entries as LoRA has numbers."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: p.detach() for name, p in model.named_parameters() if "_proj." in name}
    adapters = []
    for _ in range(count):
        tensors = {}
        for name, weight in weights.items():
            indices = random_indices(weight.numel(), architecture.rank * sum(weight.shape), generator)
            base = weight.view(-1)[indices.to(weight.device)]
            std = CHANGE * float(weight.float().std()) * (weight.numel() / len(indices)) ** 0.5
            change = torch.randn(len(indices), generator=generator).mul_(std).to(weight.device)
            values = (base.float() + change).to(weight.dtype)
            tensors[name] = shira.AdapterTensor(
                indices.int(), values, tuple(weight.shape), weight.dtype, "replace", checksum_of(base)
            )
        adapters.append(shira.Adapter(tensors))
    return adapters


def make_bank(
    model: nn.Module, adapters: list[shira.Adapter], count: int, budget: int | None = BUDGET
) -> shira.ResidentAdapters:
    bank = shira.ResidentAdapters(model, device_budget=budget)
    for i in range(count):
        bank.add(str(i), adapters[i % len(adapters)])
    return bank


class Decoding:
    """One token for each row, behind a prompt whose keys and values are cached."""

    def __init__(self, model: Any, device: str, **options: Any) -> None:
        self._model, self._options = model, options
        generator = torch.Generator().manual_seed(2)
        self._tokens = torch.randint(VOCABULARY, (ROWS, PROMPT + 1), generator=generator).to(device)
        self._cache: Any = None

    def before(self, _: object) -> None:
        """The prompt's keys and values."""
        if self._cache is None:
            prompt = self._tokens[:, :PROMPT]
            self._cache = self._model(input_ids=prompt, use_cache=True, **self._options).past_key_values
        if (length := self._cache.get_seq_length()) > PROMPT:
            self._cache.crop(PROMPT - length)

    def run(self, _: object) -> torch.Tensor:
        token = self._tokens[:, PROMPT:]
        return self._model(input_ids=token, past_key_values=self._cache, use_cache=True, **self._options).logits


def check_rows(model: Any, bank: shira.ResidentAdapters, names: list[str], length: int) -> None:
    """Each row of a batch is what it is alone with its adapter fused, and that is not the base."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (len(names), length), generator=generator).to(model.device)
    base = model(input_ids=ids).logits
    with bank.batch(names, mode="unfused"):
        got = model(input_ids=ids).logits
    share = 1e-4 if got.dtype == torch.float32 else 0.05
    for i, name in enumerate(names):
        with bank.using(name):
            want = model(input_ids=ids[i : i + 1]).logits[0]
        torch.testing.assert_close(got[i], want, rtol=0, atol=share * float(want.abs().max()))
        assert not torch.equal(base[i], want)


def check_mixed(banks: Mapping[str, shira.ResidentAdapters], model: Any, names: list[str], peft: Any) -> None:
    for bank in banks.values():
        check_rows(model, bank, names, 3)
    ids = torch.zeros(ROWS, 3, dtype=torch.int64, device=model.device)
    rows = peft(input_ids=ids, adapter_names=names).logits
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("architecture", [SMALL_LLAMA], ids=["small"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_batch(compare: Callable[..., None], place: Place, dtype: str, architecture: Architecture) -> None:
    """A decode step of 8 rows with 8 adapters, beside the base model and PEFT's mixed batch of LoRA."""
    kind = getattr(torch, dtype)
    names = [str(i) for i in range(ROWS)]
    model = make_llama(architecture, kind, place.device)
    adapters = make_adapters(model, architecture, DIFFERENT)
    banks = {MIXED: make_bank(model, adapters, ROWS), MIXED_MANY: make_bank(model, adapters, MANY)}
    peft = make_lora(
        make_llama(architecture, kind, place.device), architecture, {name: int(name) for name in names}
    ).eval()
    # Every weight and each entry of the adapters once.
    base_bytes = architecture.numel * kind.itemsize
    entries = ROWS * architecture.nnz
    plain, mixed = Decoding(model, place.device), Decoding(model, place.device)
    lora = Decoding(peft, place.device, adapter_names=names)
    sides = {
        BASE: Side(plain.run, base_bytes, before=plain.before),
        **{
            name: Side(
                mixed.run,
                base_bytes + entries * (2 + kind.itemsize),
                partial(bank.batch, names, mode="unfused"),
                mixed.before,
            )
            for name, bank in banks.items()
        },
        LORA: Side(lora.run, base_bytes + entries * kind.itemsize, before=lora.before),
    }
    with torch.inference_mode():
        compare(
            sides,
            ours=MIXED,
            baselines=[BASE, LORA],
            slots=[None],
            check=lambda: check_mixed(banks, model, names, peft),
            place=place,
            group="Mixed batch: a decode step of 8 rows, each with its own adapter",
            label=f"{place}, {dtype}, {architecture}",
            info=architecture.facts(dtype),
        )


@pytest.mark.parametrize("architecture", [SMALL_LLAMA], ids=["small"])
@pytest.mark.parametrize(
    ("rows", "length", "steps"),
    [*((1, 1, steps) for steps in (1, 4, 8, 16, 32, 64)), *((1, length, 1) for length in (32, 128, 512, 1024))],
)
def test_fused_or_unfused(
    compare: Callable[..., None], place: Place, rows: int, length: int, steps: int, architecture: Architecture
) -> None:
    """A block of forwards that one adapter owns: unfused, and switched in and out. FUSE_AFTER_TOKENS and
    FORWARD_TOKENS of `shira.serving.rows` say where the two cost as much."""
    model = make_llama(architecture, torch.float32, place.device)
    bank = make_bank(model, make_adapters(model, architecture, 1), 1, None)
    ids = torch.zeros(rows, length, dtype=torch.int64, device=place.device)

    def run(mode: str | None, _: object) -> None:
        with nullcontext() if mode is None else bank.batch(["0"], mode=mode):
            for _step in range(steps):
                model(input_ids=ids, use_cache=False)

    base_bytes = steps * architecture.numel * 4
    sides = {
        UNFUSED: Side(partial(run, "unfused"), base_bytes + steps * architecture.nnz * 6),
        FUSED: Side(partial(run, "fused"), base_bytes + 2 * architecture.nnz * 12),
        BASE: Side(partial(run, None), base_bytes),
    }
    with torch.inference_mode():
        compare(
            sides,
            ours=UNFUSED,
            baselines=[BASE],
            slots=[None],
            check=lambda: check_rows(model, bank, ["0", "0"], 3),
            place=place,
            group="Fused or unfused: forwards that one adapter owns, its switches included",
            label=f"{place}, {rows} x {length} tokens, {steps} forwards",
            info={
                **architecture.facts("float32"),
                "tokens": rows * length * steps,
                "forwards": steps,
            },
        )
