"""The kernels that are compiled with no GPU are those that run on one, and what their compilation costs is told."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from typing import Any

import pytest
from pretended import ROOT, environment, needs_triton, result_of

pytestmark = needs_triton
TRITON = ROOT / "shira_kernels/triton"

# All variants for sm_90, and which lines of the launchers ran.
RECORDED = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton_variants import variants
ran = {}
def see(frame, event, argument):
    folder, _, name = frame.f_code.co_filename.rpartition("/")
    if not folder.endswith("shira_kernels/triton"):
        return None
    ran.setdefault(name, set()).add(frame.f_lineno)
    return see
sys.settrace(see)
found = variants(GPUTarget("cuda", 90, 32))
sys.settrace(None)
lines = {name: sorted(numbers) for name, numbers in ran.items()}
print(json.dumps({"kernels": [variant.kernel.__name__ for variant in found], "ran": lines}))
"""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return result_of(RECORDED)


def parsed() -> dict[str, ast.Module]:
    return {path.name: ast.parse(path.read_text()) for path in sorted(TRITON.glob("*.py"))}


def is_kernel(function: ast.stmt) -> bool:
    return isinstance(function, ast.FunctionDef) and any(
        "triton.jit" in ast.unparse(d) for d in function.decorator_list
    )


def kernels() -> list[ast.FunctionDef]:
    return [node for tree in parsed().values() for node in tree.body if is_kernel(node)]


def test_every_kernel_that_is_launched_is_compiled(recorded: dict[str, Any]) -> None:
    called = {
        call.func.id
        for kernel in kernels()
        for call in ast.walk(kernel)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    launched = {kernel.name for kernel in kernels()} - called
    assert set(recorded["kernels"]) == launched


def test_the_calls_meet_every_line_of_the_functions_that_launch(recorded: dict[str, Any]) -> None:
    """Save errors, and what is for the interpreter."""
    names, missed, launching = {kernel.name for kernel in kernels()}, [], 0
    for file, tree in parsed().items():
        ran, left_out = set(recorded["ran"].get(file, [])), interpreted(tree)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not is_kernel(node)]
        for function in functions:
            if not any(isinstance(node, ast.Name) and node.id in names for node in ast.walk(function)):
                continue
            launching += 1
            for statement in (node for node in ast.walk(function) if isinstance(node, ast.stmt)):
                if (
                    isinstance(statement, (ast.FunctionDef, ast.Raise))
                    or _is_docstring(statement)
                    or statement in left_out
                ):
                    continue
                # A branch runs where its condition does, and a statement over several lines where one of them does.
                last = statement.body[0].lineno - 1 if hasattr(statement, "body") else statement.end_lineno
                if not ran & set(range(statement.lineno, max(last, statement.lineno) + 1)):
                    missed.append(f"{file}:{statement.lineno}: {ast.unparse(statement).splitlines()[0]}")
    assert launching > 5
    assert missed == []


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def interpreted(tree: ast.Module) -> list[ast.stmt]:
    """What stands under `if interprets()`, `if not x.is_cuda`, and in the else of `if x.is_cuda`."""
    found = []
    for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
        test = ast.unparse(branch.test)
        if test == "interprets()" or re.fullmatch(r"not \w+\.is_cuda", test):
            found += branch.body
        elif re.fullmatch(r"\w+\.is_cuda", test):
            found += branch.orelse
    return [node for statement in found for node in ast.walk(statement) if isinstance(node, ast.stmt)]


def test_types_and_alignment_are_those_of_the_call() -> None:
    code = """
import json, torch
from pretended_gpu import PretendedGpu
gpu = PretendedGpu()
weight = gpu.tensor(torch.zeros(64, 48, dtype=torch.bfloat16))
slices = gpu.tensor(torch.zeros(17, dtype=torch.int32)), gpu.tensor(torch.zeros(18, dtype=torch.bfloat16)[1:])
huge = gpu.tensor(torch.empty(2**31, dtype=torch.uint8))
one = gpu.tensor(torch.zeros(1, dtype=torch.int64)), gpu.tensor(torch.zeros(1, dtype=torch.uint8))
with gpu:
    torch.ops.shira.scatter_apply(weight, *slices, 0.5)
    torch.ops.shira.scatter_apply(huge, *one)
print(json.dumps([str(variant).split(", MODE")[0] for variant in gpu.variants]))
"""
    assert result_of(code) == [
        "scatter_apply_kernel(weight:*i16%16, indices:*i32%16, values:*i16, saved:*i16%16, nnz:i64, numel:i64, "
        "alpha_bits:i64",
        "scatter_apply_kernel(weight:*u8%16, indices:*i64%16, values:*u8%16, saved:*u8%16, nnz:i64, numel:i64, "
        "alpha_bits:i64",
    ]


