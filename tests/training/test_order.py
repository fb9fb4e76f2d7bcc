"""attach before and after what else is done to a model: as in the plain order, or refused before it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import mlp, tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import shira


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def attach(model: nn.Module, targets: str | list[str] = "all-linear") -> shira.Handle:
    return shira.attach(model, shira.ShiraConfig(targets, mask="rand", density=0.3))


IDS = torch.arange(20).view(2, 10) % 13


def losses(model: nn.Module, handle: shira.Handle) -> list[float]:
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.02)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def checkpointing(model: nn.Module) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


PREPARED: dict[str, Callable[[nn.Module], object]] = {
    "checkpointing": checkpointing,
    "double": lambda model: model.double(),
    "tie": lambda model: model.tie_weights(),
    "resize of other weights": lambda model: model.resize_token_embeddings(60, mean_resizing=False),
}


@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED.keys())
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["linear", "tied"])
def test_before_and_after_are_equal(targets: str | list[str], prepare: Callable[[nn.Module], object]) -> None:
    plain = tiny_llama()
    before, after = copy.deepcopy(plain), copy.deepcopy(plain)
    torch.manual_seed(3)
    prepare(before)
    first = losses(before, attach(before, targets))
    handle = attach(after, targets)
    torch.manual_seed(3)
    prepare(after)
    if "lm_head" in targets and prepare is PREPARED["resize of other weights"]:
        with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight: the weight was replaced or resized"):
            losses(after, handle)
        return
    assert losses(after, handle) == pytest.approx(first, rel=1e-5)
    handle.detach()


def test_compiled_before_and_after_are_equal() -> None:
    """Code that was made before attach is not used any more, and none that was made before detach after it."""
    x, results = torch.randn(4, 6), []
    for first in (True, False, None):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = mlp()
        if first:
            model.compile(backend="aot_eager")
            model(x).sum().backward()
        base = model(x).detach()
        handle = attach(model)
        if first is False:
            model.compile(backend="aot_eager")
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        results.append(model(x).detach())
        handle.detach()
        assert torch.equal(model(x), base)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def untied_head(model: nn.Module) -> None:
    model.config.tie_word_embeddings = True
    model.tie_weights()


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", nn.Identity())


def other_layer(model: nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj = nn.Linear(16, 16, bias=False)


def other_weight(model: nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)


def tied_to_another(model: nn.Module) -> None:
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[1].self_attn.q_proj.weight


def unfrozen(model: nn.Module) -> None:
    model.requires_grad_(True)


REPLACED: dict[str, tuple[Callable[[nn.Module], object], list[str], str]] = {
    "resize": (lambda model: model.resize_token_embeddings(60, mean_resizing=False), ["embed_tokens"], "resized"),
    "resize of the head": (
        lambda model: model.resize_token_embeddings(60, mean_resizing=False),
        ["q_proj", "lm_head"],
        r"lm_head\.weight: .*taken out|replaced or resized",
    ),
    "tie the embedding": (untied_head, ["q_proj", "embed_tokens"], r"lm_head: its weight was tied to .*embed_tokens"),
    "tie the head": (untied_head, ["q_proj", "lm_head"], r"lm_head\.weight: the weight was replaced"),
    "tie a layer": (tied_to_another, ["q_proj"], r"o_proj: its weight was tied to model\.layers\.1\.self_attn\.q_proj"),
    "parametrize": (parametrized, ["q_proj"], r"layers\.0\.self_attn\.q_proj\.weight: the weight was replaced"),
    "another layer": (other_layer, ["q_proj"], r"layers\.1\.self_attn\.q_proj\.weight: its layer was taken out"),
    "another weight": (other_weight, ["q_proj"], r"layers\.1\.self_attn\.q_proj\.weight: the weight was replaced"),
    "unfreeze": (unfrozen, ["q_proj"], r"requires_grad was set"),
}


@pytest.mark.parametrize(("replace", "targets", "message"), REPLACED.values(), ids=REPLACED.keys())
def test_what_is_replaced_after_attach_is_refused(
    replace: Callable[[nn.Module], object], targets: list[str], message: str
) -> None:
    model = tiny_llama(tied=False)
    handle = attach(model, targets)
    values = [value.detach().clone() for value in handle.parameters()]
    replace(model)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            model(input_ids=IDS, labels=IDS)
    if replace is not unfrozen:
        with pytest.raises(RuntimeError, match=message):
            handle.adapter()
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, handle.parameters(), values))


def test_a_weight_norm_after_attach_is_refused() -> None:
    for normalize in (parametrizations.weight_norm, nn.utils.weight_norm):
        model = mlp()
        attach(model)
        with pytest.raises(RuntimeError, match=r"0\.weight: the weight was replaced"):  # noqa: PT012
            normalize(model[0])
            model(torch.randn(2, 6))


def test_a_detach_after_a_replacement_changes_nothing() -> None:
    model = tiny_llama(tied=False)
    handle = attach(model, ["embed_tokens", "lm_head"])
    with torch.no_grad():
        for values in handle.parameters():
            values.add_(1.0)
    handle.write_back()
    untied_head(model)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: the weight was replaced"):
        handle.detach()
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: the weight was replaced"):
        handle.write_back()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_data_parallel_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="in a DataParallel, which would not see"):
        attach(nn.DataParallel(model))
    attach(model)
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cannot train"):
        model[0]._replicate_for_data_parallel()
