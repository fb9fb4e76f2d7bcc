"""Arguments that no caller means: every kernel of an op refuses them, naming the argument, or takes them alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_matrix import BACKENDS, Backend

from shira_kernels import backends
from shira_kernels.ops import OPS

ROOT = Path(__file__).parents[2]
HUGE = 2**63 - 1
HERE = [backend for backend in BACKENDS if backend.device == "cpu" and not backend.missing()]
each_backend = pytest.mark.parametrize("backend", HERE, ids=lambda backend: backend.kernel)


def calls() -> dict[str, dict[str, Any]]:
    """Right arguments of every op."""
    x, row_ptr, col, values = (
        torch.ones(3, 4),
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.ones(2),
    )
    delta = {"row_ptr": row_ptr, "col": col, "values": values}
    adapters = {**delta, "row_ptr": row_ptr.view(1, 3), "token_adapter": torch.zeros(3, dtype=torch.int32)}
    lists = {"offsets": torch.tensor([0, 2]), "indices": torch.tensor([1, 3]), "values": torch.ones(2)}
    old = {"old_offsets": torch.tensor([0, 1]), "old_indices": torch.tensor([2]), "old_saved": torch.ones(1)}
    return {
        "add_sparse_delta_mm": {"out": torch.zeros(3, 2), "x": x, **delta},
        "add_sparse_delta_mm_batched": {"out": torch.zeros(3, 2), "x": x, **adapters},
        "decode_indices": {"code": torch.tensor([1, 1], dtype=torch.uint8), "nnz": 2, "numel": 9},
        "encode_indices": {"indices": torch.tensor([1, 3]), "numel": 9},
        "extract_changed": {"base": torch.zeros(4), "tuned": torch.ones(4)},
        "fuse_adapters": {"indices": [torch.tensor([1])], "values": [torch.ones(1)], "weights": torch.ones(1)},
        "masked_adamw": {
            **{name: lists[name] for name in ("offsets", "indices")},
            "weights": [torch.zeros(4)],
            "grads": [torch.ones(4)],
            **{name: torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")},
            "master": None,
            "step": torch.tensor(1.0),
            **{"lr": 0.1, "beta1": 0.9, "beta2": 0.9} | dict.fromkeys(("eps", "weight_decay"), 0.0),
        },
        "masked_grad": {"grad_output": torch.ones(3, 2), "x": x, "row_ptr": row_ptr, "col": col},
        "scatter_apply": {"weight": torch.zeros(4), "indices": torch.tensor([1, 3]), "values": torch.ones(2)},
        "scatter_apply_batched": {"weights": [torch.zeros(4)], **lists},
        "scatter_switch_batched": {"weights": [torch.zeros(4)], **old, **lists, "saved": torch.zeros(2)},
        "sparse_delta_mm": {"x": x, **delta, "out_features": 2},
        "sparse_delta_mm_batched": {"x": x, **adapters, "out_features": 2},
        "sparse_delta_mm_transposed": {"x": torch.ones(3, 2), **delta, "in_features": 4},
        "topk_indices": {"score": torch.arange(4.0), "k": 2},
    }


def call(op: str, backend: Backend, **changes: Any) -> Any:
    arguments = {**calls()[op], **changes}
    with backends.use(backend.name, isa=backend.isa):
        return getattr(torch.ops.shira, op)(**arguments)


def refused(op: str, backend: Backend, message: str, **changes: Any) -> None:
    if backends.reason_unavailable(op, backend.name):
        pytest.skip("no kernel for this op")
    with pytest.raises(RuntimeError, match=f"^shira::{op}: {message}"):
        call(op, backend, **changes)


def tensors_of(op: str) -> list[tuple[str, torch.Tensor]]:
    """The tensors among right arguments, those of lists with their place."""
    found = []
    for name, value in calls()[op].items():
        for i, tensor in enumerate(value) if isinstance(value, list) else [(-1, value)]:
            if isinstance(tensor, torch.Tensor):
                found.append((name if i < 0 else f"{name}[{i}]", tensor))
    return found


def with_tensor(op: str, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {name.split("[")[0]: [tensor] if "[" in name else tensor}


@each_backend
@pytest.mark.parametrize(
    ("op", "argument", "named", "number"),
    [
        ("sparse_delta_mm", "out_features", "row_ptr", HUGE),
        ("sparse_delta_mm", "out_features", "out_features", -1),
        ("sparse_delta_mm_batched", "out_features", "row_ptr", HUGE),
        ("sparse_delta_mm_batched", "out_features", "out_features", -(2**63)),
        ("sparse_delta_mm_transposed", "in_features", "in_features", HUGE),
        ("sparse_delta_mm_transposed", "in_features", "in_features", -1),
        ("topk_indices", "k", "k", HUGE),
        ("decode_indices", "nnz", "nnz", HUGE),
        ("decode_indices", "numel", "numel", HUGE),
        ("encode_indices", "numel", "numel", -1),
    ],
)
def test_numbers_out_of_range_are_named(backend: Backend, op: str, argument: str, named: str, number: int) -> None:
    refused(op, backend, f"{named} must", **{argument: number})


def test_one_more_than_the_largest_number_is_written_right() -> None:
    for backend in HERE:
        refused(
            "sparse_delta_mm",
            backend,
            re.escape(f"row_ptr must have one entry more than out_features ({2**63})"),
            out_features=HUGE,
        )


@each_backend
@pytest.mark.parametrize("step", [0.0, -1.0, 1.5, 2.0**63, 3e38, float("inf"), float("nan")])
def test_a_step_that_is_not_a_number_of_steps_is_named(backend: Backend, step: float) -> None:
    refused("masked_adamw", backend, "step must be ", step=torch.tensor(step))


KINDS = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_tensors_without_elements_at_their_places_are_named(op: str, kind: str) -> None:
    for name, tensor in tensors_of(op):
        if kind == "nested" and not tensor.dim():
            continue
        if kind == "meta" and len(tensors_of(op)) == 1:  # all are: it is a call without data
            continue
        for backend in HERE:
            if backend.name == "triton":
                continue
            with pytest.raises(RuntimeError, match=rf"^shira::{op}: [a-z_0-9\[\]]+ "):
                call(op, backend, **with_tensor(op, name, KINDS[kind](tensor)))


@pytest.mark.parametrize("op", OPS)
def test_memory_that_was_given_back_is_named(op: str) -> None:
    """As sharding libraries do it with weights that other devices hold."""
    for name, _ in tensors_of(op):
        for backend in HERE:
            if backend.name == "triton":
                continue
            for keep in (0, 1):
                gone = dict(tensors_of(op))[name]
                gone.untyped_storage().resize_(keep)
                with pytest.raises(
                    RuntimeError, match=rf"^shira::{op}: {re.escape(name)} must have its elements in memory"
                ):
                    call(op, backend, **with_tensor(op, name, gone))


@each_backend
@pytest.mark.parametrize("tokens", [(), (0,), (3,), (2, 0)])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 4), (2, 0)])
def test_matrices_without_entries(backend: Backend, tokens: tuple[int, ...], rows: int, columns: int) -> None:
    delta = {
        "row_ptr": torch.zeros(rows + 1, dtype=torch.int64),
        "col": torch.empty(0, dtype=torch.int32),
        "values": torch.empty(0),
    }
    x, grad_output = torch.ones(*tokens, columns), torch.ones(*tokens, rows)
    adapters = {**delta, "row_ptr": delta["row_ptr"].view(1, -1)}
    number = x.shape[:-1].numel()
    got = call("masked_grad", backend, x=x, grad_output=grad_output, row_ptr=delta["row_ptr"], col=delta["col"])
    assert got.shape == (0,)
    assert torch.equal(call("sparse_delta_mm", backend, x=x, **delta, out_features=rows), torch.zeros(*tokens, rows))
    for adapter in (-1, 0):
        of = torch.full((number,), adapter, dtype=torch.int32)
        got = call("sparse_delta_mm_batched", backend, x=x, **adapters, token_adapter=of, out_features=rows)
        assert torch.equal(got, torch.zeros(*tokens, rows))


@each_backend
@pytest.mark.parametrize("op", ["scatter_apply_batched", "scatter_switch_batched", "masked_adamw"])
def test_without_weights_the_lists_are_checked_all_the_same(backend: Backend, op: str) -> None:
    none = torch.empty(0)
    right = {"weights": [], "offsets": torch.tensor([0]), "indices": none.long()}
    if op == "masked_adamw":
        right |= {"grads": [], "exp_avg": none, "exp_avg_sq": none.clone()}
    else:
        right |= {"values": none, "saved": none.clone()}
    if op == "scatter_switch_batched":
        right |= {"old_offsets": torch.tensor([0]), "old_indices": none.long(), "old_saved": none}
    call(op, backend, **right)
    for name, value in right.items():
        if name not in ("weights", "offsets", "old_offsets", "grads"):
            refused(op, backend, f"{name} must", **{**right, name: torch.zeros(0, 1, dtype=value.dtype)})
            if "indices" not in name:
                refused(op, backend, f"{name} must", **{**right, name: torch.zeros(1, dtype=value.dtype)})
        if "indices" in name:
            refused(op, backend, f"{name} must be int32 or int64", **{**right, name: none})


@each_backend
def test_sizes_whose_product_no_number_holds(backend: Backend) -> None:
    """Without elements, which take no memory."""
    if backend.name == "triton":
        return
    long = torch.empty(2**62, 0)
    empty = {"col": torch.empty(0, dtype=torch.int32), "values": torch.empty(0)}
    got = call("sparse_delta_mm", backend, x=long, row_ptr=torch.zeros(1, dtype=torch.int64), **empty, out_features=0)
    assert got.shape == (2**62, 0)
    rows = torch.empty(0, 2**61 + 1, dtype=torch.int64)
    of = torch.empty(0, dtype=torch.int32)
    got = call(
        "sparse_delta_mm_batched",
        backend,
        x=torch.empty(0, 4),
        token_adapter=of,
        row_ptr=rows,
        **empty,
        out_features=2**61,
    )
    assert got.shape == (0, 2**61)
    pages = {"col": torch.empty(0, 2**61, dtype=torch.int32), "values": torch.empty(0, 2**61)}
    table = torch.zeros(1, 4, dtype=torch.int32)
    refused(
        "sparse_delta_mm_batched",
        backend,
        "row_ptr of adapter 0 must rise within",
        **pages,
        row_ptr=torch.full((1, 3), 2**62),
        page_table=table,
    )
    with pytest.raises(RuntimeError, match=r"memory|overflow"):
        call("topk_indices", backend, score=torch.zeros(1).expand(2**48))
    if backend.name == "cpu":
        refused("topk_indices", backend, "score must fit in memory", score=torch.zeros(1).expand(2**48))
        refused("sparse_delta_mm", backend, "x must fit in memory", x=torch.zeros(1, 4).expand(2**46, 4))


@each_backend
def test_lazily_negated_values_are_fused_as_what_they_are(backend: Backend) -> None:
    for policy in ("last", "sum"):
        got = call("fuse_adapters", backend, values=[torch._neg_view(torch.ones(1))], policy=policy)[1]
        assert torch.equal(got, -torch.ones(1))


@each_backend
def test_tensors_without_data_run_nothing(backend: Backend) -> None:
    before = backends.calls()
    assert call("topk_indices", backend, score=torch.empty(4, device="meta")).is_meta
    assert backends.calls() == before


@pytest.mark.skipif(backends.extension is None, reason="there is no kernel to compare with the reference")
def test_fuzz() -> None:
    """Cases of tools/fuzz_ops.py, which also `make sanitize` runs: many more, and watched by sanitizers."""
    command = [sys.executable, ROOT / "tools/fuzz_ops.py", "--seed", "1", "--cases", "1000"]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    accepted, refused_ones = map(int, re.findall(r"(\d+) (?:accepted|refused)", ran.stdout))
    assert accepted > 200
    assert refused_ones > 200


DAMAGED = """
import os, sys
sys.path.insert(0, "tools")
import fuzz_ops

class damaged(fuzz_ops.backends.use):
    def __exit__(self, *error):
        super().__exit__(*error)
        if case.seed > 9 and case.buffers and case.buffers[0].numel():
            {damage}

class Case(fuzz_ops.Case):
    def __init__(self, seed, op):
        global case
        case, self.seed = self, seed
        super().__init__(seed, op)

fuzz_ops.Case, fuzz_ops.backends.use = Case, damaged
sys.exit(fuzz_ops.main())
"""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("case.buffers[0].add_(1)", "something was written"),
        ("os.kill(os.getpid(), 11)", "the process ended with SIGSEGV"),
        ("os._exit(1)", "the process ended with exit code 1"),
    ],
)
def test_a_failure_names_its_case(damage: str, said: str) -> None:
    program = DAMAGED.format(damage=damage)
    command = [sys.executable, "-c", program, "--op", "topk_indices", "--cases", "40"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 1
    (number,) = re.findall(rf"case (\d+): .*{said}", ran.stdout)
    assert int(number) > 9
    assert f"tools/fuzz_ops.py --seed {number} --cases 1 --op topk_indices" in ran.stdout
