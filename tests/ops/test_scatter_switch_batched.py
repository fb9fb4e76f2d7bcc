from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from any_bits import ANY_DTYPES, random_bits
from backend_matrix import BACKENDS, Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits, sorted_indices
from runs import PIECES, indices_of

import shira_kernels
from shira_kernels import backends

OP = "scatter_switch_batched"
each_backend = each_backend_of(OP)
SHAPES = ((7, 9), (), (40, 30), (0,), (5,), (300,), (33,))
# Of each weight: both lists, one of them, the same entries, all entries of both, none.
OLD_COUNTS = (20, 1, 500, 0, 5, 0, 0)
COUNTS = (30, 1, 700, 0, 5, 300, 0)
# (alpha, additive)
MODES = ((1.0, False), (0.3, False), (1.0, True), (-0.4, True))
List = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def list_of(counts: tuple[int, ...], index_dtype: torch.dtype, value_dtype: torch.dtype, seed: int) -> List:
    """Offsets, indices and values."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    parts = [
        sorted_indices(size, n, index_dtype, seed + i) for i, (size, n) in enumerate(zip(sizes, counts, strict=True))
    ]
    values = torch.randn(sum(counts), generator=generator, dtype=torch.float64).to(value_dtype)
    return torch.tensor([0, *itertools.accumulate(counts)]), torch.cat(parts), values


def two_calls(
    weights: list[torch.Tensor], old: List, new: List, alpha: float = 1.0, additive: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the op means: weights and saved, by the reference."""
    weights = [weight.clone() for weight in weights]
    saved = torch.zeros(len(new[1]), dtype=old[2].dtype)
    with backends.use("reference"):
        torch.ops.shira.scatter_apply_batched(weights, *old)
        torch.ops.shira.scatter_apply_batched(weights, *new, alpha, additive, saved)
    return weights, saved


def check_case(
    backend: Backend, before: list[torch.Tensor], old: List, new: List, alpha: float = 1.0, additive: bool = False
) -> None:
    expected, expected_saved = two_calls(before, old, new, alpha, additive)
    for offsets_device in {"cpu", backend.device}:
        weights = [weight.to(backend.device, copy=True) for weight in before]
        lists = [tensor.to(backend.device) for tensor in (*old, *new)]
        lists[0], lists[3] = lists[0].to(offsets_device), lists[3].to(offsets_device)
        lists_before = [bits(tensor) for tensor in lists]
        saved = torch.full(expected_saved.shape, 77).to(expected_saved.dtype).to(backend.device)
        with backend.running():
            torch.ops.shira.scatter_switch_batched(weights, *lists, saved, alpha, additive)
        for weight, right in zip(weights, expected, strict=True):
            assert torch.equal(bits(weight), bits(right))
        assert torch.equal(bits(saved), bits(expected_saved))
        assert all(torch.equal(bits(a), b) for a, b in zip(lists, lists_before, strict=True))


