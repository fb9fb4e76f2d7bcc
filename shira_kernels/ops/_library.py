"""Where ops are declared: one call gives an op its schema, its fake kernel and its default kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shira"
library = torch.library.Library(NAMESPACE, "FRAGMENT")
python_calls: Counter[str] = Counter()  # op calls by kernel, of the kernels that are Python: see backends.calls


# Dispatch keys under which a kernel that writes its arguments would get other tensors than the caller's, and write past
# them. Functional ops need no such care: torch resolves lazy views and unwraps transforms before it calls them.
_REFUSED_KEYS = {
    "Negative": "tensors must not be lazily negated: use .resolve_neg()",
    "Conjugate": "tensors must not be lazily conjugated: use .resolve_conj()",
    "FuncTorchDynamicLayerFrontMode": "writes in place, which torch.func transforms cannot follow",
}


def define(schema: str, *, fake: Callable, check: Callable, reference: Callable) -> Callable:
    """Declares an op, and returns its default kernel: `check`, then `reference`, whose result is the op's.

    The default is the kernel of every device that has no kernel of its own; a C++ kernel for a device takes precedence
    whichever is registered first. `fake` checks what can be checked without data, and gives a functional op's result
    without data.
    """

    def default(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        python_calls["reference"] += 1
        with torch.no_grad():
            return reference(*args, **kwargs)

    name, signature = schema.split("(", 1)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, default, "CompositeExplicitAutograd")
    if "!" in signature:
        for key, message in _REFUSED_KEYS.items():
            library.impl(name, _refusal(f"{NAMESPACE}::{name}: {message}"), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return default


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    return refuse
