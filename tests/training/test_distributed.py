"""DistributedDataParallel on two processes equals one process, and sends only the trained values."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import shira

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import parallel

X = torch.linspace(-1, 1, 4 * 8 * 5).view(4, 8, 5).sin()


def network() -> nn.Module:
    """A linear layer, a tied embedding and head, a batch norm (whose buffers must be sent)."""
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
            self.embedding, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.up(x)) + self.embedding((x[:, 0] > 0).long()))

    return Network().eval()


def attach(model: nn.Module) -> shira.Handle:
    return shira.attach(model, shira.ShiraConfig(["up", "head"], mask="rand", density=0.4))


def train(run: nn.Module, handle: shira.Handle, batches: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.02)
    for batch in batches:
        optimizer.zero_grad()
        run(batch).square().mean().backward()
        optimizer.step()


def attach_late(wrapped: nn.Module) -> None:
    """After DistributedDataParallel it is refused, at once or in the first forward; without gradients all is well."""
    with pytest.raises(ValueError, match="in a DistributedDataParallel, which would not see"):
        attach(wrapped)
    handle = attach(wrapped.module)
    with torch.no_grad():
        wrapped(X[0])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"up\.weight: DistributedDataParallel was made before attach"):
            wrapped(X[0])
    handle.detach()


@contextlib.contextmanager
def rank_of(rank: int, folder: Path) -> Iterator[tuple[nn.Module, shira.Handle]]:
    store, patience = f"file://{folder}/store", datetime.timedelta(seconds=100)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    try:
        model = network()
        handle = attach(model)
        yield parallel.DistributedDataParallel(model), handle
    finally:
        distributed.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    handle = attach(model)
    train(model, handle, X)
    reduced: list[int] = []
    sent: list[int] = []
    send = distributed._broadcast_coalesced

    def reduce(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        reduced.append(bucket.buffer().numel())
        future = distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def broadcast(group: object, tensors: list[torch.Tensor], *rest: object) -> None:
        sent.extend(tensor.numel() for tensor in tensors)
        send(group, tensors, *rest)

    paths = os.pathsep.join(sys.path)
    other = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    with rank_of(0, tmp_path) as (ddp, values):
        ddp.register_comm_hook(None, reduce)
        monkeypatch.setattr(distributed, "_broadcast_coalesced", broadcast)
        train(ddp, values, X.chunk(2, dim=1)[0])
        trained_here = [part.detach().clone() for part in values.parameters()]
        values.detach()
        numbers = sum(sent)
        attach_late(ddp)
    assert other.wait(timeout=100) == 0

    trained = list(handle.parameters())
    assert len(trained) == 2
    for got, expected in zip(trained_here, trained, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert sum(reduced) == len(X) * sum(part.numel() for part in trained)
    assert numbers == len(X) * sum(buffer.numel() for buffer in network().norm.buffers())
    handle.detach()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_sharding_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded, later = network(), network()
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded, mesh=mesh)
        with pytest.raises(ValueError, match=r"up\.weight: it is a DTensor"):
            attach(sharded)
        handle = attach(later)
        fully_shard(later, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"up\.weight: the weight was replaced .* fully_shard"):
            later(X[0])
        with pytest.raises(RuntimeError, match=r"up\.weight: the weight was replaced .* fully_shard"):
            handle.adapter()
    finally:
        distributed.destroy_process_group()


def test_other_names_to_ignore_stay() -> None:
    model = network()
    model._ddp_params_and_buffers_to_ignore = ["norm.running_mean"]
    attach(model).detach()
    assert model._ddp_params_and_buffers_to_ignore == ["norm.running_mean"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with rank_of(1, Path(sys.argv[1])) as (ddp, values):
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)
        train(ddp, values, X.chunk(2, dim=1)[1])
        values.detach()
        attach_late(ddp)
