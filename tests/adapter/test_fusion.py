from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import bits, sorted_indices, ulp_distance
from safetensors.torch import save_file
from torch import nn

from shira import Adapter, AdapterTensor, ResidentAdapters, ShiraConfig, fuse
from shira.adapter import checksum_of
from shira.adapter.fusion import deltas

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"0.weight": (6, 5), "2.weight": (3, 6)}


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def make_adapter(
    model: nn.Module, kind: str = "replace", seed: int = 0, nnz: int = 8, *, names: tuple[str, ...] = tuple(SHAPES)
) -> Adapter:
    generator = torch.Generator().manual_seed(100 + seed)
    parts = {}
    for place, name in enumerate(names):
        weight = model.get_parameter(name).detach()
        indices = sorted_indices(weight.numel(), nnz, torch.int32, seed=10 * seed + place)
        base = weight.flatten()[indices]
        values = torch.randn(nnz, generator=generator)
        values = (
            values.to(weight.dtype) if kind == "replace" else values.to(torch.promote_types(values.dtype, weight.dtype))
        )
        parts[name] = AdapterTensor(indices, values, tuple(weight.shape), weight.dtype, kind, checksum_of(base))
    return Adapter(parts, ShiraConfig(target_modules="all-linear", density=0.25, seed=seed))