@each_backend
@pytest.mark.parametrize(("alpha", "additive"), MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_two_calls(backend: Backend, dtype: torch.dtype, alpha: float, additive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    for old_dtype, new_dtype in itertools.product((torch.int32, torch.int64), repeat=2):
        # Where both are int64 the values are of float32 if they may.
        value_dtype = torch.float32 if additive and old_dtype == new_dtype == torch.int64 else dtype
        old, new = list_of(OLD_COUNTS, old_dtype, dtype, 1), list_of(COUNTS, new_dtype, value_dtype, 2)
        check_case(backend, before, old, new, alpha, additive)


@each_backend
@pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
def test_replace_copies_bits_of_any_dtype(backend: Backend, dtype: torch.dtype) -> None:
    old = torch.tensor([0, 500, 501]), sorted_indices(999, 500, torch.int32, 1), random_bits(dtype, 501, 1)
    new = torch.tensor([0, 600, 601]), sorted_indices(999, 600, torch.int64, 2), random_bits(dtype, 601, 2)
    old, new = (
        (offsets, torch.cat([indices, indices.new_zeros(1)]), values) for offsets, indices, values in (old, new)
    )
    check_case(backend, [random_bits(dtype, (37, 27), 3), random_bits(dtype, (), 4)], old, new)


@each_backend
def test_there_and_back(backend: Backend) -> None:
    """From one adapter to another, and again, and out: the base's bits."""
    base = [torch.linspace(-1, 1, torch.Size(shape).numel(), device=backend.device).view(shape) for shape in SHAPES]
    weights = [weight.clone() for weight in base]
    adapters = [list_of(counts, torch.int32, torch.float32, seed) for seed, counts in enumerate((OLD_COUNTS, COUNTS))]
    adapters = [tuple(tensor.to(backend.device) for tensor in adapter) for adapter in adapters]
    saved = [torch.empty_like(values) for _, _, values in adapters]
    with backends.use(backend.name, isa=backend.isa):
        torch.ops.shira.scatter_apply_batched(weights, *adapters[0], saved=saved[0])
        for now, then in ((0, 1), (1, 0), (0, 1)):
            offsets, indices, _ = adapters[now]
            torch.ops.shira.scatter_switch_batched(weights, offsets, indices, saved[now], *adapters[then], saved[then])
        torch.ops.shira.scatter_apply_batched(weights, *adapters[1][:2], saved[1])
    assert all(torch.equal(bits(weight), bits(before)) for weight, before in zip(weights, base, strict=True))


@each_backend
def test_empty_lists(backend: Backend) -> None:
    device = backend.device
    none = torch.empty(0, dtype=torch.int32, device=device), torch.empty(0, device=device)
    some = torch.tensor([1, 4], device=device), torch.tensor([7.0, 8.0], device=device)
    switch = torch.ops.shira.scatter_switch_batched
    with backends.use(backend.name, isa=backend.isa):
        no_weights = torch.zeros(1, dtype=torch.int64)
        switch([], no_weights, *none, no_weights, *none, none[1].clone())
        weights = [torch.ones(5, device=device), torch.ones(0, device=device)]
        empty, full = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 2])
        switch(weights, empty, *none, empty, *none, none[1].clone())
        assert weights[0].tolist() == [1, 1, 1, 1, 1]
        saved = torch.zeros(2, device=device)
        switch(weights, empty, *none, full, *some, saved)
        assert weights[0].tolist() == [1, 7, 1, 1, 8]
        assert saved.tolist() == [1, 1]
        switch(weights, full, some[0], saved, empty, *none, none[1].clone())
        assert weights[0].tolist() == [1, 1, 1, 1, 1]


TRITON = [
    pytest.param(
        backend,
        id=f"triton-{backend.device}",
        marks=[
            pytest.mark.skipif(bool(backend.missing()), reason=backend.missing()),
            *([pytest.mark.gpu] if backend.device == "cuda" else []),
        ],
    )
    for backend in BACKENDS
    if backend.name == "triton"
]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_triton_writes_nothing_outside_whatever_the_lists(backend: Backend, index_dtype: torch.dtype) -> None:
    """Its launch without the checks, as on a GPU, where what lists hold stays unread."""
    launch = importlib.import_module(f"shira_kernels.triton.{OP}").scatter_switch_batched
    device = backend.device
    block = torch.full((3, 10_000), 7.0, device=device)
    weights, around = [block[1][:5000], block[1][5000:]], block[[0, 2]].clone()
    low, high = torch.iinfo(index_dtype).min, torch.iinfo(index_dtype).max
    indices = torch.tensor([high, 3, 3, low, -1, 10_000, 4999, 5000], dtype=index_dtype, device=device)
    values, saved = torch.ones(8, device=device), torch.zeros(10, device=device)
    for old_offsets, offsets in itertools.product(([0, 8, 8], [0, -5, 8], [10**9, 2, 8], [0, 10**9, 8]), repeat=2):
        cuts = [torch.tensor(numbers, device=device) for numbers in (old_offsets, offsets)]
        launch(weights, cuts[0], indices, values, cuts[1], indices.flip(0).contiguous(), values + 1, saved[1:9])
    assert torch.equal(block[[0, 2]], around)
    assert saved[[0, 9]].tolist() == [0, 0]


