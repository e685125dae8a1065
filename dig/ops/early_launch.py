"""Kernels that start while the one before them ends: programmatic dependent launch, on Hopper and newer.

A kernel that is launched early has its programs placed as soon as the kernel before it on the stream has placed all of
its own and said so; they wait there until that kernel is done and its results are visible. What is saved is the time
from the end of one kernel to the first instruction of the next, about a microsecond.

Every kernel of this project that may be launched early calls `start_early` before it touches memory. It then runs after
all that came before it, as on any stream: the kernel before it has waited likewise, and so on.
`dig.ops.launch.LaunchContext` says which are launched so.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_early(EARLY: tl.constexpr):
    """Let the next kernel's programs be placed, then wait for the kernel before; first thing in a kernel."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
