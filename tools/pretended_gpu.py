"""A GPU that is not there, to see what an op would ask of it: which Triton kernels, and which waits of the host.

    with PretendedGpu(target) as gpu:
        weight = gpu.tensor(torch.zeros(64, 64))
        torch.ops.shira.scatter_apply(weight, gpu.tensor(indices), gpu.tensor(values))
    gpu.variants, gpu.waits

Ops take the path of a CUDA device: its kernel in the dispatcher, the checks, the launcher, and Triton's own binding and
specialisation of the arguments, up to where a kernel would be compiled. There it is noted and nothing runs. Tensors "on
the GPU" are tensors of the CPU that say otherwise; what PyTorch itself does with them is done on the CPU. Memory that
only a kernel would fill holds ones, so that a size read from it is plausible.

A process that has used one cannot use CUDA afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import shira_kernels  # noqa: F401 - registers the ops

DEVICE = "cuda:0"  # with its number: without it PyTorch asks the GPU which one is current
LARGE = 2**22  # elements; more are left as they are, since filling them would take memory
EMPTY = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# An H100, for launchers that ask.
PROPERTIES = SimpleNamespace(
    name="a GPU that is not there",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    gcnArchName="",
)


class Variant(NamedTuple):
    """A Triton kernel with all that Triton compiles it for."""

    kernel: Any  # triton's JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]  # alignment
    options: dict[str, Any]
    target: GPUTarget

    @property
    def key(self) -> str:
        """The same for two launches that run the same code."""
        rest = (self.signature, self.constants, self.attributes, self.options, self.target)
        return f"{self.kernel.__module__}.{self.kernel.__name__} {rest}"

    @property
    def main_key(self) -> tuple[Any, ...]:
        """The same for variants that differ in the types of indices and sizes and in alignment alone."""
        constants = {
            place: value for place, value in self.constants.items() if self.kernel.params[place[0]].is_constexpr
        }
        pointers = [kind for kind in self.signature.values() if kind.startswith("*")]
        elements = ["index" if kind in ("*i32", "*i64", "*u16") else kind for kind in pointers]
        return self.kernel.__module__, self.kernel.__name__, str(constants), str(elements)

    def __str__(self) -> str:
        names = list(self.signature)
        constants = {names[place[0]]: value for place, value in self.constants.items()}
        arguments = []
        for place, (name, kind) in enumerate(self.signature.items()):
            aligned = any(item[0] == "tt.divisibility" for item in self.attributes.get((place,), ()))
            arguments.append(f"{name}={constants[name]}" if name in constants else f"{name}:{kind}{'%16' * aligned}")
        return f"{self.kernel.__name__}({', '.join(arguments)})"

    def compile(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options)


def asked_for(kernel: Any, request: dict[str, Any], target: GPUTarget) -> Variant:
    """What Triton tells its hook before it compiles; all that depends on Triton's version is here."""
    data = json.loads(request["specialization_data"])
    options = {name: _with_tuples(value) for name, value in data["options"].items()}
    return Variant(kernel, request["signature"], request["constants"], request["configs"][0], options, target)


