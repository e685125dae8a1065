"""The launches of `gla_block` and of the mixer: the recurrence with the normalized, gated output, forward and backward.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dig.ops.gla.kernels import output_kernel
from dig.ops.gla.kernels_backward import output_backward_kernel
from dig.ops.gla.kernels_rounds import output_backward_parts_kernel
from dig.ops.gla.kernels_walk import walk_kernel
from dig.ops.gla.launches import (
    Plan,
    column_sums,
    decay_sums,
    gradients_of,
    local_states,
    no_states,
    scan_states,
    segment_starts,
    walk_rounds,
)
from dig.ops.gla.layouts import DecayGate, Layout, Rows, Slots, rows_of
from dig.ops.launch import Launch, empty, launch_context
from dig.ops.side_stream import on_side_stream


def run_block(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate: DecayGate, g: Tensor, norm_weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """`run_rows` of inputs that are tensors of their own; the result has v's shape."""
    return run_rows(plan, rows_of(q, k, v, gate, g), v.shape, norm_weight, eps, keep)


def run_rows(
    plan: Plan, rows: Rows, shape: tuple[int, ...], norm_weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """The launches of `gla_block`: its result in this shape, and the states before each chunk (1, B, H, N, K, V).

    Unless ``keep``, the latter have no elements.
    """
    first = rows.tensors[0]
    out = torch.empty(*shape, dtype=first.dtype, device=first.device)
    launch = launch_context(first.device)
    if plan.walks or plan.segments:
        states = no_states(first)
        if keep:
            states = torch.empty(1, *plan.state_shape, dtype=first.dtype, device=first.device)
        starts = segment_starts(launch, plan, rows) if plan.segments else states
        launch.start(walk_launch(plan, rows.layout, eps, keep), *rows.tensors, norm_weight, states, starts, out)
        return out, states
    states, sums = local_states(launch, plan, rows)
    scan_states(launch, plan, states, sums, direction=0)
    launch.start(output_launch(plan, rows.layout, eps), *rows.tensors, norm_weight, sums, states, out)
    return out, states if keep else no_states(first)


@functools.lru_cache(maxsize=1024)
def walk_launch(plan: Plan, layout: Layout, eps: float, keep: bool) -> Launch:
    """`walk_kernel`'s: on the inputs, the norm's weight, the states, those before the segments, and the result."""
    n, segment = layout.tensors, plan.tiles.segment_chunks if plan.segments else 0
    return Launch(
        walk_kernel, (plan.H, plan.segments, plan.B) if segment else (plan.H, plan.B),
        (*layout.qkv_strides, *layout.gate_strides, *layout.g_strides, plan.T, plan.N, *plan.scan, plan.scale,
         plan.inverse_normalizer, eps),
        early=True, parts=(*layout.qkv, *layout.gate, layout.g, *((n + i, 0) for i in range(4))),
        **plan.constants, **layout.constants, ROUNDS=walk_rounds(plan.tiles, segment or plan.N), SEGMENT=segment,
        KEEP=keep,
        num_warps=plan.tiles.walk_warps,
        maxnreg=plan.tiles.walk_registers if layout.constants["R"] else None,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def output_launch(plan: Plan, layout: Layout, eps: float, norm_gate: bool = True) -> Launch:
    """`output_kernel`'s: on the inputs, the norm's weight, the sums, the states and the result."""
    n = layout.tensors
    # Registers were measured with the norm and gate alone.
    registers: dict[str, Any] = {"maxnreg": plan.tiles.output_registers} if norm_gate else {}
    return Launch(
        output_kernel, plan.grid,
        (*layout.qkv_strides, *layout.g_strides, plan.T, plan.N, *plan.scan, plan.scale, eps),
        early=True, parts=(*layout.qkv, layout.g, (n, 0), (n + 1, 0), (n + 2, 0), (n + 3, 0)),
        **plan.constants, LEVELS=plan.levels, NORM_GATE=norm_gate, num_warps=plan.tiles.output_warps, **registers,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def output_backward_launch(
    plan: Plan, layout: Layout, slots: Slots, dy_strides: tuple[int, ...], eps: float, rebuild: bool
) -> Launch:
    """`output_backward_kernel`'s, or of the same in parts.

    On the inputs, slots, the norm's weight, dy, sums, states, their gradients, own, do, dweight and, to be rebuilt, y.
    """
    n = layout.tensors
    m = n + slots.tensors
    weight, dy, sums, states, state_gradients, own, do, dweight, y = ((m + i, 0) for i in range(9))
    which, first = slots.parts[4]
    in_parts = plan.tiles.output_backward_parts
    return Launch(
        output_backward_parts_kernel if in_parts else output_backward_kernel, plan.grid,
        (*layout.qkv_strides, *layout.g_strides, *dy_strides, slots.strides[4], plan.T, plan.N, *plan.scan, plan.scale,
         eps),
        early=True,
        parts=(*layout.qkv, layout.g, weight, dy, sums, states, state_gradients, own, do, (n + which, first), dweight,
               y if rebuild else do),
        **plan.constants, LEVELS=plan.levels, REBUILD=rebuild, num_warps=plan.tiles.output_backward_warps,
        maxnreg=plan.tiles.output_backward_registers,
    )  # fmt: skip


def run_rows_backward(
    plan: Plan,
    rows: Rows,
    slots: Slots,
    outputs: tuple[Tensor, ...],
    norm_weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    dy: Tensor,
    dy_strides: tuple[int, ...],
    eps: float,
    y: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The launches of `gla_block`'s backward pass.

    Args:
        plan: Of the forward pass.
        rows: As in the forward pass.
        slots: Where gradients go.
        outputs: The tensors that take them; contiguous over batch and tokens.
        norm_weight: (V,).
        bias: The decay gate's (H K,), or None.
        states: Those before each chunk, from the forward pass.
        dy: Gradient of the output.
        dy_strides: Its strides of batch, token and head.
        eps: As in the forward pass.
        y: Takes the forward pass's result again, (B, T, H, V) in any shape, contiguous.
        sums: Of the decays, from `decay_sums`, where they have been computed already.

    Returns:
        The gradients of norm_weight (V,) and of the gate's bias (H K,); of no elements without a bias.
    """
    device, (V,) = dy.device, norm_weight.shape
    do = torch.empty(plan.B, plan.T, plan.H, V, dtype=states.dtype, device=device)
    dweight = torch.empty(plan.B * plan.N * plan.H, V, dtype=torch.float32, device=device)
    launch = launch_context(device)
    sums = decay_sums(launch, plan, rows) if sums is None else sums
    own = torch.empty(plan.B, plan.T, plan.H, dtype=torch.float32, device=device)
    state_gradients = empty(states)
    launch.start(
        output_backward_launch(plan, rows.layout, slots, dy_strides, eps, y is not None),
        *rows.tensors, *outputs, norm_weight, dy, sums, states, state_gradients, own, do, dweight,
        do if y is None else y,
    )  # fmt: skip
    scanned = not plan.scans_in_gradients
    if scanned:
        scan_states(launch, plan, state_gradients, sums, direction=1)
    dbias = gradients_of(
        launch, plan, rows, slots, outputs, do, sums, states, state_gradients, own, bias=bias is not None,
        scanned=scanned,
    )  # fmt: skip
    with on_side_stream(dweight, dbias):
        dnorm = column_sums(launch, plan.tiles, dweight, norm_weight.dtype)
        return dnorm, dbias if bias is None else column_sums(launch, plan.tiles, dbias, bias.dtype)
