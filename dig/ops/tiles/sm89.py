"""Ada (L4, L40, RTX 40), compute capability 8.9: as Ampere, with less shared memory."""

from __future__ import annotations

from dataclasses import replace

from dig.ops.tiles import sm80
from dig.ops.tiles.architecture import KIB

ARCHITECTURE = replace(sm80.ARCHITECTURE, name="Ada", capability=(8, 9), shared_memory=99 * KIB)
