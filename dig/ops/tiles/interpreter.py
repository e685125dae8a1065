"""Triton's interpreter, which replaces a GPU in tests: fewer and larger programs.

It takes the same time for each program, whatever its width: parts are wide and programs few. None of it was swept.
Shared memory, warps and registers are nothing to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dig.ops.tiles import sm90
from dig.ops.tiles.architecture import Architecture
from dig.ops.tiles.choices import NormTiles, SwigluTiles

_DTYPES = (torch.bfloat16, torch.float32)
_GLA = replace(
    sm90.GLA[32, 64, torch.bfloat16],
    few=None,
    walk_registers=None,
    scan_lanes=128,
    scan_groups=2,
    short_units=512,
)
GLA = {(32, 64, dtype): _GLA for dtype in _DTYPES}
_ADALN = NormTiles(
    rows=16,
    part=256,
    warps=4,
    backward_rows=16,
    backward_part=1024,
    backward_warps=4,
    programs=6,
    branch_programs=6,
    sum_rows=256,
    sum_columns=8,
    sum_least_rows=32,
    sum_warps=8,
)
_SREM = replace(sm90.SREM["forward", torch.bfloat16], channels=512, groups=8, width=2, programs=1)

ARCHITECTURE = Architecture(
    name="Triton's interpreter",
    capability=None,
    shared_memory=None,
    early_launch=False,
    descriptors=False,
    gla=GLA,
    adaln={(384, dtype): _ADALN for dtype in _DTYPES},
    srem={("forward", dtype): _SREM for dtype in _DTYPES} | {("backward", dtype): _SREM for dtype in _DTYPES},
    swiglu=dict.fromkeys(_DTYPES, SwigluTiles(elements=2**14, columns=1024, warps=4)),
    # A GEMM and a pass apart: PyTorch's GEMM is far faster than an interpreted one.
    products=sm90.PRODUCTS.apart(),
    gradients=None,
    weights=sm90.WEIGHTS,
    condition=sm90.CONDITION,
    passes=sm90.PASSES,
)
