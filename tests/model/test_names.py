"""Names of a model's tensors behind wrappers, on disk and in memory, and what an adapter's names may mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import mlp
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import shira
from shira import Adapter, AdapterTensor
from shira.adapter.base import BaseTensors
from shira.convert.merge import fit_of
from shira.model.names import bare_model, canonical, canonical_in, first_names, resolve


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """One process as a group of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_layer(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0])  # type: ignore[assignment]
    return model


def checkpointed_layer(model: nn.Sequential) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])
    return model


def peft_of(model: nn.Sequential) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))  # type: ignore[no-any-return]


def fsdp_of(model: nn.Sequential) -> nn.Module:
    """As FSDP1 names its modules; the wrapper itself flattens parameters, which cannot be trained in place."""
    wrapper = nn.Module()
    wrapper._fsdp_wrapped_module = model
    wrapper.forward = model.forward  # type: ignore[method-assign]
    return wrapper


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "checkpoint": checkpoint_wrapper,
    "checkpoint of a layer": checkpointed_layer,
    "compile": torch.compile,  # type: ignore[dict-item]
    "compile of a layer": compiled_layer,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "FSDP1": fsdp_of,
    "PEFT": peft_of,
    "all": lambda model: nn.DataParallel(torch.compile(checkpointed_layer(model))),  # type: ignore[arg-type]
}


def adapter_of(model: nn.Module) -> Adapter:
    handle = shira.attach(model, shira.ShiraConfig(["0", "2"], mask="rand", density=0.3, seed=4))
    with torch.no_grad():
        for values in handle.parameters():
            values += 1
    adapter = handle.adapter()
    handle.detach()
    return adapter


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor.indices, other[name].indices)
        assert torch.equal(tensor.values, other[name].values)
        assert tensor.checksum == other[name].checksum


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_gives_the_adapter_of_the_bare_one(wrapper: str) -> None:
    torch.manual_seed(0)
    bare = mlp()
    expected = adapter_of(bare)
    assert list(expected) == ["0.weight", "2.weight"]
    torch.manual_seed(0)
    wrapped = WRAPPERS[wrapper](mlp())
    assert set(first_names(wrapped).values()) >= set(expected)
    if not isinstance(wrapped, nn.DataParallel):  # in which nothing is attached
        assert_equal(adapter_of(wrapped), expected)

    bank = shira.ResidentAdapters(wrapped)
    bank.add("one", expected)
    before = {name: tensor.clone() for name, tensor in BaseTensors(wrapped).items() if name in expected}
    bank.switch("one")
    changed = shira.diff(before, wrapped, common=True)
    assert_equal(changed, expected)
    bank.switch(None)

    # The names that the wrapper gives are understood on both sides, and are not those of files.
    own = {name: f"{'module.' * isinstance(wrapped, (nn.DataParallel, AveragedModel))}{name}" for name in expected}
    renamed = Adapter({own[name]: tensor for name, tensor in expected.items()}, expected.config)
    bank.add("renamed", renamed)
    shira.ResidentAdapters(bare).add("renamed", renamed)
    shira.attach(bare, renamed).detach()


