"""The ops: what each means, its schema, its checks. Kernels are elsewhere, by the same file name."""

import importlib
import pkgutil

# op -> its module, which offers `check` (the checks before a kernel; returns what is written) and `default`.
OPS = {
    module.name: importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}