def _with_tuples(value: Any) -> Any:
    """JSON has lists alone, where options have tuples."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


class GpuTensor(torch.Tensor):
    """A tensor of the CPU that says it is on the GPU; `content` is that tensor.

    Methods stand here where PyTorch would look for the GPU before it dispatches.
    """

    gpu: PretendedGpu
    content: torch.Tensor

    @staticmethod
    def __new__(cls, gpu: PretendedGpu, real: torch.Tensor) -> GpuTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.shape, real.stride(), real.storage_offset(), dtype=real.dtype, device=DEVICE
        )
        made.gpu, made.content = gpu, real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        gpu = next(tensor.gpu for tensor in _tensors((arguments, keywords)) if isinstance(tensor, GpuTensor))
        return gpu.dispatch(function, arguments, keywords)

    def __repr__(self) -> str:
        return f"GpuTensor({self.content!r})"

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def ptr_range(self) -> int:
        """Bytes of its memory: Triton asks for AMD GPUs."""
        return self.content.untyped_storage().size()

    def record_stream(self, stream: Any) -> None:
        pass

    def item(self) -> Any:
        self.gpu.waits_for(f"a number of {self.content.dtype} is read by the host")
        return self.content.item()

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    __index__ = __int__

    def tolist(self) -> Any:
        self.gpu.waits_for(f"a list of {self.content.dtype} is read by the host")
        return self.content.tolist()

    def nonzero(self) -> Any:
        return torch.ops.aten.nonzero(self)

    def contiguous(self) -> Any:
        return torch.ops.aten.contiguous(self)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
        return self.gpu.dispatch(torch.ops.aten.copy_.default, (self, source), {})

    def __getitem__(self, place: Any) -> torch.Tensor:
        self.gpu.looks_at(place)
        return GpuTensor(self.gpu, self.content[_real(place)])

    def __setitem__(self, place: Any, value: Any) -> None:
        self.gpu.looks_at(place)
        if isinstance(value, torch.Tensor) and not isinstance(value, GpuTensor):
            self.gpu.waits_for(f"{value.dtype} {list(value.shape)} is copied from the host")
        self.content[_real(place)] = _real(value)


def _real(argument: Any) -> Any:
    """The same with tensors of the CPU."""
    if isinstance(argument, GpuTensor):
        return argument.content
    if isinstance(argument, dict):
        return {name: _real(item) for name, item in argument.items()}
    return type(argument)(map(_real, argument)) if isinstance(argument, (list, tuple)) else argument


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    items = argument.values() if isinstance(argument, dict) else argument
    return [tensor for item in items for tensor in _tensors(item)] if isinstance(argument, (list, tuple, dict)) else []


class _Dispatch(TorchDispatchMode):
    """Sends all that PyTorch does to `gpu`, also what makes tensors; PyTorch turns it off while it is in there."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return self.gpu.dispatch(function, arguments, keywords or {})


class _Stream:
    cuda_stream = stream_id = 0
    device = torch.device(DEVICE)

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu

    def synchronize(self) -> None:
        self.gpu.waits_for("the host waits for a stream")


