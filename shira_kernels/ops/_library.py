"""Where ops are declared: one call gives an op its schema, its fake kernel and its default kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

NAMESPACE = "shira"
HOST_NAMESPACE = "shira_host"  # csrc/host/tables.cpp says what its ops are
library = torch.library.Library(NAMESPACE, "FRAGMENT")
host_library = torch.library.Library(HOST_NAMESPACE, "FRAGMENT")
host_ops: set[str] = set()
_gradients: dict[str, tuple[Callable, Callable]] = {}  # op -> setup_context and backward
python_calls: Counter[str] = Counter()  # op calls by kernel, of the kernels that are Python: see backends.calls


# Dispatch keys under which a kernel that writes its arguments would get other tensors than the caller's, and write past
# them. Functional ops need no such care: torch resolves lazy views and unwraps transforms before it calls them.
_REFUSED_KEYS = {
    "Negative": "tensors must not be lazily negated: use .resolve_neg()",
    "Conjugate": "tensors must not be lazily conjugated: use .resolve_conj()",
    "FuncTorchDynamicLayerFrontMode": "writes in place, which torch.func transforms cannot follow",
}


def define(schema: str, *, fake: Callable, check: Callable, reference: Callable, host: str = "") -> Callable:
    """Declares an op, and returns its default kernel: `check`, then `reference`, whose result is the op's.

    `host` is what the op of the same name and arguments in `shira_host` returns, if there is one.
    """

    def default(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        python_calls["reference"] += 1
        with torch.no_grad():
            return reference(*args, **kwargs)

    declare(schema, fake=fake, default=default)
    if host:
        name, signature = schema.removesuffix("()").split("(", 1)
        host_library.define(f"{name}({signature}{host}")
        _refuse_changed_tensors(host_library, name)
        host_ops.add(name)
    return default


def declare(schema: str, *, fake: Callable, default: Callable) -> None:
    """Declares an op.

    The default is the kernel of every device that has no kernel of its own; a C++ kernel for a device takes precedence
    whichever is registered first. `fake` checks what can be checked without data, and gives a functional op's result
    without data.
    """
    name, signature = schema.split("(", 1)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, default, "CompositeExplicitAutograd")
    if "!" in signature:
        _refuse_changed_tensors(library, name)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


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
    arguments = getattr(getattr(torch.ops, NAMESPACE), op).default._schema.arguments

    def run(*args: Any, **kwargs: Any) -> Any:
        rest = (kwargs.get(argument.name, argument.default_value) for argument in arguments[len(args) :])
        return function.apply(*args, *rest)  # type: ignore[attr-defined]

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
