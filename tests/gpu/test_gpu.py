"""What only a GPU can show: graphs, streams, guards around every tensor, checked mode."""

from __future__ import annotations

import pytest
import sparse_delta
import torch
from backend_matrix import Backend
from oracle import bits, sorted_indices

from shira_kernels import backends

GPU_BACKENDS = [Backend("triton", "cuda"), Backend("cuda", "cuda")]
each_gpu_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(b, id=b.name, marks=[pytest.mark.skip(reason=b.missing())] if b.missing() else [])
        for b in GPU_BACKENDS
    ],
)
pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def model(
    sizes: tuple[int, ...] = (4096, 300, 70_000),
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = [torch.zeros(size, device="cuda") for size in sizes]
    counts = [size // 10 for size in sizes]
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    indices = torch.cat([sorted_indices(size, n, torch.int32) for size, n in zip(sizes, counts, strict=True)]).cuda()
    return weights, offsets, indices, torch.arange(1.0, 1.0 + sum(counts), device="cuda")


@each_gpu_backend
def test_cuda_graph(backend: Backend) -> None:
    weights, offsets, indices, values = model()
    saved = torch.empty_like(values)
    run = backends.kernel("scatter_apply_batched", backend.name)
    run(weights, offsets, indices, values, 1.0, False, saved)  # warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(weights, offsets, indices, values, 1.0, False, saved)
    for factor in (2.0, 3.0):
        for weight in weights:
            weight.fill_(-1)
        values.copy_(torch.arange(1.0, 1.0 + values.numel(), device="cuda") * factor)
        graph.replay()
        torch.cuda.synchronize()
        for i, weight in enumerate(weights):
            part = slice(offsets[i], offsets[i + 1])
            expected = torch.full_like(weight, -1)
            expected[indices[part].long()] = values[part]
            assert torch.equal(weight, expected)
        assert (saved == -1).all()


@each_gpu_backend
def test_current_stream(backend: Backend) -> None:
    weights, offsets, indices, values = model()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for weight in weights:
            weight.fill_(5)
        with backend.running():
            torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values)
    stream.synchronize()
    assert sum(int((weight != 5).sum()) for weight in weights) == values.numel() - int((values == 5).sum())


@each_gpu_backend
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_nothing_outside_is_written_whatever_the_indices(backend: Backend, index_dtype: torch.dtype) -> None:
    block = torch.full((3, 10_000), 7.0, device="cuda")
    weight, around = block[1], block[[0, 2]].clone()
    low, high = torch.iinfo(index_dtype).min, torch.iinfo(index_dtype).max
    indices = torch.tensor([low, -10_000, -1, 10_000, 19_999, high], dtype=index_dtype, device="cuda")
    values, saved = torch.ones(6, device="cuda"), torch.zeros(6, device="cuda")
    with backend.running():
        torch.ops.shira.scatter_apply(weight, indices, values, 1.0, False, saved)
    for bad_offsets in ([0, 6, 6], [0, -5, 6], [9, 2, 6]):
        with backend.running():
            offsets = torch.tensor(bad_offsets, device="cuda")
            torch.ops.shira.scatter_apply_batched([weight[:5000], weight[5000:]], offsets, indices, values)
    torch.cuda.synchronize()
    assert torch.equal(block[[0, 2]], around)


@each_gpu_backend
def test_checked_mode_refuses_before_anything_is_written(backend: Backend) -> None:
    weight, values = torch.zeros(10, device="cuda"), torch.ones(3, device="cuda")
    for numbers in ([1, 3, 2], [1, 1, 2], [-1, 0, 1], [8, 9, 10]):
        indices = torch.tensor(numbers, device="cuda")
        with backends.checked(), pytest.raises(RuntimeError, match="indices must"), backend.running(times=0):
            torch.ops.shira.scatter_apply(weight, indices, values)
        offsets = torch.tensor([0, 0, 3], device="cuda")
        with backends.checked(), pytest.raises(RuntimeError, match="indices must"), backend.running(times=0):
            torch.ops.shira.scatter_apply_batched([torch.zeros(4, device="cuda"), weight], offsets, indices, values)
    offsets = torch.tensor([0, 4], device="cuda")
    with backends.checked(), pytest.raises(RuntimeError, match="offsets must"), backend.running(times=0):
        torch.ops.shira.scatter_apply_batched([weight], offsets, torch.tensor([0, 1, 2], device="cuda"), values)
    assert not weight.any()
    with backends.checked(), backend.running():
        torch.ops.shira.scatter_apply(weight, torch.tensor([0, 5, 9], device="cuda"), values)
    assert weight.sum() == 3


@each_gpu_backend
def test_more_weights_than_one_launch_holds(backend: Backend) -> None:
    weights = [torch.zeros(4, device="cuda") for _ in range(2500)]
    indices = torch.full((2500,), 2, dtype=torch.int32, device="cuda")
    values = torch.arange(2500.0, device="cuda")
    for device in ("cpu", "cuda"):
        for weight in weights:
            weight.zero_()
        with backends.checked(), backend.running():
            torch.ops.shira.scatter_apply_batched(weights, torch.arange(2501, device=device), indices, values)
        assert torch.equal(torch.stack(weights)[:, 2], values)
        assert torch.stack(weights).sum() == values.sum()


@each_gpu_backend
def test_addresses_beyond_2_to_31(backend: Backend) -> None:
    indices = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 70_001], device="cuda")
    weight = torch.zeros(2**31 + 70_002, dtype=torch.uint8, device="cuda")
    with backend.running():
        torch.ops.shira.scatter_apply(weight, indices, torch.arange(1, 5, dtype=torch.uint8, device="cuda"))
    assert weight[indices].tolist() == [1, 2, 3, 4]
    assert int(weight.sum(dtype=torch.int64)) == 10


