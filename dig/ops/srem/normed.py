"""SREM and the norm that comes after it in one launch, for inference.

A convolution works on few channels of many tokens, a norm on all channels of a token. Here a program has all channels
of a patch of tokens: it convolves them, writes them, and reads them again from the caches to normalise them. Against
two launches that saves the end of the one and the start of the other, and reading x once more.

Shapes: B batch, T tokens in raster order, D channels; a patch is PR rows by W columns of the grid. The widest power of
two of channels, WIDE, is convolved as in `dig.ops.srem.kernels`, two channels and all W columns a thread; the REST
beside it by the same threads, in WIDE / REST groups of fewer columns.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# Tuples of tensors are built up one by one, which to mypy changes their type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated, unreachable"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dig.ops.adaln.fused import norm_modulate_forward, parts_of
from dig.ops.adaln.kernels import load_columns, load_factor
from dig.ops.chain import chained, join_chain
from dig.ops.launch import empty, on_device
from dig.ops.srem.fused import srem_forward, taps_of
from dig.ops.srem.kernels import UNSPECIALIZED, add_row, load_row, load_taps, widen
from dig.scan import ScanOrder


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What a program works on.

    Attributes:
        rows: Rows of the grid.
        columns: Columns; both are powers of two.
        together: Tokens that the norm takes at once.
        part: Channels of a row that the norm takes side by side, a power of two: see `dig.ops.adaln.fused.Tiles`.
    """

    rows: int = 4
    columns: int = 8
    together: int = 16
    part: int = 256


PATCH = Patch()
"""With a grid of 64 by 64, DiG-XL's at 1024 pixels, 128 programs: one on each of an H100's 132 multiprocessors."""
MOST_CHANNELS = 2048
MOST_THREADS = 512


