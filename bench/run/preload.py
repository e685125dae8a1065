"""Imported once by the server that worker processes fork from: modules that are slow to import and don't touch CUDA.

Ctrl-C is the harness's to handle. A terminal sends it to the server and to what was just forked too, where it would
print a traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import sys
from types import TracebackType

from bench.measure.settings import set_variables
from bench.run.lifeline import die_with_parent
from dig.environment import COMPILES_VARIABLE, HARNESS_VARIABLE
from dig.packages import is_installed

harness = os.environ.pop(HARNESS_VARIABLE, "")
compiles = bool(os.environ.pop(COMPILES_VARIABLE, ""))


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing of a process whose harness was interrupted before it told it what to run."""
    if kind is not EOFError:
        sys.__excepthook__(kind, error, trace)


if harness:
    # A process that is forked here gets back the handler that was there before the server began to serve: this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What came while it was blocked (`bench.run.process`) is dropped.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # What ends a process before its function runs, multiprocessing hands to this hook.
    sys.excepthook = _hook
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
    # What fla and mamba-ssm spend half of their own imports on, which start CUDA and must not be here. So may these,
    # where another package is installed that they look for: transformers takes in torchao, which asks for the card's
    # capability.
    peers = ("einops", "transformers.generation.utils", "transformers.modeling_utils")
    wanted = is_installed("fla") or is_installed("mamba_ssm")
    compiler = ("torch._dynamo.backends.inductor", "torch._inductor.compile_fx") if compiles else ()
    attention = ("flash_attn.cute",) if compiles and is_installed("flash_attn.cute") else ()
    ours = ("bench.run.worker", "dig.raster", "baselines.dit", "baselines.dis")
    for name in ("torch._dynamo", "triton", *ours, *compiler, *attention, *(peers if wanted else ())):
        with contextlib.suppress(Exception):  # Missing or broken: a worker that needs it says so in its row.
            importlib.import_module(name)
finally:
    torch.cuda._lazy_init = _start_cuda

if harness:
    # From here on it ends with its last client; the signal would come with the thread that started it, too. It ends at
    # once: to take torch apart keeps a core busy for seconds.
    die_with_parent(0)
    atexit.register(os._exit, 0)
