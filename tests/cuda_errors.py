"""A fixture for every gpu test: at a CUDA error the process ends, since its context is lost to all tests after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

EXIT_CODE = 3


@pytest.fixture(autouse=True)
def end_at_a_cuda_error(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits for the GPU after a gpu test. Under xdist the worker ends and another takes its place; else pytest ends."""
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid}: {error}"
        if hasattr(request.config, "workerinput"):
            print(message, file=sys.__stderr__, flush=True)
            os._exit(EXIT_CODE)
        pytest.exit(f"the GPU's context is lost after {message}", returncode=EXIT_CODE)
