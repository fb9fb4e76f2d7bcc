"""What runs on the host before a Triton kernel: checks and tables in C++, and the search for the compiled kernel."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import test_masked_adamw as adamw
import test_scatter_apply_batched as batched
import test_scatter_switch_batched as switch
import torch
from backend_matrix import Backend
from oracle import bits, sorted_indices
from processes import python

from shira_kernels import backends
from shira_kernels.ops import OPS

needs_extension = pytest.mark.skipif(backends.extension is None, reason="C++ extension not built")
needs_interpreter = pytest.mark.skipif(bool(Backend("triton").missing()), reason=Backend("triton").missing() or "-")
TESTS: dict[str, ModuleType] = {module.OP: module for module in (batched, switch, adamw)}


def good_arguments(op: str) -> dict[str, Any]:
    if op == adamw.OP:
        return adamw.small()
    if op == switch.OP:
        return switch.good_arguments()
    return {
        "weights": [torch.zeros(6), torch.zeros(6)],
        "offsets": torch.tensor([0, 2, 3]),
        "indices": torch.tensor([1, 5, 0]),
        "values": torch.tensor([1.0, 2.0, 3.0]),
        "saved": torch.zeros(3),
    }


def written_by(op: str, arguments: dict[str, Any]) -> list[torch.Tensor]:
    names = {"masked_adamw": ("exp_avg", "exp_avg_sq", "master")}.get(op, ("saved",))
    return [*arguments["weights"], *(arguments[name] for name in names)]


def host_op(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.shira_host, op)  # type: ignore[no-any-return]


def bad_cases() -> list[Any]:
    bad = [(op, module.bad_inputs("cpu"), module.NEEDS_CONTENTS) for op, module in TESTS.items()]
    return [pytest.param(op, *case, id=f"{op}-{name}") for op, cases, skipped in bad
            for name, case in cases.items() if name not in skipped]  # fmt: skip


@needs_extension
@pytest.mark.parametrize(("op", "changes", "message"), bad_cases())
def test_the_host_op_refuses_what_the_op_refuses_in_the_same_words(op: str, changes: dict, message: str) -> None:
    arguments = {**good_arguments(op), **changes}
    before = [tensor._version for tensor in written_by(op, arguments)]
    with pytest.raises(RuntimeError, match=f"(?s)^shira::{op}.*{message}") as in_cpp:
        host_op(op)(**arguments)
    assert [tensor._version for tensor in written_by(op, arguments)] == before
    with pytest.raises(RuntimeError) as in_python:
        OPS[op].check(**arguments)
    first = str(in_cpp.value).split("\n", 1)[0]
    numbers = {"lr", "eps", "weight_decay", "beta1", "beta2", "step"} & set(changes)
    assert numbers or first == str(in_python.value), "C++ and Python write some numbers differently, nothing else"


@needs_extension
def test_a_sparse_weight_is_refused() -> None:
    arguments = {**good_arguments(batched.OP), "weights": [torch.zeros(6), torch.eye(3).to_sparse()]}
    for call in (OPS[batched.OP].check, host_op(batched.OP)):
        with pytest.raises(RuntimeError, match=r"weights\[1\] must be a strided tensor"):
            call(**arguments)


@needs_extension
@pytest.mark.parametrize("op", TESTS)
def test_the_host_op_tells_autograd(op: str) -> None:
    arguments = good_arguments(op)
    versions = [tensor._version for tensor in written_by(op, arguments)]
    contents = [bits(tensor) for tensor in written_by(op, arguments)]
    host_op(op)(**arguments)
    assert [tensor._version for tensor in written_by(op, arguments)] == [version + 1 for version in versions]
    assert all(torch.equal(bits(a), b) for a, b in zip(written_by(op, arguments), contents, strict=True))
    for leaf in (torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True) * 1):
        arguments = good_arguments(op)
        arguments["weights"][1] = leaf
        history = leaf.grad_fn
        with pytest.raises(RuntimeError, match=r"weights\[1\] requires grad"):
            host_op(op)(**arguments)
        assert leaf.grad_fn is history
        with torch.no_grad():
            host_op(op)(**arguments)
        assert leaf.grad_fn is history
    with torch.inference_mode():
        arguments = good_arguments(op)
        host_op(op)(**arguments)
    with pytest.raises(RuntimeError, match="must not be an inference tensor outside"):
        host_op(op)(**arguments)
    with pytest.raises(RuntimeError, match=f"shira::{op}: tensors must not be lazily negated"):
        host_op(op)(**{**good_arguments(op), "weights": [torch._neg_view(torch.zeros(6)), torch.zeros(6)]})


@needs_extension
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("op", TESTS)
def test_tables(op: str, count: int) -> None:
    """Of odd and even numbers of weights; those of Python are the same."""
    from shira_kernels.triton import masked_adamw, scatter_apply_batched

    weights = [torch.zeros(i + 2, 5) for i in range(count)]
    offsets, old_offsets = torch.arange(count + 1), torch.arange(0, 2 * count + 1, 2)
    indices, old_indices = torch.zeros(count, dtype=torch.int32), torch.tensor([0, 1] * count)
    values, old_values = torch.zeros(count), torch.zeros(2 * count)
    rows = [[weight.data_ptr() for weight in weights], [weight.numel() for weight in weights]]
    if op == adamw.OP:
        grads = [torch.zeros_like(weights[0]), *(torch.zeros(1) for _ in weights[1:])]
        state = torch.zeros(count), torch.zeros(count), None, torch.tensor(1.0)
        made = host_op(op)(weights, offsets, indices, grads, *state, *adamw.NUMBERS.values())
        rows += [[grad.data_ptr() for grad in grads], [-1, *[1] * (count - 1)]]
        by_python, cuts = masked_adamw.table_of(weights, offsets, grads), [offsets]
    elif op == batched.OP:
        made = host_op(op)(weights, offsets, indices, values)
        by_python, cuts = scatter_apply_batched.table_of(weights, offsets), [offsets]
    else:
        old = old_offsets, old_indices, old_values
        made = host_op(op)(weights, *old, offsets, indices, values, values.clone())
        by_python, cuts = scatter_apply_batched.table_of(weights, offsets, old_offsets), [offsets, old_offsets]
    assert torch.equal(made, by_python)
    assert made[: len(rows) * count].tolist() == list(itertools.chain(*rows))
    at = len(rows) * count
    for cut in cuts:
        at += at % 2
        assert made[at : at + count + 1].tolist() == cut.tolist()
        at += count + 1
    assert len(made) == at


@needs_interpreter
@pytest.mark.parametrize("op", TESTS)
def test_triton_without_the_extension(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks are then Python's: the same results, versions and refusals."""
    here, without = good_arguments(op), good_arguments(op)
    backends.kernel(op, "triton")(**here)
    monkeypatch.setattr(backends, "extension", None)
    kernel = backends.kernel(op, "triton")
    versions = [tensor._version for tensor in written_by(op, without)]
    kernel(**without)
    for a, b in zip(written_by(op, here), written_by(op, without), strict=True):
        assert torch.equal(bits(a), bits(b))
    assert [tensor._version for tensor in written_by(op, without)] == [version + 1 for version in versions]
    without["weights"][1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"weights\[1\] requires grad"):
        kernel(**without)


@needs_interpreter
@pytest.mark.parametrize("op", TESTS)
def test_a_table_is_kept_until_a_weight_moves(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shira_kernels.triton import _batch

    monkeypatch.setattr(backends, "_triton_reads_contents", lambda: False)
    kernel, arguments = backends.kernel(op, "triton"), good_arguments(op)
    kernel(**arguments)
    made = _batch._kept.cache_info().misses
    kernel(**arguments)
    assert _batch._kept.cache_info().misses == made
    old = arguments["weights"][0]
    arguments["weights"][0] = old.clone()
    at = bits(old)
    arguments["weights"][0].fill_(9)
    kernel(**arguments)
    assert _batch._kept.cache_info().misses == made + 1
    assert torch.equal(bits(old), at), "the old place is left alone"
    assert not bool((arguments["weights"][0] == 9).all())
    arguments["offsets"] = torch.tensor([0, 1, 3])
    if op != adamw.OP:  # its compact gradient has one entry
        kernel(**arguments)
        assert _batch._kept.cache_info().misses == made + 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_is_asked_once_for_each_kind_of_call() -> None:
    from shira_kernels.triton._launch import launch

    asked: list[tuple] = []
    ran: list[tuple] = []

    class Kernel:
        def __init__(self, backend: str) -> None:
            self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def run(*arguments: Any, enable_fp_fusion: bool) -> Kernel:
                asked.append((grid, arguments, enable_fp_fusion))
                return Compiled(self.metadata)

            return run

    class Compiled:
        def __init__(self, metadata: Any) -> None:
            self.metadata = metadata

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: ran.append((grid, arguments))

    kernel, buffer = Kernel("cuda"), torch.zeros(64)
    launch(kernel, 3, (buffer, buffer), (7, 2**40), (True, 512))
    assert asked == [((3,), (buffer, buffer, 7, 2**40, True, 512), False)]
    launch(kernel, 4, (buffer, buffer), (8, 1), (True, 512))
    assert len(asked) == 1
    assert ran == [((4, 1, 1), (buffer, buffer, 8, 1, True, 512))]
    for other in (
        ((buffer[1:], buffer), (False, 512)),  # not aligned
        ((buffer, buffer[1:]), (False, 512)),
        ((buffer, buffer.int()), (False, 512)),
        ((buffer, buffer), (False, 512)),
    ):
        number = len(asked)
        launch(kernel, 3, other[0], (7, 7), other[1])
        launch(kernel, 3, other[0], (7, 7), other[1])
        assert len(asked) == number + 1
    amd, number = Kernel("hip"), len(asked)
    launch(amd, 3, (buffer,), (), ())
    launch(amd, 3, (buffer,), (), ())
    assert len(asked) == number + 2, "there the sizes of tensors count too"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", ["scatter_apply", *TESTS])
def test_no_number_is_specialised(op: str) -> None:
    """What `launch` relies on."""
    code = f"""
from triton import language as tl
from shira_kernels.triton import {op} as module
for parameter in module.{op}_kernel.params:
    if not parameter.is_constexpr and parameter.annotation_type:
        assert parameter.do_not_specialize, parameter.name
        print(parameter.name, parameter.annotation_type)
    elif not parameter.is_constexpr:
        print(parameter.name, "tensor")
"""
    lines = python(code).stdout.split("\n")
    kinds = dict(line.split() for line in lines if line)
    assert {"i32", "i64", "tensor"} >= set(kinds.values())
    assert kinds["nnz"] == "i64"
    assert kinds["indices"] == "tensor"


def lists_for_windows() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Old and new indices of one weight of 9000 elements, more than a program's."""
    some, other = sorted_indices(9000, 1300, torch.int32, 1), sorted_indices(9000, 1400, torch.int32, 2)
    return {
        "any": (some, other),
        "the same": (some, some.clone()),
        "shifted by one": (some, some + 1 if int(some[-1]) < 8999 else some - 1),
        "new before old": (torch.arange(5000, 6500, dtype=torch.int32), torch.arange(0, 1500, dtype=torch.int32)),
        "new after old": (torch.arange(0, 1500, dtype=torch.int32), torch.arange(5000, 6500, dtype=torch.int32)),
        "dense in sparse": (some, torch.arange(1000, 4000, dtype=torch.int32)),
        "one old": (some[700:701], other),
        "ends": (torch.tensor([0, 8999], dtype=torch.int32), torch.arange(9000, dtype=torch.int32)),
        "no old": (some[:0], other),
        "no new": (some, other[:0]),
    }


@needs_interpreter
@pytest.mark.parametrize("lists", lists_for_windows())
@pytest.mark.parametrize("weights", [1, 2])
def test_programs_of_one_weight_and_of_two(lists: str, weights: int) -> None:
    """More entries of a weight than one program has: it searches once, and in a window of the other list."""
    old, new = lists_for_windows()[lists]
    cuts = [torch.arange(weights + 1) * len(part) for part in (old, new)]
    parts = [part.repeat(weights) for part in (old, new)]
    values = [torch.arange(1, len(part) + 1).float() + place for place, part in zip((1000, 20_000), parts, strict=True)]
    before = [torch.arange(9000).float() + 0.5 for _ in range(weights)]
    switch.check_case(
        Backend("triton"), before, (cuts[0], parts[0], values[0]), (cuts[1], parts[1], values[1]), 0.5, False
    )


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_step_by_the_host_and_by_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; under the interpreter the kernel reads the step only if it is made to."""
    from shira_kernels.triton import masked_adamw

    for step, beta1, beta2 in ((1.0, 0.9, 0.999), (3.0, 0.0, 0.99999), (1000.0, 0.5, 0.0), (2.0**24, 0.3, 0.9999999)):
        numbers = {**adamw.NUMBERS, "beta1": beta1, "beta2": beta2}
        results = []
        for on_device in (False, True):
            monkeypatch.setattr(masked_adamw, "stays_on_device", lambda _, there=on_device: there)
            tensors = adamw.model(dtype=dtype, step=step)
            with Backend("triton").running():
                adamw.run(tensors, numbers)
            results.append(tensors)
        for a, b in zip(
            *(written_by(adamw.OP, {**tensors, "master": tensors["exp_avg"]}) for tensors in results), strict=True
        ):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numbers_are_rounded_as_the_reference_rounds_them() -> None:
    from shira_kernels.triton.masked_adamw import numbers_of

    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 77, 2**24):
        lr, beta1, beta2, decay = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        exact = [1 - lr * decay, 1 - beta1, beta2, 1 - beta2, 1e-8]
        for dtype, ints in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
            made = numbers_of(dtype, step, lr, beta1, beta2, 1e-8, decay)
            assert made[:5] == tuple(torch.tensor(exact, dtype=torch.float64).to(dtype).view(ints).tolist())
    huge = numbers_of(torch.float32, 1, 1e300, 0.9, 0.999, 1e-8, 0.0)
    assert huge[6] == int(torch.tensor(float("-inf")).view(torch.int32)), "beyond float32 it is infinite, as in C"
