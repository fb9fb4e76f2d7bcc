"""setuptools' build backend, which asks for torch and ninja only where something is built and they are not there.

The extension needs torch's headers, of any version from 2.10 on, since it uses the stable ABI alone. pip builds in an
environment of its own; a torch that the real environment has already is found there (it lies where the interpreter
says), so an installation beside an existing torch downloads none.
"""

from __future__ import annotations

import importlib.machinery
import os
import shlex
import shutil
import sys
import sysconfig
from typing import Any

from setuptools.build_meta import *  # noqa: F403

_installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
sys.path += [path for path in _installed if path not in sys.path]


def _needed() -> list[str]:
    mode, compiler = os.environ.get("SHIRA_BUILD", "auto"), shlex.split(os.environ.get("CXX", "c++"))[0]
    if mode == "0" or (mode == "auto" and shutil.which(compiler) is None):  # as setup.py, which says so
        return []
    here = {name for name in ("torch", "ninja") if importlib.machinery.PathFinder.find_spec(name, _installed)}
    return [requirement for name, requirement in (("torch", "torch>=2.10"), ("ninja", "ninja")) if name not in here]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _needed()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _needed()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []
