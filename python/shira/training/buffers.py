"""State that training moves beside parameters: buffers, as the running statistics of BatchNorm.

A module keeps a copy of each such buffer beside it, as a buffer `shira_base_<name>`, from `attach` to `detach`: so a
state dict has it, and it moves with the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shira.adapter.base import check_base, check_fits, entries_of
from shira.adapter.checksum import checksum_of
from shira.adapter.header import check_name
from shira.adapter.tensor import AdapterTensor
from shira.files.errors import warn
from shira.model.claims import claim
from shira.model.names import canonical, canonical_in
from shira.training.matching import is_saved
from shira_kernels import extract_changed, scatter_apply
from shira_kernels.dtypes import ARITHMETIC


@dataclass(eq=False)
class TrainedBuffer:
    """A buffer that training may move: its canonical name, and its module's name for it."""

    name: str
    owner: nn.Module
    role: str

    @property
    def base_name(self) -> str:
        """What the owner calls the copy of it."""
        return f"shira_base_{self.role}"

    @property
    def now(self) -> torch.Tensor | None:
        """The buffer as it is now."""
        return self.owner._buffers[self.role]

    @property
    def base(self) -> torch.Tensor:
        """The buffer as it was before training."""
        base = self.owner._buffers[self.base_name]
        assert base is not None
        return base

    def keep(self) -> None:
        """Makes the copy, and claims the buffer."""
        assert self.now is not None
        self.owner.register_buffer(self.base_name, self.now.detach().clone(memory_format=torch.contiguous_format))
        claim(self.now, "attach")

    def release(self) -> None:
        """Takes the copy out again, and gives up the claim."""
        delattr(self.owner, self.base_name)
        if self.now is not None:
            claim(self.now, None)

    @torch.no_grad()
    def write_base(self) -> None:
        """Gives the buffer its old bits back."""
        now, base = self.now, self.base
        if now is not None and (now.shape, now.dtype, now.device) == (base.shape, base.dtype, base.device):
            now.copy_(base)
        else:
            self.owner._buffers[self.role] = base.clone()

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """Gives the buffer its old bits until the block is left, and then those that it had, whatever the block did."""
        now, place = self.now, (self.base.dtype, self.base.device)
        kept, version = (None, 0) if now is None else (now.detach().clone(), now._version)
        try:
            self.write_base()
            yield
        finally:
            if kept is not None and place != (self.base.dtype, self.base.device):  # the block moved the model
                now = kept = kept.to(self.base.device, self.base.dtype)
            self.owner._buffers[self.role] = now
            if now is not None and kept is not None:
                with torch.no_grad():
                    now.copy_(kept)
                torch._C._autograd._unsafe_set_version_counter((now,), (version,))

    @torch.no_grad()
    def write(self, tensor: AdapterTensor) -> None:
        """Writes an adapter's entries."""
        now = self.now
        assert now is not None
        scatter_apply(now, tensor.indices.to(now.device), tensor.values.to(now.device), additive=tensor.kind == "add")

    def changes(self) -> AdapterTensor | None:
        """What an adapter has of it: the entries that training moved, on the CPU; None if there are none.

        Warns if it was moved, but an adapter cannot hold that.
        """
        now, base = self.now, self.base
        if now is None or (now.shape, now.dtype) != (base.shape, base.dtype):
            warn(self.name, ": training gave this buffer another shape or dtype, so the adapter leaves it out")
            return None
        indices, values = extract_changed(base, now.detach().to(base.device).contiguous())
        if not indices.numel():
            return None
        reason = "" if base.dtype in ARITHMETIC else f"it is {base.dtype}"
        try:
            check_name(self.name)
        except ValueError as error:
            reason = str(error)
        if not reason:
            checksum = checksum_of(entries_of(base, indices))
            return AdapterTensor(indices.cpu(), values.cpu(), tuple(base.shape), base.dtype, "replace", checksum)
        if self.role != "num_batches_tracked":  # forwards in evaluation do not read it, and numbers of it have no mix
            warn(self.name, f": training moved this buffer, but the adapter leaves it out: {reason}")
        return None


def trained_buffers(model: nn.Module, saved: Sequence[str]) -> list[TrainedBuffer]:
    """The buffers of a model's state dict that training may move: those of floating point, and single numbers.

    Other integers are left alone, for a quantized model's weights are such buffers; so are modules that are `saved`.
    """
    found, seen, bare = [], set[int](), canonical_in(model)
    for prefix, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # which takes no further buffer
        for role, buffer in module._buffers.items():
            own = f"{prefix}.{role}" if prefix else role
            if buffer is None or role in module._non_persistent_buffers_set or is_saved(bare(own), saved):
                continue
            if type(buffer) is not torch.Tensor or buffer.is_meta or id(buffer) in seen or buffer.is_inference():
                continue
            if buffer.dtype in ARITHMETIC or buffer.numel() == 1:
                seen.add(id(buffer))
                found.append(TrainedBuffer(bare(own), module, role))
    return found


def warn_of_scripted(model: nn.Module) -> None:
    """Warns of floating-point buffers in scripted modules, which cannot be kept."""
    names = [
        canonical(f"{prefix}.{role}")
        for prefix, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
        for role, buffer in module.named_buffers(recurse=False)
        if buffer.dtype in ARITHMETIC
    ]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warn(
            f"{shown}: buffers of scripted modules are not kept. What training moves of them is not in the adapter, "
            "and detach leaves it: set these modules to eval()"
        )


def moved_by(
    adapter: Mapping[str, AdapterTensor], buffers: Iterable[TrainedBuffer]
) -> dict[TrainedBuffer, AdapterTensor]:
    """The buffers that an adapter changes, and what it has of them.

    Raises ValueError if one does not fit, or belongs to another base.
    """
    by_name = {buffer.name: buffer for buffer in buffers}
    found: dict[TrainedBuffer, AdapterTensor] = {}
    for name, tensor in adapter.items():
        buffer = by_name.get(canonical(name))
        if buffer is not None and buffer.now is not None:
            check_fits(name, tensor, buffer.now)
            check_base(name, tensor, entries_of(buffer.now, tensor.indices))
            if found.setdefault(buffer, tensor) is not tensor:
                raise ValueError(f"{name}: the adapter names the tensor {buffer.name!r} twice")
    return found
