"""A training step of a Llama, six ways: Table 6 of the paper, on this machine. Time in turn, and peak memory.

Llama shape, hidden 1024, four layers, float32, batch 4 x 256, all seven projections; SHiRA trains 10 (rows + columns)
entries of each weight, as many numbers as LoRA of rank 10. Baselines use torch's fused AdamW. Memory is the peak of a
process of its own for each side, less that of the frozen run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_sides
from compare import Place, Side
from training_sides import FLOOR, OURS, SIDES, Training


def measured_peak(side: str) -> int:
    command = [sys.executable, str(Path(training_sides.__file__)), side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def check(trainings: dict[str, Training], ids: torch.Tensor) -> None:
    """All sides start from the same loss, train as many numbers, and our gradients are entries of the full ones."""
    losses = {name: training.model(input_ids=ids, labels=ids).loss for name, training in trainings.items()}
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses[FLOOR], msg=lambda text, name=name: f"{name}: {text}")
    assert trainings[OURS].trained == trainings["LoRA (PEFT)"].trained == trainings["SHiRA (PEFT)"].trained
    losses[OURS].backward()
    losses["full"].backward()
    dense = dict(trainings["full"].model.named_parameters())
    values = {name: p for name, p in trainings[OURS].model.named_parameters() if p.grad is not None}
    assert len(values) == len(training_sides.PROJECTIONS) * 4
    for name, vector in values.items():
        layer = name.removesuffix(".shira_values")
        indices = trainings[OURS].model.get_buffer(f"{layer}.shira_indices")
        expected = dense[f"{layer}.weight"].grad.view(-1)[indices.long()]
        torch.testing.assert_close(vector.grad, expected, rtol=1e-3, atol=1e-7)
        assert vector.grad.abs().max() > 0
    for training in trainings.values():
        training.model.zero_grad()


@pytest.mark.parametrize("place", [Place("cpu", 1)], ids=str, indirect=True)
def test_training_step(compare: Callable[..., None], place: Place) -> None:
    trainings = {name: make() for name, make in SIDES.items()}
    ids = training_sides.batch()
    weights = 4 * sum(p.numel() for p in trainings[FLOOR].model.parameters())
    # The least that any side moves: the weights once forward, once backward.
    sides = {name: Side(training.step, 2 * weights) for name, training in trainings.items()}
    compare(
        sides,
        ours=OURS,
        baselines=[name for name in sides if name != OURS],
        slots=[ids],
        check=lambda: check(trainings, ids),
        place=place,
        group="Training step (4 Llama layers, hidden 1024, batch 4 x 256, float32)",
        label=f"{place}, rank {training_sides.RANK}",
        info={
            "dtype": "float32",
            "floor": FLOOR,
            "trained": {name: training.trained for name, training in trainings.items()},
            "peak_bytes": {name: measured_peak(name) for name in sides},
        },
    )
