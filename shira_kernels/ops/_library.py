"""Where ops are declared: one call gives an op its schema, its fake kernel and its default kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shira"
library = torch.library.Library(NAMESPACE, "FRAGMENT")
python_calls: Counter[str] = Counter()  # op calls by kernel, of the kernels that are Python: see backends.calls


# Dispatch keys under which a kernel would get other tensors than the caller's, and write past them.
_REFUSED_KEYS = {
    "Negative": "weight, values and saved must not be lazily negated: use .resolve_neg()",
    "Conjugate": "weight, values and saved must not be lazily conjugated: use .resolve_conj()",
    "FuncTorchDynamicLayerFrontMode": "weight is written in place, which torch.func transforms cannot follow",
}


def define(schema: str, *, fake: Callable, check: Callable, reference: Callable) -> Callable:
    """Declares an op that writes its arguments, and returns its default kernel: `check`, then `reference`.

    The default is the kernel of every device that has no kernel of its own; a C++ kernel for a device takes precedence
    whichever is registered first. `fake` checks what can be checked without data.
    """

    def default(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        python_calls["reference"] += 1
        with torch.no_grad():
            reference(*args, **kwargs)

    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, default, "CompositeExplicitAutograd")
    for key, message in _REFUSED_KEYS.items():
        library.impl(name, _refusal(f"{NAMESPACE}::{name}: {message}"), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return default


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    return refuse
