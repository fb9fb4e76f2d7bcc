from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from oracle import bits, sorted_indices
from safetensors.torch import save_file
from torch import nn

from shira import Adapter, AdapterTensor, ShiraConfig
from shira.adapter import checksum_of
from shira.fusion import deltas

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
    with pytest.raises(ValueError, match=r"no parameter '0\.weight'"):
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
