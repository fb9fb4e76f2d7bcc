"""Ways to train one Llama, for bench_training.py; as a command, the peak memory of one of them in a process of its own:

python bench/training_sides.py "SHiRA (ours)"     prints bytes
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

RANK = 10
BATCH, TOKENS, VOCABULARY = 4, 256, 256
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLOOR, OURS = "frozen weights", "SHiRA (ours)"


@dataclass
class Training:
    """A model to train: `step` runs forward, backward and update on token ids [batch, tokens], and gives the loss."""

    model: torch.nn.Module
    step: Callable[[torch.Tensor], float]
    trained: int  # numbers


def llama() -> LlamaForCausalLM:
    """Four layers of hidden size 1024: 52 M weights, float32, the same ones each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batch() -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


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


def frozen() -> Training:
    """Nothing is trained; the backward goes down to the embeddings: what any adapter must pay."""
    model = llama()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return _training(model, None)


def ours() -> Training:
    import shira

    model = llama()
    handle = shira.attach(model, shira.ShiraConfig(target_modules=PROJECTIONS, mask="rand", r=RANK))
    return _training(model, shira.ShiraAdamW(handle.parameters(), lr=1e-4, weight_decay=0.0))


def _peft(config: object) -> Training:
    from peft import get_peft_model

    model = get_peft_model(llama(), config)
    return _training(model, _adamw(model))


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def lora() -> Training:
    from peft import LoraConfig

    return _peft(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS))


def dora() -> Training:
    from peft import LoraConfig

    return _peft(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, use_dora=True))


def shira_peft() -> Training:
    from peft import ShiraConfig

    return _peft(ShiraConfig(r=RANK, target_modules=PROJECTIONS))


def full() -> Training:
    model = llama()
    return _training(model, _adamw(model))


SIDES: dict[str, Callable[[], Training]] = {
    OURS: ours,
    FLOOR: frozen,
    "LoRA (PEFT)": lora,
    "DoRA (PEFT)": dora,
    "SHiRA (PEFT)": shira_peft,
    "full": full,
}


def peak_bytes(side: str, steps: int = 3) -> int:
    """The most memory that this process has held after some steps of one side."""
    torch.set_num_threads(1)
    training = SIDES[side]()
    ids = batch()
    for _ in range(steps):
        training.step(ids)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    print(peak_bytes(sys.argv[1]))
