"""Recurrence, adaptive norm, SwiGLU, SREM against references and peers under pytest-benchmark: ``nox -s bench_ops``.

One round is a replay of a CUDA graph that holds the step once for each of its input sets (see `bench.ops.common`), so a
round's time over the number of sets is a step's. ``extra_info`` has that, the bytes that the step must move, and the
share of a device copy's rate, measured in the same run, that it reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.ops import gla, rowwise, srem
from bench.ops.common import MODES, Step, capture, copy_rate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

Maker = Callable[[str, str], tuple[list[Step], int]]
"""(implementation, mode) to cold steps and the bytes that one must move."""

SIZES: dict[str, dict[str, int]] = {
    "S/2 at 1792": {"side": 112, "D": 384, "H": 6, "K": 32, "V": 64},
    "XL/2 at 2048": {"side": 128, "D": 1152, "H": 18, "K": 32, "V": 64},
}


def _gla(size: dict[str, int], operation: str, implementation: str, mode: str) -> tuple[list[Step], int]:
    shape = gla.Shape(B=1, T=size["side"] ** 2, H=size["H"], K=size["K"], V=size["V"], dtype="bf16")
    return gla.make_steps(shape, operation, implementation, mode), shape.least_bytes(operation, mode)


def _rowwise(size: dict[str, int], operation: str, implementation: str, mode: str) -> tuple[list[Step], int]:
    shape = rowwise.Shape(B=1, T=size["side"] ** 2, D=size["D"], norm="layer", stream="bf16", dtype="bf16")
    return rowwise.make_steps(shape, operation, implementation, mode), shape.least_bytes(operation, mode)


def _srem(size: dict[str, int], implementation: str, mode: str) -> tuple[list[Step], int]:
    shape = srem.Shape(B=1, rows=size["side"], columns=size["side"], D=size["D"], dtype="bf16")
    return srem.make_steps(shape, implementation, mode), shape.least_bytes(mode)


def _cases() -> list[Any]:
    """One parameter set for each size, operation and implementation."""
    cases = []
    for name, size in SIZES.items():
        makers: list[tuple[str, tuple[str, ...], Maker]] = [
            *((f"gla {op}", ("triton", "fla"), partial(_gla, size, op)) for op in ("recurrence", "block")),
            *((op, rowwise.IMPLEMENTATIONS, partial(_rowwise, size, op)) for op in rowwise.OPERATIONS),
            ("srem", srem.IMPLEMENTATIONS, partial(_srem, size)),
        ]
        for operation, implementations, make in makers:
            for one in implementations:
                cases.append(pytest.param(name, operation, one, make, id=f"{operation}-{one}-{name}"))
    return cases


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    """Each case compiles for its own shapes; Dynamo counts those of other cases against its limit."""
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def rate() -> float:
    """Bytes a microsecond of a device copy."""
    return copy_rate()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "operation", "implementation", "make"), _cases())
def test_operation(
    benchmark: Any, rate: float, size: str, operation: str, implementation: str, make: Maker, mode: str
) -> None:
    """Time one operation of one implementation; a peer that isn't installed is skipped, with what to install."""
    try:
        steps, bytes_moved = make(implementation, mode)
    except ImportError as error:
        # Peers are optional: the others are timed without them. The reason shown says what to install.
        pytest.skip(str(error))
    graph = capture(steps)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.group = f"{operation}, {mode}, {size}"
    benchmark.pedantic(replay, rounds=50, warmup_rounds=5)
    us = benchmark.stats.stats.median * 1e6 / len(steps)
    benchmark.extra_info |= {
        "implementation": implementation,
        "us_per_step": us,
        "bytes": bytes_moved,
        "share_of_copy": bytes_moved / us / rate,
        "device": torch.cuda.get_device_name(),
    }
