"""Imported once by the server that worker processes fork from: what is slow to import and leaves CUDA alone."""

from __future__ import annotations

import contextlib
import importlib
import os

# With this, asking whether there is a GPU does not start CUDA, whose state would not survive the fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# A training step of plain attention at 1792 pixels fits on an 80 GB card only if the allocator does not fragment it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # after the variables that it reads


def _refuse() -> None:
    raise RuntimeError("CUDA must not start in the workers' server: no process that is forked from it could use a GPU")


_start_cuda, torch.cuda._lazy_init = torch.cuda._lazy_init, _refuse
try:
    # The last of them are what fla and mamba-ssm spend half of their own imports on, which start CUDA and must not be
    # here. So may these, where another package is installed that they look for: transformers takes in torchao, which
    # asks for the card's capability.
    for name in (
        "torch._dynamo", "triton", "bench.worker", "dig.raster", "einops", "transformers.generation.utils",
        "transformers.modeling_utils",
    ):  # fmt: skip
        with contextlib.suppress(Exception):  # Missing or broken: a worker that needs it says so in its row.
            importlib.import_module(name)
finally:
    torch.cuda._lazy_init = _start_cuda
