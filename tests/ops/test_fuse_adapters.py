from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_matrix import BACKENDS, Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits, sorted_indices, ulp_distance

import shira_kernels
from shira_kernels import backends

OP = "fuse_adapters"
POLICIES = ("sum", "mean", "last", "ties")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
each_backend = each_backend_of(OP)
fuse = torch.ops.shira.fuse_adapters
Lists = list[torch.Tensor]


def make_lists(
    numel: int, sizes: tuple[int, ...], dtype: torch.dtype, index_dtype: torch.dtype = torch.int32, seed: int = 0
) -> tuple[Lists, Lists, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = [sorted_indices(numel, nnz, index_dtype, seed=seed + k) for k, nnz in enumerate(sizes)]
    values = [torch.randn(nnz, generator=generator, dtype=torch.float64).to(dtype) for nnz in sizes]
    return indices, values, torch.randn(len(sizes), generator=generator)


def oracle(indices: Lists, values: Lists, weights: torch.Tensor, policy: str) -> dict[int, tuple[float, float]]:
    """Position -> the result, in Python's floats, and the sum of the magnitudes that it is computed from."""
    terms: dict[int, list[float]] = {}
    for positions, entries, weight in zip(indices, values, weights.tolist(), strict=True):
        for position, value in zip(positions.tolist(), entries.tolist(), strict=True):
            terms.setdefault(position, []).append(value if policy == "last" else weight * value)
    results = {}
    for position, own in sorted(terms.items()):
        total = math.fsum(own)
        agreeing = [term for term in own if term * total > 0]
        result = {
            "sum": total,
            "mean": total / len(own),
            "last": own[-1],
            "ties": math.fsum(agreeing) / len(agreeing) if agreeing else 0.0,
        }[policy]
        results[position] = result, math.fsum(map(abs, own))
    return results


def check_case(backend: Backend, indices: Lists, values: Lists, weights: torch.Tensor, policy: str) -> None:
    moved = [[tensor.to(backend.device) for tensor in group] for group in (indices, values, [weights])]
    with backend.running():
        union, fused = fuse(moved[0], moved[1], moved[2][0], policy)
    wide = any(positions.dtype == torch.int64 for positions in indices)
    assert union.dtype == (torch.int64 if wide else torch.int32)
    assert fused.dtype == values[0].dtype
    assert union.device.type == fused.device.type == backend.device
    with backends.use("reference"):
        expected = fuse(indices, values, weights, policy)
    # All backends round alike: the oracle need only be near.
    assert torch.equal(bits(union), bits(expected[0]))
    assert torch.equal(bits(fused), bits(expected[1]))
    exact = oracle(indices, values, weights, policy)
    assert union.tolist() == list(exact)
    results, magnitudes = torch.tensor(list(exact.values()), dtype=torch.float64).view(-1, 2).unbind(1)
    scale = torch.maximum(magnitudes, results.abs())
    if policy == "ties":  # what a rounding error elects otherwise is not wrong
        sums = torch.tensor([total for total, _ in oracle(indices, values, weights, "sum").values()])
        sure = (sums == 0) | (sums.abs() > 1e-5 * scale)
        fused, results, scale = fused.cpu()[sure], results[sure], scale[sure]
    # A product, a sum and a division for each list at most, each within half a unit, and the last rounding.
    units = 1.0 if fused.dtype in (torch.bfloat16, torch.float16) else 1.5 * len(indices) + 1
    assert ulp_distance(fused.cpu(), results, scale) <= (0.0 if policy == "last" else units)


@each_backend
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_lists(backend: Backend, dtype: torch.dtype, policy: str) -> None:
    check_case(backend, *make_lists(400, (150, 3, 0, 200, 77), dtype), policy)


@each_backend
@pytest.mark.parametrize("policy", POLICIES)
def test_lists_of_several_blocks(backend: Backend, policy: str) -> None:
    """One list is dense where others have gaps, two begin and end alike, one is short."""
    indices, values, weights = make_lists(3000, (700, 0, 900, 2), torch.float32)
    indices += [torch.arange(1000, 1600, dtype=torch.int32), torch.arange(1000, 1600, 3, dtype=torch.int32)]
    generator = torch.Generator().manual_seed(1)
    values += [torch.randn(positions.numel(), generator=generator) for positions in indices[-2:]]
    check_case(backend, indices, values, torch.cat([weights, torch.tensor([-1.5, 0.25])]), policy)


TRITON = [
    pytest.param(backend, id=backend.device, marks=[pytest.mark.gpu] if backend.device == "cuda" else [])
    for backend in BACKENDS
    if backend.name == "triton" and not backend.missing(OP)
]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_triton_ranks_stay_inside_whatever_the_lists_hold(backend: Backend, dtype: torch.dtype) -> None:
    """Unsorted, repeated and negative positions, and the largest and smallest numbers of the type."""
    from shira_kernels.triton import fuse_adapters as triton_fuse

    generator = torch.Generator().manual_seed(0)
    sizes = [600, 1, 300, 0, 257]
    wild = torch.randint(-50, 50, (sum(sizes),), generator=generator, dtype=dtype)
    wild[::7], wild[3::11] = torch.iinfo(dtype).max, torch.iinfo(dtype).min
    wild[600:] = wild[600:].abs().clamp(0, 40).sort().values  # and sorted, but repeated
    wild[-200:] = -1
    around = torch.full((3, wild.numel()), 77, dtype=torch.int32, device=backend.device)
    triton_fuse.rank_entries(wild.to(backend.device), sizes, around[1])
    assert (around[[0, 2]] == 77).all()
    lists = list(wild.split(sizes))
    values = [torch.ones(size, device=backend.device) for size in sizes]
    for policy in POLICIES:
        union, result = triton_fuse.fuse_adapters(
            [positions.to(backend.device) for positions in lists], values, torch.ones(5, device=backend.device), policy
        )
        assert union.shape == result.shape


@each_backend
@pytest.mark.parametrize("policy", POLICIES)
def test_widths_of_indices(backend: Backend, policy: str) -> None:
    for widths in ((torch.int64,) * 3, (torch.int32, torch.int64, torch.int32)):
        indices, values, weights = make_lists(90, (20, 50, 10), torch.float32)
        indices = [positions.to(width) for positions, width in zip(indices, widths, strict=True)]
        indices[1][-1] += 2**40 if widths[1] == torch.int64 else 0
        check_case(backend, indices, values, weights, policy)


@each_backend
@pytest.mark.parametrize("policy", POLICIES)
def test_empty_lists_and_a_single_one(backend: Backend, policy: str) -> None:
    for sizes in ((0,), (0, 0), (1,), (40,), (0, 5)):
        check_case(backend, *make_lists(50, sizes, torch.float32), policy)


@each_backend
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("sum", [0.5, 2.0, -0.5, 0.0, 4.0, -3.5]),
        ("mean", [0.5, 1.0, -0.25, 0.0, 4.0, -3.5 / 3]),
        ("last", [1.0, 1.5, -1.0, 1.0, 2.0, 1.0]),
        ("ties", [0.5, 1.0, -1.0, 0.0, 4.0, (-4 - 0.5) / 2]),
    ],
)
def test_policies(backend: Backend, policy: str, expected: list[float]) -> None:
    a = [0, 1, 2, 3, 5], [1.0, 1.0, 1.0, -2.0, -1.0]  # terms 0.5 0.5 0.5 -1 -0.5
    b = [4, 5], [2.0, -2.0]  # terms 4 -4
    c = [1, 2, 3, 5], [1.5, -1.0, 1.0, 1.0]  # terms 1.5 -1 1 1
    indices = [torch.tensor(part[0], dtype=torch.int32, device=backend.device) for part in (a, b, c)]
    values = [torch.tensor(part[1], device=backend.device) for part in (a, b, c)]
    weights = torch.tensor([0.5, 2.0, 1.0], device=backend.device)
    with backend.running():
        union, fused = fuse(indices, values, weights, policy)
    assert union.tolist() == [0, 1, 2, 3, 4, 5]
    assert fused.tolist() == torch.tensor(expected).tolist()


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_keeps_every_bit(backend: Backend, dtype: torch.dtype) -> None:
    """NaNs with payloads, signalling ones too, infinities, -0, subnormals; whatever the weights are."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    generator = torch.Generator().manual_seed(0)
    patterns = [torch.randint(low, high, (300,), generator=generator, dtype=integer) for _ in range(2)]
    infinity = torch.tensor(math.inf, dtype=dtype).view(integer)
    patterns[1][:6] = torch.stack([infinity, infinity + 1, ~infinity, infinity - 1, infinity * 0, infinity * 0 + 1])
    values = [pattern.view(dtype).to(backend.device) for pattern in patterns]
    indices = [sorted_indices(500, 300, torch.int32, seed=k).to(backend.device) for k in range(2)]
    weights = torch.tensor([math.nan, 0.0], device=backend.device)
    with backend.running():
        union, fused = fuse(indices, values, weights, "last")
    dense = torch.zeros(500, dtype=integer)
    for positions, pattern in zip(indices, patterns, strict=True):
        dense[positions.cpu().long()] = pattern
    assert torch.equal(bits(fused), bits(dense[union.cpu().long()]))


@each_backend
@pytest.mark.parametrize("policy", ["sum", "mean", "ties"])
def test_what_is_not_finite(backend: Backend, policy: str) -> None:
    """inf - inf and NaN give NaN, infinities stay; with ties also where they are elected."""
    columns = [(math.inf, 1.0), (math.inf, -math.inf), (math.nan, 1.0), (-math.inf, 1.0), (-1.0, 1.0), (-0.0, -0.0)]
    values = [torch.tensor(row, device=backend.device) for row in zip(*columns, strict=True)]
    indices = [torch.arange(6, dtype=torch.int32, device=backend.device)] * 2
    with backend.running():
        fused = fuse(indices, values, torch.ones(2, device=backend.device), policy)[1].cpu()
    expected = torch.tensor([math.inf, math.nan, math.nan, -math.inf, 0.0, 0.0])
    assert torch.equal(fused.isnan(), expected.isnan())
    assert torch.equal(fused.nan_to_num(nan=7, posinf=8, neginf=9), expected.nan_to_num(nan=7, posinf=8, neginf=9))
    assert not torch.signbit(fused[4:]).any()  # sums begin at +0


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_once(backend: Backend, dtype: torch.dtype) -> None:
    """1 + 3 eps / 8 + 3 eps / 8 rounds up; rounded after each addition it would stay 1."""
    eps = torch.finfo(dtype).eps
    values = [torch.tensor([number], dtype=dtype, device=backend.device) for number in (1.0, 3 * eps / 8, 3 * eps / 8)]
    indices = [torch.zeros(1, dtype=torch.int32, device=backend.device)] * 3
    with backend.running():
        assert fuse(indices, values, torch.ones(3, device=backend.device))[1].item() == 1 + eps


@st.composite
def lists(draw: st.DrawFn) -> tuple[Lists, Lists, torch.Tensor]:
    """Clusters and gaps, ends of windows; numbers with few bits, so that sums are exact and ties have one answer."""
    places = st.integers(0, 40) | st.sampled_from([16383, 16384, 16385, 2**31 - 1]) | st.integers(0, 2**31 - 1)
    chosen = draw(st.lists(st.sets(places, max_size=30), min_size=1, max_size=6))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = st.integers(-8, 8)
    indices = [torch.tensor(sorted(own), dtype=draw(st.sampled_from([torch.int32, torch.int64]))) for own in chosen]
    values = [
        torch.tensor(draw(st.lists(numbers, min_size=len(own), max_size=len(own))), dtype=torch.float64).to(dtype)
        for own in chosen
    ]
    weights = torch.tensor(draw(st.lists(numbers, min_size=len(chosen), max_size=len(chosen)))) / 4
    return indices, values, weights


@given(
    given_lists=lists(),
    policy=st.sampled_from(POLICIES),
    backend=st.sampled_from([b for b in BACKENDS if b.device == "cpu" and b.name != "triton" and not b.missing(OP)]),
)
def test_any_lists(given_lists: tuple[Lists, Lists, torch.Tensor], policy: str, backend: Backend) -> None:
    check_case(backend, *given_lists, policy)


@pytest.mark.skipif(backends.extension is None, reason="C++ extension not built")
@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_at_any_number_of_threads(policy: str) -> None:
    """Lists of several windows and lengths, dense in one place, so that threads' runs differ in width."""
    indices, values, weights = make_lists(2_000_000, (40_000, 30_000, 20_000), torch.float32)
    indices.append(torch.arange(700_000, 760_000, dtype=torch.int64))
    values.append(torch.randn(60_000, generator=torch.Generator().manual_seed(1)))
    weights = torch.cat([weights, torch.tensor([0.5])])
    with backends.use("reference"):
        expected = fuse(indices, values, weights, policy)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            for actual, wanted in zip(fuse(indices, values, weights, policy), expected, strict=True):
                assert torch.equal(bits(actual), bits(wanted))
    finally:
        torch.set_num_threads(threads)


