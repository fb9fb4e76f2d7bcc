from __future__ import annotations

import itertools

import pytest
import torch
from any_bits import ANY_DTYPES, random_bits
from backend_matrix import BACKENDS, Backend, each_backend
from hypothesis import given
from hypothesis import strategies as st
from oracle import ULP, bits, scatter, sorted_indices, ulp_distance
from runs import PIECES, indices_of

import shira_kernels
from shira_kernels import backends

ARITHMETIC = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (alpha, additive)
MODES = ((1.0, False), (0.3, False), (-1.7, False), (0.0, False), (1.0, True), (0.3, True))
NEVER_WRITTEN = float("nan")


def check_case(
    backend: Backend,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    alpha: float,
    additive: bool,
    keep: bool,
    value_dtype: torch.dtype | None = None,
    shape: tuple[int, ...] = (37, 61),
    nnz: int = 700,
) -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    values = torch.randn(nnz, generator=generator, dtype=torch.float64).to(value_dtype or dtype)
    indices = sorted_indices(before.numel(), nnz, index_dtype)
    weight = before.to(backend.device, copy=True)
    saved = torch.full((nnz,), NEVER_WRITTEN, dtype=dtype, device=backend.device) if keep else None
    with backend.running():
        torch.ops.shira.scatter_apply(
            weight, indices.to(backend.device), values.to(backend.device), alpha, additive, saved
        )
    after, old = weight.cpu().view(-1), before.view(-1)[indices.long()]
    touched = torch.zeros(before.numel(), dtype=torch.bool)
    touched[indices.long()] = True
    assert torch.equal(bits(after[~touched]), bits(before.view(-1)[~touched])), "an entry that is not listed changed"
    if saved is not None:
        assert torch.equal(bits(saved), bits(old))
    if alpha == 1.0 and not additive:
        assert torch.equal(bits(after[touched]), bits(values))
        return
    exact, scale = scatter(old, values, alpha, additive)
    assert ulp_distance(after[touched], exact, scale) <= ULP[dtype]
    reference = before.clone()
    with backends.use("reference"):
        shira_kernels.scatter_apply(reference, indices, values, alpha, additive)
    assert torch.equal(bits(after), bits(reference)), "backends round the same operations, so their bits are equal"


