"""Blackwell for desktops (RTX 50, RTX PRO 6000), compute capability 12.0: as 10.0, with less shared memory.

It has Ampere's tensor cores, for which all of the recurrence's kernels compile; gradients in rounds would spill.
"""

from __future__ import annotations

from dataclasses import replace

from dig.ops.tiles import sm90, sm100
from dig.ops.tiles.architecture import KIB

ARCHITECTURE = replace(
    sm100.ARCHITECTURE, name="Blackwell for desktops", capability=(12, 0), shared_memory=99 * KIB,
    gla=sm90.GLA_BY_LEVELS,
)  # fmt: skip
