"""A training step of a Llama, six ways: Table 6 of the paper, on this machine. Time in turn, and peak memory.

The shapes are in harness/training.py; all seven projections are trained. SHiRA trains 10 (rows + columns) entries of
each weight, as many numbers as LoRA of rank 10. Baselines use torch's fused AdamW. Memory is the peak of a process of
its own for each side, less that of the frozen run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.compare import Place, Side
from harness.training import FLOOR, OURS, PROJECTIONS, RANK, SHAPES, SIDES, Training, batch


def measured_peak(side: str, device: str) -> int:
    command = [sys.executable, str(Path(sys.modules[Training.__module__].__file__)), side, device]
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
    assert len(values) == len(PROJECTIONS) * SHAPES[ids.device.type].layers
    for name, vector in values.items():
        layer = name.removesuffix(".shira_values")
        indices = trainings[OURS].model.get_buffer(f"{layer}.shira_indices")
        expected = dense[f"{layer}.weight"].grad.view(-1)[indices.long()]
        # In bfloat16 the dense gradient is rounded, and ours is not.
        error = torch.finfo(expected.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(vector.grad, expected.float(), rtol=1e-3, atol=8 * error)
        assert vector.grad.abs().max() > 0
    for training in trainings.values():
        training.model.zero_grad()


@pytest.mark.parametrize(
    "place", [Place("cpu", 1), pytest.param(Place("cuda"), marks=pytest.mark.gpu)], ids=str, indirect=True
)
def test_training_step(compare: Callable[..., None], place: Place, pytestconfig: pytest.Config) -> None:
    trainings = {name: make(place.device) for name, make in SIDES.items()}
    ids = batch(place.device)
    # Between revisions only time is compared; a process for each side's memory would take most of it.
    peaks = (
        {} if pytestconfig.getoption("--packages-of") else {name: measured_peak(name, place.device) for name in SIDES}
    )
    others = [peak for name, peak in peaks.items() if name != FLOOR]
    assert not peaks or peaks[FLOOR] < min(others), "the floor takes the least memory"
    weights = sum(p.nbytes for p in trainings[FLOOR].model.parameters())
    # The least that any side moves: the weights once forward, once backward.
    sides = {name: Side(training.step, 2 * weights) for name, training in trainings.items()}
    compare(
        sides,
        ours=OURS,
        baselines=[name for name in sides if name != OURS],
        slots=[ids],
        check=lambda: check(trainings, ids),
        place=place,
        group=f"Training step ({SHAPES[place.device]})",
        label=f"{place}, rank {RANK}",
        info={
            "dtype": SHAPES[place.device].dtype,
            "floor": FLOOR,
            "trained": {name: training.trained for name, training in trainings.items()},
            "peak_bytes": peaks,
        },
    )