PLACES = st.lists(st.tuples(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199))), min_size=1, max_size=4)


@given(
    places=PLACES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mode=st.sampled_from(MODES),
    isa=st.sampled_from([backend.isa for backend in BACKENDS if backend.isa and not backend.missing()] or [""]),
)
def test_any_lists(
    places: list[tuple[set[int], set[int]]], dtype: torch.dtype, mode: tuple[float, bool], isa: str
) -> None:
    lists = []
    for side, first in ((0, 1000), (1, 2000)):
        parts = [sorted(pair[side]) for pair in places]
        offsets = torch.tensor([0, *itertools.accumulate(map(len, parts))])
        indices = torch.tensor([i for part in parts for i in part], dtype=torch.int32)
        lists.append((offsets, indices, torch.arange(first, first + len(indices)).to(dtype)))
    before = [torch.arange(200).to(dtype) for _ in places]
    backend = Backend("cpu", isa=isa) if isa else Backend("reference")
    check_case(backend, before, *lists, *mode)


@given(
    old_pieces=PIECES,
    pieces=PIECES,
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    isa=st.sampled_from([backend.isa for backend in BACKENDS if backend.isa and not backend.missing()] or [""]),
)
def test_any_runs(
    old_pieces: list[tuple[int, int]], pieces: list[tuple[int, int]], dtype: torch.dtype, isa: str
) -> None:
    old, new = indices_of(old_pieces), indices_of(pieces, torch.int64)
    before = (torch.arange(max(int(old[-1]), int(new[-1])) + 1) % 251).to(dtype)
    lists = [
        (torch.tensor([0, len(indices)]), indices, (torch.arange(len(indices)) % prime).to(dtype))
        for indices, prime in ((old, 241), (new, 239))
    ]
    check_case(Backend("cpu", isa=isa) if isa else Backend("reference"), [before], *lists)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_split_both_lists(threads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60_000, (9,), generator=generator).tolist()
    lists = []
    for seed, share in ((1, 2), (2, 3)):
        counts = [size // share if i != 2 * seed else 0 for i, size in enumerate(sizes)]
        parts = [
            sorted_indices(size, n, torch.int32, seed + i)
            for i, (size, n) in enumerate(zip(sizes, counts, strict=True))
        ]
        values = torch.randint(0, 200, (sum(counts),), generator=generator).to(dtype)
        lists.append((torch.tensor([0, *itertools.accumulate(counts)]), torch.cat(parts), values))
    before = [torch.randint(0, 200, (size + 3,), generator=generator).to(dtype)[3:] for size in sizes]  # not aligned
    number = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected, expected_saved = two_calls(before, *lists)
        whole = [torch.cat([weight[:3], weight]) for weight in before]
        weights, saved = [weight[3:] for weight in whole], torch.zeros_like(expected_saved)
        torch.ops.shira.scatter_switch_batched(weights, *lists[0], *lists[1], saved)
    finally:
        torch.set_num_threads(number)
    assert torch.equal(saved, expected_saved)
    assert all(torch.equal(weight, right) for weight, right in zip(weights, expected, strict=True))


@pytest.mark.skipif(backends.extension is None, reason="C++ extension not built")
@given(st.integers(0, 500), st.integers(0, 200), st.sampled_from([1, 2, 4, 8]))
def test_a_cut_begins_a_cache_line(position: int, address: int, size: int) -> None:
    begin = backends.extension.line_begin(position, address * size, size)
    assert begin >= position
    assert (address + begin) * size % 64 == 0
    assert (begin - position) * size < 64, "no further than needed"


@pytest.mark.parametrize("which", ["old_indices", "indices"])
@pytest.mark.parametrize("threads", [1, 3])
def test_wrong_indices_are_found_in_every_share(threads: int, which: str) -> None:
    nnz, number = 60_000, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for place in (1, nnz // 3, nnz // 2, nnz - 1):
            good, bad = torch.arange(0, 2 * nnz, 2), torch.arange(0, 2 * nnz, 2)
            bad[place] = bad[place - 1]
            old, new = (bad, good) if which == "old_indices" else (good, bad)
            weight, offsets, values = torch.zeros(2 * nnz), torch.tensor([0, nnz]), torch.ones(nnz)
            saved = torch.zeros(nnz)
            with pytest.raises(RuntimeError, match=f": {which} must be sorted and unique"):
                torch.ops.shira.scatter_switch_batched([weight], offsets, old, values, offsets, new, values, saved)
            assert not weight.any()
            assert not saved.any()
    finally:
        torch.set_num_threads(number)


def test_addresses_beyond_2_to_31() -> None:
    old = torch.tensor([5, 2**31, 2**31 + 70_001])
    new = torch.tensor([0, 2**31 - 1, 2**31 + 70_001])
    weight = torch.empty(2**31 + 70_002, dtype=torch.uint8)  # its pages are made when they are written
    weight[old], weight[new] = 8, 9
    offsets, saved = torch.tensor([0, 3]), torch.zeros(3, dtype=torch.uint8)
    lists = offsets, old, torch.arange(1, 4, dtype=torch.uint8), offsets, new, torch.arange(4, 7, dtype=torch.uint8)
    torch.ops.shira.scatter_switch_batched([weight], *lists, saved)
    assert weight[old].tolist() == [1, 2, 6]
    assert weight[new].tolist() == [4, 5, 6]
    assert saved.tolist() == [9, 9, 3]


def good_arguments(device: str = "cpu") -> dict:
    return {
        "weights": [torch.zeros(6, device=device), torch.zeros(6, device=device)],
        "old_offsets": torch.tensor([0, 1, 2]),
        "old_indices": torch.tensor([2, 0], device=device),
        "old_saved": torch.tensor([4.0, 5.0], device=device),
        "offsets": torch.tensor([0, 2, 3]),
        "indices": torch.tensor([1, 5, 0], device=device),
        "values": torch.tensor([1.0, 2.0, 3.0], device=device),
        "saved": torch.zeros(3, device=device),
    }


def bad_inputs(device: str) -> dict[str, tuple[dict, str]]:
    """name -> (arguments that differ from good ones, what the error says)"""

    def numbers(*items: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(items, dtype=dtype, device=device)

    shared, three = torch.zeros(12, device=device), torch.ones(3, device=device)
    plain = torch.zeros(6, device=device)
    float32 = {"dtype": torch.float32}
    return {
        "old offsets do not begin at 0": ({"old_offsets": torch.tensor([1, 2, 2])}, r"old_offsets must rise .* \(2\)"),
        "old offsets end late": ({"old_offsets": torch.tensor([0, 1, 3])}, r"old_offsets must rise .* \(2\)"),
        "too few old offsets": (
            {"old_offsets": torch.tensor([0, 2])},
            r"old_offsets must have one entry more .* got 2",
        ),
        "int32 old offsets": ({"old_offsets": torch.tensor([0, 1, 2]).int()}, "old_offsets must be int64"),
        "2-D old offsets": ({"old_offsets": torch.tensor([[0, 1, 2]])}, "old_offsets must be 1-D"),
        "offsets end late": ({"offsets": torch.tensor([0, 2, 4])}, r": offsets must rise .* \(3\)"),
        "int32 offsets": ({"offsets": torch.tensor([0, 2, 3]).int()}, ": offsets must be int64"),
        "float old indices": ({"old_indices": numbers(2, 0, **float32)}, "old_indices must be int32 or int64, got"),
        "strided old indices": ({"old_indices": numbers(2, 9, 0, 9)[::2]}, "old_indices must be contiguous"),
        "float indices": ({"indices": numbers(1, 5, 0, **float32)}, ": indices must be int32 or int64, got"),
        "too few old saved": ({"old_saved": numbers(4, **float32)}, r"old_saved must have one entry .* \(2\), got 1"),
        "old saved of another dtype": ({"old_saved": numbers(4, 5)}, "old_saved must be torch.float32 like the weight"),
        "old saved of another dtype, adding": (
            {"weights": [plain.bfloat16(), plain.bfloat16()], "saved": three.bfloat16(), "additive": True},
            "old_saved must be torch.bfloat16 like the weight, got torch.float32",
        ),
        "too few values": ({"values": numbers(1, 2, **float32)}, r": values must have one entry .* \(3\), got 2"),
        "values of another dtype": ({"values": numbers(1, 2, 3)}, ": values must be torch.float32 like the weight"),
        "short saved": ({"saved": torch.zeros(2, device=device)}, ": saved must have one entry per index"),
        "saved of another dtype": ({"saved": three.double()}, ": saved must be torch.float32 like"),
        "mixed dtypes": ({"weights": [plain, plain.double()]}, r"weights\[1\] must be torch.float32 like weights\[0\]"),
        "a strided weight": (
            {"weights": [plain, torch.zeros(4, 6, device=device).t()]},
            r"weights\[1\] must be contiguous",
        ),
        "integers": (
            {
                **{name: three.int() for name in ("values", "saved")},
                "weights": [plain.int(), plain.int()],
                "old_saved": numbers(4, 5).int(),
                "alpha": 0.5,
            },
            r"weights\[0\] must be floating point",
        ),
        "the same weight twice": ({"weights": [plain, plain]}, r"weights\[0\] must not share memory with weights\[1\]"),
        "saved in a weight": ({"weights": [plain, shared], "saved": shared[1:4]}, ": saved must not share memory with"),
        "saved is values": ({"values": three, "saved": three}, ": saved must not share memory with values"),
        "saved in old saved": (
            {"saved": shared[:3], "old_saved": shared[2:4]},
            ": saved must not share memory with old_saved",
        ),
        "old saved in a weight": (
            {"weights": [plain, shared], "old_saved": shared[1:3]},
            r"old_saved must not share memory with weights\[1\]",
        ),
        "old index beyond its weight": ({"old_indices": numbers(2, 6)}, r"old_indices must lie in \[0, 6\).* got 6"),
        "old index before its weight": ({"old_indices": numbers(-1, 0)}, r"old_indices must lie in \[0, 6\).* got -1"),
        "unsorted old part": (
            {"old_offsets": torch.tensor([0, 2, 2]), "old_indices": numbers(3, 1)},
            "old_indices must be sorted",
        ),
        "index beyond its weight": ({"indices": numbers(0, 6, 1)}, r": indices must lie in \[0, 6\).* got 6"),
        "repeated in a part": ({"indices": numbers(3, 3, 2)}, ": indices must be sorted"),
    }


NEEDS_CONTENTS = (
    *("old index beyond its weight", "old index before its weight", "unsorted old part"),
    *("index beyond its weight", "repeated in a part"),
)


@each_backend
@pytest.mark.parametrize("case", bad_inputs("cpu"))
@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument_and_writes_nothing(backend: Backend, case: str, call: str) -> None:
    function = torch.ops.shira.scatter_switch_batched if call == "torch.ops" else shira_kernels.scatter_switch_batched
    changes, message = bad_inputs(backend.device)[case]
    if backend.device == "cuda" and case in NEEDS_CONTENTS:
        message = "indices must"
    arguments = {**good_arguments(backend.device), **changes}
    written = [*arguments["weights"], arguments["saved"]]
    before = [bits(tensor) for tensor in written]
    with (
        backends.checked(),
        pytest.raises(RuntimeError, match=f"(?s)shira::{OP}.*{message}"),
        backend.running(times=0),
    ):
        function(**arguments)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(written, before, strict=True))


@each_backend
def test_autograd_is_told(backend: Backend) -> None:
    switch, arguments = torch.ops.shira.scatter_switch_batched, good_arguments(backend.device)
    written = [*arguments["weights"], arguments["saved"]]
    read = [value for name, value in arguments.items() if name not in ("weights", "saved")]
    versions = [tensor._version for tensor in (*written, *read)]
    with backend.running():
        switch(**arguments)
    assert all(tensor._version > old for tensor, old in zip(written, versions, strict=False))
    assert [tensor._version for tensor in read] == versions[len(written) :]
    assert [weight.tolist() for weight in arguments["weights"]] == [[0, 1, 4, 0, 0, 2], [3, 0, 0, 0, 0, 0]]
    assert arguments["saved"].tolist() == [0, 0, 5]

    parameter = torch.nn.Parameter(arguments["weights"][1].clone())
    for leaf in (parameter, parameter * 1):
        with pytest.raises(RuntimeError, match=r"weights\[1\] requires grad"), backend.running(times=0):
            switch(**{**arguments, "weights": [arguments["weights"][0], leaf]})
    for name in ("values", "old_saved", "saved"):
        leaf = arguments[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f": {name} requires grad"), backend.running(times=0):
            switch(**{**arguments, name: leaf})
    with torch.no_grad(), backend.running():
        switch(**{**arguments, "weights": [arguments["weights"][0], parameter]})
    assert parameter[0] == 3


@each_backend
def test_inference_tensors(backend: Backend) -> None:
    with torch.inference_mode(), backend.running():
        arguments = good_arguments(backend.device)
        torch.ops.shira.scatter_switch_batched(**arguments)
    assert arguments["weights"][1][0] == 3
    with pytest.raises(RuntimeError, match="must not be an inference tensor"), backend.running(times=0):
        torch.ops.shira.scatter_switch_batched(**arguments)


@each_backend
def test_lazily_changed_tensors_and_transforms_are_refused(backend: Backend) -> None:
    arguments = good_arguments(backend.device)
    for name in ("old_saved", "values", "saved"):
        lazy = torch._neg_view(arguments[name])
        with pytest.raises(RuntimeError, match="must not be lazily"), backend.running(times=0):
            torch.ops.shira.scatter_switch_batched(**{**arguments, name: lazy})

    def total(x: torch.Tensor) -> torch.Tensor:
        weights = [weight * x for weight in arguments["weights"]]
        torch.ops.shira.scatter_switch_batched(**{**arguments, "weights": weights})
        return weights[0].sum()

    with pytest.raises(RuntimeError, match=r"torch\.func transforms|requires grad"), backend.running(times=0):
        torch.func.grad(total)(torch.tensor(2.0, device=backend.device))


def test_opcheck() -> None:
    for alpha, additive in MODES:
        arguments = (*good_arguments().values(), alpha, additive)
        torch.library.opcheck(torch.ops.shira.scatter_switch_batched.default, arguments)


def test_compile() -> None:
    def switch(weights: list[torch.Tensor], *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        saved = torch.empty_like(rest[-1])
        torch.ops.shira.scatter_switch_batched(weights, *rest, saved)
        return torch.stack([weight.sum() for weight in weights]), saved

    weights, *rest, _ = good_arguments().values()
    expected = [weight.clone() for weight in weights]
    results = switch(expected, *rest)
    compiled = torch.compile(switch, fullgraph=True, backend="aot_eager")(weights, *rest)
    assert all(torch.equal(a, b) for a, b in zip(compiled, results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
