"""Where ops are declared: one call gives an op its schema, its checks, its fake kernel and its default kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from shira_kernels.ops import _checks

NAMESPACE = "shira"
HOST_NAMESPACE = "shira_host"  # csrc/host/tables.cpp says what its ops are
library = torch.library.Library(NAMESPACE, "FRAGMENT")
host_library = torch.library.Library(HOST_NAMESPACE, "FRAGMENT")
host_ops: set[str] = set()
_gradients: dict[str, tuple[Callable, Callable]] = {}  # op -> setup_context and backward
OPS: dict[str, Op] = {}
python_calls: Counter[str] = Counter()  # op calls by kernel, of the kernels that are Python: see backends.calls


# Dispatch keys under which a kernel that writes its arguments would get other tensors than the caller's, and write past
# them. Functional ops need no such care: torch resolves lazy views and unwraps transforms before it calls them.
_REFUSED_KEYS = {
    "Negative": "tensors must not be lazily negated: use .resolve_neg()",
    "Conjugate": "tensors must not be lazily conjugated: use .resolve_conj()",
    "FuncTorchDynamicLayerFrontMode": "writes in place, which torch.func transforms cannot follow",
}
# Those of nested tensors, which no other covers: without a kernel, torch refuses them itself, and names no argument.
_NESTED_KEYS = ("NestedTensorCPU", "NestedTensorCUDA", "AutogradNestedTensor")


class Op(NamedTuple):
    """An op as backends need it."""

    # Refuses what no kernel may be given, and returns the tensors that the op writes. It takes the op's arguments, and
    # `contents`: whether it may read what they hold, which waits for a GPU.
    check: Callable[..., list[torch.Tensor]]
    default: Callable[..., Any]  # its default kernel
    composed_of: str = ""  # the op whose kernels it runs, if it has none of its own
    compose: Callable[..., Any] | None = None  # then the op, by a kernel of that one and its own arguments


def define(
    schema: str,
    *,
    form: Callable[..., None],
    reference: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    contents: Callable[..., None] | None = None,
    host_contents: Callable[..., None] | None = None,
    allows_grad: bool = False,
    host: str = "",
    composed_of: str = "",
    compose: Callable[..., Any] | None = None,
) -> None:
    """Declares an op: its schema, its checks, its fake kernel and its default kernel.

    The default is the kernel of every device that has no kernel of its own; a C++ kernel for a device takes precedence
    whichever is registered first. Before any kernel in Python come, in this order: `form`; that no argument requires
    grad outside no_grad, and that what the schema writes shares no memory with another argument; and `contents`. Before
    them all: that each tensor has its elements in memory, which sparse, nested and quantized ones have not.

    Args:
        schema: of `torch.library`, with `(a!)` at what is written.
        form: checks what can be checked without data. This and the following take the op's arguments.
        reference: computes the op in plain PyTorch.
        fake: gives a functional op's result without data.
        contents: checks what tensors hold.
        host_contents: in its place where it may not wait for a GPU: checks what tensors on the CPU hold.
        allows_grad: whether arguments may require grad: the op has a gradient, or its result is of integers.
        host: what the op of the same name and arguments in `shira_host` returns, if there is one.
        composed_of, compose: as in `Op`, in place of `reference`.
    """
    name, signature = schema.split("(", 1)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = _arguments_of(name)
    named, writes = _named_by(arguments), any(map(_is_written, arguments))
    check = _check_of(name, arguments, form, contents, host_contents, allows_grad)

    def default(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if compose is not None:
            return compose(getattr(getattr(torch.ops, NAMESPACE), composed_of), *args, **kwargs)
        python_calls["reference"] += 1
        with torch.no_grad():
            return reference(*args, **kwargs)  # type: ignore[misc]

    def fake_kernel(*args: Any, **kwargs: Any) -> Any:
        args = _positional(arguments, args, kwargs)
        _checks.check_plain(name, *named(args), writes)
        form(*args)
        return None if fake is None else fake(*args)

    for key in ("CompositeExplicitAutograd", *_NESTED_KEYS):
        library.impl(name, default, key)
    if "!" in signature:
        _refuse_changed_tensors(library, name)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_kernel, lib=library)
    if host:
        host_library.define(f"{schema.removesuffix('()')}{host}")
        _refuse_changed_tensors(host_library, name)
        host_ops.add(name)
    OPS[name] = Op(check, default, composed_of, compose)


def _check_of(
    op: str,
    arguments: Sequence[Any],
    form: Callable[..., None],
    contents: Callable[..., None] | None,
    host_contents: Callable[..., None] | None,
    allows_grad: bool,
) -> Callable[..., list[torch.Tensor]]:
    """An op's `check`, from the arguments of its schema."""
    named, writes = _named_by(arguments), any(map(_is_written, arguments))
    read_by = {True: contents, False: host_contents}

    def check(*args: Any, contents: bool = True, **kwargs: Any) -> list[torch.Tensor]:
        if kwargs:
            args = _positional(arguments, args, kwargs)
        written, read = named(args)
        _checks.check_plain(op, written, read, writes)
        form(*args)
        if not allows_grad:
            _checks.check_autograd(op, written, read)
        _checks.check_storage(op, written, read)
        if writes:
            _checks.check_overlap(op, written, read)
        if (reads := read_by[contents]) is not None:
            reads(*args)
        return [tensor for _, tensor in written]

    return check


