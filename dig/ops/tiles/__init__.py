"""Tile choices of every operation's kernels, one file an architecture.

`dig.ops.tiles.choices` says what there is to choose, `dig.ops.tiles.products` that of GEMMs, `Architecture` what an
architecture's file states, and `dig.ops.tiles.sm90` is the one that was measured. A file ``sm<capability>.py`` here
with an ``ARCHITECTURE`` is found by its name: docs/extending.md says how to add one.

**GPUs that have none** take the nearest older file: the largest capability that isn't above theirs, or the oldest
there is. How much shared memory they have is asked of the driver.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from dataclasses import replace

import torch

from dig.ops.tiles.architecture import KIB, Architecture
from dig.ops.tiles.interpreter import ARCHITECTURE as INTERPRETER
from dig.ops.tiles.passes import PassChoices

__all__ = [
    "INTERPRETER",
    "KIB",
    "Architecture",
    "architectures",
    "for_capability",
    "for_device",
    "forget_choices",
    "gpu_index",
    "passes_for",
]


LEAST = (8, 0)
"""Compute capability from which on GPUs compute in bf16."""


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """Those that have a file, oldest first.

    Raises:
        ValueError: A file states another capability than its name does, too old a one, or none at all.
    """
    return tuple(architecture for _, architecture in sorted(_found().items()))


def _found() -> dict[tuple[int, int], Architecture]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if re.fullmatch(r"sm\d+", module.name):
            capability = divmod(int(module.name[2:]), 10)
            architecture = getattr(importlib.import_module(f"{__name__}.{module.name}"), "ARCHITECTURE", None)
            if not isinstance(architecture, Architecture):
                raise ValueError(f"dig/ops/tiles/{module.name}.py must have an ARCHITECTURE, as sm80.py has")
            if architecture.capability != capability:
                raise ValueError(
                    f"{module.name}.py must have the capability {capability}; got {architecture.capability}"
                )
            if capability < LEAST:
                raise ValueError(f"{module.name}.py: the kernels compute in bf16, which GPUs have from {LEAST} on")
            found[capability] = architecture
    return found


def for_capability(capability: tuple[int, int]) -> Architecture:
    """The architecture of a compute capability, (major, minor), or the nearest older one with a file.

    Raises:
        ValueError: A GPU that does not compute in bf16.
    """
    if capability < LEAST:
        raise ValueError(
            f"this project's kernels compute in bf16, which GPUs have from compute capability 8.0 on; this one has "
            f"{capability[0]}.{capability[1]}: use backend 'reference'"
        )
    known = architectures()
    older = [each for each in known if each.capability is not None and each.capability <= capability]
    return older[-1] if older else known[0]


def for_device(device: torch.device) -> Architecture:
    """What runs on a device: on a CPU that is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    return _of_gpu(gpu_index(device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def passes_for(device: torch.device) -> PassChoices:
    """Which of its ways a block's pass takes there; of a device that launches nothing, as in the interpreter."""
    return _passes_for(device)


@functools.cache
def _passes_for(device: torch.device) -> PassChoices:
    return (for_device(device) if device.type == "cuda" and torch.cuda.is_available() else INTERPRETER).passes


def gpu_index(device: torch.device) -> int:
    """Which GPU a CUDA device is; without an index it is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def forget_choices() -> None:
    """Choose anew from now on: somebody has changed a table (`bench.ops.variants`)."""
    _of_gpu.cache_clear()
    _passes_for.cache_clear()
    INTERPRETER.forget()


@functools.cache
def _of_gpu(index: int) -> Architecture:
    known = for_capability(torch.cuda.get_device_capability(index))
    limit = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", known.shared_memory)
    return replace(known, shared_memory=limit)
