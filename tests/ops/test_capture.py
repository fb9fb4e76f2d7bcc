"""What a CUDA graph cannot capture is not done: waits for the GPU, copies from and to the host, other memory.

The Triton launchers are called on a GPU that is not there. The CUDA C++ kernels' host code is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from pretended import ROOT, needs_triton, result_of

from shira_kernels.ops import OPS

# Each call is made twice: only a call that was just made is promised to be capturable, since tables are made at first.
TWICE = """
import json
import torch
from pretended_gpu import PretendedGpu
from triton_variants import calls

waits = {}
for call in calls():
    gpu = PretendedGpu()
    arguments = call.make(gpu)
    with gpu, torch.no_grad():
        operator = getattr(torch.ops.shira, call.op)
        operator(*arguments)
        gpu.waits.clear()
        gpu.capturing = True
        operator(*arguments)
    waits.setdefault(call.op, []).append(gpu.waits)
print(json.dumps(waits))
"""
# Ops that read a number back at each call, and which.
READ_BACK = {"extract_changed": "the size of its result", "fuse_adapters": "the size of the union"}
ON_GPU = sorted(set(OPS) - {"decode_indices", "encode_indices"})


@pytest.fixture(scope="module")
def waits() -> dict[str, list[list[str]]]:
    return result_of(TWICE)


@needs_triton
@pytest.mark.parametrize("op", ON_GPU)
def test_a_second_call_waits_for_nothing(op: str, waits: dict[str, list[list[str]]]) -> None:
    most = max(waits[op], key=len)
    assert len(most) == (op in READ_BACK), f"{op} waits: {most}"


@needs_triton
def test_waits_are_seen() -> None:
    """All that a launcher could do to wait, on a GPU that is not there."""
    code = """
import json
import torch
from pretended_gpu import DEVICE, PretendedGpu
gpu = PretendedGpu()
with gpu:
    there = gpu.tensor(torch.arange(6))
    mask = there > 2
    here = torch.arange(6)
    seen = {}
    for name, do in {
        "int": lambda: int(there[1]), "float": lambda: float(there[1]), "bool": lambda: bool(there[1]),
        "item": lambda: there.max().item(),
        "tolist": lambda: there.tolist(), "cpu": lambda: there.cpu(), "to": lambda: here.to(DEVICE),
        "to device": lambda: here.to(there.device), "tensor": lambda: torch.tensor([1, 2], device=DEVICE),
        "copy_ there": lambda: there.copy_(here), "copy_ here": lambda: here.copy_(there),
        "setitem": lambda: there.__setitem__(slice(None), here), "mask": lambda: there[mask],
        "nonzero": lambda: mask.nonzero(), "unique": lambda: there.unique(), "where": lambda: torch.where(mask),
        "masked_select": lambda: there.masked_select(mask), "equal": lambda: torch.equal(there, there + 0),
        "repeat": lambda: there.repeat_interleave(there), "index_put": lambda: there.index_put_((mask,), there[0]),
        "synchronize": lambda: torch.cuda.synchronize(), "stream": lambda: torch.cuda.current_stream().synchronize(),
        "pin": lambda: there.is_pinned(),
        "-sum": lambda: there.sum(), "-sort": lambda: there.sort(stable=True), "-slice": lambda: there[1:3] + 1,
        "-gather": lambda: there[gpu.tensor(torch.tensor([1, 0]))], "-zeros": lambda: torch.zeros(3, device=DEVICE),
        "-full": lambda: torch.full((2,), 7, device=DEVICE), "-arange": lambda: torch.arange(3, device=DEVICE),
        "-fill": lambda: there.__setitem__(0, 5), "-copy": lambda: there.copy_(there + 1),
        "-cast": lambda: there.to(torch.int32), "-view": lambda: there.view(2, 3).t().contiguous(),
        "-matmul": lambda: there.view(2, 3).float() @ there.view(3, 2).float(),
    }.items():
        gpu.waits.clear()
        do()
        seen[name] = len(gpu.waits)
print(json.dumps(seen))
"""
    seen = result_of(code)
    assert [name for name, count in seen.items() if (count == 0) != name.startswith("-")] == []


# Host calls that wait, or take memory that PyTorch does not hand out.
FORBIDDEN = re.compile(r"\bcuda(Memcpy|Malloc|Free|Host|\w*Synchronize|StreamWait|EventQuery|StreamQuery)\w*")


def functions(text: str) -> Iterator[tuple[str, str]]:
    """(name, code) of each function of a file. clang-format begins them at the left margin, and ends them there."""
    piece: list[str] = []
    for line in text.splitlines():
        if not piece and not re.match(r"(?!template|namespace|struct|class|using)\w.*", line):
            continue
        piece.append(line)
        if line == "}" or (line.endswith("}") and not line.startswith(" ")):
            code = "\n".join(piece)
            names = [name for name in re.findall(r"(\w+)\(", code.split("{")[0]) if not name.startswith("__")]
            if names:
                yield names[0], code
        if line.endswith((";", "}")) and (len(piece) == 1 or not line.startswith(" ")):
            piece = []


def guarded(code: str) -> str:
    """What is left of a function outside checked mode: without what `if (checks_contents())` is for."""
    return re.sub(r"if \(checks_contents\(\)\) (\{.*?^  \}|[^{;]*;)", "", code, flags=re.M | re.S)


def test_cuda_host_code_waits_in_checked_mode_alone() -> None:
    """The names of FORBIDDEN stand in check_... functions alone, and those are called in checked mode alone."""
    known: list[tuple[str, str]] = []
    for path in sorted((ROOT / "csrc/cuda").iterdir()):
        text = path.read_text()
        found = list(functions(text))
        inside = sum(len(FORBIDDEN.findall(code)) for _, code in found)
        assert inside == len(FORBIDDEN.findall(text)), f"{path.name}: outside a function"
        known += found
    waiting = {name for name, code in known if FORBIDDEN.search(code)}
    assert waiting
    assert all(name.startswith("check_") for name in waiting), waiting
    while True:  # and what calls those without asking whether checked mode is on
        called = re.compile(rf"\b({'|'.join(sorted(waiting))})\(")
        more = {name for name, code in known if called.search(guarded(code).split("{", 1)[-1])}
        if more <= waiting:
            break
        waiting |= more
    assert all(name.startswith("check_") for name in waiting), waiting
