"""Kernels that start while the one before them ends: programmatic dependent launch, on Hopper and newer.

An early kernel's programs are placed once the kernel before it on the stream has placed all of its own and said so.
They wait until that kernel is done and its results are visible. This saves the time from the end of one kernel to the
first instruction of the next, about a microsecond.

Every kernel of this project that may be launched early calls `start_early` before it touches memory. The order of a
stream then holds as ever: the kernel before has waited in the same way.
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
