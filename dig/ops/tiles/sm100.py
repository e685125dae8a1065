"""Blackwell for data centres (B200), compute capability 10.0: Hopper's tiles, for nobody has run a sweep on one yet.

It has Hopper's TMA and more. SwiGLU's GEMMs are apart all the same, and so are weights' gradients: which of these tiles
beat cuBLAS there is not known, and its tensor cores (tcgen05) are not Hopper's. For those Triton 3.6 fails to compile
the recurrence's forward pass in one launch (an assertion in its pass for tensor memory's layouts), so that is three
launches. What few programs take, chunks of 16 in bf16, compiles.
"""

from __future__ import annotations

from dataclasses import replace

from dig.ops.tiles import sm90

ARCHITECTURE = replace(
    sm90.ARCHITECTURE,
    name="Blackwell",
    capability=(10, 0),
    gla={sizes: replace(tiles, walk_chunks=0, segment_chunks=0) for sizes, tiles in sm90.GLA.items()},
    products=sm90.PRODUCTS.apart(),
    gradients=None,
)
