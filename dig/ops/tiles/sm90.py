"""Hopper (H100, H200), compute capability 9.0: every tile choice, and how it was found.

Tables, not autotuning: the first call costs no search, and a run repeats exactly. Sweeps ran on an H100 with 132 SMs,
of which most numbers of programs are multiples. "Not swept" is said of numbers beside which no other was timed that is
known of. docs/log.md has the measurements by date.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dig.ops.tiles.architecture import KIB, Architecture
from dig.ops.tiles.choices import (
    CopyTiles,
    GlaTiles,
    ModulationTiles,
    NormTiles,
    SremPass,
    SremTiles,
    SwigluTiles,
    VectorTiles,
    WeightTiles,
)
from dig.ops.tiles.passes import PassChoices
from dig.ops.tiles.products import GradientTiles, ProductChoices, ProductPass, ProductTiles

# What the entries share, as it was found for heads of 32 and 64 in bf16.
_HEADS = GlaTiles(
    # Chunks of 32 and of 128 were slower. With 32, `gradient_kernel` was faster, and the longer scan took that back.
    chunk=64,
    # One an SM. `_FEW` says what was timed on either side of it.
    few_programs=132,
    # 8 warps leave one program an SM in the backward kernels, 4 leave two: 134 to 93 µs and 78 to 55. 2 were slower.
    # The other two kernels' warps are the best of `python -m bench ops gla --sweep`.
    local_warps=4,
    output_warps=4,
    output_backward_warps=4,
    gradient_warps=4,
    # 256 chunks in one round: S/2 at 1792 pixels took 9.02 ms, 9.10 before. 512 threads a program were slower.
    scan_warps=4,
    scan_lanes=32,
    scan_groups=16,
    scan_steps=16,
    # Not swept: 16 bytes for each thread of a program.
    short_chunks=16,
    short_warps=4,
    short_units=128,
    short_steps=8,
    # Timed at 4 chunks alone: the first entry below says what it gave. Not swept. 44 programs a chunk are a third of
    # the SMs: at 8 chunks they are nearly three an SM, as many as an SM has registers for.
    walk_chunks=8,
    walk_programs=44,
    # Off until it is timed: of 4 chunks, two programs an SM.
    segment_chunks=0,
    segment_programs=2 * 132,
    segment_warps=4,
    walk_warps=4,
    # 256 pixels. Not timed with more: a program of the first chunk reads what all the others add.
    gradient_scan_chunks=4,
    # Not swept.
    sum_rows=256,
    sum_columns=8,
    sum_warps=8,
)
# For entries whose walk over several chunks nobody has timed: only single chunks take it.
_ONE_CHUNK: dict[str, Any] = {"walk_chunks": 1}
# Heads of 36 leave room for one program of the walk an SM (182 registers at 8 warps), and it does one after the other
# what three launches do beside each other. Of 8 warps the compiler's counts are known, no times.
_EIGHT_WARPS: dict[str, Any] = {
    **_ONE_CHUNK, "local_warps": 8, "walk_warps": 8, "output_warps": 8, "output_backward_warps": 8,
    "gradient_warps": 8,
}  # fmt: skip
# In turns: where chunks of 64 are 24 to 96 programs, chunks of 16 take 4 to 8% from a forward pass and 1.2 to 3.8% from
# a training step; where they are 288 or more they add 0.3 to 6%. The scan's choices give 1 to 2% of a forward pass, 8
# warps in `output_backward_kernel` 0.5% of a training step.
_FEW = replace(_HEADS, chunk=16, short_units=32, short_steps=16, output_backward_warps=8)
GLA_BY_LEVELS: dict[tuple[int, int, torch.dtype], GlaTiles] = {
    # The best of `python -m bench ops gla --sweep` that was also the best in a whole model, whose tensors are not in
    # the L2 cache. In turns, release variant, where the walk takes all 4 chunks of 256 pixels: DiG-XL/2 forward with 64
    # images 6% less, S/2 with 32 images 2%, training 0.5 to 1%. 168 registers let three walking programs share an SM.
    (32, 64, torch.bfloat16): replace(_HEADS, few=_FEW, walk_registers=168),
    # These are the largest chunks at which no kernel keeps registers in memory: where one does while it uses Hopper's
    # asynchronous matrix products, compiled code has been seen to read their operands from wrong addresses
    # (`python -m bench ops registers` compiles all of them and looks, without a GPU).
    (36, 72, torch.bfloat16): replace(_HEADS, chunk=32, **_EIGHT_WARPS),
    (32, 64, torch.float32): replace(_HEADS, chunk=16, **_ONE_CHUNK),
    (36, 72, torch.float32): replace(_HEADS, chunk=16, **_EIGHT_WARPS),
}
GLA: dict[tuple[int, int, torch.dtype], GlaTiles] = {
    **GLA_BY_LEVELS,
    # 168 registers let three programs share an SM here too. In turns on an H200, with gradients in rounds S/2's
    # training step at 256 pixels with 32 images takes 2.9% less, at 1024 and 2048 with one 3.4%. Outputs in parts give
    # another 0.3 to 1.2% beside those, and nothing by themselves. In the other entries rounds spill, and with chunks of
    # 16 they take more registers, not fewer.
    (32, 64, torch.bfloat16): replace(
        GLA_BY_LEVELS[32, 64, torch.bfloat16], gradient_rounds=True, gradient_registers=168,
        output_backward_parts=True, output_backward_registers=168,
    ),
}  # fmt: skip

# bf16 at 384, and the forward part at 1152: the best of `python -m bench ops rowwise --sweep`. The others come from the
# compiler's counts of registers and spills, and programs from how many an SM then holds. As many warps as rows, but for
# the forward part of bf16 at 384. What adds up the partial sums is not swept.
_NORM = NormTiles(
    rows=4, part=128, warps=4, backward_rows=4, backward_part=128, backward_warps=4, programs=3 * 132,
    branch_programs=2 * 132, sum_rows=256, sum_columns=8, sum_least_rows=32, sum_warps=8,
)  # fmt: skip
_WIDE_BF16 = replace(_NORM, part=1024, backward_rows=1, backward_part=1024, programs=4 * 132, branch_programs=4 * 132)
_WIDE_FP32 = replace(_WIDE_BF16, part=128)
ADALN: dict[tuple[int, torch.dtype], NormTiles] = {
    # In turns on an H200, S/2's training step at 256 pixels with 32 images takes 3.3% less with two rows of two warps
    # backwards than with four, as the sweep by itself had it, and another 0.8% less with one of one.
    (384, torch.bfloat16): replace(
        _NORM, part=256, warps=2, backward_rows=1, backward_warps=1, programs=8 * 132, branch_programs=8 * 132
    ),
    (384, torch.float32): _NORM,
    (768, torch.bfloat16): replace(_NORM, part=256, backward_rows=2, backward_part=512),
    (768, torch.float32): replace(_NORM, backward_rows=2, backward_part=256),
    (1024, torch.bfloat16): _WIDE_BF16,
    (1024, torch.float32): _WIDE_FP32,
    # In turns, a training step of XL/2 with 32 images takes as long with the fourth of them, which SMs don't hold.
    (1152, torch.bfloat16): replace(_WIDE_BF16, branch_programs=3 * 132),
    (1152, torch.float32): replace(_WIDE_FP32, branch_programs=3 * 132),
}

_SREM = SremTiles(
    # From the compiler's counts in bf16. Two channels a thread keep its 9 weights, and going back also their 9
    # gradients, in few enough registers for 16 warps an SM and more (72 registers forwards; 128 backwards, without a
    # spill), where four channels take 210 backwards. Four columns a thread cost 20 instructions an element forwards and
    # 41 backwards; two columns 30 and 46. `python -m bench ops srem --sweep` times alternatives.
    channels=64,
    groups=4,
    width=4,
    warps=4,
    # Not swept. At 72 registers the SMs hold more of them at once, 7 each.
    programs=600,
    # Not swept.
    rows=32,
    least_rows=4,
    sum_steps=64,
    sum_channels=32,
    sum_warps=4,
)
SREM: dict[tuple[SremPass, torch.dtype], SremTiles] = {
    ("forward", torch.bfloat16): _SREM,
    ("forward", torch.float32): _SREM,
    # As many programs as these registers let the SMs hold at once.
    ("backward", torch.bfloat16): replace(_SREM, registers=128, programs=4 * 132),
    ("backward", torch.float32): replace(_SREM, registers=168, programs=3 * 132),
}

SWIGLU = {
    # For any F: two reads of 16 bytes a thread each of gate and up, at 4 warps. Not swept.
    torch.bfloat16: SwigluTiles(elements=2048, columns=1024, warps=4),
    torch.float32: SwigluTiles(elements=1024, columns=1024, warps=4),
}

# What was fastest of `python -m bench ops products --sweep`, at D = 384 and T = 12,544 and at D = 1152 and T = 4096.
# Groups of other than 8 rows of tiles are not swept.
_PRODUCT = ProductTiles(rows=128, columns=64, depth=64, group=8, warps=8, stages=3)
_NARROW: dict[ProductPass, ProductTiles] = {
    # At D = 384 the sum is short: a tile takes as long to write as to compute, so two are to share an SM.
    "up": replace(_PRODUCT, registers=128),
    "up alone": replace(_PRODUCT, registers=128),
    "down": replace(_PRODUCT, stages=4),
}
_WIDE: dict[ProductPass, ProductTiles] = {
    # What isn't here is faster apart: at D = 1152 cuBLAS' GEMM takes so much less time that the pass is paid for.
    "up alone": replace(_PRODUCT, columns=128, stages=4),
}
# Small tiles, so that there are many: in turns 3.6% of DiG-S/2's forward pass at 256 pixels, 5.9% at 512, 3.9% of
# XL/2's at 256. Training gains nothing.
_FEW_PROGRAMS: dict[ProductPass, ProductTiles] = {
    "up alone": replace(_PRODUCT, rows=64, columns=64, stages=4, warps=4),
}
PRODUCTS = ProductChoices(
    # Not swept: 384 and 1152 were timed, and no width in between.
    narrow_width=512,
    narrow=_NARROW,
    wide=_WIDE,
    # Not swept: 1024 tokens at D = 384 are 128 programs of these tiles, fewer than there are SMs.
    least_tokens=2048,
    few=_FEW_PROGRAMS,
    # At 512 pixels they are 768 programs in XL/2, which is 4% slower than with cuBLAS and a pass. The bound, two an SM,
    # is not swept.
    few_programs=2 * 132,
    # 16 elements of each of a program's 256 threads. Shares four times as large as before, in every third step instead
    # of every one, took XL/2's forward pass at 1024 pixels from 9.33 to 9.24 ms.
    share=(32, 128),
)

# With tiles of 128 by 128, DiG-S' four weights are 111 programs. In turns on an H200, beside a GEMM each: S/2's
# training step at 256 pixels takes 5.4% less with one image, 4.2% with 32; at 1024 4.9%, at 2048 5.7%. XL/2's with 32
# images takes 1.9% more. No width in between was timed, and no fewer tokens. 6 stages take from 0.5% less to 1.7% more
# than 4, 3 take 0.5 to 2.4% more; 64 rows or columns, or 128 tokens at a time, 1.7 to 7.4% more.
GRADIENTS = GradientTiles(rows=128, columns=128, depth=64, warps=8, stages=4, most_width=512, least_tokens=256)

# Not swept. Reading the weight is all the work: with 64 images a program, each is read once for as many.
MODULATION = ModulationTiles(
    rows=64, columns=32, images=64, inner_images=32, gradient_rows=64, gradient_columns=64, shares=16, share_rows=32,
    warps=4, stages=3,
)  # fmt: skip

WEIGHTS = WeightTiles(
    # Not swept: 16 elements a thread, as of `copy_few`.
    copy=CopyTiles(elements=4096, warps=8),
    # Not swept: 64 KiB in flight on each SM. How many SMs is what was timed (docs/log.md, 2026-11-25).
    copy_few=CopyTiles(elements=16384, warps=32),
    # Not swept: 32 elements of each thread's are read together. A row is a warp's in both, so sums have one order.
    vector=VectorTiles(rows=8, columns=512, warps=4),
    vector_few=VectorTiles(rows=32, columns=512, warps=16),
    # Models ask for 32 or 64 (`dig.raster`). No other bound was timed.
    few=64,
    # Not swept.
    gradient_columns=1024,
    gradient_warps=4,
    modulation=MODULATION,
)

# Not swept: as `WEIGHTS.vector`, for reading the weights is all the work.
CONDITION = VectorTiles(rows=8, columns=512, warps=4)

PASSES = PassChoices(
    # With 32 programs XL's forward pass at 512 pixels took 3.82 ms instead of 4.05, at 256 2.60 instead of 2.89; with
    # 4096 tokens any number of them was slower (`python -m bench ops prepare`).
    beside_tokens=1024,
    beside_programs=32,
    # In turns: S/2's forward pass with bf16 weights at 256 pixels 2.4% less than with 32, at 512 the same.
    beside_programs_gates=64,
    # Before a GEMM of many tiles cuBLAS clears a counter of them, by a memset that delays a CUDA graph by 6.5 µs.
    # Halves of 4096 rows need none and take as long as the whole (D = 1152), which saves 1.8% of XL's forward pass. At
    # 16,384 rows the whole is faster.
    halved_tokens=4096,
    # In turns, unfolded: XL/2 at 256 pixels 9.3% less, at 512 7.4%, at 1024 and 2048 the same; L/2 and B/2 at 256 7.4%
    # and 2.2% less; S/2 at 256 0.6% more.
    unfolded_tokens=1024,
    unfolded_width=768,
    # Not swept: every image reads the weights again, from the L2 cache; of more images a GEMM is faster.
    condition_images=8,
)

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
    gradients=GRADIENTS,
    weights=WEIGHTS,
    condition=CONDITION,
    passes=PASSES,
)
