"""Set before anything imports triton: on a machine without a GPU, Triton kernels run in its interpreter."""

from __future__ import annotations

import os
import signal

import torch
from cuda_errors import fail_at_a_cuda_error, pytest_runtest_logfinish  # noqa: F401
from hypothesis import HealthCheck, settings
from skips import pytest_terminal_summary  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS runs under torch.use_deterministic_algorithms

settings.register_profile(
    "shira",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("shira")

# A shell has what it starts in the background ignore SIGINT; tests send it to themselves and to their children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