def good_arguments(device: str = "cpu") -> dict[str, Any]:
    return {
        "indices": [torch.tensor(own, dtype=torch.int32, device=device) for own in ([0, 2], [1, 2, 5], [2])],
        "values": [torch.tensor(own, device=device) for own in ([1.0, 2.0], [3.0, 4.0, 5.0], [6.0])],
        "weights": torch.tensor([1.0, 0.5, -1.0], device=device),
        "policy": "sum",
    }


def changed(k: int, change: Any) -> Any:
    return lambda group: [change(tensor) if i == k else tensor for i, tensor in enumerate(group)]


BAD = [
    ("policy", lambda _: "max", "policy must be one of sum, mean, last, ties, got 'max'"),
    ("indices", lambda _: [], "indices must hold at least one list"),
    ("indices", lambda group: group[:2], r"values must hold one tensor per list of indices \(2\), got 3"),
    ("indices", changed(1, lambda t: t.float()), r"indices\[1\] must be int32 or int64, got torch.float32"),
    ("indices", changed(1, lambda t: t[None]), r"indices\[1\] must be 1-D"),
    ("indices", changed(1, lambda t: t.repeat_interleave(2)[::2]), r"indices\[1\] must be contiguous"),
    ("indices", changed(1, lambda t: t.flip(0)), r"indices\[1\] must be sorted and unique"),
    ("indices", changed(1, lambda t: t.clamp(max=2)), r"indices\[1\] must be sorted and unique"),
    ("indices", changed(2, lambda t: t - 5), r"indices\[2\] must not be negative, got -3"),
    ("indices", changed(0, lambda t: t.long() - 1), r"indices\[0\] must not be negative, got -1"),
    ("values", lambda group: group[:2], r"values must hold one tensor per list of indices \(3\), got 2"),
    ("values", lambda group: [t.int() for t in group], r"values\[0\] must be float64, float32, bfloat16 or float16"),
    ("values", changed(2, lambda t: t.double()), r"values\[2\] must be torch.float32 like values\[0\], got torch.fl"),
    ("values", changed(0, lambda t: t[:1]), r"values\[0\] must have one entry per index \(2\), got 1"),
    ("values", changed(0, lambda t: t[None]), r"values\[0\] must be 1-D"),
    ("values", changed(1, lambda t: t.repeat_interleave(2)[::2]), r"values\[1\] must be contiguous"),
    ("weights", lambda t: t.double(), r"weights must be (torch\.)?float32, got torch.float64"),
    ("weights", lambda t: t[:2], r"weights must have one (number per list|entry per index) \(3\), got 2"),
    ("weights", lambda t: t[None], "weights must be 1-D"),
    ("weights", lambda t: t.repeat_interleave(2)[::2], "weights must be contiguous"),
]


