"""Triton kernels of adaptive norm, one pass over the tokens forward and one backward.

Shapes: B batch, T tokens, D width; R rows (tokens) that a program holds at once; P programs of a batch entry.

With ``a = weight (1 + scale)`` (``1 + scale`` for the layer norm, which has no weight) and n = norm(x) before weight::

    h      = n a + shift                     n = x r                  (rms)     r = rsqrt(mean(x^2) + eps)
                                             n = (x - mean(x)) r      (layer)   r = rsqrt(var(x) + eps)
    dn     = dh a
    dx     = r (dn - n mean(n dn))                                    (rms)
    dx     = r (dn - n mean(n dn) - mean(dn))                         (layer)
    dshift = sum_t dh,   A = sum_t n dh,   dscale = weight A,   dweight = sum_b (1 + scale) A

Two sums over tokens are enough. A residual branch adds a third, ``dgate = sum_t branch dx``.

**Widths.** Of the models' widths only 1024 is a power of two, and padding 1152 to 2048 leaves 44% of the lanes idle. So
a row is cut into parts, each a power of two wide (1152 = 1024 + 128, or 4 * 256 + 128), and held as a tuple of tiles.
Every lane works, and no column needs a mask. PARTS lists (first column, width) of each.

**Sums over tokens.** A program walks over several tiles of rows and adds them up in registers, tile upon tile; the rows
of that sum are added to each other once, at the end. Each program leaves one row of partial sums. A last, small kernel
adds those in a fixed order, without atomics: a run repeats bit by bit.

Arguments named x_b, x_t, ... are strides of batch and token; whatever the kernels write is contiguous.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated, unreachable"
# Nor does that language know (*tiles, tile).
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.early_launch import start_early


@triton.jit
def tile_offsets(stride, START: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    """Offsets (R, WIDTH) of a part of R rows, from the first of these rows."""
    return tl.arange(0, R)[:, None] * stride + (START + tl.arange(0, WIDTH))[None, :]


@triton.jit
def load_tile(ptr, stride, inside, START: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    """A part (R, WIDTH) of R rows as stored; 0 in the rows that are not ``inside``."""
    return tl.load(ptr + tile_offsets(stride, START, WIDTH, R), mask=inside[:, None], other=0.0)


@triton.jit
def store_tile(ptr, value, inside, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    """The counterpart of `load_tile` for contiguous rows; casts to the pointer's type."""
    tl.store(ptr + tile_offsets(D, START, WIDTH, R), value.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def load_columns(ptr, START: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    """A part of a vector in fp32, the same in each row of (R, WIDTH).

    Every thread loads what it needs, from L1 after the first time. To load once and share would take shared memory and
    two barriers.
    """
    return tl.load(ptr + tile_offsets(0, START, WIDTH, R)).to(tl.float32)


@triton.jit
def load_factor(scale, weight, START: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr):
    """A part (R, WIDTH) of a, the factor of the norm; weight is read for the rms norm only."""
    factor = 1.0 + load_columns(scale, START, WIDTH, R)
    if NORM == "rms":
        factor *= load_columns(weight, START, WIDTH, R)
    return factor


@triton.jit
def zeros(R: tl.constexpr, WIDTH: tl.constexpr):
    """Where a part's sums start."""
    return tl.zeros([R, WIDTH], tl.float32)


@triton.jit(do_not_specialize=["T"])
def norm_modulate_kernel(
    x,
    branch,
    gate,
    shift,
    scale,
    weight,
    x_new,
    h,
    stats,
    x_b,
    x_t,
    branch_b,
    branch_t,
    gate_b,
    shift_b,
    scale_b,
    T,
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``h`` (B, T, D) and, with RESIDUAL, ``x_new = x + gate branch`` (B, T, D), whose norm h then is.

    Grid (ceil(T / R), B). branch, gate and x_new are touched with RESIDUAL only. Stats are r (1, B, T) for the rms
    norm; r and mean (2, B, T) for the layer norm.
    """
    start_early(EARLY)
    first = tl.program_id(0) * R
    b = tl.program_id(1).to(tl.int64)
    inside = first + tl.arange(0, R) < T
    start = first.to(tl.int64)
    x_rows = x + b * x_b + start * x_t
    branch_rows = branch + b * branch_b + start * branch_t
    out = (b * T + start) * D
    tiles = ()
    total = tl.zeros([R], tl.float32)
    for i in tl.static_range(len(PARTS)):
        tile = load_tile(x_rows, x_t, inside, PARTS[i][0], PARTS[i][1], R)
        if RESIDUAL:
            b_gate = load_columns(gate + b * gate_b, PARTS[i][0], PARTS[i][1], R)
            b_branch = load_tile(branch_rows, branch_t, inside, PARTS[i][0], PARTS[i][1], R).to(tl.float32)
            # The norm is that of the stored, rounded value: it is what the backward pass reads.
            tile = (tile.to(tl.float32) + b_gate * b_branch).to(x.dtype.element_ty)
            store_tile(x_new + out, tile, inside, D, PARTS[i][0], PARTS[i][1], R)
        tiles = tiles + (tile,)
        wide = tile.to(tl.float32)
        if NORM == "rms":
            total += tl.sum(wide * wide, axis=1)
        else:
            total += tl.sum(wide, axis=1)
    stat = stats + b * T + first + tl.arange(0, R)
    if NORM == "layer":
        # Variance in a second pass over registers, from the differences: the mean may be far larger than those.
        mean = total / D
        tl.store(stat + tl.num_programs(1).to(tl.int64) * T, mean, mask=inside)
        total = tl.zeros([R], tl.float32)
        for i in tl.static_range(len(PARTS)):
            difference = tiles[i].to(tl.float32) - mean[:, None]
            total += tl.sum(difference * difference, axis=1)
    r = tl.rsqrt(total / D + eps)
    tl.store(stat, r, mask=inside)
    for i in tl.static_range(len(PARTS)):
        factor = load_factor(scale + b * scale_b, weight, PARTS[i][0], PARTS[i][1], R, NORM)
        offset = load_columns(shift + b * shift_b, PARTS[i][0], PARTS[i][1], R)
        n = tiles[i].to(tl.float32)
        if NORM == "layer":
            n -= mean[:, None]
        store_tile(h + out, n * r[:, None] * factor + offset, inside, D, PARTS[i][0], PARTS[i][1], R)


@triton.jit
def load_tokens(
    starts,
    strides,
    stats,
    means,
    first,
    T,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """The tiles of x, dh, and with a flag of dx_new and branch, of R rows from ``first``; and their r and mean."""
    inside = first + tl.arange(0, R) < T
    row = first.to(tl.int64)
    r = tl.load(stats + first + tl.arange(0, R), mask=inside, other=0.0)
    mean = r
    if NORM == "layer":
        mean = tl.load(means + first + tl.arange(0, R), mask=inside, other=0.0)
    x_tiles = ()
    dh_tiles = ()
    dx_new_tiles = ()
    branch_tiles = ()
    for i in tl.static_range(len(PARTS)):
        rows = starts[0] + row * strides[0]
        x_tiles = x_tiles + (load_tile(rows, strides[0], inside, PARTS[i][0], PARTS[i][1], R),)
        rows = starts[1] + row * strides[1]
        dh_tiles = dh_tiles + (load_tile(rows, strides[1], inside, PARTS[i][0], PARTS[i][1], R),)
        if ADD:
            rows = starts[2] + row * strides[2]
            dx_new_tiles = dx_new_tiles + (load_tile(rows, strides[2], inside, PARTS[i][0], PARTS[i][1], R),)
        if BRANCH:
            rows = starts[3] + row * strides[3]
            branch_tiles = branch_tiles + (load_tile(rows, strides[3], inside, PARTS[i][0], PARTS[i][1], R),)
    return x_tiles, dh_tiles, dx_new_tiles, branch_tiles, r, mean


@triton.jit(do_not_specialize=["T"])
def norm_modulate_backward_kernel(
    x,
    branch,
    gate,
    shift,
    scale,
    weight,
    stats,
    dx_new,
    dh,
    dx,
    dbranch,
    h,
    partials,
    x_b,
    x_t,
    branch_b,
    branch_t,
    gate_b,
    shift_b,
    scale_b,
    dx_new_b,
    dx_new_t,
    dh_b,
    dh_t,
    T,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    BRANCH: tl.constexpr,
    REBUILD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Gradients of every token, and this program's share of the sums over tokens.

    Grid (P, B). x is the norm's input. Writes dx (B, T, D), and partials (B, P, 2 or 3, D) in fp32: the sums of dh and
    of n dh. ADD adds dx_new, the gradient that comes around the norm by the residual connection. BRANCH also writes
    dbranch = gate dx (B, T, D), and the sum of branch dx as the third of the partials. REBUILD writes the forward
    pass's h (B, T, D) again. What goes with a flag is touched only then.
    """
    start_early(EARLY)
    b = tl.program_id(1).to(tl.int64)
    factors = ()
    gates = ()
    shifts = ()
    sums_dh = ()
    sums_n = ()
    sums_branch = ()
    for i in tl.static_range(len(PARTS)):
        factors = factors + (load_factor(scale + b * scale_b, weight, PARTS[i][0], PARTS[i][1], R, NORM),)
        sums_dh = sums_dh + (zeros(R, PARTS[i][1]),)
        sums_n = sums_n + (zeros(R, PARTS[i][1]),)
        if BRANCH:
            gates = gates + (load_columns(gate + b * gate_b, PARTS[i][0], PARTS[i][1], R),)
            sums_branch = sums_branch + (zeros(R, PARTS[i][1]),)
        if REBUILD:
            shifts = shifts + (load_columns(shift + b * shift_b, PARTS[i][0], PARTS[i][1], R),)

    starts = (x + b * x_b, dh + b * dh_b, dx_new + b * dx_new_b, branch + b * branch_b)
    strides = (x_t, dh_t, dx_new_t, branch_t)
    stats += b * T
    means = stats + tl.num_programs(1).to(tl.int64) * T
    first = tl.program_id(0) * R
    loaded = load_tokens(starts, strides, stats, means, first, T, PARTS, R, NORM, ADD, BRANCH)
    while first < T:
        x_tiles, dh_tiles, dx_new_tiles, branch_tiles, r, mean = loaded
        # The next tiles are asked for before these are worked on.
        following = first + tl.num_programs(0) * R
        loaded = load_tokens(starts, strides, stats, means, following, T, PARTS, R, NORM, ADD, BRANCH)
        inside = first + tl.arange(0, R) < T
        out = (b * T + first) * D
        along = tl.zeros([R], tl.float32)
        level = tl.zeros([R], tl.float32)
        new_dh = ()
        new_n = ()
        for i in tl.static_range(len(PARTS)):
            n = x_tiles[i].to(tl.float32)
            if NORM == "layer":
                # Rows after the last token have mean 0 as well, so that n is 0 there.
                n -= mean[:, None]
            n *= r[:, None]
            b_dh = dh_tiles[i].to(tl.float32)
            dn = b_dh * factors[i]
            along += tl.sum(dn * n, axis=1)
            if NORM == "layer":
                level += tl.sum(dn, axis=1)
            new_dh = new_dh + (sums_dh[i] + b_dh,)
            new_n = new_n + (sums_n[i] + b_dh * n,)
            if REBUILD:
                store_tile(h + out, n * factors[i] + shifts[i], inside, D, PARTS[i][0], PARTS[i][1], R)
        sums_dh = new_dh
        sums_n = new_n
        along = along * (r / D)
        level = level * (r / D)

        new_branch = ()
        for i in tl.static_range(len(PARTS)):
            n = x_tiles[i].to(tl.float32)
            if NORM == "layer":
                n -= mean[:, None]
            n *= r[:, None]
            b_dx = dh_tiles[i].to(tl.float32) * factors[i] * r[:, None] - n * along[:, None]
            if NORM == "layer":
                b_dx -= level[:, None]
            if ADD:
                b_dx += dx_new_tiles[i].to(tl.float32)
            if BRANCH:
                new_branch = new_branch + (sums_branch[i] + branch_tiles[i].to(tl.float32) * b_dx,)
                store_tile(dbranch + out, b_dx * gates[i], inside, D, PARTS[i][0], PARTS[i][1], R)
            store_tile(dx + out, b_dx, inside, D, PARTS[i][0], PARTS[i][1], R)
        sums_branch = new_branch
        first = following

    KINDS: tl.constexpr = 3 if BRANCH else 2
    row = partials + (b * tl.num_programs(0) + tl.program_id(0)) * (KINDS * D)
    for i in tl.static_range(len(PARTS)):
        cols = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        tl.store(row + cols, tl.sum(sums_dh[i], axis=0))
        tl.store(row + D + cols, tl.sum(sums_n[i], axis=0))
        if BRANCH:
            tl.store(row + 2 * D + cols, tl.sum(sums_branch[i], axis=0))


@triton.jit(do_not_specialize=["P"])
def norm_modulate_finish_kernel(
    partials,
    scale,
    weight,
    dshift,
    dscale,
    dgate,
    dweight,
    scale_b,
    P,
    B,
    D: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """Sums over tokens from partials (B, P, 2 or 3, D): dshift, dscale and dgate (B, D), dweight (D,).

    Grid (ceil(D / COLS), B, or B + 1 for the rms norm, whose last programs sum dweight over all batch entries). They
    add up ROWS rows at a time, the last ALL_ROWS.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    exists = cols < D
    b = tl.program_id(1)
    KINDS: tl.constexpr = 3 if BRANCH else 2
    if b < B:
        steps = tl.arange(0, ROWS)
        sum_n = tl.zeros([ROWS, COLS], tl.float32)
        sum_dh = tl.zeros([ROWS, COLS], tl.float32)
        sum_branch = tl.zeros([ROWS, COLS], tl.float32)
        step = 0
        while step < P:
            rows = b * P + step + steps
            mask = (step + steps < P)[:, None] & exists[None, :]
            pointers = partials + rows.to(tl.int64)[:, None] * (KINDS * D) + cols[None, :]
            sum_dh += tl.load(pointers, mask=mask, other=0.0)
            sum_n += tl.load(pointers + D, mask=mask, other=0.0)
            if BRANCH:
                sum_branch += tl.load(pointers + 2 * D, mask=mask, other=0.0)
            step += ROWS
        b_dscale = tl.sum(sum_n, axis=0)
        if NORM == "rms":
            b_dscale *= tl.load(weight + cols, mask=exists, other=0.0).to(tl.float32)
        out = b.to(tl.int64) * D + cols
        tl.store(dshift + out, tl.sum(sum_dh, axis=0).to(dshift.dtype.element_ty), mask=exists)
        tl.store(dscale + out, b_dscale.to(dscale.dtype.element_ty), mask=exists)
        if BRANCH:
            tl.store(dgate + out, tl.sum(sum_branch, axis=0).to(dgate.dtype.element_ty), mask=exists)
    else:
        every = tl.arange(0, ALL_ROWS)
        sum_scaled = tl.zeros([ALL_ROWS, COLS], tl.float32)
        step = 0
        while step < B * P:
            partial = step + every
            there = (partial < B * P)[:, None] & exists[None, :]
            at = partials + partial.to(tl.int64)[:, None] * (KINDS * D) + D + cols[None, :]
            at_scale = scale + (partial // P).to(tl.int64)[:, None] * scale_b + cols[None, :]
            factor = 1.0 + tl.load(at_scale, mask=there, other=0.0).to(tl.float32)
            sum_scaled += factor * tl.load(at, mask=there, other=0.0)
            step += ALL_ROWS
        tl.store(dweight + cols, tl.sum(sum_scaled, axis=0).to(dweight.dtype.element_ty), mask=exists)
