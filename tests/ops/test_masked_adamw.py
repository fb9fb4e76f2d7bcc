from __future__ import annotations

import itertools
import math

import pytest
import torch
from backend_matrix import BACKENDS, Backend, each_backend_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits, sorted_indices

import shira_kernels
from shira_kernels import backends

OP = "masked_adamw"
each_backend = each_backend_of(OP)
SHAPES = ((7, 9), (), (40, 30), (0,), (5,), (300,), (11, 13, 3))
COUNTS = (20, 1, 700, 0, 0, 300, 65)
DENSE = (True, False, False, True, False, True, True)
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# float32 arithmetic: the error of a step is that of a few roundings of the weight, of the update, and (in the first
# steps, where the moments are differences of nearly equal numbers) of the moments; relative to the sizes met.
STATE_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def model(
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    grad_dtype: torch.dtype | None = None,
    master: bool = False,
    device: str = "cpu",
    step: float = 1.0,
) -> dict:
    """The tensors of a call over weights of many shapes, with dense and compact gradients and empty parts."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    nnz, compute = sum(COUNTS), torch.promote_types(dtype, torch.float32)
    weights = [random(*shape).to(dtype) for shape in SHAPES]
    indices = [
        sorted_indices(w.numel(), n, index_dtype, i) for i, (w, n) in enumerate(zip(weights, COUNTS, strict=True))
    ]
    grads = [random(*(shape if dense else (n,))) for shape, n, dense in zip(SHAPES, COUNTS, DENSE, strict=True)]
    entries = torch.cat([w.view(-1)[i.long()] for w, i in zip(weights, indices, strict=True)])
    tensors = {
        "weights": weights,
        "offsets": torch.tensor([0, *itertools.accumulate(COUNTS)]),
        "indices": torch.cat(indices),
        "grads": [grad.to(grad_dtype or dtype) for grad in grads],
        "exp_avg": random(nnz).mul_(0.1).to(compute),
        "exp_avg_sq": random(nnz).square_().to(compute),
        "master": (entries.double() * (1 + 1e-4 * random(nnz))).to(compute) if master else None,
        "step": torch.tensor(step),
    }
    return moved(tensors, device)


def moved(tensors: dict, device: str, keep: tuple[str, ...] = ("offsets", "step")) -> dict:
    """Copies on the device; those called `keep` stay where they are."""

    def move(name: str, value: object) -> object:
        if isinstance(value, list):
            return [move(name, item) for item in value]
        return value.to("cpu" if name in keep else device, copy=True) if isinstance(value, torch.Tensor) else value

    return {name: move(name, value) for name, value in tensors.items()}


def entries_of(tensors: dict) -> list[torch.Tensor]:
    borders = tensors["offsets"].tolist()
    return [tensors["indices"][a:b].long().cpu() for a, b in itertools.pairwise(borders)]


def oracle(tensors: dict, numbers: dict) -> dict[str, torch.Tensor]:
    """One step in float64 from the inputs as they are: entries, exp_avg, exp_avg_sq, [nnz] each, not rounded."""
    lists, step = entries_of(tensors), float(tensors["step"])
    w = torch.cat([x.cpu().view(-1)[i].double() for x, i in zip(tensors["weights"], lists, strict=True)])
    if tensors["master"] is not None:
        w = tensors["master"].cpu().double()
    g = torch.cat(
        [
            (grad.cpu().view(-1)[i] if grad.shape == weight.shape else grad.cpu()).double()
            for grad, weight, i in zip(tensors["grads"], tensors["weights"], lists, strict=True)
        ]
    )
    beta1, beta2, lr = numbers["beta1"], numbers["beta2"], numbers["lr"]
    m = beta1 * tensors["exp_avg"].cpu().double() + (1 - beta1) * g
    v = beta2 * tensors["exp_avg_sq"].cpu().double() + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    update = lr * m_hat / (v_hat.sqrt() + numbers["eps"])
    return {"entries": w * (1 - lr * numbers["weight_decay"]) - update, "exp_avg": m, "exp_avg_sq": v}


def run(tensors: dict, numbers: dict = NUMBERS) -> None:
    torch.ops.shira.masked_adamw(*tensors.values(), *numbers.values())


def check_case(backend: Backend, numbers: dict = NUMBERS, step_on_device: bool = False, **what: object) -> None:
    before = model(**what)  # type: ignore[arg-type]
    expected = oracle(before, numbers)
    after = moved(before, backend.device, keep=("offsets",) if step_on_device else ("offsets", "step"))
    with backend.running():
        run(after, numbers)
    dtype = before["weights"][0].dtype
    tolerance, lists = STATE_TOLERANCE[dtype], entries_of(before)
    g_size = max(float(g.abs().max()) for g in before["grads"] if g.numel())
    assert (after["exp_avg"].cpu().double() - expected["exp_avg"]).abs().max() <= tolerance * g_size
    assert (after["exp_avg_sq"].cpu().double() - expected["exp_avg_sq"]).abs().max() <= tolerance * g_size**2
    w = torch.cat([x.cpu().view(-1)[i] for x, i in zip(after["weights"], lists, strict=True)])
    exact = expected["entries"]
    if after["master"] is None:
        allowed = tolerance * exact.abs().max() + torch.finfo(dtype).eps * exact.abs()
        assert ((w.double() - exact).abs() <= allowed).all()
    else:
        assert (after["master"].cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()
        assert torch.equal(bits(w), bits(after["master"].to(dtype))), "weights are the rounded masters"
    for weight, old, index in zip(after["weights"], before["weights"], lists, strict=True):
        weight = weight.cpu().view(-1).clone()
        weight[index] = old.view(-1)[index]
        assert torch.equal(bits(weight), bits(old)), "an entry that is not listed changed"
    for name in ("offsets", "indices", "step"):
        assert torch.equal(after[name].cpu(), before[name])
    for grad, old in zip(after["grads"], before["grads"], strict=True):
        assert torch.equal(bits(grad), bits(old))
    if dtype == torch.float64:
        return  # the reference takes torch's square roots, which may be one bit off
    same = moved(before, "cpu")
    with backends.use("reference"):
        run(same, numbers)
    for name in ("weights", "exp_avg", "exp_avg_sq", "master"):
        for a, b in zip(*(x[name] if isinstance(x[name], list) else [x[name]] for x in (after, same)), strict=True):
            assert a is b is None or torch.equal(bits(a), bits(b)), f"{name}: all backends give the same bits"


@each_backend
@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entries(backend: Backend, dtype: torch.dtype, index_dtype: torch.dtype, master: bool) -> None:
    for grad_dtype in {dtype, torch.float32}:
        check_case(backend, dtype=dtype, index_dtype=index_dtype, grad_dtype=grad_dtype, master=master)


@each_backend
@pytest.mark.parametrize(
    "changes",
    [
        {"beta1": 0.0, "beta2": 0.0},
        {"beta1": 0.5},
        {"beta1": 0.3, "beta2": 0.99999},
        {"lr": 0.0},
        {"weight_decay": 0.0, "eps": 1e-3},
    ],
    ids=str,
)
def test_numbers(backend: Backend, changes: dict) -> None:
    for step in (1.0, 2.0, 7.0, 12_345.0):
        check_case(backend, {**NUMBERS, **changes}, master=True, step=step, step_on_device=step == 7)


@each_backend
@pytest.mark.parametrize("master", [False, True], ids=["", "master"])
def test_many_steps_are_torchs(backend: Backend, master: bool) -> None:
    """As torch.optim.AdamW on the entries as a vector."""
    steps = 20 if backend.name == "triton" and backend.device == "cpu" else 1000 if backend.isa else 200
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 30, generator=generator)
    indices = sorted_indices(600, 200, torch.int32)
    vector = torch.nn.Parameter(weight.view(-1)[indices.long()].clone())
    optimizer = torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.01, foreach=False, fused=False)
    live = weight.to(backend.device)
    moments = [torch.zeros(200, device=backend.device) for _ in range(2)]
    true = vector.detach().clone().to(backend.device) if master else None
    target = torch.randn(200, generator=generator)
    offsets, where = torch.tensor([0, 200]), indices.to(backend.device)
    for step in range(1, steps + 1):
        vector.grad = (vector.detach() - target) * torch.rand(200, generator=generator)
        grad = vector.grad.to(backend.device)
        optimizer.step()
        with backend.running():
            shira_kernels.masked_adamw(
                [live], offsets, where, [grad], *moments, true, torch.tensor(float(step)), 1e-3, 0.9, 0.999, 1e-8, 0.01
            )
    torch.testing.assert_close(live.cpu().view(-1)[indices.long()], vector.detach(), rtol=1e-5, atol=1e-7)


@each_backend
def test_empty_lists(backend: Backend) -> None:
    none = torch.empty(0, device=backend.device)
    indices = torch.empty(0, dtype=torch.int32, device=backend.device)
    state = [torch.empty(0, device=backend.device) for _ in range(3)]
    rest = (torch.tensor(1.0), *NUMBERS.values())
    torch.ops.shira.masked_adamw([], torch.zeros(1, dtype=torch.int64), indices, [], *state, *rest)
    weight = torch.ones(3, device=backend.device)
    grads = [torch.ones(3, device=backend.device), none]
    weights, offsets = [weight, torch.ones(2, 2, device=backend.device)], torch.zeros(3, dtype=torch.int64)
    torch.ops.shira.masked_adamw(weights, offsets, indices, grads, *state, *rest)
    assert weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_split_the_whole_arena(dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60_000, (7,), generator=generator).tolist()
    counts = [max(1, size // 2) for size in sizes]
    parts = list(enumerate(zip(sizes, counts, strict=True)))
    tensors = {
        "weights": [torch.randn(size, generator=generator).to(dtype) for size in sizes],
        "offsets": torch.tensor([0, *itertools.accumulate(counts)]),
        "indices": torch.cat([sorted_indices(s, n, torch.int32, i) for i, (s, n) in parts]),
        "grads": [torch.randn(n if i % 2 else s, generator=generator) for i, (s, n) in parts],
        "exp_avg": torch.zeros(sum(counts)),
        "exp_avg_sq": torch.zeros(sum(counts)),
        "master": torch.randn(sum(counts), generator=generator),
        "step": torch.tensor(1.0),
    }
    expected = moved(tensors, "cpu")
    with backends.use("reference"):
        run(expected)
    number = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(tensors)
    finally:
        torch.set_num_threads(number)
    for a, b in zip(tensors["weights"], expected["weights"], strict=True):
        assert torch.equal(bits(a), bits(b))
    for name in ("exp_avg", "exp_avg_sq", "master"):
        assert torch.equal(bits(tensors[name]), bits(expected[name]))


@each_backend
@pytest.mark.parametrize("step_on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_gradients_and_moments(backend: Backend, dtype: torch.dtype, step_on_device: bool) -> None:
    """Where v becomes infinite the weight only decays; nothing but a NaN, or infinity over infinity, gives a NaN."""
    inf, nan = math.inf, math.nan
    huge = 1e300 if dtype == torch.float64 else 1e30  # its square is infinite
    gradients = (huge, -huge, inf, -inf, nan, -0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    moments = (*[(0.0, 0.0)] * 8, (0.0, inf), (1.0, huge), (-inf, 1.0), (-0.0, 0.0))
    compute, count = torch.promote_types(dtype, torch.float32), len(gradients)
    m, v = torch.tensor(moments, dtype=compute).t().contiguous().unbind()
    before = {
        "weights": [torch.full((count + 1,), 2.0, dtype=dtype)],
        "offsets": torch.tensor([0, count]),
        "indices": torch.arange(count, dtype=torch.int32),
        "grads": [torch.tensor(gradients, dtype=compute)],  # 1e30 is no float16
        "exp_avg": m,
        "exp_avg_sq": v,
        "master": None,
        "step": torch.tensor(3.0),
    }
    before["grads"] = [before["grads"][0].to(dtype)] if dtype == torch.float64 else before["grads"]
    after = moved(before, backend.device, keep=("offsets",) if step_on_device else ("offsets", "step"))
    expected = moved(before, "cpu")
    with backend.running():
        run(after)
    with backends.use("reference"):
        run(expected)
    weight = after["weights"][0].cpu()
    two, decay = torch.tensor([2.0, 1 - NUMBERS["lr"] * NUMBERS["weight_decay"]], dtype=compute)
    decayed = two * decay
    assert weight[[0, 1, 5, 6, 8, 11]].tolist() == [float(decayed.to(dtype))] * 6
    assert torch.isnan(weight).nonzero().view(-1).tolist() == [2, 3, 4, 10]
    assert after["exp_avg_sq"][[0, 1, 8]].tolist() == [inf] * 3
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        a, b = (torch.cat(x[name]) if name == "weights" else x[name].cpu() for x in (after, expected))
        a, nan_at = a.cpu(), b.isnan()
        assert torch.equal(a.isnan(), nan_at)
        assert torch.equal(bits(a[~nan_at]), bits(b[~nan_at])), name


FLOATS = st.floats(width=16, allow_nan=False)


@given(
    entries=st.lists(st.tuples(st.booleans(), FLOATS, FLOATS), min_size=1, max_size=80),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    dense=st.booleans(),
    step=st.integers(1, 2**24),
    isa=st.sampled_from([b.isa for b in BACKENDS if b.isa and not b.missing(OP)] or [""]),
)
def test_any_entries(
    entries: list[tuple[bool, float, float]], dtype: torch.dtype, dense: bool, step: int, isa: str
) -> None:
    """Any places, any numbers with infinities and signed zeros: C++ and reference agree to the bit but for NaNs."""
    indices = torch.tensor([i for i, (listed, _, _) in enumerate(entries) if listed], dtype=torch.int32)
    before = torch.tensor([w for _, w, _ in entries], dtype=dtype)
    grad = torch.tensor([g for _, _, g in entries], dtype=dtype)
    grad = grad if dense else grad[indices.long()]
    results = []
    for backend in (Backend("reference"), Backend("cpu", isa=isa)) if isa else (Backend("reference"),):
        weight = before.clone()
        moments = [torch.zeros(len(indices), dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
        with backend.running():
            shira_kernels.masked_adamw(
                [weight.view(1, -1)], torch.tensor([0, len(indices)]), indices, [grad.view(1, -1) if dense else grad],
                *moments, None, torch.tensor(float(step)), 0.1, 0.9, 0.99, 1e-8, 0.1,
            )  # fmt: skip
        results.append(torch.cat([weight, *moments]))
    if dtype == torch.float64:
        torch.testing.assert_close(results[0], results[-1], rtol=1e-14, atol=0, equal_nan=True)
        return
    nan = results[0].isnan()
    assert torch.equal(nan, results[-1].isnan())
    assert torch.equal(bits(results[0][~nan]), bits(results[-1][~nan]))


def small(device: str = "cpu") -> dict:
    """A good call: a dense and a compact gradient, a master."""
    return {
        "weights": [torch.ones(2, 3, device=device), torch.ones(6, device=device)],
        "offsets": torch.tensor([0, 2, 3]),
        "indices": torch.tensor([1, 5, 0], device=device),
        "grads": [torch.ones(2, 3, device=device), torch.ones(1, device=device)],
        "exp_avg": torch.zeros(3, device=device),
        "exp_avg_sq": torch.zeros(3, device=device),
        "master": torch.ones(3, device=device),
        "step": torch.tensor(1.0),
        **NUMBERS,
    }


def bad_inputs(device: str = "cpu") -> dict[str, tuple[dict, str]]:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def indices(*items: int) -> torch.Tensor:
        return torch.tensor(items, device=device)

    good, shared = small(device), zeros(12)
    dense, compact = good["grads"]
    cases: dict[str, tuple[dict, str]] = {
        "offsets fall": ({"offsets": torch.tensor([0, 4, 3])}, "offsets must rise"),
        "offsets end late": ({"offsets": torch.tensor([0, 1, 4])}, r"offsets must rise .* \(3\)"),
        "too few offsets": ({"offsets": torch.tensor([0, 3])}, r"offsets must have one entry more .* \(3\), got 2"),
        "int32 offsets": ({"offsets": torch.tensor([0, 2, 3], dtype=torch.int32)}, "offsets must be int64"),
        "float indices": ({"indices": zeros(3)}, "indices must be int32 or int64, got torch.float32"),
        "2-D indices": ({"indices": indices(1, 5, 0).view(1, 3)}, "indices must be 1-D"),
        "integer weights": ({"weights": [zeros(6, dtype=torch.int32)] * 2}, r"weights\[0\] must be float64, float32"),
        "complex weights": ({"weights": [zeros(6, dtype=torch.complex64)] * 2}, r"weights\[0\] must be float64"),
        "mixed weights": (
            {"weights": [zeros(2, 3), zeros(6, dtype=torch.float64)]},
            r"weights\[1\] must be torch.float32 like weights\[0\], got torch.float64",
        ),
        "a strided weight": ({"weights": [zeros(3, 2).t(), zeros(6)]}, r"weights\[0\] must be contiguous"),
        "the same weight twice": ({"weights": [shared, shared], "grads": [shared.clone(), compact]}, "must not share"),
        "too few gradients": ({"grads": [dense]}, r"grads must be as many as weights \(2\), got 1"),
        "a gradient of another shape": ({"grads": [zeros(3, 2), compact]}, r"grads\[0\] must have the weight's shape"),
        "a short gradient": (
            {"grads": [zeros(1), compact]},
            r"grads\[0\] must have the weight's shape \(2, 3\) or be 1-D with one entry per index \(2\)",
        ),
        "a strided gradient": ({"grads": [zeros(3, 2).t(), compact]}, r"grads\[0\] must be contiguous"),
        "float64 gradients": ({"grads": [dense.double(), compact.double()]}, r"grads\[0\] must be torch.float32"),
        "mixed gradients": (
            {
                "weights": [zeros(2, 3).bfloat16(), zeros(6).bfloat16()],
                "grads": [dense, compact.bfloat16()],
            },
            r"grads\[1\] must be torch.float32 like grads\[0\]",
        ),
        "bfloat16 moments": (
            {"exp_avg": zeros(3, dtype=torch.bfloat16)},
            "exp_avg must be torch.float32 for torch.float32 weights, got torch.bfloat16",
        ),
        "float64 master": ({"master": zeros(3, dtype=torch.float64)}, "master must be torch.float32 for"),
        "short moments": ({"exp_avg_sq": zeros(2)}, r"exp_avg_sq must have one entry per index \(3\), got 2"),
        "long moments": ({"exp_avg": zeros(4)}, r"exp_avg must have one entry per index \(3\), got 4"),
        "2-D master": ({"master": zeros(3, 1)}, "master must be 1-D"),
        "strided master": ({"master": zeros(6)[::2]}, "master must be contiguous"),
        "integer step": ({"step": torch.tensor(1)}, "step must be a 0-d float32 tensor, got torch.int64"),
        "1-D step": ({"step": torch.ones(1)}, "step must be a 0-d float32 tensor"),
        "step 0": ({"step": torch.tensor(0.0)}, "step must be a whole number of at least 1, got 0"),
        "half a step": ({"step": torch.tensor(1.5)}, "step must be a whole number of at least 1, got 1.5"),
        "step nan": ({"step": torch.tensor(math.nan)}, "step must be a whole number"),
        "moments in one place": ({"exp_avg": shared[:3], "exp_avg_sq": shared[2:5]}, "exp_avg must not share memory"),
        "master in a weight": (
            {"weights": [zeros(2, 3), shared[:6]], "master": shared[:3]},
            r"master must not share memory with weights\[1\]",
        ),
        "a gradient in a weight": (
            {"weights": [zeros(2, 3), shared[:6]], "grads": [dense, shared[2:3]]},
            r"grads\[1\] must not share memory with weights\[1\]",
        ),
        "a moment in a gradient": (
            {"grads": [shared[:6].view(2, 3), compact], "exp_avg": shared[3:6]},
            r"exp_avg must not share memory with grads\[0\]",
        ),
        "index beyond its weight": ({"indices": indices(0, 6, 1)}, r"indices must lie in \[0, 6\)"),
        "index before its weight": ({"indices": indices(-1, 5, 1)}, r"indices must lie in \[0, 6\)"),
        "unsorted part": ({"indices": indices(3, 1, 2)}, "indices must be sorted"),
        "repeated in a part": ({"indices": indices(3, 3, 2)}, "indices must be sorted"),
    }
    for name in ("lr", "eps", "weight_decay"):
        for number in (-0.1, math.nan, math.inf):
            cases[f"{name} {number}"] = ({name: number}, f"{name} must be finite and not negative, got")
    for name in ("beta1", "beta2"):
        for number in (-0.1, 1.0, math.nan):
            cases[f"{name} {number}"] = ({name: number}, rf"{name} must lie in \[0, 1\), got")
    return cases


NEEDS_CONTENTS = ("index beyond its weight", "index before its weight", "unsorted part", "repeated in a part")


@each_backend
@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("call", ["torch.ops", "wrapper"])
def test_bad_input_names_the_argument_and_writes_nothing(backend: Backend, case: str, call: str) -> None:
    function = torch.ops.shira.masked_adamw if call == "torch.ops" else shira_kernels.masked_adamw
    changes, message = bad_inputs(backend.device)[case]
    arguments = {**small(backend.device), **changes}
    if backend.device == "cuda" and case in NEEDS_CONTENTS:
        message = "indices must"
    written = [*arguments["weights"], arguments["exp_avg"], arguments["exp_avg_sq"], arguments["master"]]
    before = [tensor.clone() for tensor in written]
    with (
        backends.checked(),
        pytest.raises(RuntimeError, match=f"(?s)shira::{OP}: .*{message}"),
        backend.running(times=0),
    ):
        function(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))


@each_backend
def test_autograd_is_told(backend: Backend) -> None:
    arguments = small(backend.device)
    written = [*arguments["weights"], *(arguments[name] for name in ("exp_avg", "exp_avg_sq", "master"))]
    read = [*arguments["grads"], arguments["indices"], arguments["step"], arguments["offsets"]]
    versions, read_versions = ([tensor._version for tensor in tensors] for tensors in (written, read))
    with backend.running():
        torch.ops.shira.masked_adamw(**arguments)
    assert all(tensor._version > old for tensor, old in zip(written, versions, strict=True))
    assert [tensor._version for tensor in read] == read_versions
    arguments = small(backend.device)
    x = torch.ones(6, device=backend.device, requires_grad=True)
    product = x * arguments["weights"][1]  # saves the weight for backward
    with backend.running():
        torch.ops.shira.masked_adamw(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@each_backend
@pytest.mark.parametrize("argument", ["weights[1]", "grads[0]", "exp_avg", "exp_avg_sq", "master", "step"])
@pytest.mark.parametrize("leaf", [True, False])
def test_an_argument_that_requires_grad_is_refused_outside_no_grad(backend: Backend, argument: str, leaf: bool) -> None:
    arguments = small(backend.device)
    name, _, place = argument.partition("[")
    tensor = arguments[name][int(place[0])] if place else arguments[name]
    tensor = tensor.clone().requires_grad_()
    tensor = tensor if leaf else tensor * 1
    if place:
        arguments[name][int(place[0])] = tensor
    else:
        arguments[name] = tensor
    message = f"{name}{place and r'.' + place[0] + '.'} requires grad"
    before = bits(arguments["weights"][0])
    with pytest.raises(RuntimeError, match=message), backend.running(times=0):
        torch.ops.shira.masked_adamw(**arguments)
    assert torch.equal(bits(arguments["weights"][0]), before)
    with torch.no_grad(), backend.running():
        torch.ops.shira.masked_adamw(**arguments)
    assert not torch.equal(bits(arguments["weights"][0]), before)


@each_backend
def test_inference_mode(backend: Backend) -> None:
    arguments = small(backend.device)
    with torch.inference_mode(), backend.running():
        torch.ops.shira.masked_adamw(**arguments)
    assert arguments["weights"][0][0, 1] < 1
    arguments = small(backend.device)
    with torch.inference_mode():
        arguments["master"] = arguments["master"].clone()
    with pytest.raises(RuntimeError, match="master must not be an inference tensor"), backend.running(times=0):
        torch.ops.shira.masked_adamw(**arguments)


@each_backend
def test_lazily_negated_tensors_are_refused(backend: Backend) -> None:
    for name in ("weights", "grads"):
        arguments = small(backend.device)
        arguments[name][0] = torch._neg_view(arguments[name][0])
        with pytest.raises(RuntimeError, match="must not be lazily"), backend.running(times=0):
            torch.ops.shira.masked_adamw(**arguments)


def test_opcheck() -> None:
    for dtype, master in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
        arguments = (*model(dtype, master=master).values(), *NUMBERS.values())
        torch.library.opcheck(torch.ops.shira.masked_adamw.default, arguments)


def test_compile() -> None:
    def update(weights: list[torch.Tensor], *rest: torch.Tensor) -> torch.Tensor:
        torch.ops.shira.masked_adamw(weights, *rest, *NUMBERS.values())
        return torch.stack([weight.sum() for weight in weights])

    arguments, expected = model(master=True), model(master=True)
    sums = update(*expected.values())
    assert torch.equal(torch.compile(update, fullgraph=True, backend="aot_eager")(*arguments.values()), sums)
    assert all(torch.equal(a, b) for a, b in zip(arguments["weights"], expected["weights"], strict=True))
    assert torch.equal(arguments["master"], expected["master"])


def test_schema_is_the_contract() -> None:
    assert str(torch.ops.shira.masked_adamw.default._schema) == (
        "shira::masked_adamw(Tensor(a!)[] weights, Tensor offsets, Tensor indices, Tensor[] grads, Tensor(b!) exp_avg, "
        "Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay) -> ()"
    )
