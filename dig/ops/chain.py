"""Kernels of a chain that start while the one before them ends: programmatic dependent launch, on Hopper and newer.

A kernel that is launched early has its programs placed as soon as the kernel before it on the stream has placed all of
its own and said so; they wait there until that kernel is done and its results are visible. What is saved is the time
from the end of one kernel to the first instruction of the next, about a microsecond.

Every kernel of this project that may be launched early calls `join_chain` before it touches memory. It then runs after
all that came before it, as on any stream: the kernel before it has waited likewise, and so on.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dig.ops.aside import first_after_wait


@triton.jit
def join_chain(CHAINED: tl.constexpr):
    """Let the next kernel's programs be placed, then wait for the kernel before; first thing in a kernel."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()


def supported(device: torch.device) -> bool:
    """Whether kernels can be launched early there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def chained(device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel that calls `join_chain` and is launched next on the current stream.

    It is launched early, but where it is the first after the stream has waited for another one: that such a kernel of a
    CUDA graph waits for both of them is nowhere promised. (Outside of a graph a stream that waits launches nothing.)
    """
    if not supported(device):
        return {"CHAINED": False}
    return {"CHAINED": True} if first_after_wait(device) else {"CHAINED": True, "launch_pdl": True}
