"""Hopper (H100, H200), compute capability 9.0: every tile choice, and how it was found.

Tables, not autotuning: the first call costs no search, and a run repeats exactly. Sweeps ran on an H100 with 132 SMs,
of which the numbers of programs are multiples.
"""

from __future__ import annotations

from typing import Any

import torch

from dig.ops.tiles.architecture import KIB, Architecture
from dig.ops.tiles.choices import (
    CopyTiles,
    GlaTiles,
    NormTiles,
    ProductChoices,
    ProductPass,
    ProductTiles,
    SremPass,
    SremTiles,
    SwigluTiles,
    VectorTiles,
    WeightTiles,
)

# Of these nobody has timed the walk over several chunks: only single chunks take it.
_ONE_CHUNK: dict[str, Any] = {"walk_chunks": 1}
# Heads of 36 leave room for one program of the walk an SM (182 registers at 8 warps), and what three launches would do
# beside each other it does one after the other.
_EIGHT_WARPS: dict[str, Any] = {
    **_ONE_CHUNK, "local_warps": 8, "walk_warps": 8, "output_warps": 8, "output_backward_warps": 8,
    "gradient_warps": 8,
}  # fmt: skip
# In turns: where chunks of 64 are 24 to 96 programs, chunks of 16 take 4 to 8% from a forward pass; where they are 288
# or more they add 0.3 to 6%. The scan's choices give 1 to 2% of a forward pass.
_FEW = GlaTiles(chunk=16, short_units=32, short_steps=16)
GLA: dict[tuple[int, int, torch.dtype], GlaTiles] = {
    # The best of `python -m bench ops gla --sweep` that was also the best in a whole model, whose tensors are not in
    # the L2 cache. In turns, release variant, where the walk takes all 4 chunks of 256 pixels: DiG-XL/2 forward with 64
    # images 6% less, S/2 with 32 images 2%, training 0.5 to 1%. Walking, 168 registers let three programs share an SM.
    (32, 64, torch.bfloat16): GlaTiles(few=_FEW, walk_registers=168),
    # These are the largest chunks at which no kernel keeps registers in memory: where one does while it uses Hopper's
    # asynchronous matrix products, compiled code has been seen to read their operands from wrong addresses
    # (`python -m bench ops registers` compiles all of them and looks, without a GPU).
    (36, 72, torch.bfloat16): GlaTiles(chunk=32, **_EIGHT_WARPS),
    (32, 64, torch.float32): GlaTiles(chunk=16, **_ONE_CHUNK),
    (36, 72, torch.float32): GlaTiles(chunk=16, **_EIGHT_WARPS),
}

_WIDE_BF16 = NormTiles(part=1024, backward_rows=1, backward_part=1024, programs=4 * 132)
_WIDE_FP32 = NormTiles(part=128, backward_rows=1, backward_part=1024, programs=4 * 132)
ADALN: dict[tuple[int, torch.dtype], NormTiles] = {
    # bf16 at 384, and the forward part at 1152: the best of `python -m bench ops rowwise --sweep`. The others come from
    # the compiler's counts of registers and spills.
    (384, torch.bfloat16): NormTiles(
        part=256, warps=2, backward_rows=4, backward_part=128, backward_warps=2, programs=4 * 132
    ),
    (384, torch.float32): NormTiles(part=128, backward_rows=4, backward_part=128, programs=3 * 132),
    (768, torch.bfloat16): NormTiles(part=256, backward_rows=2, backward_part=512, programs=3 * 132),
    (768, torch.float32): NormTiles(part=128, backward_rows=2, backward_part=256, programs=3 * 132),
    (1024, torch.bfloat16): _WIDE_BF16,
    (1024, torch.float32): _WIDE_FP32,
    (1152, torch.bfloat16): _WIDE_BF16,
    (1152, torch.float32): _WIDE_FP32,
}

SREM: dict[tuple[SremPass, torch.dtype], SremTiles] = {
    # From the compiler's counts in bf16. Two channels a thread keep its 9 weights, and going back also their 9
    # gradients, in few enough registers for 16 warps an SM and more (72 registers forwards; 128 backwards, without a
    # spill), where four channels take 210 backwards. Four columns a thread cost 20 instructions an element forwards and
    # 41 backwards; two columns 30 and 46. `python -m bench ops srem --sweep` times alternatives.
    ("forward", torch.bfloat16): SremTiles(),
    ("forward", torch.float32): SremTiles(),
    ("backward", torch.bfloat16): SremTiles(registers=128, programs=4 * 132),
    ("backward", torch.float32): SremTiles(registers=168, programs=3 * 132),
}

SWIGLU = {
    # For any F: two reads of 16 bytes a thread each of gate and up, at 4 warps.
    torch.bfloat16: SwigluTiles(elements=2048),
    torch.float32: SwigluTiles(elements=1024),
}

# What was fastest of `python -m bench ops products --sweep`, at D = 384 and T = 12,544 and at D = 1152 and T = 4096.
_NARROW: dict[ProductPass, ProductTiles] = {
    # At D = 384 the sum is short: a tile takes as long to write as to compute, so two are to share an SM.
    "up": ProductTiles(rows=128, columns=64, stages=3, registers=128),
    "up alone": ProductTiles(rows=128, columns=64, stages=3, registers=128),
    "down": ProductTiles(rows=128, columns=64, stages=4),
}
_WIDE: dict[ProductPass, ProductTiles] = {
    # What isn't here is faster apart: at D = 1152 cuBLAS' GEMM takes so much less time that the pass is paid for.
    "up alone": ProductTiles(rows=128, columns=128, stages=4),
}
PRODUCTS = ProductChoices(
    narrow_width=512,
    narrow=_NARROW,
    wide=_WIDE,
    least_tokens=2048,
    # Small tiles, so that there are many: in turns 3.6% of DiG-S/2's forward pass at 256 pixels, 5.9% at 512, 3.9% of
    # XL/2's at 256. At 512, of 768 programs, XL/2 is 4% slower than with cuBLAS and a pass. Training gains nothing.
    few={"up alone": ProductTiles(rows=64, columns=64, stages=4, warps=4)},
    # 16 elements of each of a program's 256 threads.
    share=(32, 128),
)

WEIGHTS = WeightTiles(
    copy=CopyTiles(elements=4096, warps=8),
    # 64 KiB in flight on each SM.
    copy_few=CopyTiles(elements=16384, warps=32),
    # 32 elements of each thread's are read together. A row is a warp's in both, so the sums are added in one order.
    vector=VectorTiles(rows=8, columns=512, warps=4),
    vector_few=VectorTiles(rows=32, columns=512, warps=16),
    few=64,
    gradient_columns=1024,
    gradient_warps=4,
)

# As `WEIGHTS.vector`: reading the weights is all the work.
CONDITION = VectorTiles(rows=8, columns=512, warps=4)

ARCHITECTURE = Architecture(
    name="Hopper",
    capability=(9, 0),
    shared_memory=227 * KIB,
    early_launch=True,
    descriptors=True,
    gla=GLA,
    adaln=ADALN,
    srem=SREM,
    swiglu=SWIGLU,
    products=PRODUCTS,
    weights=WEIGHTS,
    condition=CONDITION,
)