def _named_by(arguments: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[_checks.Named, _checks.Named]]:
    """Gives, for a schema's arguments, what names the tensors of a call: those that it writes, and the others."""
    # Of each argument: its name, whether it is a list, and whether it is written; None of what is not a tensor.
    kinds = [
        (argument.name, "List" in str(argument.type), _is_written(argument)) if "Tensor" in str(argument.type) else None
        for argument in arguments
    ]

    def named(args: Sequence[Any]) -> tuple[_checks.Named, _checks.Named]:
        written: _checks.Named = []
        read: _checks.Named = []
        for kind, argument in zip(kinds, args, strict=False):  # trailing ones may have their defaults
            if kind is None or argument is None:
                continue
            name, is_list, is_written = kind
            group = written if is_written else read
            if is_list:
                group += [(f"{name}[{i}]", tensor) for i, tensor in enumerate(argument)]
            else:
                group.append((name, argument))
        return written, read

    return named


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _arguments_of(op: str) -> Sequence[Any]:
    return getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments  # type: ignore[no-any-return]


def _positional(arguments: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All of a call's arguments in the order of the schema. Raises TypeError, as Python does."""
    rest = arguments[len(args) :]
    missing = [argument.name for argument in rest if not (argument.name in kwargs or argument.has_default_value())]
    if missing or kwargs.keys() - {argument.name for argument in rest}:
        raise TypeError(f"arguments must be {', '.join(argument.name for argument in arguments)}, each once")
    return (*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest))


def differentiable(op: str, *, backward: Callable, setup_context: Callable | None = None) -> None:
    """Gives a functional op its gradient; both functions as in `torch.autograd.Function`."""
    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup_context, lib=library)
    _gradients[op] = (setup_context or _save_nothing, backward)


def with_gradient(op: str, kernel: Callable, forced: Callable[[], AbstractContextManager]) -> Callable:
    """A kernel that is called above autograd, with its op's gradient if it has one, whose ops run within `forced`."""
    if op not in _gradients:
        return kernel
    setup_context, backward = _gradients[op]

    def forced_backward(ctx: Any, *grads: Any) -> Any:
        with forced():
            return backward(ctx, *grads)

    methods = {"forward": kernel, "setup_context": setup_context, "backward": forced_backward}
    static = {name: staticmethod(method) for name, method in methods.items()}
    function = type(f"{op}_gradient", (torch.autograd.Function,), static)
    arguments = _arguments_of(op)

    def run(*args: Any, **kwargs: Any) -> Any:
        return function.apply(*_positional(arguments, args, kwargs))  # type: ignore[attr-defined]

    return run


def _refuse_changed_tensors(where: torch.library.Library, name: str) -> None:
    for key, message in _REFUSED_KEYS.items():
        where.impl(name, _refusal(f"{NAMESPACE}::{name}: {message}"), key)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    return refuse
