"""Launches of gated linear attention's kernels, one a function, and the plan that they share.

`dig.ops.gla.block_launches` puts those of a whole block in order.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks.

States between chunks are stored in the inputs' dtype: they are operands of a product in that dtype anyway, and in bf16
that halves their traffic. The scan over chunks carries its state in fp32, so the rounding does not add up along the
sequence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dig.ops.arithmetic import INTERPRETED
from dig.ops.gla.kernels import local_state_kernel, scan_kernel, short_scan_kernel
from dig.ops.gla.kernels_backward import column_sums_kernel, gradient_kernel
from dig.ops.gla.kernels_rounds import gradient_rounds_kernel
from dig.ops.gla.kernels_walk import segment_state_kernel
from dig.ops.gla.layouts import Layout, Outline, Rows, Slots, strides_of
from dig.ops.launch import Launch, LaunchContext
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import GlaTiles
from dig.ops.whole import ceil_div, power_of_two


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything about a call that several launches share; equal to itself alone, as a key of what is made of it."""

    tiles: GlaTiles
    B: int
    T: int
    H: int
    N: int
    scale: float
    inverse_normalizer: float
    scan: tuple[int, int, int]
    """(rows, columns) of the image, for orders that go column by column, and the order, as `scan_tokens` takes them."""
    constants: dict[str, Any]
    """Those of every kernel that works on a chunk."""

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Programs: one a chunk and head."""
        # Heads vary fastest: programs that run together read neighbouring parts of the same tokens.
        return self.H, self.N, self.B

    @cached_property
    def state_shape(self) -> tuple[int, ...]:
        """(B, H, N, K, V)."""
        return self.B, self.H, self.N, self.constants["K"], self.constants["V"]

    @cached_property
    def sums_shape(self) -> tuple[int, ...]:
        """Of the sums of the decays of every chunk's tokens, (B, H, N C, KP)."""
        return self.B, self.H, self.N * self.tiles.chunk, self.constants["KP"]

    @cached_property
    def walks(self) -> bool:
        """Whether the forward pass is one launch, whose programs walk all chunks of a head, instead of three.

        One launch moves the fewest bytes, but its programs walk chunks one after the other; three launches do all
        chunks at once. So one launch needs enough heads to keep the card busy, and the more, the more chunks there are.
        Of a single chunk both ways have the same programs.
        """
        tiles = self.tiles
        few_chunks, many_heads = tiles.walk_chunks >= self.N, tiles.walk_programs * self.N <= self.B * self.H
        return few_chunks and (many_heads or self.N == 1)

    @cached_property
    def segments(self) -> int:
        """Into how many segments of a head's chunks the forward pass is cut, a program each; 0: it isn't."""
        tiles = self.tiles
        if self.walks or not 0 < tiles.segment_chunks < self.N:
            return 0
        segments = ceil_div(self.N, tiles.segment_chunks)
        return segments if tiles.segment_programs <= self.B * self.H * segments else 0

    @property
    def scans_in_gradients(self) -> bool:
        """Whether the kernel of the gradients adds up those of the states itself."""
        return self.tiles.gradient_rounds and self.tiles.gradient_scan_chunks >= self.N

    @property
    def levels(self) -> int:
        """Group sizes in a chunk: 16, 32, ... up to the chunk."""
        return self.tiles.chunk.bit_length() - 4


def tiles_for(q: Tensor | Outline, v: Tensor | Outline) -> GlaTiles:
    """The tile choices for queries (B, T, H, K) and values (B, T, H, V), fp32 or bf16."""
    B, T, H, K = q.shape
    # Plain numbers: a table has no entry for torch.compile's symbols, which dynamic shapes have.
    return for_device(v.device).gla_tiles(int(K), int(v.shape[-1]), v.dtype).of(B, T, H)


