"""Shared by all tests: GPU tests are skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import os
import signal
import threading

# Under nohup SIGHUP is ignored, by every process that a test starts too, and tests send it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests run side by side, and start harnesses of their own: more threads than cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# PyTorch reads it once, at the first matrix product, which may be in a test before those that train deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# Without a GPU, Triton's interpreter replaces it. It must be chosen before anything imports triton, which
# diffusers does: so here, and not beside the tests of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
