"""Ways to train one Llama, for bench_training.py; as a command, the peak memory of one of them in a process of its own:

python bench/harness/training.py "SHiRA (ours)" cpu     prints bytes
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

RANK = 10
VOCABULARY = 256
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLOOR, OURS = "frozen weights", "SHiRA (ours)"


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    dtype: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.layers} Llama layers, hidden {self.hidden}, batch {self.batch} x {self.tokens}, {self.dtype}"


# 52 M weights for a CPU; for a GPU the layers of a Llama of 1 B weights.
SHAPES = {
    "cpu": Shape(1024, 2816, 4, 16, 16, "float32", 4, 256),
    "cuda": Shape(2048, 8192, 16, 32, 8, "bfloat16", 4, 1024),
}


@dataclass
class Training:
    """A model to train: `step` runs forward, backward and update on token ids [batch, tokens], and gives the loss."""

    model: torch.nn.Module
    step: Callable[[torch.Tensor], float]
    trained: int  # numbers


def llama(device: str) -> LlamaForCausalLM:
    """The device's shape, the same weights each time."""
    shape = SHAPES[device]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=shape.tokens,
        use_cache=False,
    )
    with torch.device(device):  # a GPU fills a model of this size in no time
        return LlamaForCausalLM(config).to(getattr(torch, shape.dtype))


def batch(device: str) -> torch.Tensor:
    size = (SHAPES[device].batch, SHAPES[device].tokens)
    return torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(1)).to(device)


def _training(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Training:
    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    parameters = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
    return Training(model, step, sum(p.numel() for p in parameters))


def frozen(device: str) -> Training:
    """Nothing is trained; the backward goes down to the embeddings: what any adapter must pay."""
    model = llama(device)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return _training(model, None)


def ours(device: str) -> Training:
    import shira

    model = llama(device)
    handle = shira.attach(model, shira.ShiraConfig(target_modules=PROJECTIONS, mask="rand", r=RANK))
    return _training(model, shira.ShiraAdamW(handle.parameters(), lr=1e-4, weight_decay=0.0))


def _peft(device: str, config: object) -> Training:
    from peft import get_peft_model

    model = get_peft_model(llama(device), config)
    return _training(model, _adamw(model))


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def lora(device: str) -> Training:
    from peft import LoraConfig

    return _peft(device, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS))


def dora(device: str) -> Training:
    from peft import LoraConfig

    return _peft(device, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, use_dora=True))


def shira_peft(device: str) -> Training:
    from peft import ShiraConfig

    return _peft(device, ShiraConfig(r=RANK, target_modules=PROJECTIONS))


def full(device: str) -> Training:
    model = llama(device)
    return _training(model, _adamw(model))


SIDES: dict[str, Callable[[str], Training]] = {
    OURS: ours,
    FLOOR: frozen,
    "LoRA (PEFT)": lora,
    "DoRA (PEFT)": dora,
    "SHiRA (PEFT)": shira_peft,
    "full": full,
}


def peak_bytes(side: str, device: str, steps: int = 3) -> int:
    """The most memory that this process has held after some steps of one side: its own on a CPU, tensors on a GPU."""
    torch.set_num_threads(1)
    training = SIDES[side](device)
    ids = batch(device)
    for _ in range(steps):
        training.step(ids)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory at the time of the fork
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    print(peak_bytes(*sys.argv[1:]))