class PretendedGpu:
    """The context in which there seems to be one GPU, for which Triton would compile for `target`.

    variants: of each launch, in order. waits: what makes the host wait for the GPU or the GPU for the host, and cannot
    be captured in a CUDA graph. `capturing` is what PyTorch answers when it is asked.
    """

    def __init__(self, target: GPUTarget | None = None) -> None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise RuntimeError("TRITON_INTERPRET=1 was set when Triton was imported: its launches ask for no kernel")
        self.target = GPUTarget("cuda", 90, 32) if target is None else target
        self.variants: list[Variant] = []
        self.waits: list[str] = []
        self.capturing = False
        self.undo = contextlib.ExitStack()

    def tensor(self, real: torch.Tensor) -> GpuTensor:
        return GpuTensor(self, real)

    def __enter__(self) -> PretendedGpu:
        for patch in self._patches():
            self.undo.enter_context(patch)
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
        # torch.tensor makes its result on the CPU and copies it with an op that can be seen.
        self.undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        self.undo.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo.close()

    def _patches(self) -> Iterator[contextlib.AbstractContextManager]:
        stream = _Stream(self)
        for name, answer in {
            "_lazy_init": lambda: None,
            "device": contextlib.nullcontext,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: stream,
            "get_device_properties": lambda device=None: PROPERTIES,
            "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
            "is_current_stream_capturing": lambda: self.capturing,
            "synchronize": lambda device=None: self.waits_for("the host waits for the GPU"),
        }.items():
            yield mock.patch.object(torch.cuda, name, answer)
        yield mock.patch.object(torch.version, "hip", "7.0" if self.target.backend == "hip" else None)
        yield mock.patch.object(triton.knobs.runtime, "jit_cache_hook", self.hook)
        limits = {"multiprocessor_count": PROPERTIES.multi_processor_count, "warpSize": 32, "max_num_regs": 65536}
        limits["max_shared_mem"] = PROPERTIES.shared_memory_per_block_optin
        # Triton keeps what depends on the target by the device's number, so each target is a device of its own.
        number = hash((self.target.backend, self.target.arch))
        yield mock.patch.object(
            triton.runtime.driver,
            "_active",
            SimpleNamespace(
                get_current_target=lambda: self.target,
                get_current_device=lambda: number,
                get_current_stream=lambda device=None: 0,
                get_active_torch_device=lambda: torch.device(DEVICE),
                get_device_interface=lambda: torch.cuda,
                utils=SimpleNamespace(get_device_properties=lambda device=None: limits),
            ),
        )

    def hook(self, *, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        """Triton's hook before it compiles a kernel; True means that it need not, and then it launches nothing."""
        self.variants.append(asked_for(fn.jit_function, compile, self.target))
        return True

    def waits_for(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "shira_kernels" in frame.filename]
        self.waits.append(f"{what} ({os.path.basename(ours[-1].filename)}:{ours[-1].lineno})" if ours else what)

    def looks_at(self, place: Any) -> None:
        """Indexing reads masks, and single numbers, on the host."""
        for index in _tensors(place):
            if isinstance(index, GpuTensor) and (index.dtype in (torch.bool, torch.uint8) or index.dim() == 0):
                self.waits_for("the host reads an index")

    def dispatch(self, function: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        composed = torch._C.DispatchKey.CompositeImplicitAutograd
        if function.namespace == "shira" or torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), composed):
            with _Dispatch(self):  # what it consists of
                key = torch._C.DispatchKey.CUDA if function.namespace == "shira" else composed
                return function._op_dk(key, *arguments, **keywords)
        given = _tensors((arguments, keywords))
        here = {id(tensor.content): tensor for tensor in given if isinstance(tensor, GpuTensor)}
        on_gpu = bool(here)
        if (device := keywords.get("device")) is not None:
            on_gpu = torch.device(device).type == "cuda"
            keywords = {**keywords, "device": "cpu"}
        self._note(function, given, on_gpu)
        name = function._schema.name.partition("::")[2]
        if name in PRODUCTS and "out" in keywords:  # left undone: it takes time, and CPUs do not have all of them
            return keywords["out"]
        result = function(*_real(arguments), **_real(keywords))
        if on_gpu and name in EMPTY and result.numel() <= LARGE:
            result.fill_(1)
        return self._wrapped(result, here) if on_gpu else result

    def _wrapped(self, result: Any, here: dict[int, GpuTensor]) -> Any:
        """Results as tensors on the GPU; one that was written in place is the argument itself."""
        if isinstance(result, torch.Tensor):
            return here[id(result)] if id(result) in here else self.tensor(result)
        return (
            type(result)(self._wrapped(item, here) for item in result) if isinstance(result, (list, tuple)) else result
        )

    def _note(self, function: Any, given: list[torch.Tensor], on_gpu: bool) -> None:
        name = function._schema.name.partition("::")[2]
        if name in ("_to_copy", "copy_"):
            here = [isinstance(tensor, GpuTensor) for tensor in given]
            if name == "_to_copy" and here[0] != on_gpu:
                where = "to the host" if here[0] else "from the host"
            elif name == "copy_" and here[0] != here[1]:
                where = "from the host" if here[0] else "to the host"
            else:
                return
            self.waits_for(f"{given[-1].dtype} {list(given[-1].shape)} is copied {where}")
        elif name in ("index", "index_put", "index_put_"):
            self.looks_at(given[1:])
        elif any(isinstance(tensor, GpuTensor) for tensor in given) and (
            name in ("is_pinned", "_pin_memory")
            or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        ):
            self.waits_for(f"the size of the result of {name} is read by the host")
