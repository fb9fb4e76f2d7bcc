"""CUDA C++ without a GPU: kernels and their host code, compiled by g++, run on CPU tensors (tests/ops/cuda_on_host)."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_masked_adamw
import test_scatter_apply
import test_scatter_apply_batched
import test_scatter_switch_batched
import torch
from cuda_on_host.extension import OnHost, extension, reason_missing
from oracle import bits, sorted_indices

from shira_kernels import backends
from shira_kernels.ops import OPS

pytestmark = pytest.mark.skipif(bool(reason_missing()), reason=reason_missing())

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OFFSETS = ("offsets", "old_offsets")
# Where offsets are: both on the CPU, both on the device, each of them.
PLACES = [pytest.param(OnHost(*names, "step"), id="+".join(names) or "none") for names in (OFFSETS, (), *zip(OFFSETS))]
each_place = pytest.mark.parametrize("place", PLACES)
each_place_of_one_list = pytest.mark.parametrize("place", PLACES[:2])


def test_every_op_of_the_cuda_folder_is_registered() -> None:
    files = {path.stem for path in Path(__file__).parents[2].glob("csrc/cuda/*.cu")} - {"launch"}
    assert set(extension().ops) == files
    assert files <= set(OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_apply_entries(dtype: torch.dtype) -> None:
    for index_dtype, mode in itertools.product((torch.int32, torch.int64), test_scatter_apply.MODES):
        test_scatter_apply.test_entries(OnHost(), dtype, index_dtype, *mode)


def test_scatter_apply_copies_bits() -> None:
    for dtype in (torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.complex64):
        test_scatter_apply.test_replace_copies_bits_of_any_dtype(OnHost(), dtype)
    for shape, nnz in ((), 0), ((), 1), ((0,), 0), ((5,), 5), ((70, 70), 0):
        test_scatter_apply.test_shapes(OnHost(), shape, nnz)


@each_place_of_one_list
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_apply_batched_entries(place: OnHost, dtype: torch.dtype) -> None:
    for mode in ((1.0, False), (0.3, False), (-0.4, True)):
        test_scatter_apply_batched.test_equals_one_call_for_each_weight(place, dtype, *mode)


@each_place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_switch_batched_entries(place: OnHost, dtype: torch.dtype) -> None:
    for mode in test_scatter_switch_batched.MODES:
        test_scatter_switch_batched.test_equals_two_calls(place, dtype, *mode)


def test_scatter_switch_batched_copies_bits() -> None:
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.complex64):
        test_scatter_switch_batched.test_replace_copies_bits_of_any_dtype(OnHost(*OFFSETS), dtype)


def lists_of(
    sizes: list[int], counts: list[int], index_dtype: torch.dtype, seed: int, dtype: torch.dtype = torch.float32
) -> test_scatter_switch_batched.List:
    """Offsets, indices and values."""
    parts = [
        sorted_indices(size, n, index_dtype, seed + i) for i, (size, n) in enumerate(zip(sizes, counts, strict=True))
    ]
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    values = torch.arange(seed, seed + int(offsets[-1])).to(dtype)
    return offsets, torch.cat(parts), values


@each_place
@pytest.mark.parametrize(
    ("sizes", "old_counts", "counts"),
    [
        ([5000], [2000], [3100]),  # several blocks, windows in shared memory
        ([9000], [9000], [1500]),  # a window as large as shared memory holds of int32, not of int64
        ([300, 2500, 7, 2500, 2000], [100, 1200, 7, 0, 400], [200, 1300, 0, 1200, 400]),  # blocks in several parts
        ([40] * 50, [20] * 50, [30] * 50),  # blocks in many parts
        ([10, 3000, 10], [0, 3000, 0], [10, 0, 10]),  # parts that only one list has
        ([3000, 10], [0, 0], [2000, 5]),  # one list empty
        ([3000, 10], [2000, 5], [0, 0]),
    ],
    ids=str,
)
def test_windows(place: OnHost, sizes: list[int], old_counts: list[int], counts: list[int]) -> None:
    before = [torch.arange(size).to(torch.int32) for size in sizes]
    index_dtypes = itertools.product((torch.int32, torch.int64), repeat=2) if len(sizes) == 1 else [(torch.int32,) * 2]
    for old_dtype, new_dtype in index_dtypes:
        old = lists_of(sizes, old_counts, old_dtype, 1000, torch.int32)
        new = lists_of(sizes, counts, new_dtype, 2000, torch.int32)
        for _ in range(2):  # blocks and threads take turns in another order
            test_scatter_switch_batched.check_case(place, before, old, new)


@pytest.mark.parametrize(("old_count", "count"), [(66_000, 1100), (300, 66_000)])
def test_windows_beyond_shared_memory_and_three_rounds_for_their_ends(old_count: int, count: int) -> None:
    old = lists_of([70_000], [old_count], torch.int32, 1000, torch.int32)
    new = lists_of([70_000], [count], torch.int32, 2000, torch.int32)
    test_scatter_switch_batched.check_case(OnHost(*OFFSETS), [torch.arange(70_000).to(torch.int32)], old, new)


def test_equal_lists_and_neighbours() -> None:
    before = [torch.arange(5000.0)]
    offsets, values = torch.tensor([0, 2048]), torch.arange(2048.0)
    runs = torch.arange(2048), torch.arange(2048) + 1, torch.arange(2048) + 2048, torch.arange(2048) * 2
    for old, new in itertools.product(runs, repeat=2):
        test_scatter_switch_batched.check_case(
            OnHost(*OFFSETS), before, (offsets, old, -values), (offsets, new, values)
        )


def test_switch_of_nothing() -> None:
    test = OnHost(*OFFSETS)
    none = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    launches = extension().counts.launches
    with test.running():
        torch.ops.shira.scatter_switch_batched(
            [torch.ones(3)], torch.tensor([0, 0]), *none, torch.tensor([0, 0]), *none, torch.zeros(0)
        )
    with test.running(times=0):
        zero = torch.tensor([0])
        torch.ops.shira.scatter_switch_batched([], zero, *none, zero, *none, torch.zeros(0))
    assert extension().counts.launches == launches


@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@pytest.mark.parametrize("on_host", [("offsets", "step"), ("offsets",), ("step",), ()], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_adamw_entries(dtype: torch.dtype, on_host: tuple[str, ...], master: bool) -> None:
    for index_dtype, grad_dtype in itertools.product((torch.int32, torch.int64), {dtype, torch.float32}):
        for step in (1.0, 12_345.0):
            test_masked_adamw.check_case(
                OnHost(*on_host), dtype=dtype, index_dtype=index_dtype, grad_dtype=grad_dtype, master=master, step=step
            )


@pytest.mark.parametrize("on_host", [("offsets", "step"), ("offsets",)], ids="+".join)
def test_masked_adamw_numbers(on_host: tuple[str, ...]) -> None:
    for changes in ({"beta1": 0.0, "beta2": 0.0}, {"beta1": 0.3, "beta2": 0.99999}, {"lr": 0.0}):
        test_masked_adamw.test_numbers(OnHost(*on_host), changes)


@each_place
@pytest.mark.parametrize("weights", [1, 2, 32, 33, 256, 257, 2500])
def test_instances_for_numbers_of_weights(place: OnHost, weights: int) -> None:
    """All of them, and more weights than one launch holds."""
    sizes = [4 + i % 3 for i in range(weights)]
    before = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    old = lists_of(sizes, [i % 4 for i in range(weights)], torch.int32, 1)
    new = lists_of(sizes, [(i + 1) % 4 for i in range(weights)], torch.int32, 2)
    counts = extension().counts
    test_scatter_switch_batched.check_case(place, before, old, new)
    switched = extension().counts
    assert switched.launches - counts.launches == -(-weights // 1015)
    assert (switched.argument_bytes - counts.argument_bytes) / (switched.launches - counts.launches) <= (
        1400 if weights <= 32 else 8600 if weights <= 256 else 32764
    )

    applied, expected, saved = [w.clone() for w in before], [w.clone() for w in before], torch.empty_like(new[2])
    with backends.use("reference"):
        torch.ops.shira.scatter_apply_batched(expected, *new)
    with place.running():
        torch.ops.shira.scatter_apply_batched(applied, *new, saved=saved)
    assert all(torch.equal(a, b) for a, b in zip(applied, expected, strict=True))
    with place.running():
        torch.ops.shira.scatter_apply_batched(applied, new[0], new[1], saved)
    assert all(torch.equal(a, b) for a, b in zip(applied, before, strict=True))

    borders = new[0].tolist()
    grads = [torch.ones_like(w) if i % 2 else torch.ones(borders[i + 1] - borders[i]) for i, w in enumerate(before)]
    moments = [torch.zeros_like(new[2]) for _ in range(4)]
    rest = torch.tensor(1.0), *test_masked_adamw.NUMBERS.values()
    expected = [w.clone() for w in before]
    with backends.use("reference"):
        torch.ops.shira.masked_adamw(expected, *new[:2], grads, *moments[:2], None, *rest)
    with place.running():
        torch.ops.shira.masked_adamw(applied, *new[:2], grads, *moments[2:], None, *rest)
    assert all(torch.equal(a, b) for a, b in zip(applied, expected, strict=True))
    assert torch.equal(torch.stack(moments[:2]), torch.stack(moments[2:]))


@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument_and_writes_nothing(call: str) -> None:
    place = OnHost(*OFFSETS, "step")
    for module in (test_masked_adamw, test_scatter_apply_batched, test_scatter_switch_batched):
        for case in set(module.bad_inputs("cpu")) - set(module.NEEDS_CONTENTS):
            module.test_bad_input_names_the_argument_and_writes_nothing(place, case, call)


@each_place
def test_checked_mode_refuses_wrong_contents(place: OnHost) -> None:
    arguments = test_scatter_switch_batched.good_arguments()
    written = [*arguments["weights"], arguments["saved"]]
    before = [bits(tensor) for tensor in written]
    for name, wrong in itertools.product(
        ("old_indices", "indices"), ([0, 6], [-1, 0], [2, 2], [3, 1], [2**31 - 1, 2**31])
    ):
        values = {"old_indices": "old_saved", "indices": "values"}[name]
        offsets = {"old_indices": "old_offsets", "indices": "offsets"}[name]
        changes = {name: torch.tensor(wrong), offsets: torch.tensor([0, 2, 2]), values: torch.ones(2)}
        if name == "indices":
            changes["saved"] = torch.zeros(2)
        with backends.checked(), pytest.raises(RuntimeError, match=f": {name} must be sorted"), place.running(times=0):
            torch.ops.shira.scatter_switch_batched(**{**arguments, **changes})
    for name in OFFSETS:
        changes = {name: torch.tensor([0, 3, 2])}
        with backends.checked(), pytest.raises(RuntimeError, match=f": {name} must rise"), place.running(times=0):
            torch.ops.shira.scatter_switch_batched(**{**arguments, **changes})
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(written, before, strict=True))
    with backends.checked(), place.running():
        torch.ops.shira.scatter_switch_batched(**arguments)
    with backends.checked(), pytest.raises(RuntimeError, match="step must be a whole number"), place.running(times=0):
        torch.ops.shira.masked_adamw(**{**test_masked_adamw.small(), "step": torch.tensor(1.5)})


def test_checked_mode_finds_a_wrong_index_at_borders_of_blocks_and_parts() -> None:
    offsets, values = torch.tensor([0, 1000, 1000, 1700]), torch.zeros(1700)
    good = torch.cat([torch.arange(1000), torch.arange(700)])
    weights = [torch.zeros(1000), torch.zeros(3), torch.zeros(700)]
    with backends.checked(), OnHost("offsets").running():
        torch.ops.shira.scatter_apply_batched(weights, offsets, good, values)
    for place, at in itertools.product((OnHost("offsets"), OnHost()), (1, 255, 256, 999, 1001, 1024, 1699)):
        bad = good.clone()
        bad[at] = bad[at - 1]
        with backends.checked(), pytest.raises(RuntimeError, match="indices must"), place.running(times=0):
            torch.ops.shira.scatter_apply_batched(weights, offsets, bad, values)


class Guarded:
    """Tensors at the end (or at the beginning) of memory that ends the process where it is left."""

    def __init__(self, at_the_end: bool) -> None:
        self.at_the_end, self.maps = at_the_end, []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + page + inner):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        begin = page + (inner - size if self.at_the_end else 0)
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
        self.maps.append(memory)
        return copy.copy_(tensor)


def wrong_lists_leave_nothing() -> None:
    """Calls that a GPU takes unchecked, with lists that are wrong in every way, between guards."""
    generator = torch.Generator().manual_seed(0)

    def indices(count: int, dtype: torch.dtype, size: int) -> torch.Tensor:
        numbers = torch.randint(-3, size + 3, (count,), generator=generator)
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            numbers = numbers.sort().values
        extremes = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max, -1, size, size - 1, 0])
        if kind > 1 and count:
            numbers[torch.randint(count, (kind * 5,), generator=generator)] = extremes.repeat(3)[: kind * 5]
        return numbers.to(dtype)

    cuts = [0, 0, -5, 700, 1300, 2100, 2**40, -(2**40), 2**63 - 1, -(2**63)]
    for round_ in range(30):
        guarded = Guarded(bool(round_ % 2))
        dtypes = [(torch.int32, torch.int64)[int(torch.randint(2, (), generator=generator))] for _ in range(2)]
        sizes, nnz = [500, 3000, 1], [2100, 1300]
        weights = [guarded(torch.ones(size)) for size in sizes]
        lists = [guarded(indices(count, dtype, 3000)) for count, dtype in zip(nnz, dtypes, strict=True)]
        offsets = [
            guarded(torch.tensor([cuts[int(i)] for i in torch.randint(len(cuts), (4,), generator=generator)]))
            for _ in range(2)
        ]
        values = [guarded(torch.ones(count)) for count in nnz]
        saved, moments = guarded(torch.ones(nnz[1])), [guarded(torch.ones(nnz[1])) for _ in range(3)]
        grads = [guarded(torch.ones(500)), guarded(torch.ones(700)), guarded(torch.ones(1))]
        step = guarded(torch.tensor([1.0])).view(())
        with OnHost().running():
            torch.ops.shira.scatter_switch_batched(
                weights, offsets[0], lists[0], values[0], offsets[1], lists[1], values[1], saved
            )
        with OnHost().running():
            torch.ops.shira.scatter_apply_batched(weights, offsets[1], lists[1], values[1], 1.0, False, saved)
        with OnHost().running():
            torch.ops.shira.scatter_apply(weights[1], lists[1], values[1], 0.5, False, saved)
        with OnHost().running():
            numbers = test_masked_adamw.NUMBERS.values()
            torch.ops.shira.masked_adamw(weights, offsets[1], lists[1], grads, *moments, step, *numbers)
        with OnHost(*OFFSETS).running():
            torch.ops.shira.scatter_switch_batched(
                weights,
                torch.tensor([0, 100, 2100, 2100]),
                lists[0],
                values[0],
                torch.tensor([0, 0, 1300, 1300]),
                lists[1],
                values[1],
                saved,
            )


def test_wrong_lists_leave_nothing() -> None:
    folder = Path(__file__).parent
    path = os.pathsep.join(
        [str(folder), str(folder.parent / "helpers"), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    code = "import test_cuda_on_host as t; t.wrong_lists_leave_nothing(); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "done", f"exit {done.returncode}: {done.stderr[-2000:]}"
