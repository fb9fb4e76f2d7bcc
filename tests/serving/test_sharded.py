"""Models whose parameters several processes share are refused by what they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import distributed, nn

import shira

if not distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 8)
        self.layer = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 10, bias=False)


def adapter_of(model: nn.Module) -> shira.Adapter:
    handle = shira.attach(model, shira.ShiraConfig(["layer"], mask="rand", density=0.5))
    adapter = handle.adapter()
    handle.detach()
    return adapter


def shard(model: nn.Module, way: str) -> None:
    mesh = init_device_mesh("cpu", (1,))
    if way == "FSDP2":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"layer": ColwiseParallel()})


@pytest.mark.parametrize("way", ["FSDP2", "tensor parallelism"])
def test_shards_are_refused_by_name(way: str) -> None:
    model = Tied()
    adapter, bank = adapter_of(model), shira.ResidentAdapters(model)
    bank.add("before", adapter)
    shard(model, way)
    refused = rf"layer.weight: it is a DTensor, .*{way}.*: a bank takes the whole model, as it is before fully_shard"
    with pytest.raises(ValueError, match=refused.replace("layer.weight", r"\w+.weight")):
        shira.ResidentAdapters(model)
    with pytest.raises(ValueError, match=refused):
        bank.add("after", adapter)
    for call in (lambda: bank.switch("before"), lambda: bank.batch(["before", None]).__enter__()):
        with pytest.raises(RuntimeError, match=r"the weight of a .*Linear was replaced since an adapter was added"):
            call()
    for what in (adapter, shira.ShiraConfig(["layer"])):
        with pytest.raises(ValueError, match=r"layer.weight: it is a DTensor, .*: attach takes the whole model"):
            shira.attach(model, what)
    for use in (lambda: shira.diff(model, model), lambda: shira.fuse([(adapter, 1.0)], base=model)):
        with pytest.raises(ValueError, match=r"\w+: \w+\.weight: it is a DTensor, .*: give the whole tensor"):
            use()