@each_backend
@pytest.mark.parametrize("wrapped", [False, True], ids=["op", "wrapper"])
@pytest.mark.parametrize(("argument", "change", "message"), BAD)
def test_bad_input(backend: Backend, wrapped: bool, argument: str, change: Any, message: str) -> None:
    arguments = good_arguments(backend.device)
    arguments[argument] = change(arguments[argument])
    call = shira_kernels.fuse_adapters if wrapped else fuse
    with pytest.raises(RuntimeError, match=message), backends.checked(), backend.running(times=0):
        call(**arguments)


@each_backend
def test_last_checks_the_weights_too(backend: Backend) -> None:
    arguments = {**good_arguments(backend.device), "policy": "last"}
    with pytest.raises(RuntimeError, match="weights must have one"), backend.running(times=0):
        fuse(**{**arguments, "weights": arguments["weights"][:1]})


@each_backend
def test_it_is_not_differentiable(backend: Backend) -> None:
    for argument in ("values", "weights"):
        arguments = good_arguments(backend.device)
        (arguments["values"][1] if argument == "values" else arguments["weights"]).requires_grad_()
        with pytest.raises(RuntimeError, match=rf"{argument}(\[1\])? requires grad"), backend.running(times=0):
            fuse(**arguments)
        with torch.no_grad(), backend.running():
            assert fuse(**arguments)[1].tolist() == [1.0, 1.5, -2.0, 2.5]
    with torch.inference_mode(), backend.running():
        assert fuse(**good_arguments(backend.device))[0].tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("policy", ["sum", "last"])
def test_opcheck(policy: str) -> None:
    arguments = tuple({**good_arguments(), "policy": policy}.values())
    torch.library.opcheck(torch.ops.shira.fuse_adapters.default, arguments)


def test_compile_and_export() -> None:
    """The size of the result depends on the data."""

    class Double(torch.nn.Module):
        def forward(self, indices: Lists, values: Lists, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            union, fused = fuse(indices, values, weights)
            return union, 2 * fused

    first = make_lists(20, (5, 9), torch.float32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(Double(), fullgraph=True, backend="aot_eager", dynamic=True)
        exported = torch.export.export(Double(), first).module()
        for run, lists in ((compiled, first), (compiled, make_lists(20, (7, 3), torch.float32)), (exported, first)):
            for actual, expected in zip(run(*lists), Double()(*lists), strict=True):
                assert torch.equal(actual, expected)


def test_the_default_is_the_fast_path() -> None:
    fastest = f"cpu/{backends.extension.runnable_isas()[-1]}" if backends.extension else "reference"
    before = backends.calls()
    shira_kernels.fuse_adapters(**good_arguments())
    assert backends.calls() - before == {backends.active(OP, "cpu"): 1} == {fastest: 1}