def plan_of(
    q: Tensor | Outline,
    v: Tensor | Outline,
    scale: float,
    normalizer: float,
    grid: tuple[int, int] = (0, 0),
    order: int = 0,
) -> Plan:
    """The launch plan for queries (B, T, H, K) and values (B, T, H, V).

    Args:
        q: Not read.
        v: Not read.
        scale: As of `Plan`.
        normalizer: The inverse of its own.
        grid: As of its scan.
        order: As `scan_tokens` takes it.
    """
    B, T, H, K = q.shape
    # torch.compile's symbols, which dynamic shapes have, are no keys of a cache.
    plan = _plan if type(B) is int and type(T) is int else _plan.__wrapped__
    return plan(tiles_for(q, v), B, T, H, K, v.shape[-1], v.dtype, scale, normalizer, grid, order)


@functools.lru_cache(maxsize=1024)
def _plan(
    tiles: GlaTiles,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    scale: float,
    normalizer: float,
    grid: tuple[int, int],
    order: int,
) -> Plan:
    constants = {
        "K": K,
        "V": V,
        "KP": max(16, power_of_two(K)),
        "VP": max(16, power_of_two(V)),
        "C": tiles.chunk,
        "PRECISION": _precision(dtype),
    }
    N = ceil_div(T, tiles.chunk)
    return Plan(
        tiles=tiles,
        B=B,
        T=T,
        H=H,
        N=N,
        scale=scale,
        inverse_normalizer=1.0 / normalizer,
        scan=(*grid, order),
        constants=constants,
    )


def _precision(dtype: torch.dtype) -> str:
    if INTERPRETED:
        return "interpreter"
    # Three tf32 products keep fp32's 24 bits of the operands and still run on the tensor cores.
    return "tf32x3" if dtype == torch.float32 else "tf32"


@functools.lru_cache(maxsize=1024)
def local_launch(plan: Plan, layout: Layout, do_strides: tuple[int, ...] | None, sums_only: bool) -> Launch:
    """`local_state_kernel`'s, on the inputs, the sums and, where they are asked for, the states, do and own."""
    n, v = layout.tensors, layout.qkv[2]
    # A pointer that a kernel does not touch can be anything of its dtype.
    do, own = (v, (n, 0)) if do_strides is None else ((n + 2, 0), (n + 3, 0))
    return Launch(
        local_state_kernel, plan.grid,
        (*layout.qkv_strides, *layout.gate_strides, *(do_strides or layout.qkv_strides[6:]),
         plan.T, plan.N, *plan.scan, plan.scale, plan.inverse_normalizer),
        early=True, parts=(*layout.qkv, *layout.gate, do, (n, 0), v if sums_only else (n + 1, 0), own),
        **plan.constants, **layout.constants, STATES=not sums_only, GRADIENT=do_strides is not None,
        num_warps=plan.tiles.local_warps,
    )  # fmt: skip


def local_states(launch: LaunchContext, plan: Plan, rows: Rows) -> tuple[Tensor, Tensor]:
    """What each chunk adds to the state (1, B, H, N, K, V), and the sums of the decays."""
    first = rows.tensors[0]
    states, sums = torch.empty(1, *plan.state_shape, dtype=first.dtype, device=first.device), empty_sums(plan, first)
    launch.start(local_launch(plan, rows.layout, None, False), *rows.tensors, sums, states)
    return states, sums


