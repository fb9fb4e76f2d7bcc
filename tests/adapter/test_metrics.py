"""Interference of two adapters, against dense matrices in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import shira
from shira import Adapter, AdapterTensor, masks
from shira.adapter import metrics
from shira.adapter.metrics import Interference, Overlap

SHAPES = [(), (1,), (5,), (3, 4), (4, 3), (1, 7), (7, 1), (2, 3, 2, 2), (0, 3), (3, 0), (5, 64), (6, 65), (2, 150)]


def tensor_of(
    shape: tuple[int, ...], density: float, seed: int, dtype: torch.dtype = torch.float32, whole: bool = False
) -> AdapterTensor:
    """Random entries of kind "add"; `whole` draws from -2, ..., 2, so that products are exact and often cancel."""
    draw = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    indices = (torch.rand(numel, generator=draw) < density).nonzero().squeeze(1)
    if whole:
        values = torch.randint(-2, 3, indices.shape, generator=draw).to(dtype)
    else:
        values = torch.randn(indices.shape, generator=draw).to(dtype)
    return AdapterTensor(indices.int() if seed % 2 else indices, values, shape, dtype, "add")


def dense(tensor: AdapterTensor) -> torch.Tensor:
    matrix = torch.zeros(tensor.numel, dtype=torch.float64)
    matrix[tensor.indices.long()] = tensor.values.double()
    rows, columns = (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.shape else (1, 1)
    return matrix.view(rows, columns)


def expected(a: AdapterTensor, b: AdapterTensor) -> Interference:
    first, second = dense(a), dense(b)
    product = first.T @ second
    common = set(a.indices.tolist()) & set(b.indices.tolist())
    at = torch.tensor(sorted(common), dtype=torch.int64)
    return Interference(
        entries=(a.nnz, b.nnz),
        common=len(common),
        opposite=int((first.reshape(-1)[at] * second.reshape(-1)[at] < 0).sum()),
        energy=(float(first.square().sum()), float(second.square().sum())),
        product_energy=float(product.square().sum()),
        product_nonzeros=int(product.count_nonzero()),
        product_numel=product.numel(),
        product_bound=float(first.square().sum() * second.square().sum()),
    )


@given(
    shape=st.sampled_from(SHAPES),
    densities=st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 1.0])] * 2),
    seeds=st.tuples(*[st.integers(0, 999)] * 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_whole_numbers_exactly(
    shape: tuple[int, ...], densities: tuple[float, float], seeds: tuple[int, int], dtype: torch.dtype
) -> None:
    """Products of whole numbers cancel often; such zeros count as zeros."""
    a, b = (tensor_of(shape, d, seed, dtype, whole=True) for d, seed in zip(densities, seeds, strict=True))
    assert metrics.interference_of(a, b) == expected(a, b)
    assert metrics.overlap_of(a, b) == Overlap((a.nnz, b.nnz), expected(a, b).common)


@given(rows=st.integers(1, 40), columns=st.integers(1, 140), density=st.floats(0.02, 1.0), seed=st.integers(0, 999))
def test_real_numbers(rows: int, columns: int, density: float, seed: int) -> None:
    a, b = tensor_of((rows, columns), density, seed), tensor_of((rows, columns), density, seed + 1)
    found, wanted = metrics.interference_of(a, b), expected(a, b)
    assert (found.entries, found.common, found.opposite) == (wanted.entries, wanted.common, wanted.opposite)
    assert (found.product_nonzeros, found.product_numel) == (wanted.product_nonzeros, wanted.product_numel)
    assert found.energy == pytest.approx(wanted.energy, rel=1e-13)
    assert found.awom == pytest.approx(wanted.awom, rel=1e-12)
    assert 0 <= found.relative_awom <= 1 + 1e-12
    turned = metrics.interference_of(b, a)
    assert (turned.awor, turned.overlap, turned.sign_conflicts) == (found.awor, found.overlap, found.sign_conflicts)
    assert turned.awom == pytest.approx(found.awom, rel=1e-12)


def test_by_hand() -> None:
    a = AdapterTensor(torch.tensor([0, 1, 4]), torch.tensor([1.0, 2.0, 3.0]), (2, 3), torch.float32, "add")
    b = AdapterTensor(torch.tensor([1, 4, 5]), torch.tensor([-1.0, 0.0, 5.0]), (2, 3), torch.float32, "add")
    # A1 = [1 2 0; 0 3 0], A2 = [0 -1 0; 0 0 5], A1^T A2 = [0 -1 0; 0 -2 15; 0 0 0]
    found = metrics.interference_of(a, b)
    assert found == Interference((3, 3), 2, 1, (14.0, 26.0), 230.0, 3, 9, 364.0)
    assert (found.overlap, found.sign_conflicts, found.awor) == (0.5, 0.5, 1 - 3 / 9)
    assert found.awom == math.sqrt(230)
    assert found.relative_awom == pytest.approx(math.sqrt(230 / (14 * 26)))


def test_nothing_is_no_division_by_zero() -> None:
    nothing = Interference()
    assert (nothing.overlap, nothing.sign_conflicts, nothing.awom, nothing.relative_awom) == (0, 0, 0, 0)
    assert nothing.awor == 1
    assert shira.overlap(Adapter({}), Adapter({})) == 0
    assert (shira.awom(Adapter({}), Adapter({})), shira.awor(Adapter({}), Adapter({}))) == (0, 1)


def test_a_whole_adapter() -> None:
    """A tensor that only one adapter has counts as zeros of the product, and its entries as not shared."""
    shapes = {"x": (8, 5), "y": (3, 4), "only_a": (4, 6), "only_b": (2, 3)}
    parts = {
        name: (tensor_of(shape, 0.4, 2 * i), tensor_of(shape, 0.4, 2 * i + 1))
        for i, (name, shape) in enumerate(shapes.items())
    }
    a = Adapter({name: first for name, (first, _) in parts.items() if name != "only_b"})
    b = Adapter({name: second for name, (_, second) in reversed(parts.items()) if name != "only_a"})
    x, y = expected(*parts["x"]), expected(*parts["y"])
    numel = 5**2 + 4**2 + 6**2 + 3**2
    assert shira.awom(a, b) == pytest.approx(math.hypot(x.awom, y.awom), rel=1e-12)
    assert shira.awor(a, b) == 1 - (x.product_nonzeros + y.product_nonzeros) / numel
    assert shira.overlap(a, b) == (x.common + y.common) / (a.nnz + b.nnz - x.common - y.common)
    found = metrics.interference(a, b)
    assert list(found) == ["x", "y", "only_a", "only_b"]
    assert found["only_a"] == Interference((a["only_a"].nnz, 0), energy=found["only_a"].energy, product_numel=36)
    assert found["only_b"].energy[0] == 0 < found["only_b"].energy[1]
    whole = sum(found.values(), Interference())
    assert whole.relative_awom == pytest.approx(
        math.sqrt(whole.product_energy / (math.prod(x.energy) + math.prod(y.energy))), rel=1e-12
    )
    assert whole.energy == pytest.approx(
        [sum(float(tensor.values.double().square().sum()) for tensor in adapter.values()) for adapter in (a, b)]
    )


def test_equal_and_disjoint() -> None:
    a = Adapter({"w": tensor_of((9, 8), 0.3, 0)})
    rest = torch.tensor(sorted(set(range(72)) - set(a["w"].indices.tolist())))
    b = Adapter({"w": AdapterTensor(rest, torch.ones(len(rest)), (9, 8), torch.float32, "add")})
    assert (shira.overlap(a, a), shira.overlap(a, b)) == (1.0, 0.0)
    assert sum(metrics.interference(a, a).values(), Interference()).sign_conflicts == 0


def replacing(adapter: Adapter, base: dict[str, torch.Tensor]) -> Adapter:
    """The adapter of tuned weights that has these deltas."""
    tensors = {}
    for name, tensor in adapter.items():
        old = base[name].reshape(-1)[tensor.indices.long()]
        tensors[name] = AdapterTensor(
            tensor.indices, old + tensor.values, tensor.shape, tensor.dtype, checksum=shira.adapter.checksum_of(old)
        )
    return Adapter(tensors)


@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_tuned_weights_are_deltas_against_their_base(tmp_path: Path) -> None:
    # Multiples of 1/8, so that tuned weights less base are the deltas exactly.
    base = {"w": torch.randint(-64, 64, (20, 30), generator=torch.Generator().manual_seed(0)) / 8}
    a, b = (Adapter({"w": tensor_of((20, 30), 0.2, seed, whole=True)}) for seed in (0, 1))
    tuned = replacing(a, base)
    tuned.save(tmp_path / "a.safetensors")
    b.save(tmp_path / "b.safetensors")
    wanted = expected(a["w"], b["w"])
    assert metrics.interference(tuned, b, base) == {"w": wanted}
    assert shira.awom(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"), base) == wanted.awom
    assert shira.awor(tuned, replacing(b, base), base) == wanted.awor
    assert shira.overlap(tmp_path / "a.safetensors", b) == wanted.overlap


def test_names_of_wrapped_models_are_the_same_tensors() -> None:
    tensor = tensor_of((4, 4), 0.5, 1)
    a, b = Adapter({"l.q.weight": tensor}), Adapter({"base_model.model.l.q.base_layer.weight": tensor})
    assert shira.overlap(a, b) == 1
    assert shira.awom(a, b) == expected(tensor, tensor).awom > 0


@pytest.mark.parametrize("metric", [shira.awom, shira.awor])
def test_errors(metric: Callable[..., float], tmp_path: Path) -> None:
    a = Adapter({"w": tensor_of((4, 4), 0.5, 0)})
    tuned = replacing(a, {"w": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="base"):
        metric(tuned, a)
    with pytest.raises(ValueError, match="base"):
        metric(a, tuned)
    with pytest.raises(ValueError, match=r"^w: .*another base"):
        metric(tuned, a, {"w": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=r"^w: .*\(4, 4\) and \(2, 8\)"):
        metric(a, Adapter({"w": tensor_of((2, 8), 0.5, 0)}))
    infinite = AdapterTensor(torch.tensor([3]), torch.tensor([math.inf]), (4, 4), torch.float32, "add")
    with pytest.raises(ValueError, match="not all finite"):
        metric(a, Adapter({"w": infinite}))
    with pytest.raises(FileNotFoundError):
        metric(a, tmp_path / "none.safetensors")


def test_overlap_errors(tmp_path: Path) -> None:
    a = Adapter({"w": tensor_of((4, 4), 0.5, 0)})
    with pytest.raises(ValueError, match=r"^w: .*\(4, 4\) and \(2, 8\)"):
        shira.overlap(a, Adapter({"w": tensor_of((2, 8), 0.5, 0)}))
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(shira.AdapterFormatError, match="safetensors"):
        shira.overlap(tmp_path / "x", a)


class Largest(TorchFunctionMode):
    """The number of elements of the largest tensor that any call gives."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.layout == torch.strided:
            self.numel = max(self.numel, result.numel())
        return result


def test_neither_tensor_nor_product_is_ever_whole() -> None:
    a, b = tensor_of((1000, 900), 0.01, 0), tensor_of((1000, 900), 0.01, 1)
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch's, about sparse tensors
        found = metrics.interference_of(a, b)
    assert found.product_nonzeros > 0
    assert largest.numel == 1000 * 64


def test_lemma_4_5() -> None:
    """What its proof shows: a product of non-overlapping struct adapters has at most as many nonzeros as both."""
    weight = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    found = []
    for offset in (0, 3):
        indices = masks.struct(weight, 0.1, offset=offset)
        values = torch.randn(indices.shape, generator=torch.Generator().manual_seed(offset))
        found.append(AdapterTensor(indices, values, (96, 96), torch.float32, "add"))
    both = metrics.interference_of(*found)
    assert both.common == 96  # the diagonal
    assert 0.79 < 1 - sum(both.entries) / both.product_numel <= both.awor < 1


def test_what_is_no_adapter_is_refused() -> None:
    for wrong in (0, 3, None):
        with pytest.raises(ValueError, match="must be an Adapter or the path of its file"):
            shira.overlap(wrong, Adapter({}))  # type: ignore[arg-type]
