"""Imported once by the server that worker processes fork from: modules that are slow to import and don't touch CUDA."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os

from bench.measure.settings import set_variables
from bench.run.lifeline import die_with_parent
from dig.environment import HARNESS_VARIABLE

harness = os.environ.pop(HARNESS_VARIABLE, "")
if harness:
    # Until it serves, the server does not look whether its harness is still there.
    die_with_parent()
    if os.getppid() != int(harness):
        os._exit(1)

set_variables()

import torch  # noqa: E402 - it reads these variables


def _refuse() -> None:
    raise RuntimeError("CUDA must not start in the workers' server: no process that is forked from it could use a GPU")


_start_cuda, torch.cuda._lazy_init = torch.cuda._lazy_init, _refuse
try:
    # The last of them are what fla and mamba-ssm spend half of their own imports on, which start CUDA and must not be
    # here. So may these, where another package is installed that they look for: transformers takes in torchao, which
    # asks for the card's capability.
    for name in (
        "torch._dynamo", "triton", "bench.run.worker", "dig.raster", "einops", "transformers.generation.utils",
        "transformers.modeling_utils",
    ):  # fmt: skip
        with contextlib.suppress(Exception):  # Missing or broken: a worker that needs it says so in its row.
            importlib.import_module(name)
finally:
    torch.cuda._lazy_init = _start_cuda

if harness:
    # From here on it ends with its last client; the signal would come with the thread that started it, too. It ends at
    # once: to take torch apart keeps a core busy for seconds.
    die_with_parent(0)
    atexit.register(os._exit, 0)
