"""What saves a model and loads it again: everything that `attach` added comes back, and training goes on to the same
bits."""

from __future__ import annotations

import io
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import nn

import shira

ENTRY = shira.AdapterTensor(torch.tensor([0]), torch.ones(1), (16, 8), torch.float32, "add")
ATTACH = [shira.attach, shira.mask_gradients]


class Network(nn.Module):
    """Linear layers, tied ones too, running statistics, and one layer that is so small that it gets no entries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.small, self.other = nn.Linear(8, 2), nn.Linear(2, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for layer in (self.small, self.other):
                layer.weight.mul_(1e-6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(self.norm(self.up(x)).relu()) + self.other(self.small(x)))


CONFIG = shira.ShiraConfig(["embed", "up", "down", "small", "other"], mask="wm", density=0.1, budget="model")


def make(attach: Callable = shira.attach) -> tuple[Network, shira.Handle, shira.ShiraAdamW]:
    model = Network()
    handle = attach(model, CONFIG)
    return model, handle, shira.ShiraAdamW(handle.parameters(), lr=0.02, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        ids = torch.randint(12, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids), (ids * 5 + 1) % 12).backward()
        optimizer.step()


def assert_same(model: nn.Module, handle: shira.Handle, expected: nn.Module, expected_handle: shira.Handle) -> None:
    now, whole = model.state_dict(), expected.state_dict()
    assert list(now) == list(whole)
    for name, tensor in now.items():
        assert torch.equal(tensor, whole[name]), name
    for (name, tensor), (other, wanted) in zip(
        handle.adapter().items(), expected_handle.adapter().items(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor.indices, wanted.indices)
        assert torch.equal(tensor.values, wanted.values)
        assert tensor.checksum == wanted.checksum
    handle.detach()
    bare = Network().state_dict()
    assert list(model.state_dict()) == list(bare)
    assert all(torch.equal(tensor, bare[name]) for name, tensor in model.state_dict().items())


def test_the_network_has_weights_without_entries() -> None:
    model, handle, _ = make()
    assert [values.numel() for name, values in handle.named_parameters() if "small" in name or "other" in name] == [
        0,
        0,
    ]
    storages = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(set(storages)) == len(storages) - 1  # but for the tied weight


def by_torch(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if saved:
        torch.save([model.state_dict(), optimizer.state_dict()], folder / "state.pt")
        return
    states = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])


def by_assignment(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    by_torch(folder, saved, model, optimizer)
    if not saved:
        model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)[0], assign=True)
        optimizer.param_groups[0]["params"] = [p for name, p in model.named_parameters() if "shira_values" in name]
        optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True)[1])


def by_assignment_of_copies(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if saved:
        torch.save([{n: t.clone() for n, t in model.state_dict().items()}, optimizer.state_dict()], folder / "state.pt")
    else:
        by_assignment(folder, saved, model, optimizer)
        assert model.head.weight is model.embed.weight
        bank = shira.ResidentAdapters(model)
        with pytest.raises(RuntimeError, match="attach is changing this weight"):
            bank.add("a", shira.Adapter({"up.weight": ENTRY}))


def by_safetensors(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    if saved:
        safetensors.save_model(model, str(folder / "model.safetensors"))
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return
    missing, unexpected = safetensors.load_model(model, str(folder / "model.safetensors"))
    assert not missing
    assert not unexpected
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def by_distributed_checkpoint(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no distributed")
    from torch.distributed.checkpoint import state_dict as states

    if saved:
        of_model, of_optimizer = states.get_state_dict(model, optimizer)
        checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
        return
    of_model, of_optimizer = states.get_state_dict(model, optimizer)
    loaded = {"model": of_model, "optimizer": of_optimizer}
    checkpoint.load(loaded, checkpoint_id=folder)
    states.set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


def by_distributed_checkpoint_in_place(
    folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no distributed")
    if saved:
        checkpoint.save(model.state_dict(), checkpoint_id=folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return
    checkpoint.load(model.state_dict(), checkpoint_id=folder)  # into the live tensors
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def by_accelerate(
    folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool
) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer)
    assert prepared[0] is model
    if saved:
        accelerator.save_state(str(folder), **options)
    else:
        accelerator.load_state(str(folder))


def by_accelerate_pickled(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    by_accelerate(folder, saved, model, optimizer, **({"safe_serialization": False} if saved else {}))


def by_accelerates_model(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    if saved:
        accelerate.Accelerator(cpu=True).save_model(model, str(folder), max_shard_size="1KB")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return
    accelerate.load_checkpoint_in_model(model, str(folder), strict=False)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def by_hub(folder: Path, saved: bool, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    if saved:
        hub.save_torch_model(model, str(folder), max_shard_size="1KB")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return
    hub.load_torch_model(model, str(folder))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


SAVERS = [
    by_torch,
    by_assignment,
    by_assignment_of_copies,
    by_safetensors,
    by_distributed_checkpoint,
    by_distributed_checkpoint_in_place,
    by_accelerate,
    by_accelerate_pickled,
    by_accelerates_model,
    by_hub,
]


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("saver", SAVERS)
def test_everything_comes_back_and_training_resumes(saver: Callable, attach: Callable, tmp_path: Path) -> None:
    whole, whole_handle, optimizer = make(attach)
    train(whole, optimizer, range(6))

    model, _, optimizer = make(attach)
    train(model, optimizer, range(3))
    saver(tmp_path, True, model, optimizer)

    model, handle, optimizer = make(attach)
    train(model, optimizer, range(10, 12))  # what is loaded replaces whatever is there
    saver(tmp_path, False, model, optimizer)
    train(model, optimizer, range(3, 6))
    assert_same(model, handle, whole, whole_handle)


@pytest.mark.parametrize("attach", ATTACH)
def test_a_pickled_model_resumes(attach: Callable, tmp_path: Path) -> None:
    whole, whole_handle, optimizer = make(attach)
    train(whole, optimizer, range(6))
    model, handle, optimizer = make(attach)
    train(model, optimizer, range(3))
    torch.save([model, handle, optimizer], tmp_path / "all.pt")
    model, handle, optimizer = torch.load(tmp_path / "all.pt", weights_only=False)
    train(model, optimizer, range(3, 6))
    assert_same(model, handle, whole, whole_handle)


def test_trained_values_are_saved_by_themselves() -> None:
    model, handle, _ = make()
    buffer = io.BytesIO()
    torch.save(dict(handle.named_parameters()), buffer)
    assert buffer.tell() < 6000  # not their layers
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for name, values in handle.named_parameters():
        assert type(loaded[name]) is nn.Parameter
        assert torch.equal(loaded[name], values)
    assert model.up.shira_values.untyped_storage().nbytes() == 4 * model.up.shira_values.numel()


def test_a_hub_mixin_has_all(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    class Hosted(Network, hub.PyTorchModelHubMixin):
        pass

    class Attaching(Network, hub.PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.handles = [shira.attach(self, CONFIG)]

    model = Hosted()
    handle = shira.attach(model, CONFIG)
    train(model, shira.ShiraAdamW(handle.parameters(), lr=0.02), range(3))
    model.eval().save_pretrained(tmp_path)
    ids = torch.arange(12)
    plain = Hosted.from_pretrained(tmp_path)  # the trained weights in the bare model
    assert torch.equal(plain(ids), model(ids))
    attached = Attaching.from_pretrained(tmp_path)
    assert_same(attached, attached.handles[0], model, handle)


def test_indices_that_are_loaded_in_place_are_used() -> None:
    # As torch.distributed.checkpoint does, which asks no module: other entries, with their values, weight and base.
    models = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8))
        handle = shira.attach(model, shira.ShiraConfig(["0"], mask="rand", density=0.3, seed=seed))
        models.append((model, handle))
    (model, _), (source, source_handle) = models
    with torch.no_grad():
        next(source_handle.parameters()).add_(1)
        for own, other in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
            own.copy_(other)
    x = torch.randn(4, 6)
    for net in (model, source):
        net(x).square().sum().backward()
    assert torch.equal(model(x), source(x))
    assert torch.equal(model[0].shira_values.grad, source[0].shira_values.grad)


def test_processes_share_trained_values() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    handle = shira.attach(model, shira.ShiraConfig(["0"], density=0.3))
    model.share_memory()
    child = ForkingPickler.loads(bytes(ForkingPickler.dumps(model)))
    with torch.no_grad():
        child[0].shira_values.fill_(3)  # as a process of Hogwild does
    assert (next(handle.parameters()) == 3).all()
