"""Ampere for data centres (A100), compute capability 8.0: Hopper's tiles, for nobody has run a sweep on one yet.

Gradients in rounds take Hopper's matrix products, whose operands lie in shared memory: here they would spill.
"""

from __future__ import annotations

from dataclasses import replace

from dig.ops.tiles import sm90
from dig.ops.tiles.architecture import KIB

ARCHITECTURE = replace(
    sm90.ARCHITECTURE,
    name="Ampere",
    capability=(8, 0),
    shared_memory=163 * KIB,
    early_launch=False,
    descriptors=False,
    gla=sm90.GLA_BY_LEVELS,
    products=sm90.PRODUCTS.apart(),
    gradients=None,
)