BEYOND = [0, 2**31 - 1, 2**31, 2**31 + 70_001]


@pytest.mark.slow_gpu
@each_gpu_backend
def test_addresses_beyond_2_to_31_of_a_model(backend: Backend) -> None:
    """A weight of 2 GiB beside a small one; of adamw 4 GiB."""
    device = torch.device(DEVICE)
    small, huge = (
        torch.zeros(6, dtype=torch.uint8, device=device),
        torch.zeros(2**31 + 70_002, dtype=torch.uint8, device=device),
    )
    offsets, indices = torch.tensor([0, 2, 6]), torch.tensor([1, 5, *BEYOND], device=device)
    values, saved = (
        torch.arange(1, 7, dtype=torch.uint8, device=device),
        torch.zeros(6, dtype=torch.uint8, device=device),
    )
    with backend.running():
        torch.ops.shira.scatter_apply_batched([small, huge], offsets, indices, values, 1.0, False, saved)
    assert small.tolist() == [0, 1, 0, 0, 0, 2]
    assert huge[indices[2:]].tolist() == [3, 4, 5, 6]
    assert int(huge.sum(dtype=torch.int64)) == 18
    assert not saved.any()
    if not backend.missing("scatter_switch_batched"):
        new = torch.tensor([0, 5, 7, 2**31, 2**31 + 70_001], device=device)
        more, kept = (
            torch.arange(11, 16, dtype=torch.uint8, device=device),
            torch.zeros(5, dtype=torch.uint8, device=device),
        )
        with backend.running():
            torch.ops.shira.scatter_switch_batched(
                [small, huge], offsets, indices, saved, torch.tensor([0, 2, 5]), new, more, kept
            )
        assert small.tolist() == [11, 0, 0, 0, 0, 12]
        assert huge[new[2:]].tolist() == [13, 14, 15]
        assert int(huge.sum(dtype=torch.int64)) == 42
        assert not kept.any()
    del huge
    weight = torch.ones(2**31 + 70_002, dtype=torch.bfloat16, device=device)
    grads, states = [torch.ones(4, device=device)], [torch.zeros(4, device=device) for _ in range(3)]
    states[2].fill_(1)
    with backend.running():
        torch.ops.shira.masked_adamw(
            [weight], torch.tensor([0, 4]), torch.tensor(BEYOND, device=device), grads, *states,
            torch.tensor(1.0), 0.5, 0.9, 0.999, 1e-8, 0.0,
        )  # fmt: skip
    assert weight[torch.tensor(BEYOND, device=device)].tolist() == [0.5] * 4
    assert [int((part != 1).sum()) for part in weight.split(2**30)] == [1, 1, 2]