def local_gradients(launch: LaunchContext, plan: Plan, rows: Rows, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`local_states`, and do . v of each token; the first is (2, ...), its second part what adds to its gradient."""
    states, sums = torch.empty(2, *plan.state_shape, dtype=do.dtype, device=do.device), empty_sums(plan, do)
    own = torch.empty(plan.B, plan.T, plan.H, dtype=torch.float32, device=do.device)
    launch.start(local_launch(plan, rows.layout, strides_of(do), False), *rows.tensors, sums, states, do, own)
    return states, sums, own


def decay_sums(launch: LaunchContext, plan: Plan, rows: Rows) -> Tensor:
    """The sums of the decays alone, as the kernels of the backward pass read them again; q, k and v aren't read."""
    sums = empty_sums(plan, rows.tensors[0])
    launch.start(local_launch(plan, rows.layout, None, True), *rows.tensors, sums)
    return sums


def empty_sums(plan: Plan, like: Tensor) -> Tensor:
    """Room for the sums of the decays of every chunk's tokens (B, H, N C, KP) in fp32."""
    return torch.empty(*plan.sums_shape, dtype=torch.float32, device=like.device)


def scan_states(launch: LaunchContext, plan: Plan, states: Tensor, sums: Tensor, *, direction: int) -> None:
    """Turn what chunks add into what was added before each, in place; directions as `scan_kernel` takes them."""
    launch.start(scan_launch(plan, states.dtype, len(states), direction), states, sums)


def segment_starts(launch: LaunchContext, plan: Plan, rows: Rows) -> Tensor:
    """The states before each of a plan's segments (1, B, H, M, K, V)."""
    starts, decays = empty_segments(plan, rows.tensors[0])
    launch.start(segment_launch(plan, rows.layout), *rows.tensors, decays, starts)
    launch.start(scan_launch(plan, starts.dtype, 1, 0, segments=True), starts, decays)
    return starts


def empty_segments(plan: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the states before segments (1, B, H, M, K, V), and in fp32 for segments' decays (B, H, M, KP)."""
    B, H, _, K, V = plan.state_shape
    starts = torch.empty(1, B, H, plan.segments, K, V, dtype=like.dtype, device=like.device)
    return starts, torch.empty(B, H, plan.segments, plan.constants["KP"], dtype=torch.float32, device=like.device)


@functools.lru_cache(maxsize=1024)
def segment_launch(plan: Plan, layout: Layout) -> Launch:
    """`segment_state_kernel`'s: on the inputs, the segments' decays and states."""
    n = layout.tensors
    return Launch(
        segment_state_kernel, (plan.H, plan.segments, plan.B),
        (*layout.qkv_strides[3:], *layout.gate_strides, plan.T, *plan.scan, plan.inverse_normalizer),
        early=True, parts=(*layout.qkv[1:], *layout.gate, (n, 0), (n + 1, 0)),
        **plan.constants, **layout.constants, SEGMENT=plan.tiles.segment_chunks, num_warps=plan.tiles.segment_warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def scan_launch(plan: Plan, dtype: torch.dtype, entries: int, direction: int, segments: bool = False) -> Launch:
    """`scan_kernel`'s, or that of few chunks: on so many entries of states and the sums; or of segments likewise."""
    # To the scan a segment is a chunk of one token.
    N, C = (plan.segments, 1) if segments else (plan.N, plan.tiles.chunk)
    (K, V), tiles = plan.state_shape[-2:], plan.tiles
    kernel: Any
    if tiles.short_chunks >= N:
        sizes = short_scan_sizes(tiles, N, V, dtype)
        kernel, warps, parts = short_scan_kernel, tiles.short_warps, ceil_div(K * V, sizes["WIDTH"] * sizes["UNITS"])
    else:
        sizes = scan_sizes(tiles, N, V, dtype)
        kernel, warps, parts = scan_kernel, tiles.scan_warps, ceil_div(V, sizes["LANES"]) * K
    return Launch(
        kernel, (parts, plan.B * plan.H, entries), (N, direction),
        early=True, K=K, V=V, KP=plan.constants["KP"], C=C, **sizes, num_warps=warps,
    )  # fmt: skip


def scan_sizes(tiles: GlaTiles, N: int, V: int, dtype: torch.dtype) -> dict[str, Any]:
    """`scan_kernel`'s for N chunks."""
    # A power of two, so that images of all sizes share a few binaries.
    steps = min(tiles.scan_steps, power_of_two(ceil_div(N, tiles.scan_groups)))
    return {"LANES": min(tiles.scan_lanes, power_of_two(V)), "GROUPS": tiles.scan_groups, "STEPS": steps}


def short_scan_sizes(tiles: GlaTiles, N: int, V: int, dtype: torch.dtype) -> dict[str, Any]:
    """`short_scan_kernel`'s for N chunks: units of 16 bytes, or of what divides a row."""
    steps = min(tiles.short_steps, power_of_two(N))
    return {"WIDTH": math.gcd(V, 16 // dtype.itemsize), "UNITS": tiles.short_units, "STEPS": steps}


def walk_rounds(tiles: GlaTiles, N: int) -> int:
    """`walk_kernel`'s rounds for N chunks: a power of two, so that images of all sizes share a few binaries."""
    return power_of_two(N) * tiles.chunk // 16


@functools.lru_cache(maxsize=1024)
def gradient_launch(plan: Plan, layout: Layout, slots: Slots, do_strides: tuple[int, ...], scanned: bool) -> Launch:
    """`gradient_kernel`'s, or that of the same in rounds.

    On the inputs, slots, do, sums, states, their gradients, own and dbias.
    """
    n = layout.tensors
    m = n + slots.tensors
    outputs = tuple((n + which, first) for which, first in slots.parts[:4])
    rounds = plan.tiles.gradient_rounds
    form: dict[str, Any] = {"SCAN": not scanned} if rounds else {"LEVELS": plan.levels}
    # With neither a low-rank factor nor a scan before it, the compiler would spill one.
    capped = not rounds or scanned or layout.constants["R"]
    return Launch(
        gradient_rounds_kernel if rounds else gradient_kernel, plan.grid,
        (*layout.qkv_strides, *layout.gate_strides, *do_strides, *slots.strides[:4],
         plan.T, plan.N, *plan.scan, plan.scale, plan.inverse_normalizer),
        early=True,
        parts=(*layout.qkv, *layout.gate, *((m + i, 0) for i in range(5)), *outputs, (m + 5, 0)),
        **plan.constants, **layout.constants, **form,
        num_warps=plan.tiles.gradient_warps, maxnreg=plan.tiles.gradient_registers if capped else None,
    )  # fmt: skip


def gradients_of(
    launch: LaunchContext,
    plan: Plan,
    inputs: Rows,
    slots: Slots,
    outputs: tuple[Tensor, ...],
    do: Tensor,
    sums: Tensor,
    states: Tensor,
    state_gradients: Tensor,
    own: Tensor,
    *,
    bias: bool,
    scanned: bool = True,
) -> Tensor:
    """Write the gradients of q, k, v and the decay gate (B, T, H, K) into ``outputs``, where the slots say.

    Unless ``scanned``, the states' gradients are what each chunk adds: `Plan.scans_in_gradients`.

    Returns:
        Every chunk's part of the gradient of the gate's bias (B N, H K); of no rows without a bias.
    """
    rows = plan.B * plan.N if bias else 0
    dbias = torch.empty(rows, plan.H * plan.constants["K"], dtype=torch.float32, device=do.device)
    kernel = gradient_launch(plan, inputs.layout, slots, strides_of(do), scanned)
    launch.start(kernel, *inputs.tensors, *outputs, do, sums, states, state_gradients, own, dbias)
    return dbias


def empty_states(q: Tensor, v: Tensor) -> Tensor:
    """Room for the states of a call with queries (B, T, H, K) and values (B, T, H, V): (1, B, H, N, K, V)."""
    B, T, H, K = q.shape
    N = -(-T // tiles_for(q, v).chunk)
    return torch.empty(1, B, H, N, K, v.shape[-1], dtype=v.dtype, device=v.device)


def no_states(like: Tensor) -> Tensor:
    """What stands for the states where nothing is kept for a backward pass."""
    return like.new_empty(0)


def check_kept(keep: bool) -> None:
    """Refuse to differentiate a forward pass that wasn't to keep its states.

    Raises:
        ValueError: It wasn't.
    """
    if not keep:
        raise ValueError("keep must be True where gradients are recorded: the backward pass reads the states")


def column_sums(launch: LaunchContext, tiles: GlaTiles, partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (D,) in ``dtype`` over the rows of partials (rows, D), which are at least one."""
    rows, D = partials.shape
    sums = torch.empty(D, dtype=dtype, device=partials.device)
    launch.start(column_launch(tiles, rows, D), partials, sums)
    return sums


@functools.lru_cache(maxsize=1024)
def column_launch(tiles: GlaTiles, rows: int, D: int) -> Launch:
    """`column_sums_kernel`'s: on partials (rows, D) and their sums (D,)."""
    return Launch(
        column_sums_kernel, (ceil_div(D, tiles.sum_columns),), (rows,),
        D=D, ROWS=tiles.sum_rows, COLS=tiles.sum_columns, num_warps=tiles.sum_warps,
    )  # fmt: skip
