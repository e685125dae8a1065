"""Triton's interpreter, which replaces a GPU in tests: fewer and larger programs.

It takes the same time for each program, whatever its width. Shared memory, warps and registers are nothing to it.
"""

from __future__ import annotations

import torch

from dig.ops.tiles import sm90
from dig.ops.tiles.architecture import Architecture
from dig.ops.tiles.choices import GlaTiles, NormTiles, ProductChoices, SremTiles, SwigluTiles

_DTYPES = (torch.bfloat16, torch.float32)
_GLA = GlaTiles(scan_lanes=128, scan_groups=2, short_units=512)
GLA = {(32, 64, dtype): _GLA for dtype in _DTYPES}
_ADALN = NormTiles(rows=16, part=256, backward_rows=16, backward_part=1024, programs=6)
_SREM = SremTiles(channels=512, groups=8, width=2, programs=1)

ARCHITECTURE = Architecture(
    name="Triton's interpreter",
    capability=None,
    shared_memory=None,
    early_launch=False,
    descriptors=False,
    gla=GLA,
    adaln={(384, dtype): _ADALN for dtype in _DTYPES},
    srem={("forward", dtype): _SREM for dtype in _DTYPES} | {("backward", dtype): _SREM for dtype in _DTYPES},
    swiglu=dict.fromkeys(_DTYPES, SwigluTiles(elements=2**14)),
    # A GEMM and a pass apart: PyTorch's GEMM is far faster than an interpreted one.
    products=ProductChoices(),
    weights=sm90.WEIGHTS,
    condition=sm90.CONDITION,
)