@each_gpu_backend
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32),
        *(torch.int64, torch.float64, torch.complex64),
    ],
    ids=str,
)
def test_a_model_of_any_element_type_is_replaced_to_the_bit(backend: Backend, dtype: torch.dtype) -> None:
    generator, size = torch.Generator().manual_seed(0), dtype.itemsize

    def random(count: int) -> torch.Tensor:
        high = 2 if dtype == torch.bool else 256  # every bit pattern, so NaNs of every payload too
        return torch.randint(0, high, (count * size,), dtype=torch.uint8, generator=generator).view(dtype).to(DEVICE)

    weights = [random(count) for count in (1000, 7, 3)]
    before = [bits(weight).view(-1, size) for weight in weights]
    lists = [sorted_indices(1000, 300, torch.int32), torch.tensor([2, 6]), torch.tensor([], dtype=torch.int32)]
    indices, offsets = torch.cat([each.int() for each in lists]).to(DEVICE), torch.tensor([0, 300, 302, 302])
    values, saved = random(302), torch.zeros(302 * size, dtype=torch.uint8, device=DEVICE).view(dtype)
    with backend.running():
        torch.ops.shira.scatter_apply_batched(weights, offsets, indices, values, 1.0, False, saved)
    for weight, old, which, begin in zip(weights, before, lists, (0, 300, 302), strict=True):
        part = slice(begin, begin + which.numel())
        want = old.clone()
        want[which.long()] = bits(values).view(-1, size)[part]
        assert torch.equal(bits(weight).view(-1, size), want)
        assert torch.equal(bits(saved).view(-1, size)[part], old[which.long()])