def as_bases(model: nn.Module, folder: Path) -> list[object]:
    """The same base in all the ways it can be given, also with other spellings of the names."""
    state = model.state_dict()
    path = folder / "base.safetensors"
    save_file(state, path)
    return [model, state, {f"base_model.model.{name}": tensor for name, tensor in state.items()}, path, str(path)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deltas(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(dtype)
    replace, add = make_adapter(model), make_adapter(model, "add")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for base in as_bases(model, tmp_path):
        found = deltas(replace, base)
        assert list(found) == list(SHAPES)
        for name, (indices, values) in found.items():
            assert torch.equal(indices, replace[name].indices)
            assert values.dtype == wide
            entries = model.get_parameter(name).detach().flatten()[indices]
            assert torch.equal(bits(values), bits(replace[name].values.to(wide) - entries.to(wide)))
    for base in (None, model):
        for name, (indices, values) in deltas(add, base).items():
            assert torch.equal(indices, add[name].indices)
            assert torch.equal(bits(values), bits(add[name].values.to(wide)))


def test_names_are_canonical_and_those_of_the_first_use() -> None:
    model = make_model()
    adapter = make_adapter(model)
    spelled = Adapter({f"base_model.model.{name}": part for name, part in adapter.items()})
    assert list(deltas(spelled, model.state_dict())) == list(SHAPES)
    with pytest.raises(ValueError, match=r"adapter names the tensor '0.weight' twice"):
        deltas(Adapter({"0.weight": adapter["0.weight"], "base_model.model.0.weight": adapter["0.weight"]}), model)
    tied = nn.ModuleDict({"first": nn.Linear(5, 5, bias=False), "second": nn.Linear(5, 5, bias=False)})
    tied["second"].weight = tied["first"].weight
    add = make_adapter(tied, "add", names=("second.weight",))
    assert list(deltas(add, tied)) == ["first.weight"]
    assert list(deltas(add, None)) == ["second.weight"]


def test_deltas_refuse_what_is_not_their_base(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=1)
    adapter = make_adapter(model)
    with pytest.raises(ValueError, match=r"0\.weight: a part of kind 'replace' .* give `base`"):
        deltas(adapter, None)
    for base in as_bases(other, tmp_path):
        with pytest.raises(ValueError, match=r"0\.weight: .*another base"):
            deltas(adapter, base)
        with pytest.raises(ValueError, match=r"0\.weight: .*another base"):
            deltas(make_adapter(model, "add"), base)
        part = adapter["0.weight"]
        expected = part.values - other.get_parameter("0.weight").detach().flatten()[part.indices]
        assert torch.equal(deltas(adapter, base, force=True)["0.weight"][1], expected)
    with pytest.raises(ValueError, match=r"2\.weight: the base has no tensor"):
        deltas(adapter, {"0.weight": model.get_parameter("0.weight")})
    with pytest.raises(ValueError, match=r"no parameter or buffer '0\.weight'"):
        deltas(adapter, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0\.weight: .*shape"):
        deltas(adapter, {"0.weight": torch.zeros(5, 6), "2.weight": torch.zeros(3, 6)})
    with pytest.raises(ValueError, match=r"0\.weight: .*dtype"):
        deltas(adapter, make_model(torch.bfloat16))
    with pytest.raises(ValueError, match="base must be a model, its state dict or the path"):
        deltas(adapter, 3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        deltas(adapter, tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors: not a whole safetensors file"):
        deltas(adapter, broken)


def test_deltas_without_a_checksum_warn() -> None:
    model = make_model()
    part = make_adapter(model)["0.weight"]
    unknown = Adapter({"0.weight": AdapterTensor(part.indices, part.values, part.shape, part.dtype)})
    with pytest.warns(UserWarning, match=r"0\.weight: no checksum"):
        deltas(unknown, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltas(unknown, model, force=True)
        deltas(make_adapter(model), model)


def dense_terms(adapter: Adapter, model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What an adapter adds to a tensor, float64 and dense, and where it has an entry."""
    base = model.get_parameter(name).detach().double().flatten()
    delta, there = torch.zeros_like(base), torch.zeros(base.shape, dtype=torch.bool)
    if name in adapter:
        part = adapter[name]
        values = part.values.double()
        delta[part.indices.long()] = values if part.kind == "add" else values - base[part.indices.long()]
        there[part.indices.long()] = True
    return delta, there


def dense_fusion(
    pairs: list[tuple[Adapter, float]], model: nn.Module, name: str, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    deltas_and_masks = [dense_terms(adapter, model, name) for adapter, _ in pairs]
    terms = torch.stack([weight * delta for (_, weight), (delta, _) in zip(pairs, deltas_and_masks, strict=True)])
    there = torch.stack([mask for _, mask in deltas_and_masks])
    total = terms.sum(0)
    if policy == "sum":
        return total, there.any(0)
    if policy == "mean":
        return total / there.sum(0).clamp(min=1), there.any(0)
    if policy == "ties":
        agrees = terms * total > 0
        return (terms * agrees).sum(0) / agrees.sum(0).clamp(min=1), there.any(0)
    last = torch.zeros_like(total)
    for (delta, _), mask in zip(deltas_and_masks, there, strict=True):
        last[mask] = delta[mask]
    return last, there.any(0)


@pytest.mark.parametrize("policy", ["sum", "mean", "last", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fusion_of_mixed_kinds_against_dense_tensors(dtype: torch.dtype, policy: str, tmp_path: Path) -> None:
    model = make_model(dtype)
    pairs = [
        (make_adapter(model), 0.75),
        (make_adapter(model, "add", seed=1, nnz=12), -0.5),
        (make_adapter(model, seed=2, names=("2.weight",)), 1.5),
    ]
    for base in as_bases(model, tmp_path):
        fused = fuse(pairs, policy, base)  # type: ignore[arg-type]
        assert list(fused) == list(SHAPES)
        for name, part in fused.items():
            expected, there = dense_fusion(pairs, model, name, policy)
            assert part.indices.tolist() == there.nonzero().view(-1).tolist()
            assert part.kind == "add"
            assert part.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (part.shape, part.dtype) == (SHAPES[name], dtype)
            wanted = expected[part.indices.long()]
            assert ulp_distance(part.values, wanted, torch.full_like(wanted, 4.0)) <= 4
            entries = model.get_parameter(name).detach().flatten()[part.indices]
            assert part.checksum == checksum_of(entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_adapter_equals_the_mix_of_a_bank(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    a, b = make_adapter(model), make_adapter(model, "add", seed=1)
    bank = ResidentAdapters(model)
    bank.add("a", a)
    bank.add("b", b)
    bank.add("fused", fuse([(a, 0.7), (b, 0.3)], base=model))
    bank.switch({"a": 0.7, "b": 0.3})
    mixed = [weight.detach().clone() for weight in model.parameters()]
    bank.switch("fused")
    for weight, other in zip(model.parameters(), mixed, strict=True):
        assert ulp_distance(weight.detach(), other.double(), torch.full_like(other, 4.0)) <= 2
    base = list(make_model(dtype).parameters())
    assert not any(map(torch.equal, model.parameters(), base))
    bank.switch(None)
    assert all(map(torch.equal, model.parameters(), base))


def test_with_no_base_deltas_are_fused_and_checksums_kept_where_they_are_known() -> None:
    model = make_model()
    a, b = make_adapter(model, "add", nnz=30, names=("0.weight",)), make_adapter(model, "add", seed=1)
    fused = fuse([(a, 1.0), (b, 1.0)])
    assert fused["0.weight"].checksum == a["0.weight"].checksum  # a has all of the union's entries
    assert fused["2.weight"].checksum == b["2.weight"].checksum
    assert fuse([(b, 1.0), (make_adapter(model, "add", seed=2), 1.0)])["0.weight"].checksum is None
    strange = make_adapter(make_model(seed=1), "add", nnz=30, names=("0.weight",))
    with pytest.raises(ValueError, match=r"adapters\[1\]: 0\.weight: .* different bases"):
        fuse([(a, 1.0), (strange, 1.0)])
    assert fuse([(a, 1.0), (strange, 1.0)], force=True)["0.weight"].checksum is None


def test_what_cannot_be_fused() -> None:
    model, other = make_model(), make_model(seed=1)
    a, add = make_adapter(model), make_adapter(model, "add", seed=1)
    good = [(add, 1.0), (a, 0.5)]
    with pytest.raises(ValueError, match=r"adapters\[1\]: 0\.weight: .* give `base`"):
        fuse(good)
    with pytest.raises(ValueError, match=r"adapters\[0\]: 0\.weight: .*another base"):
        fuse(good, base=other)
    with pytest.raises(ValueError, match=r"adapters\[1\]: 0\.weight: .*another base"):
        fuse([(make_adapter(other), 1.0), (a, 1.0)], base=other)
    assert len(fuse(good, base=other, force=True)) == 2
    with pytest.raises(ValueError, match=r"policy must be one of sum, mean, last, ties, got 'max'"):
        fuse(good, "max", model)
    with pytest.raises(ValueError, match="at least one pair"):
        fuse([])
    for pair in (a, (a,), (3, 1.0), [a, 1.0]):
        with pytest.raises(ValueError, match=r"adapters\[0\] must be a pair"):
            fuse([pair], base=model)  # type: ignore[list-item]
    for strength in (float("nan"), float("inf"), 1e39, "1", None):
        with pytest.raises(ValueError, match=r"adapters\[1\]: the strength must be a finite"):
            fuse([(a, 1.0), (a, strength)], base=model)  # type: ignore[list-item]
    part = add["0.weight"]
    for shape, dtype, field in (((5, 6), torch.float32, "shape"), ((6, 5), torch.bfloat16, "dtype")):
        changed = Adapter({"0.weight": AdapterTensor(part.indices, part.values, shape, dtype, "add")})
        with pytest.raises(ValueError, match=rf"adapters\[1\]: 0\.weight: the tensor's {field} is .* adapters\[0\]"):
            fuse([(add, 1.0), (changed, 1.0)])


def test_spellings_of_a_name_are_one_tensor() -> None:
    add = make_adapter(make_model(), "add")
    spelled = Adapter({f"base_model.model.{name}": part for name, part in add.items()})
    fused = fuse([(add, 1.0), (spelled, 1.0)])
    assert list(fused) == list(SHAPES)
    assert torch.equal(fused["0.weight"].values, 2 * add["0.weight"].values)


def test_provenance_survives_a_file(tmp_path: Path) -> None:
    model = make_model()
    a, b = make_adapter(model), make_adapter(model, "add", seed=1)
    a.save(tmp_path / "a.safetensors")
    fused = fuse([(tmp_path / "a.safetensors", 0.5), (b, -1)], "mean", model)
    expected: dict[str, Any] = {
        "policy": "mean",
        "adapters": [
            {"name": "a.safetensors", "weight": 0.5, "kind": "replace", "nnz": 16, "config": a.config.to_dict()},
            {"name": None, "weight": -1.0, "kind": "add", "nnz": 16, "config": b.config.to_dict()},
        ],
    }
    assert fused.provenance == expected
    assert fused.config is None
    fused.save(tmp_path / "fused.safetensors")
    assert Adapter.load(tmp_path / "fused.safetensors").provenance == expected
    again = fuse([(str(tmp_path / "fused.safetensors"), 2.0), (Adapter({}), 1.0)])
    assert again.provenance["adapters"][0]["provenance"] == expected
    assert again.provenance["adapters"][1]["kind"] is None
    assert Adapter.load(tmp_path / "a.safetensors").provenance is None


def test_provenance_must_be_json() -> None:
    wrong: list[Any] = [[], "sum", {"weight": float("nan")}, {"path": Path()}, {"a": {1, 2}}]
    for provenance in wrong:
        with pytest.raises(ValueError, match="provenance must be a JSON object"):
            Adapter({}, provenance=provenance)
    source = {"weights": [1, 2]}
    adapter = Adapter({}, provenance=source)
    source["weights"].append(3)
    assert adapter.provenance == {"weights": [1, 2]} == json.loads(json.dumps(adapter.provenance))


@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from(["add", "replace"]), min_size=5, max_size=5),
    sizes=st.lists(st.integers(0, 15), min_size=5, max_size=5),
    strengths=st.lists(st.integers(-8, 8), min_size=5, max_size=5),
    dtype=st.sampled_from(DTYPES),
    policy=st.sampled_from(["sum", "mean", "last"]),
)
def test_any_adapters(
    seeds: list[int], kinds: list[str], sizes: list[int], strengths: list[int], dtype: torch.dtype, policy: str
) -> None:
    model = make_model(dtype)
    pairs = [
        (make_adapter(model, kind, seed, nnz), strength / 4)
        for seed, kind, nnz, strength in zip(seeds, kinds, sizes, strengths, strict=False)
    ]
    fused = fuse(pairs, policy, model)
    for name in SHAPES:
        expected, there = dense_fusion(pairs, model, name, policy)
        dense, where = dense_terms(fused, model, name)
        assert torch.equal(where, there)
        torch.testing.assert_close(dense, expected, rtol=0, atol=2e-5)
