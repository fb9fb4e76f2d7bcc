"""Table 5 of the paper: load, fuse, unfuse and unload an adapter of a large model, against PEFT's LoRA.

    step      ours                      PEFT's
    load      bank.add(name, file)      PeftModel.from_pretrained(model, folder)
    apply     bank.switch(name)         merge_adapter()
    revert    bank.switch(None)         unmerge_adapter()
    remove    bank.remove(name)         unload()

Both adapters hold equally many numbers: entries with their positions, which are checked against the base, or LoRA's
factors. Files are in the page cache. Each step is timed alone; what undoes or redoes it in between is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.architectures import LLAMA_7B_QUARTER, SDXL_ATTENTION, Architecture
from harness.compare import Place, Side, assert_same_bits
from harness.machine import available_threads
from harness.switching import (
    LORA,
    OURS,
    base_of,
    check_merged,
    expected_of,
    make_adapter,
    make_lora,
    make_model,
    share_of_changed,
    touched_bytes,
    weights_of,
)

import shira

DTYPE = torch.bfloat16
# Each step with the one that takes it back.
INVERSE = {"load": "remove", "apply": "revert", "revert": "apply", "remove": "load"}


class Ours:
    """Our side: a bank, and the file of an adapter."""

    def __init__(self, architecture: Architecture, device: str, folder: Path) -> None:
        self.adapter = make_adapter(architecture, DTYPE, seed=1)
        self.path = folder / "adapter.safetensors"
        self.adapter.save(self.path)
        self.weights = weights_of(model := make_model(architecture.shapes, DTYPE, device))
        self.bank = shira.ResidentAdapters(model)

    def load(self) -> None:
        self.bank.add("a", self.path)

    def apply(self) -> None:
        self.bank.switch("a")

    def revert(self) -> None:
        self.bank.switch(None)

    def remove(self) -> None:
        self.bank.remove("a")

    def bytes_moved(self) -> dict[str, int]:
        """Bytes that each step moves."""
        entry, old = self.adapter.nnz * (4 + DTYPE.itemsize), self.adapter.nnz * DTYPE.itemsize
        writing = 2 * touched_bytes(self.weights, [self.adapter]) + entry + old
        return {"load": 2 * entry, "apply": writing, "revert": writing - old, "remove": 0}

    def check_applied(self) -> None:
        for name, weight in self.weights.items():
            assert_same_bits(name, [weight], [expected_of(weight, self.adapter[f"{name}.weight"])])

    def check_reverted(self) -> dict[str, Any]:
        for name, weight in self.weights.items():
            assert_same_bits(name, [weight], [base_of(weight)])
        return {}


class Lora:
    """PEFT's side: a model, and the folder of an adapter."""

    def __init__(self, architecture: Architecture, device: str, folder: Path) -> None:
        self.folder, self.device = folder / "lora", device
        self.model = make_model(architecture.shapes, DTYPE, device)
        peft = make_lora(self.model, architecture, {"default": 1})
        peft.save_pretrained(self.folder)
        self.numbers = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name)
        self.model = peft.unload()

    def load(self) -> None:
        from peft import PeftModel

        # Without the option PEFT first draws random factors; PEFT advises it for speed.
        self.peft = PeftModel.from_pretrained(self.model, self.folder, low_cpu_mem_usage=True, torch_device=self.device)

    def apply(self) -> None:
        self.peft.merge_adapter()

    def revert(self) -> None:
        self.peft.unmerge_adapter()

    def remove(self) -> None:
        self.model = self.peft.unload()

    def bytes_moved(self) -> dict[str, int]:
        """Bytes that each step moves: both fusing and unfusing read and write the whole weights."""
        factors = 4 * self.numbers
        writing = 2 * sum(weight.nbytes for weight in weights_of(self.model).values()) + factors
        return {"load": 2 * factors, "apply": writing, "revert": writing, "remove": 0}

    def check_applied(self) -> None:
        check_merged(self.peft, "default")

    def check_reverted(self) -> dict[str, Any]:
        """PEFT subtracts, so the base does not come back: the share of weights that differ is reported."""
        return {"lora_drift_after_one_cycle": share_of_changed(weights_of(self.peft))}


@pytest.fixture(scope="module", params=[SDXL_ATTENTION, LLAMA_7B_QUARTER], ids=["sdxl", "llama-7b"])
def steps_on(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """device -> both sides, checked, without an adapter. They are kept for all steps, since making them takes long."""

    @lru_cache(maxsize=1)
    def make(device: str) -> tuple[dict[str, Ours | Lora], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("steps")
        sides = {OURS: Ours(request.param, device, folder), LORA: Lora(request.param, device, folder)}
        facts = {
            "dtype": "bfloat16",
            "architecture": str(request.param),
            "weights": len(request.param.shapes),
            "nnz": request.param.nnz,
            "density": request.param.density,
            "rank": request.param.rank,
        }
        with torch.no_grad():
            for side in sides.values():
                facts |= check(side)
        return sides, facts

    yield make
    make.cache_clear()


def check(side: Ours | Lora) -> dict[str, Any]:
    """All four steps; raises AssertionError where the weights are not what they should be, and gives facts."""
    side.load()
    side.apply()
    side.check_applied()
    side.revert()
    found = side.check_reverted()
    side.remove()
    return found


@pytest.mark.parametrize("step", INVERSE)
@pytest.mark.parametrize(
    "place",
    [Place("cpu", available_threads()), pytest.param(Place("cuda"), marks=pytest.mark.gpu)],
    ids=str,
    indirect=True,
)
def test_step(compare: Callable[..., None], steps_on: Callable[..., Any], place: Place, step: str) -> None:
    states, facts = steps_on(place.device)
    assert states[OURS].adapter.nnz == states[LORA].numbers == facts["nnz"]
    # Rounds begin with the inverse of the step, so the first one starts where the step is done.
    done = {"load": ["load"], "apply": ["load", "apply"], "revert": ["load"], "remove": []}[step]
    with torch.no_grad():
        for name in done:
            do(name, states.values())
    compare(
        {
            name: Side(
                lambda _, state=state: do(step, [state]),
                state.bytes_moved()[step],
                torch.no_grad,
                before=lambda _, state=state: do(INVERSE[step], [state]),
            )
            for name, state in states.items()
        },
        ours=OURS,
        baselines=[LORA],
        slots=[None],
        check=lambda: None,  # done when the sides were made
        place=place,
        group=f"{step.capitalize()} an adapter (Table 5)",
        label=f"{place}, {facts['architecture']}",
        info={**facts, "cold": step in ("apply", "revert")},
    )
    with torch.no_grad():
        for name in reversed(done):
            do(INVERSE[name], states.values())


def do(step: str, sides: Iterable[Ours | Lora]) -> None:
    for side in sides:
        getattr(side, step)()