@pytest.mark.parametrize("wrapper", ["checkpoint", "AveragedModel", "FSDP1", "PEFT"])
def test_all_linear_leaves_out_the_head_of_a_wrapped_model(wrapper: str) -> None:
    class WithHead(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            return self[2]  # type: ignore[no-any-return]

    wrapped = WRAPPERS[wrapper](WithHead(*mlp()))
    assert bare_model(wrapped).get_output_embeddings() is not None  # type: ignore[operator]
    handle = shira.attach(wrapped, shira.ShiraConfig("all-linear", density=0.5))
    assert [name for name in handle.adapter() if "lora" not in name] == ["0.weight"]
    handle.detach()


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_names_as_the_bare_model_does() -> None:
    model = mlp()
    expected = list(first_names(model).values())
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert list(first_names(wrapped).values()) == expected
    assert resolve(wrapped, "0.weight") is model[0].weight
    assert resolve(wrapped, "module.0.weight") is model[0].weight
    assert set(BaseTensors(wrapped)) == set(expected)


def test_a_part_called_module_stays_where_no_wrapper_put_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.weight = mlp(), nn.Parameter(torch.zeros(3))

    model = Own()
    assert "module.0.weight" in first_names(model).values()
    assert resolve(model, "module.0.weight") is model.module[0].weight
    wrapped = nn.DataParallel(nn.Sequential(model))
    bare = canonical_in(wrapped)
    assert [bare(name) for name, _ in wrapped.named_parameters()][:2] == ["0.weight", "0.module.0.weight"]
    assert bare("module") == ""
    assert canonical("module.0.weight") == "module.0.weight"
    with pytest.raises(ValueError, match=r"the model has no parameter 'module.x.weight'"):
        resolve(model, "module.x.weight")


def test_a_state_dict_of_distributed_data_parallel_is_the_bare_one(tmp_path: Path) -> None:
    bare = mlp()
    expected = adapter_of(bare)
    wrapped = {f"module.{name}": tensor for name, tensor in bare.state_dict().items()}
    save_file(wrapped, tmp_path / "base.safetensors")
    assert fit_of(expected, wrapped).fits is True
    shira.merge_checkpoint(tmp_path / "base.safetensors", [(expected, 1.0)], tmp_path / "merged.safetensors")
    tuned = load_file(tmp_path / "merged.safetensors")
    assert set(tuned) == set(wrapped)
    assert_equal(shira.diff(bare, tuned), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.embed, self.other = nn.Linear(4, 5, bias=False), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.other(self.embed(ids)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["head.weight", "embed.weight"])
def test_alias_metadata_of_a_file_is_read(tmp_path: Path, name: str) -> None:
    """save_model keeps one name of a tied tensor, and notes the other in the file's metadata."""
    model = Tied()
    save_model(model, str(tmp_path / "base.safetensors"))
    [kept] = set(load_file(tmp_path / "base.safetensors")) - {"other.weight", "other.bias"}
    [other] = {"head.weight", "embed.weight"} - {kept}
    base = BaseTensors(tmp_path / "base.safetensors")
    assert torch.equal(base[other], model.embed.weight)
    assert other in base
    assert base.find(other) == kept
    assert base.aliases() == {other: kept}

    indices = torch.tensor([1, 7, 19], dtype=torch.int32)
    adapter = Adapter({name: AdapterTensor(indices, torch.arange(3.0), (5, 4), torch.float32)})
    with pytest.warns(shira.ShiraWarning, match=r"no checksum"):
        shira.merge_checkpoint(tmp_path / "base.safetensors", [(adapter, 1.0)], tmp_path / "merged.safetensors")
    merged = Tied()
    load_model(merged, str(tmp_path / "merged.safetensors"))
    expected = model.embed.weight.detach().clone()
    expected.view(-1)[indices.long()] = torch.arange(3.0)
    assert torch.equal(merged.embed.weight, expected)
    assert merged.head.weight is merged.embed.weight
    assert list(shira.diff(tmp_path / "base.safetensors", tmp_path / "merged.safetensors")) == [kept]
    assert list(shira.diff(tmp_path / "base.safetensors", merged)) == [kept]
    both = Adapter({"head.weight": adapter[name], "embed.weight": adapter[name]})
    with pytest.raises(ValueError, match=r"the adapter names the tensor '.*' twice"):
        shira.merge_checkpoint(tmp_path / "base.safetensors", [(both, 1.0)], tmp_path / "two.safetensors")


def test_a_tie_that_was_broken_is_no_silent_loss(tmp_path: Path) -> None:
    model = Tied()
    save_model(model, str(tmp_path / "base.safetensors"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    [kept] = set(load_file(tmp_path / "base.safetensors")) - {"other.weight", "other.bias"}
    [other] = {"head.weight", "embed.weight"} - {kept}
    assert not shira.diff(tmp_path / "base.safetensors", state)
    state[other][0, 0] += 1
    with pytest.raises(
        ValueError,
        match=rf"^{other}: base has it and '{kept}' as one tensor, and in tuned they differ: compare with a base that",
    ):
        shira.diff(tmp_path / "base.safetensors", state)
