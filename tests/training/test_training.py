"""Attached models in real training: Trainer, torch.compile, activation checkpointing, mixed precision."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from shira.training import trained
from shira_kernels import optim

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tiny_llama(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))


def config(target_modules: list[str] | str = TARGETS) -> shira.ShiraConfig:
    return shira.ShiraConfig(target_modules, mask="rand", density=0.1)


def values_of(handle: shira.Handle) -> dict[str, torch.Tensor]:
    return {name: values.detach().clone() for name, values in handle.named_parameters()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


IDS = torch.arange(16 * 8).view(16, 8) * 7 % 40
ATTACH: dict[str, Callable] = {"attach": shira.attach, "mask_gradients": shira.mask_gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own_optimizer", [False, True], ids=["trainers_optimizer", "ShiraAdamW"])
@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH.keys())
def test_trainer_resumes_to_the_same_bits(
    attach: Callable, own_optimizer: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS]

    def run(steps: int, resume: bool) -> tuple[nn.Module, shira.Handle]:
        model = tiny_llama().to(dtype)
        handle = attach(model, config([*TARGETS, "embed_tokens"]))
        optimizer = shira.ShiraAdamW(handle.parameters(), lr=0.02, weight_decay=0.1) if own_optimizer else None
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / ("interrupted" if resume or steps < 6 else "whole")),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.02,
            weight_decay=0.1,
            max_grad_norm=0.5,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
                control.should_training_stop |= state.global_step == steps

        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return model, handle

    _, whole = run(6, resume=False)
    run(4, resume=False)
    model, resumed = run(6, resume=True)
    assert_equal(values_of(resumed), values_of(whole))
    for name, part in resumed.adapter().items():
        assert torch.equal(part.values, whole.adapter()[name].values)
    resumed.detach()
    base = tiny_llama().to(dtype).state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_trainer_resumes_with_running_statistics_and_dropout(tmp_path: Path) -> None:
    class Network(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: transformers.PretrainedConfig) -> None:
            super().__init__(config)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
            self.post_init()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.layers(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(6), "labels": torch.tensor(i % 3)} for i in range(64)]

    def run(folder: str, steps: int, resume: bool) -> tuple[nn.Module, shira.Handle]:
        torch.manual_seed(7)
        model = Network(transformers.PretrainedConfig())
        handle = shira.attach(model, shira.ShiraConfig("all-linear", density=0.3))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        optimizers = (shira.ShiraAdamW(handle.parameters(), lr=0.05), None)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=optimizers)

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
                control.should_training_stop |= state.global_step == steps

        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return model, handle

    whole, _ = run("whole", 6, resume=False)
    run("interrupted", 4, resume=False)
    model, handle = run("interrupted", 6, resume=True)
    assert_equal(dict(model.state_dict()), dict(whole.state_dict()))
    assert "layers.1.running_mean" in handle.adapter()
    handle.detach()
    torch.manual_seed(7)
    assert_equal(dict(model.state_dict()), dict(Network(transformers.PretrainedConfig()).state_dict()))


def test_save_pretrained_writes_values_and_indices(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        handle = shira.attach(model, config([*TARGETS, "lm_head"]))
        with torch.no_grad():
            for values in handle.parameters():
                values.add_(1.0)
        model.save_pretrained(tmp_path / str(tied))
        saved = safetensors.load_file(tmp_path / str(tied) / "model.safetensors")
        for name, values in handle.named_parameters():
            assert torch.equal(saved[name], values)
            layer = model.get_submodule(name.removesuffix(".shira_values"))
            indices = saved[name.replace("values", "indices")]
            assert torch.equal(indices, layer.shira_indices)
            weight = saved[name.replace("shira_values", "weight")]
            assert torch.equal(weight.view(-1)[indices], values)
        plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(plain(IDS).logits, model(IDS).logits)


def steps(model: nn.Module, run: Callable, handle: shira.Handle, optimizer: type = torch.optim.AdamW) -> list[float]:
    stepper, losses = optimizer(handle.parameters(), lr=0.02), []
    for batch in IDS.split(8):
        stepper.zero_grad()
        loss = run(input_ids=batch, labels=batch).loss
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("attach", "optimizer"),
    [
        (shira.attach, torch.optim.AdamW),
        (shira.attach, shira.ShiraAdamW),
        (shira.mask_gradients, torch.optim.SGD),
        (shira.mask_gradients, shira.ShiraAdamW),
    ],
)
def test_compiled_llama(attach: Callable, optimizer: type) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = tiny_llama(num_hidden_layers=1)
        handle = attach(model, config([*TARGETS, "embed_tokens"]))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        results.append((steps(model, run, handle, optimizer), values_of(handle)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, values in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], values, rtol=1e-4, atol=1e-5)


def test_inductor_after_attaching_a_compiled_model_and_loading() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    twin = copy.deepcopy(model)
    run, x = torch.compile(model, fullgraph=True), torch.randn(4, 6)
    handles = [shira.attach(net, shira.ShiraConfig("all-linear", density=0.3)) for net in (model, twin)]
    start = copy.deepcopy(model.state_dict())
    optimizers = [torch.optim.SGD(handle.parameters(), lr=0.1) for handle in handles]
    for _ in range(3):
        for net, optimizer in zip((run, twin), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(run(x), twin(x))
    for net in (model, twin):
        net.load_state_dict({name: tensor for name, tensor in start.items() if "shira" in name}, strict=False)
    torch.testing.assert_close(run(x), twin(x))
    for handle in handles:
        handle.detach()
    torch.testing.assert_close(run(x), twin(x))


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH.keys())
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_activation_checkpointing(attach: Callable, reentrant: bool, before: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama()
        model.train()
        if checkpointing and before:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        handle = attach(model, config())
        if checkpointing and not before:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
        gradients.append({name: values.grad for name, values in handle.named_parameters()})
        handle.detach()
    assert_equal(*gradients)


@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, shira.ShiraAdamW])
@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH.keys())
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
def test_mixed_precision_scaler_clipping_and_accumulation(
    attach: Callable, dtype: torch.dtype, autocast: torch.dtype | None, optimizer_type: type
) -> None:
    model = tiny_llama().to(dtype)
    handle = attach(model, config())
    optimizer = optimizer_type(handle.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        for batch in IDS.split(8):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(input_ids=batch, labels=batch).loss
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        assert 0 < norm < float("inf")
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(values.dtype == torch.float32 for values in handle.parameters())


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, shira.ShiraAdamW])
def test_a_step_that_the_scaler_skips_writes_nothing(optimizer_type: type) -> None:
    model = tiny_llama()
    handle = shira.attach(model, config())
    optimizer = optimizer_type(handle.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
    next(handle.parameters()).grad[0] = float("inf")
    before = values_of(handle)
    scaler.step(optimizer)
    scaler.update()
    model(input_ids=IDS)
    assert_equal(values_of(handle), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH.keys())
def test_shira_adamw_updates_and_writes_the_whole_model_in_one_call(
    attach: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = tiny_llama().to(dtype), tiny_llama().to(dtype)
    handles = [attach(net, config([*TARGETS, "embed_tokens"])) for net in (model, twin)]
    optimizers = [
        shira.ShiraAdamW(handles[0].parameters(), lr=0.02),
        torch.optim.AdamW(handles[1].parameters(), lr=0.02),
    ]
    calls: Counter[str] = Counter()
    for module, op in ((optim, "masked_adamw"), (trained, "scatter_apply")):
        monkeypatch.setattr(module, op, counted(getattr(module, op), calls))
    for _ in range(3):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            calls.clear()
            net(input_ids=IDS[:4], labels=IDS[:4]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected = {"masked_adamw": 1} if net is model else {"scatter_apply": len(list(handles[1].parameters()))}
            assert calls == expected
    calls.clear()
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=2e-2, atol=1e-4)
    assert not calls, "nothing is written that the optimizer wrote"
    for name, part in handles[0].adapter().items():
        torch.testing.assert_close(part.values, handles[1].adapter()[name].values, rtol=1e-2, atol=1e-4)
        assert torch.equal(model.get_parameter(name).view(-1)[part.indices], part.values)
        assert not torch.equal(part.values, tiny_llama().to(dtype).get_parameter(name).view(-1)[part.indices])


def counted(function: Callable, calls: Counter[str]) -> Callable:
    def call(*arguments: object) -> object:
        calls[function.__name__] += 1
        return function(*arguments)

    return call