@each_gpu_backend
def test_same_bits_each_time(backend: Backend) -> None:
    weights, offsets, indices, values = model()
    results = []
    for _ in range(3):
        copies = [weight.clone() for weight in weights]
        with backend.running():
            torch.ops.shira.scatter_apply_batched(copies, offsets, indices, values, 0.3, True)
        results.append(torch.cat([bits(copy) for copy in copies]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def adamw_arguments() -> tuple:
    """A model with compact and dense gradients, and everything, the step too, on the GPU."""
    weights, offsets, indices, grad = model()
    compact, _, last = grad.split(offsets.diff().tolist())
    grads = [compact, torch.linspace(-1, 1, weights[1].numel(), device="cuda"), last]
    states = [torch.zeros_like(grad) for _ in range(2)]
    master, step = torch.ones_like(grad), torch.ones((), device="cuda")
    return weights, offsets, indices, grads, *states, master, step, 1e-2, 0.9, 0.999, 1e-8, 0.1


@each_gpu_backend
def test_a_replayed_step_of_adamw_reads_the_step_that_is_there_then(backend: Backend) -> None:
    arguments, expected = adamw_arguments(), adamw_arguments()
    run = backends.kernel("masked_adamw", backend.name)
    run(*adamw_arguments())  # warms up
    run(*arguments)  # and this one's tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*arguments)
    for step in range(2, 6):
        arguments[7].fill_(step)
        graph.replay()
    with backends.use("reference"):
        for step in range(1, 6):
            torch.ops.shira.masked_adamw(*expected[:7], torch.tensor(float(step)), *expected[8:])
    torch.cuda.synchronize()
    for got, want in zip((*arguments[0], *arguments[4:7]), (*expected[0], *expected[4:7]), strict=True):
        assert torch.equal(bits(got), bits(want))


@each_gpu_backend
def test_adamw_touches_nothing_outside_whatever_the_indices(backend: Backend) -> None:
    block = torch.full((3, 10_000), 7.0, device="cuda")
    weight, around = block[1], block[[0, 2]].clone()
    indices = torch.tensor([-(2**40), -10_000, -1, 10_000, 19_999, 2**40], device="cuda")
    states = [torch.zeros(6, device="cuda") for _ in range(3)]
    for offsets in ([0, 6, 6], [0, -5, 6], [9, 2, 6]):
        for size in (0, 3, 5000):
            grads = [torch.ones(size, device="cuda"), torch.ones(5000, device="cuda")]
            with backend.running():
                torch.ops.shira.masked_adamw(
                    [weight[:5000], weight[5000:]], torch.tensor(offsets, device="cuda"), indices, grads, *states,
                    torch.tensor(1.0), 1e-2, 0.9, 0.999, 1e-8, 0.1,
                )  # fmt: skip
    torch.cuda.synchronize()
    assert torch.equal(block[[0, 2]], around)


@each_gpu_backend
def test_adamw_of_more_weights_than_one_launch_holds(backend: Backend) -> None:
    indices = torch.full((2000,), 2, dtype=torch.int32, device="cuda")
    results = []
    for device in ("cpu", "cuda"):
        weights = [torch.ones(4, device="cuda") for _ in range(2000)]
        grads = list(torch.arange(1.0, 2001.0, device="cuda").split(1))
        states = [torch.zeros(2000, device="cuda") for _ in range(2)]
        with backends.checked(), backend.running():
            torch.ops.shira.masked_adamw(
                weights, torch.arange(2001, device=device), indices, grads, *states, None,
                torch.tensor(1.0), 1e-2, 0.9, 0.999, 1e-8, 0.0,
            )  # fmt: skip
        results.append(torch.stack(weights))
        torch.testing.assert_close(states[0], torch.cat(grads) * 0.1)
    assert torch.equal(*results)
    assert (results[0][:, 2] < 1).all()
    assert (results[0][:, [0, 1, 3]] == 1).all()


triton_only = pytest.mark.skipif(
    bool(GPU_BACKENDS[0].missing("add_sparse_delta_mm_batched")),
    reason=GPU_BACKENDS[0].missing("add_sparse_delta_mm_batched"),
)


@triton_only
@pytest.mark.parametrize("tokens", [4, 100])
def test_a_captured_batch_follows_the_adapters_of_its_tokens(tokens: int) -> None:
    stored, _ = sparse_delta.arena(
        sparse_delta.mixed_masks(300, 200, 0.05), torch.float32, torch.int32, torch.uint16, 64
    )
    operands = [tensor.cuda() for tensor in stored]
    x, out = torch.randn(tokens, 200, device="cuda"), torch.zeros(tokens, 300, device="cuda")
    token_adapter = torch.full((tokens,), -1, dtype=torch.int32, device="cuda")
    run = backends.kernel("add_sparse_delta_mm_batched", "triton")
    run(out, x, token_adapter, *operands)  # warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out, x, token_adapter, *operands)
    for step in (1, 2, 5):
        adapters = torch.tensor([-1, *sparse_delta.SLOTS], dtype=torch.int32)[torch.arange(tokens) * step % 4]
        token_adapter.copy_(adapters)
        x.normal_()
        out.fill_(step)
        graph.replay()
        expected = torch.full((tokens, 300), float(step))
        with backends.use("reference"):
            torch.ops.shira.add_sparse_delta_mm_batched(expected, x.cpu(), adapters, *stored)
        torch.testing.assert_close(out.cpu(), expected)


@triton_only
@pytest.mark.parametrize("tokens", [5, 40])
def test_products_touch_nothing_outside_whatever_the_entries(tokens: int) -> None:
    sparse_delta.check_nothing_outside("cuda", tokens)
