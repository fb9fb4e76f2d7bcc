"""Where ops are declared: one call gives an op its schema, its fake kernel and its default kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

NAMESPACE = "shira"
library = torch.library.Library(NAMESPACE, "FRAGMENT")
python_calls: Counter[str] = Counter()  # op calls by kernel, of the kernels that are Python: see backends.calls


def define(schema: str, *, fake: Callable, default: Callable) -> str:
    """Declares an op and returns its name.

    `default` becomes the kernel of every device that has no kernel of its own; a C++ kernel for a device takes
    precedence whichever is registered first. `fake` checks what can be checked without data.
    """
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return name
