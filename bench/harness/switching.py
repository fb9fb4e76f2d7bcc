"""Models and adapters for the switching benchmarks and the drift study: ours, and PEFT's LoRA and SHiRA.

A model here is its linear layers without a forward, since switching reads and writes weights only. Of a weight
[n, m] an adapter of rank r holds r (n + m) numbers: LoRA's factors, or as many entries, random ones, which both
SHiRAs share. Every adapter changes the weights by a hundredth of their norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness.architectures import Architecture, Shapes
from harness.machine import line_bytes
from harness.rotation import random_indices
from torch import nn

import shira
from shira.adapter import checksum_of

OURS, LORA, SHIRA_PEFT = "SHiRA (ours)", "LoRA (PEFT)", "SHiRA (PEFT)"
WEIGHT_STD = 0.02
CHANGE = 0.01  # norm of an adapter's change over that of the weights
# Weights repeat it: random enough to round like any others, and made at the speed of a copy. No power of two long.
BLOCK = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(WEIGHT_STD)


def make_model(shapes: Shapes, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of linear layers without a forward; its weights are the same each time."""
    model = nn.Module()
    for name, (n, m) in shapes.items():
        *path, last = name.split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.utils.skip_init(nn.Linear, m, n, bias=False, dtype=dtype, device=device)
        _fill(layer.weight)
        parent.add_module(last, layer)
    return model.requires_grad_(False)


@torch.no_grad()
def _fill(weight: torch.Tensor) -> None:
    block = BLOCK.to(weight.device, weight.dtype)
    for part in weight.view(-1).split(len(block)):
        part.copy_(block[: len(part)])


def base_of(weight: torch.Tensor) -> torch.Tensor:
    """What a weight of that shape and dtype holds before any adapter."""
    base = torch.empty_like(weight)
    _fill(base)
    return base


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the adapted layers by the names of `Shapes`; the model may be PEFT's."""
    return {
        name.replace("base_model.model.", "").removesuffix(".weight").removesuffix(".base_layer"): weight.detach()
        for name, weight in model.named_parameters()
        if "lora_" not in name and "shira_" not in name
    }


@dataclass(frozen=True)
class Change:
    """What an adapter does to one weight: at `indices`, `change` (float32) is added to `base`."""

    indices: torch.Tensor
    base: torch.Tensor
    change: torch.Tensor


def changes(architecture: Architecture, dtype: torch.dtype, seed: int, device: str = "cpu") -> dict[str, Change]:
    """A random sparse adapter, by the names of `Shapes`; another one on another device."""
    generator = torch.Generator(device).manual_seed(seed)
    block = BLOCK.to(device)
    found = {}
    for name, (n, m) in architecture.shapes.items():
        indices = random_indices(n * m, architecture.rank * (n + m), generator)
        std = CHANGE * WEIGHT_STD * (n * m / len(indices)) ** 0.5
        change = torch.randn(len(indices), generator=generator, device=device).mul_(std)
        found[name] = Change(indices, block[indices % len(block)].to(dtype), change)
    return found


def make_adapter(architecture: Architecture, dtype: torch.dtype, seed: int, device: str = "cpu") -> shira.Adapter:
    """For models of `make_model`; it replaces. Its tensors are on the device."""
    tensors = {}
    for name, part in changes(architecture, dtype, seed, device).items():
        values = (part.base + part.change).to(dtype)
        tensors[f"{name}.weight"] = shira.AdapterTensor(
            part.indices.int(), values, architecture.shapes[name], dtype, checksum=checksum_of(part.base)
        )
    return shira.Adapter(tensors)


