"""Trains the demonstration's base model: `python -m shira.cli.demo.train_base OUTPUT_FOLDER`.

A Llama of 3.1 M weights over bytes, 4000 steps of 16 windows of 256 bytes (16.4 MB read) from the Python sources of
installed packages, AdamW, one thread: about 40 minutes on one core with AMX. The shipped folder was made by this
script; `config.json` beside the weights records its held-out bits per byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from shira.cli.demo import corpus
from shira.cli.demo.base import CONTEXT, bits_per_byte, random_windows

TRAIN_BYTES = 40_000_000
HELDOUT_BYTES = 262_144
BATCH = 16
WARMUP_STEPS = 100
PEAK_LR = 3e-3


def train_base(output: Path, steps: Annotated[int, typer.Option(min=1)] = 4000, seed: int = 0) -> None:
    """Train the byte-level Llama on Python sources and write it to OUTPUT as a Hugging Face model folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text = corpus.load("python", train_bytes=TRAIN_BYTES, heldout_bytes=HELDOUT_BYTES)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS), 1.0)
    )

    @torch.compile
    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=rows, labels=rows, use_cache=False).loss

    generator = torch.Generator().manual_seed(seed)
    for step in track(range(steps), description="training"):
        loss = loss_of(random_windows(text.train, BATCH, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: {loss.item() / 0.6931472:.3f} bits per byte", flush=True)

    # Scored as it is used: the rounded weights in float32.
    score = bits_per_byte(model.to(torch.bfloat16).float().eval(), text.heldout)
    model.config.heldout_bits_per_byte = round(score, 4)
    model.to(torch.bfloat16).save_pretrained(output)
    print(f"{sum(p.numel() for p in model.parameters())} weights, {score:.4f} held-out bits per byte, in {output}")


if __name__ == "__main__":
    typer.run(train_base)
