"""PEFT's SHiRA and Super-Tuning layers on the kernels of this library (docs/peft.md).

    import shira.integrations.peft

    shira.integrations.peft.accelerate()  # all such layers of this process, those there and those to come

`restore` puts PEFT's own methods back; `with accelerate():` does at the end.
"""

from shira.integrations.peft.hotswap import hotswap
from shira.integrations.peft.masks import mask
from shira.integrations.peft.patching import accelerate, restore

__all__ = ["accelerate", "hotswap", "mask", "restore"]