def make_lora(model: nn.Module, architecture: Architecture, seeds: Mapping[str, int]) -> Any:
    """A PeftModel over the model with a random LoRA adapter of each name."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=architecture.rank, lora_alpha=architecture.rank, target_modules=architecture.targets)
    first, *others = seeds
    peft = get_peft_model(model, config, adapter_name=first)
    for name in others:
        peft.add_adapter(name, config)
    # The product of [n, r] and [r, m] has sqrt(r) times the product of their standard deviations.
    std = (CHANGE * WEIGHT_STD / architecture.rank**0.5) ** 0.5
    for name, seed in seeds.items():
        generator = torch.Generator().manual_seed(seed)
        for key, factor in peft.named_parameters():
            if "lora_" in key and key.endswith(f".{name}.weight"):
                factor.data.copy_(torch.randn(factor.shape, generator=generator).mul_(std))
    return peft.requires_grad_(False)


def make_shira_peft(model: nn.Module, architecture: Architecture, seeds: Mapping[str, int]) -> Any:
    """A PeftModel over the model with the SHiRA adapters of `changes`, which stay in float32, as PEFT trains them."""
    from peft import ShiraConfig, get_peft_model
    from peft.tuners.shira import ShiraLayer

    weights = weights_of(model)
    names = {weight.data_ptr(): name for name, weight in weights.items()}
    dtype = next(iter(weights.values())).dtype
    adapters = {name: changes(architecture, dtype, seed) for name, seed in seeds.items()}

    def config(adapter: Mapping[str, Change]) -> ShiraConfig:
        def mask(base_layer: nn.Linear, r: int, **_: Any) -> torch.Tensor:
            weight = base_layer.weight
            found = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            found.view(-1)[adapter[names[weight.data_ptr()]].indices.to(weight.device)] = True
            return found

        config = ShiraConfig(r=architecture.rank, target_modules=architecture.targets)
        config.mask_fn = mask
        return config

    first, *others = adapters
    peft = get_peft_model(model, config(adapters[first]), adapter_name=first)
    for name in others:
        peft.add_adapter(name, config(adapters[name]))
    for layer in peft.modules():
        if isinstance(layer, ShiraLayer):
            weight = layer.get_base_layer().weight
            for name, adapter in adapters.items():
                layer.shira_weight[name].data = adapter[names[weight.data_ptr()]].change.to(weight.device)
    return peft.requires_grad_(False)


def merge_other(peft: Any, name: str) -> None:
    """PEFT's way from one merged adapter to another."""
    peft.unmerge_adapter()
    peft.merge_adapter([name])


def touched_bytes(weights: Mapping[str, torch.Tensor], adapters: Iterable[shira.Adapter]) -> int:
    """Bytes in the memory lines of the weights that hold an entry of at least one of the adapters."""
    adapters, total = list(adapters), 0
    for name, weight in weights.items():
        line = line_bytes(weight.device.type)
        indices = torch.cat([a[f"{name}.weight"].indices for a in adapters if f"{name}.weight" in a]).long()
        addresses = weight.data_ptr() + indices * weight.element_size()
        total += torch.div(addresses, line, rounding_mode="floor").unique().numel() * line
    return total


def expected_of(weight: torch.Tensor, tensor: shira.AdapterTensor) -> torch.Tensor:
    """The base with an adapter's values in it, plainly."""
    expected = base_of(weight)
    expected.view(-1)[tensor.indices.long().to(weight.device)] = tensor.values.to(weight.device)
    return expected


def check_merged(peft: Any, *names: str, strengths: tuple[float, ...] = (1.0,)) -> None:
    """Every weight is base + the sum of strength B A, up to rounding. The first rows stand for all."""
    parameters = dict(peft.named_parameters())
    for layer, weight in weights_of(peft).items():
        expected = base_of(weight)[:64].float()
        before = expected.clone()
        for name, strength in zip(names, strengths, strict=True):
            b, a = (parameters[f"base_model.model.{layer}.lora_{x}.{name}.weight"].float() for x in "BA")
            expected += strength * (b[:64] @ a)
        assert (expected - before).abs().max() > 1e-5, layer
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight[:64], expected.to(weight.dtype), rtol=2 * eps, atol=5e-6)


def share_of_changed(weights: Mapping[str, torch.Tensor]) -> float:
    """How many of all weights differ from the base in their bits."""
    changed = total = 0
    for weight in weights.values():
        bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        changed += int((base_of(weight).view(bits) != weight.view(bits)).sum())
        total += weight.numel()
    return changed / total
