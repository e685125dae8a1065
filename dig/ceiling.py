"""The matrix product whose speed is the ceiling that a model's share is taken of."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square operands, by device."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_WARM_UP_S = 0.2
_PRODUCTS = 20


def large_product(device: str, dtype: str) -> tuple[Callable[[], Tensor], int]:
    """A product of two square matrices of random numbers (zeros would be faster and cooler), and its FLOPs.

    Args:
        device: ``cuda`` or ``cpu``.
        dtype: ``bf16`` or ``fp32``.
    """
    side = SIDE[device]
    a, b = torch.randn(2, side, side, device=device).to(DTYPES[dtype]).unbind(0)
    return lambda: a @ b, 2 * side**3


def gpu_ceiling(dtype: str) -> float:
    """FLOP/s of that product on the current GPU: the median of some, launched without waiting, by CUDA's events."""
    run, flops = large_product("cuda", dtype)
    end = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < end:
        run()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_PRODUCTS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(events)]
    return 1000 * flops / median(times)
