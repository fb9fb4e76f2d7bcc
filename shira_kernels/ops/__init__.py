"""The ops: what each means, its schema, its checks. Kernels are elsewhere, by the same file name."""

import importlib
import pkgutil

from shira_kernels.ops import _library

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

OPS = {op: _library.OPS[op] for op in sorted(_library.OPS)}