def test_triton_is_asked_for_what_is_compiled() -> None:
    """Without the hook Triton goes on to its compiler: what that is given is the recorded variant."""
    code = """
import json, torch, triton
from unittest import mock
from pretended_gpu import PretendedGpu
from triton_variants import calls

class Asked(Exception):
    pass

def compile(source, target, options):
    raise Asked(source.hash(), str(target), options)

equal = []
for call in list(calls())[::40]:
    with mock.patch("triton.compile", compile):
        recording, running = PretendedGpu(), PretendedGpu()
        call.run(recording)
        if not recording.variants:
            continue
        first = recording.variants[0]
        try:
            first.compile()
        except Asked as asked:
            recorded = asked.args
    with mock.patch("triton.compiler.compile", compile), mock.patch.object(PretendedGpu, "hook", None):
        first.kernel.device_caches.clear()  # Triton keeps which compiler it calls
        try:
            call.run(running)
        except Asked as asked:
            equal.append(asked.args == recorded)
        first.kernel.device_caches.clear()
print(json.dumps(equal))
"""
    equal = result_of(code)
    assert len(equal) > 5
    assert all(equal)


def test_registers_spills_and_instructions_of_a_kernel() -> None:
    code = """
import json, subprocess, tempfile
from compile_gpu import TOOLS, compile_triton, instructions_of
from pretended_gpu import PretendedGpu
from triton_variants import masked_grad_calls, topk_calls
gpu = PretendedGpu()
next(topk_calls()).run(gpu)
small = gpu.variants[0]
file = tempfile.NamedTemporaryFile(suffix=".cubin")
file.write(small.compile().asm["cubin"])
file.flush()
listing = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True).stdout
gpu = PretendedGpu()
next(masked_grad_calls()).run(gpu)
large = gpu.variants[0]
few = large._replace(options={**large.options, "maxnreg": 64})
wrong = small._replace(signature={**small.signature, "numel": "*i64"})
made = [compile_triton(variant)._asdict() for variant in (small, few, wrong)]
print(json.dumps([made, instructions_of(open(file.name, "rb").read()), listing]))
"""
    (small, few, wrong), counted, listing = result_of(code)
    lines = [line for line in listing.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) and "NOP" not in line]
    assert counted == {small["kernel"]: len(lines)}
    assert small["instructions"] == len(lines) > 50
    assert 8 <= small["registers"] <= 255
    assert (small["spilled"], small["problem"]) == (0, "")
    assert few["spilled"] > 0
    assert few["problem"] == "spills"
    assert "Error" in wrong["problem"]


def test_the_tool_prints_a_line_for_each_kernel_and_fails_for_a_problem() -> None:
    command = [sys.executable, "tools/compile_gpu.py", "--no-cuda", "--targets", "gfx942", "--only", "transpose"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    versions, _, *lines = done.stdout.splitlines()
    assert re.match(r"torch 2\S+, triton 3\S+", versions)
    assert [line.split()[:3] for line in lines] == [["triton", "gfx942", "transpose_kernel"]]
    assert int(lines[0].split()[3]) >= 2  # the types of x
    code = """
import contextlib, io, json, sys
import compile_gpu
sys.argv = ["compile_gpu.py", "--no-cuda", "--targets", "sm_90", "--only", "transpose", "--json"]
problems = ["", "spills"]
compile_gpu.compile_triton = lambda variant: compile_gpu.Compiled("k", str(variant), 255, 8, 1, problem)
said = []
for problem in problems:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = compile_gpu.main()
    said.append([code, json.loads(out.getvalue()), error.getvalue()])
print(json.dumps(said))
"""
    (good, data, silent), (bad, _, told) = result_of(code)
    assert (good, "transpose" in silent, bad) == (0, False, 1)
    assert "triton sm_90: spills: transpose_kernel(" in told
    assert data["compiled"]["triton sm_90"][0]["registers"] == 255
