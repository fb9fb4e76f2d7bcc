"""After each gpu test the GPU is waited for. At a CUDA error the process ends: its context is lost to later tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

EXIT_CODE = 3
lost: list[str] = []  # what the error was, once there was one


@pytest.fixture(autouse=True)
def fail_at_a_cuda_error(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        lost.append(f"{request.node.nodeid}: {error}")
        pytest.fail(str(error), pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Behind the test's own reports. A worker of xdist is replaced by another one; else pytest ends."""
    if lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(EXIT_CODE)
    if lost:
        pytest.exit(f"the GPU's context is lost: {lost[0]}", returncode=EXIT_CODE)