@each_backend
@pytest.mark.parametrize(("alpha", "additive"), MODES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
def test_entries(backend: Backend, dtype: torch.dtype, index_dtype: torch.dtype, alpha: float, additive: bool) -> None:
    for keep in (False, True):
        check_case(backend, dtype, index_dtype, alpha, additive, keep)
    if additive:
        check_case(backend, dtype, index_dtype, alpha, additive, True, value_dtype=torch.float32)


@each_backend
@pytest.mark.parametrize(
    ("shape", "nnz"),
    [((), 0), ((), 1), ((0,), 0), ((1,), 1), ((5,), 5), ((3, 4, 5), 60), ((2, 0, 3), 0), ((70, 70), 0)],
)
def test_shapes(backend: Backend, shape: tuple[int, ...], nnz: int) -> None:
    for alpha, additive in ((1.0, False), (0.5, True)):
        check_case(backend, torch.float32, torch.int32, alpha, additive, True, shape=shape, nnz=nnz)


@each_backend
@pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
def test_replace_copies_bits_of_any_dtype(backend: Backend, dtype: torch.dtype) -> None:
    before, values = random_bits(dtype, 999, 2), random_bits(dtype, 300, 3)
    indices = sorted_indices(999, 300, torch.int32)
    weight = before.to(backend.device, copy=True)
    saved = torch.zeros_like(bits(values)).view(dtype).to(backend.device)
    arguments = indices.to(backend.device), values.to(backend.device)
    with backend.running():
        torch.ops.shira.scatter_apply(weight, *arguments, 1.0, False, saved)
    expected = bits(before).view(999, -1)
    old = expected[indices.long()]
    expected[indices.long()] = bits(values).view(300, -1)
    assert torch.equal(bits(weight), expected.view(-1))
    assert torch.equal(bits(saved), old.view(-1))
    with backend.running():
        torch.ops.shira.scatter_apply(weight, arguments[0], saved)
    assert torch.equal(bits(weight), bits(before)), "reverting gives every bit back"


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(backend: Backend, dtype: torch.dtype) -> None:
    """Every number of the dtype, every midpoint between two, and their neighbours in float32."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    exact = torch.cat([numbers, between]).view(torch.int32)
    values = torch.cat([exact - 1, exact, exact + 1]).view(torch.float32)
    values = values[~values.isnan()]
    weight = torch.zeros(values.numel(), dtype=dtype, device=backend.device)
    with backend.running():
        indices = torch.arange(values.numel(), device=backend.device)
        torch.ops.shira.scatter_apply(weight, indices, values.to(backend.device), 1.0, True)
    assert torch.equal(weight.cpu().float(), values.to(dtype).float())


FLOATS = st.floats(width=16, allow_nan=False)


@given(
    entries=st.lists(st.tuples(st.booleans(), FLOATS, FLOATS), min_size=1, max_size=24),
    dtype=st.sampled_from(ARITHMETIC),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    alpha=st.sampled_from([1.0, 0.0, -0.5, 2.0]),
    additive=st.booleans(),
    isa=st.sampled_from([backend.isa for backend in BACKENDS if backend.isa and not backend.missing()] or [""]),
)
def test_any_entries(
    entries: list[tuple[bool, float, float]],
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    alpha: float,
    additive: bool,
    isa: str,
) -> None:
    """Any places, any numbers with infinities and signed zeros: C++ and reference agree to the bit but for NaNs."""
    before = torch.tensor([w for _, w, _ in entries], dtype=dtype)
    indices = torch.tensor([i for i, (listed, _, _) in enumerate(entries) if listed], dtype=index_dtype)
    values = torch.tensor([v for listed, _, v in entries if listed], dtype=dtype)
    results = []
    for backend in (Backend("reference"), Backend("cpu", isa=isa)) if isa else (Backend("reference"),):
        weight, saved = before.clone(), torch.empty_like(values)
        with backend.running():
            torch.ops.shira.scatter_apply(weight, indices, values, alpha, additive, saved)
        untouched = torch.ones(len(entries), dtype=torch.bool)
        untouched[indices.long()] = False
        assert torch.equal(bits(weight[untouched]), bits(before[untouched]))
        assert torch.equal(bits(saved), bits(before[indices.long()]))
        results.append(weight)
    nan = results[0].isnan()
    assert torch.equal(nan, results[-1].isnan())
    assert torch.equal(bits(results[0][~nan]), bits(results[-1][~nan]))


@given(
    pieces=PIECES,
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    mode=st.sampled_from(MODES),
    keep=st.booleans(),
    skipped=st.integers(0, 65),
    isa=st.sampled_from([backend.isa for backend in BACKENDS if backend.isa and not backend.missing()] or [""]),
)
def test_any_runs(
    pieces: list[tuple[int, int]],
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    mode: tuple[float, bool],
    keep: bool,
    skipped: int,
    isa: str,
) -> None:
    """Runs of neighbours and single entries, at any alignment of the weight, the values and the list."""
    alpha, additive = mode if dtype in ARITHMETIC else (1.0, False)
    indices = indices_of(pieces, index_dtype)
    before = (torch.arange(int(indices[-1]) + 100) % 251).to(dtype)
    value_dtype = torch.float32 if additive and skipped % 2 else dtype
    values = (torch.arange(len(indices) + 1) % 241).to(value_dtype)[1:]
    results = []
    for backend in (Backend("reference"), Backend("cpu", isa=isa)) if isa else (Backend("reference"),):
        whole = torch.cat([before[:skipped], before])
        saved = torch.zeros(len(indices) + 1, dtype=dtype)
        with backend.running():
            torch.ops.shira.scatter_apply(
                whole[skipped:], indices, values, alpha, additive, saved[1:] if keep else None
            )
        results.append((bits(whole), bits(saved)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    assert torch.equal(results[-1][0][: before[:skipped].nbytes], bits(before[:skipped]))


def bad_inputs(device: str = "cpu") -> dict[str, tuple[dict, str]]:
    """name -> (arguments that differ from good ones, what the error says)"""

    def tensor(numbers: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    weight = torch.arange(12.0, device=device).view(3, 4)
    shared = torch.arange(12.0, device=device)
    cases = {
        "index too large": ({"indices": tensor([1, 12], torch.int64)}, r"indices must lie in \[0, 12\).* got 12"),
        "index negative": ({"indices": tensor([-1, 1], torch.int32)}, r"indices must lie in \[0, 12\).* got -1"),
        "unsorted": ({"indices": tensor([5, 1], torch.int64)}, "indices must be sorted and unique"),
        "repeated": ({"indices": tensor([5, 5], torch.int32)}, "indices must be sorted and unique"),
        "float indices": ({"indices": tensor([1.0, 2.0])}, "indices must be int32 or int64, got torch.float32"),
        "uint8 indices": ({"indices": tensor([1, 2], torch.uint8)}, "indices must be int32 or int64"),
        "2-D indices": ({"indices": tensor([[1, 2]], torch.int64)}, r"indices must be 1-D, got shape \(1, 2\)"),
        "strided indices": ({"indices": tensor([1, 0, 2, 0], torch.int64)[::2]}, "indices must be contiguous"),
        "too few values": ({"values": tensor([1.0])}, r"values must have one entry per index \(2\), got 1"),
        "0-D values": ({"values": tensor(1.0)}, "values must be 1-D"),
        "strided values": ({"values": tensor([1.0, 0, 2, 0])[::2]}, "values must be contiguous"),
        "values of another dtype": (
            {"values": tensor([1.0, 2.0], torch.float64)},
            "values must be torch.float32 like the weight, got torch.float64",
        ),
        "float32 values replace bfloat16": ({"weight": weight.bfloat16()}, "values must be torch.bfloat16 like"),
        "additive values of another dtype": (
            {"values": tensor([1.0, 2.0], torch.float64), "additive": True},
            "values must be torch.float32 or (torch.)?float32, got torch.float64",
        ),
        "strength on integers": (
            {"weight": weight.int(), "values": tensor([1, 2], torch.int32), "alpha": 0.5},
            "weight must be floating point",
        ),
        "adding to integers": (
            {"weight": weight.int(), "values": tensor([1, 2], torch.int32), "additive": True},
            "weight must be floating point",
        ),
        "16-byte elements": (
            {"weight": weight.to(torch.complex128), "values": tensor([1, 2], torch.complex128)},
            "weight must have elements of 1, 2, 4 or 8 bytes",
        ),
        "transposed weight": ({"weight": weight.t()}, "weight must be contiguous"),
        "channels-last weight": (
            {"weight": torch.zeros(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)},
            "weight must be contiguous",
        ),
        "expanded weight": ({"weight": torch.zeros(1, device=device).expand(12)}, "weight must be contiguous"),
        "short saved": ({"saved": tensor([0.0])}, r"saved must have one entry per index \(2\), got 1"),
        "saved of another dtype": ({"saved": tensor([0.0, 0.0], torch.float64)}, "saved must be torch.float32 like"),
        "strided saved": ({"saved": tensor([0.0, 0, 0, 0])[::2]}, "saved must be contiguous"),
        "saved is the weight": ({"weight": shared, "saved": shared[4:6]}, "saved must not share memory with weight"),
        "values in the weight": ({"weight": shared, "values": shared[4:6]}, "values must not share memory with weight"),
    }
    values = tensor([1.0, 2.0])
    cases["saved is values"] = ({"values": values, "saved": values}, "saved must not share memory with values")
    flat = torch.zeros(12, dtype=torch.int64, device=device)
    flat[3] = 1
    cases["indices in the weight"] = (
        {"weight": flat, "indices": flat[2:4], "values": tensor([1, 2], torch.int64)},
        "indices must not share memory with weight",
    )
    cases["indices on another device"] = ({"indices": torch.empty(2, dtype=torch.int64, device="meta")}, "indices")
    return cases


NEEDS_CONTENTS = ("index too large", "index negative", "unsorted", "repeated")


def check_bad_input(backend: Backend, case: str, call: object) -> None:
    changes, message = bad_inputs(backend.device)[case]
    arguments = {
        "weight": torch.arange(12.0, device=backend.device).view(3, 4),
        "indices": torch.tensor([1, 5], device=backend.device),
        "values": torch.tensor([101.0, 105.0], device=backend.device),
        "alpha": 1.0,
        "additive": False,
        "saved": None,
        **changes,
    }
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.device.type != "meta"]
    before = [bits(value) for value in tensors]
    with pytest.raises(RuntimeError, match=f"(?s)shira::scatter_apply: .*{message}"), backend.running(times=0):
        call(**arguments)
    assert all(torch.equal(bits(value), old) for value, old in zip(tensors, before, strict=True))


# `indices` on the meta device chooses the meta kernel before any of ours: nothing is written, nothing refused.
@each_backend
@pytest.mark.parametrize("case", [case for case in bad_inputs() if case != "indices on another device"])
@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument_and_writes_nothing(backend: Backend, case: str, call: str) -> None:
    function = torch.ops.shira.scatter_apply if call == "torch.ops" else shira_kernels.scatter_apply
    if backend.device == "cuda" and case in NEEDS_CONTENTS:
        with backends.checked():
            changes, _ = bad_inputs("cuda")[case]
            with pytest.raises(RuntimeError, match="indices must"), backend.running(times=0):
                function(**{**good_arguments("cuda"), **changes})
        return
    check_bad_input(backend, case, function)


def good_arguments(device: str = "cpu") -> dict:
    return {
        "weight": torch.arange(12.0, device=device).view(3, 4),
        "indices": torch.tensor([1, 5], device=device),
        "values": torch.tensor([101.0, 105.0], device=device),
    }


@each_backend
def test_autograd_is_told(backend: Backend) -> None:
    arguments = good_arguments(backend.device)
    weight, saved = arguments["weight"], torch.zeros(2, device=backend.device)
    versions = weight._version, saved._version, arguments["values"]._version, arguments["indices"]._version
    with backend.running():
        torch.ops.shira.scatter_apply(**arguments, saved=saved)
    assert weight._version > versions[0]
    assert saved._version > versions[1]
    assert (arguments["values"]._version, arguments["indices"]._version) == versions[2:]

    x = torch.ones(3, 4, device=backend.device, requires_grad=True)
    weight = torch.ones(3, 4, device=backend.device)
    product = x * weight  # saves the weight for backward
    with backend.running():
        torch.ops.shira.scatter_apply(**{**arguments, "weight": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@each_backend
@pytest.mark.parametrize("argument", ["weight", "values", "saved"])
@pytest.mark.parametrize("leaf", [True, False])
def test_an_argument_that_requires_grad_is_refused_outside_no_grad(backend: Backend, argument: str, leaf: bool) -> None:
    arguments = {**good_arguments(backend.device), "saved": torch.zeros(2, device=backend.device)}
    tensor = arguments[argument].clone().requires_grad_()
    arguments[argument] = tensor if leaf else tensor * 1
    before = bits(arguments["weight"])
    with pytest.raises(RuntimeError, match=f"{argument} requires grad"), backend.running(times=0):
        torch.ops.shira.scatter_apply(**arguments)
    assert torch.equal(bits(arguments["weight"]), before)
    version = arguments["weight"]._version
    with torch.no_grad(), backend.running():
        torch.ops.shira.scatter_apply(**arguments)
    assert arguments["weight"]._version > version
    assert arguments["weight"].view(-1)[1] == 101


@each_backend
def test_inference_mode(backend: Backend) -> None:
    arguments = good_arguments(backend.device)
    with torch.inference_mode(), backend.running():
        torch.ops.shira.scatter_apply(**arguments)
    assert arguments["weight"].view(-1)[[1, 5]].tolist() == [101, 105]


@each_backend
def test_inference_tensors_stay_as_they_are_outside_inference_mode(backend: Backend) -> None:
    arguments = good_arguments(backend.device)
    with torch.inference_mode():
        arguments["weight"] = arguments["weight"].clone()
    before = bits(arguments["weight"])
    with pytest.raises(RuntimeError, match="weight must not be an inference tensor"), backend.running(times=0):
        torch.ops.shira.scatter_apply(**arguments)
    assert torch.equal(bits(arguments["weight"]), before)


@each_backend
def test_lazily_changed_tensors_are_refused(backend: Backend) -> None:
    whole = torch.zeros(4, dtype=torch.complex64, device=backend.device)
    indices = torch.tensor([1], device=backend.device)
    for weight in (whole.conj(), torch._neg_view(whole)):
        values = torch.ones(1, dtype=whole.dtype, device=backend.device)
        with pytest.raises(RuntimeError, match="must not be lazily"), backend.running(times=0):
            torch.ops.shira.scatter_apply(weight, indices, values)
    assert not whole.abs().any()


@each_backend
def test_function_transforms_are_refused(backend: Backend) -> None:
    arguments = good_arguments(backend.device)

    def total(x: torch.Tensor) -> torch.Tensor:
        weight = arguments["weight"] * x
        torch.ops.shira.scatter_apply(weight, arguments["indices"], arguments["values"])
        return weight.sum()

    with pytest.raises(RuntimeError, match=r"torch\.func transforms|requires grad"), backend.running(times=0):
        torch.func.grad(total)(torch.tensor(2.0, device=backend.device))


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep: bool) -> None:
    for alpha, additive in itertools.product((1.0, 0.5), (False, True)):
        arguments = (*good_arguments().values(), alpha, additive, torch.zeros(2) if keep else None)
        torch.library.opcheck(torch.ops.shira.scatter_apply.default, arguments)


def test_compile_and_export() -> None:
    def switch(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> tuple:
        saved = torch.empty_like(values)
        torch.ops.shira.scatter_apply(weight, indices, values, 1.0, False, saved)
        return x @ weight, saved

    arguments = (*good_arguments().values(), torch.ones(2, 3))
    expected = switch(*(argument.clone() for argument in arguments))
    compiled = torch.compile(switch, fullgraph=True, backend="aot_eager")
    results = compiled(*(argument.clone() for argument in arguments))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    class Switch(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> tuple:
            return switch(*arguments)

    exported = torch.export.export(Switch(), arguments).module()
    weight = arguments[0].clone()
    results = exported(weight, *arguments[1:])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert weight.view(-1)[1] == 101, "the exported program writes its input too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype) -> None:
    nnz = 200_000
    before = torch.randint(0, 200, (3_000_003,)).to(dtype)[3:]  # not aligned to a cache line
    values = torch.randint(0, 200, (nnz,)).to(dtype)
    indices = sorted_indices(before.numel(), nnz, torch.int32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            weight, saved = before.clone(), torch.zeros(nnz, dtype=dtype)
            torch.ops.shira.scatter_apply(weight, indices, values, 1.0, False, saved)
            results.append((weight, saved))
    finally:
        torch.set_num_threads(threads)
    expected = before.clone()
    expected[indices.long()] = values
    assert all(torch.equal(weight, expected) for weight, _ in results)
    assert all(torch.equal(saved, before[indices.long()]) for _, saved in results)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_wrong_indices_are_found_in_every_share(threads: int) -> None:
    """A descent anywhere, also across the border of two threads' shares, is refused before anything is written."""
    nnz, before = 120_000, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        places = {
            1,
            nnz - 1,
            *(border + step for k in range(1, threads) for border in [k * nnz // threads] for step in (-1, 0, 1)),
        }
        for place in places:
            indices = torch.arange(0, 2 * nnz, 2)
            indices[place] = indices[place - 1]
            weight = torch.zeros(2 * nnz)
            with pytest.raises(RuntimeError, match="sorted and unique"):
                torch.ops.shira.scatter_apply(weight, indices, torch.ones(nnz))
            assert not weight.any()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(backends.extension is None, reason="C++ extension not built")
@given(st.sets(st.integers(0, 400), min_size=1), st.sampled_from([1, 2, 4, 8]), st.integers(0, 63), st.data())
def test_threads_never_share_a_cache_line(chosen: set[int], size: int, address: int, data: st.DataObject) -> None:
    indices = sorted(chosen)
    i = data.draw(st.integers(1, len(indices)))
    border = backends.extension.next_line(indices, i, address * size, size)
    line = [(address * size + index * size) // 64 for index in indices]
    assert border >= i
    assert set(line[:border]).isdisjoint(line[border:])
    assert border == i or line[border - 1] == line[i - 1], "no further than needed"


@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b.device == "cpu" and not b.missing() and b.name != "triton"]
)
def test_addresses_beyond_2_to_31(backend: Backend) -> None:
    indices = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 70_001])
    weight = torch.empty(2**31 + 70_002, dtype=torch.uint8)  # its pages are made when they are written
    weight[indices[1:] - 1] = 7
    weight[indices] = 9
    saved = torch.zeros(5, dtype=torch.uint8)
    with backend.running():
        torch.ops.shira.scatter_apply(weight, indices, torch.arange(1, 6, dtype=torch.uint8), 1.0, False, saved)
    assert weight[indices].tolist() == [1, 2, 3, 4, 5]
    assert saved.tolist() == [9, 9, 9, 9, 9]
    assert weight[indices[1:] - 1].tolist() == [7, 7, 3, 7]


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    before = backends.calls()
    shira_kernels.scatter_apply(**good_arguments())
    assert backends.calls() - before == {backends.active("scatter_apply", "cpu"): 1} == {fastest: 1}