def channels_of(D: int) -> tuple[int, int] | None:
    """WIDE and REST of a width; None where this is no way to cut it."""
    wide = 1 << (D.bit_length() - 1)
    rest = D - wide
    if wide > MOST_THREADS * 2 or wide < 64 or rest & (rest - 1) or (rest and wide // rest > PATCH.columns):
        return None
    return wide, rest


@triton.jit
def begin_part(
    x, weight, bias, first_channel, row_start, first_column, first_row, rows, columns, tap_start, tap_row, tap_column,
    X_T: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What convolving BD channels from one on begins with: see `srem_norm_kernel`, and G, W as in the other kernels."""
    channels = first_channel + tl.arange(0, BD)
    exists = channels >= 0
    first = (first_column + tl.arange(0, G) * W)[:, None]
    taps = load_taps(weight, channels, exists, tap_start, tap_row, tap_column)
    constant = tl.load(bias + channels).to(tl.float32)[None, :]
    inside = ()
    for i in tl.static_range(W + 2):
        inside += ((first + (i - 1) >= 0) & (first + (i - 1) < columns) & exists[None, :],)
    above = ()
    middle = ()
    for _ in tl.static_range(W):
        above += (tl.zeros((G, BD), tl.float32),)
        middle += (tl.zeros((G, BD), tl.float32) + constant,)
    start = x + ((first - 1) * X_T + channels[None, :])
    values = widen(load_row(start, row_start, first_row - 1, 0, rows, inside, X_T), PACKED)
    return taps, constant, inside, start, (first, channels), above, middle, values


@triton.jit
def store_row(y, done, first, channels, inside, wanted, D: tl.constexpr):
    """Write one row of a part, where it is inside and wanted."""
    pointers = y + (first * D + channels[None, :])
    for i in tl.static_range(len(done)):
        tl.store(pointers + i * D, done[i].to(y.dtype.element_ty), mask=inside[i + 1] & wanted)


@triton.jit
def normalize(
    y, h, shift, scale, weight, offsets, exists, eps,
    D: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """h of R tokens, which exist where it says so; offsets (R, 1) of each, contiguous. See `norm_modulate_kernel`."""
    tiles = ()
    total = tl.zeros([R], tl.float32)
    for i in tl.static_range(len(PARTS)):
        part = offsets + (PARTS[i][0] + tl.arange(0, PARTS[i][1]))[None, :]
        tile = tl.load(y + part, mask=exists, other=0.0)
        tiles += (tile,)
        wide = tile.to(tl.float32)
        if NORM == "rms":
            total += tl.sum(wide * wide, axis=1)
        else:
            total += tl.sum(wide, axis=1)
    mean = total / D
    if NORM == "layer":
        total = tl.zeros([R], tl.float32)
        for i in tl.static_range(len(PARTS)):
            difference = tiles[i].to(tl.float32) - mean[:, None]
            total += tl.sum(difference * difference, axis=1)
    r = tl.rsqrt(total / D + eps)
    for i in tl.static_range(len(PARTS)):
        factor = load_factor(scale, weight, PARTS[i][0], PARTS[i][1], R, NORM)
        n = tiles[i].to(tl.float32)
        if NORM == "layer":
            n -= mean[:, None]
        value = n * r[:, None] * factor + load_columns(shift, PARTS[i][0], PARTS[i][1], R)
        part = offsets + (PARTS[i][0] + tl.arange(0, PARTS[i][1]))[None, :]
        tl.store(h + part, value.to(h.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=[*UNSPECIALIZED[:2], *UNSPECIALIZED[3:]])
def srem_norm_kernel(
    x, weight, bias, shift, scale, norm_weight, y, h, x_b, shift_b, scale_b, rows, columns,
    tap_start, tap_row, tap_column, eps,
    D: tl.constexpr, X_T: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    PR: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """y, the convolution, and h, its norm modulated, of one patch. Grid (patches, B)."""
    join_chain(CHAINED)
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(columns, W)
    first_row = tl.program_id(0) // across * PR
    first_column = tl.program_id(0) % across * W
    end_row = tl.minimum(first_row + PR, rows)
    row_tokens = columns.to(tl.int64)
    x_row = row_tokens * X_T
    x_image = x + batch * x_b
    image = batch * rows * columns * D

    taps, constant, inside, start, at, above, middle, values = begin_part(
        x_image, weight, bias, 0, x_row, first_column, first_row, rows, columns, tap_start, tap_row, tap_column,
        X_T, W, 1, WIDE, PACKED,
    )  # fmt: skip
    if REST > 0:
        # Renamed one by one: a tuple that a loop carries has to be one of tensors.
        r_taps, r_constant, r_inside, r_start, r_at, r_above, r_middle, r_values = begin_part(
            x_image, weight, bias, WIDE, x_row, first_column, first_row, rows, columns, tap_start, tap_row, tap_column,
            X_T, W * REST // WIDE, WIDE // REST, REST, PACKED,
        )  # fmt: skip
    last = tl.minimum(rows, end_row + 1)
    # Unrolled, so that what the rows at both ends don't need isn't computed.
    for step in tl.static_range(PR + 2):
        row = first_row - 1 + step
        if step <= PR:
            following = load_row(start, x_row, row + 1, 0, last, inside, X_T)
            if REST > 0:
                r_following = load_row(r_start, x_row, row + 1, 0, last, r_inside, X_T)
        y_row = y + image + (row - 1) * (row_tokens * D)
        done, above, middle = add_row(values, above, middle, taps, constant, step == 0, step == PR + 1)
        if step >= 2:
            store_row(y_row, done, at[0], at[1], inside, row <= end_row, D)
        if step <= PR:
            values = widen(following, PACKED)
        if REST > 0:
            r_done, r_above, r_middle = add_row(
                r_values, r_above, r_middle, r_taps, r_constant, step == 0, step == PR + 1
            )
            if step >= 2:
                store_row(y_row, r_done, r_at[0], r_at[1], r_inside, row <= end_row, D)
            if step <= PR:
                r_values = widen(r_following, PACKED)

    # What other threads of this program have written is read from here on.
    tl.debug_barrier()
    for first in tl.static_range(0, PR * W, R):
        token = first + tl.arange(0, R)
        token_row = first_row + token // W
        token_column = first_column + token % W
        exists = ((token_row < rows) & (token_column < columns))[:, None]
        offsets = (image + (token_row * row_tokens + token_column) * D)[:, None]
        normalize(
            y, h, shift + batch * shift_b, scale + batch * scale_b, norm_weight, offsets, exists, eps, D, R, PARTS, NORM
        )


@torch.library.custom_op("dig::srem_norm", mutates_args=())
def srem_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`dig.ops.srem.srem` without a branch, and `dig.ops.adaln.norm_modulate` of that, both (B, T, D) in x's dtype.

    Args:
        x: (B, T, D) in raster order, contiguous in its last dimension.
        weight: (D, 1, 3, 3), contiguous.
        bias: (D,).
        rows: Of the grid.
        columns: Likewise.
        transposed: As in `dig.scan.ScanOrder`.
        reversed: Likewise.
        shift: (B, D), contiguous in its last dimension.
        scale: Likewise.
        norm_weight: (D,) of the rms norm.
        norm: ``rms`` or ``layer``.
        eps: Added to the mean square or the variance.
    """
    B, _, D = x.shape
    cut = channels_of(D)
    order = ScanOrder(transposed, reversed)
    if cut is None:
        y = srem_forward(x, None, None, weight, bias, rows, columns, transposed, reversed)
        return y, norm_modulate_forward(y, shift, scale, norm_weight, norm, eps, x.dtype)[0]
    wide, rest = cut
    y, h = empty(x), empty(x)
    patches = triton.cdiv(rows, PATCH.rows) * triton.cdiv(columns, PATCH.columns)
    with on_device(x.device):
        srem_norm_kernel[(patches, B)](
            x, weight, bias, shift, scale, shift if norm_weight is None else norm_weight, y, h,
            x.stride(0), shift.stride(0), scale.stride(0), rows, columns, *taps_of(order), eps,
            D=D, X_T=x.stride(1), WIDE=wide, REST=rest, PR=PATCH.rows, W=PATCH.columns, R=PATCH.together, NORM=norm,
            PACKED=x.dtype == torch.bfloat16 and isinstance(srem_norm_kernel, triton.runtime.JITFunction),
            PARTS=parts_of(D, PATCH.part), num_warps=max(2, wide // 64), **chained(x.device),
        )  # fmt: skip
    return y, h


@srem_norm_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return empty(x), empty(x)
