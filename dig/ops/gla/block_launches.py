"""The launches of `gla_block` and of the mixer: the recurrence with the normalized, gated output, forward and backward.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dig.ops.gla.kernels import output_kernel
from dig.ops.gla.kernels_backward import output_backward_kernel
from dig.ops.gla.kernels_walk import walk_kernel
from dig.ops.gla.launches import (
    DecayGate,
    Plan,
    column_sums,
    decay_sums,
    gradients_of,
    local_states,
    no_states,
    scan_states,
    strides_of,
    walk_rounds,
)
from dig.ops.launch import empty, last_contiguous, launching
from dig.ops.side_stream import on_side_stream


def run_block(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate: DecayGate, g: Tensor, norm_weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """The launches of `gla_block`: its result, and the states before each chunk (1, B, H, N, K, V).

    Unless ``keep``, the latter have no elements.
    """
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with launching(q.device) as launch:
        if plan.walks:
            states = torch.empty(1, *plan.state_shape, dtype=v.dtype, device=v.device) if keep else no_states(v)
            launch.early(
                walk_kernel, (plan.H, plan.B), (q, k, v, *gate.tensors, g, norm_weight, states, out),
                (*strides_of(q, k, v), *gate.strides, *strides_of(g), plan.T, plan.N, *plan.scan, plan.scale,
                 plan.inverse_normalizer, eps),
                **plan.constants, **gate.constants, ROUNDS=walk_rounds(plan.tiles, plan.N), KEEP=keep,
                num_warps=plan.tiles.walk_warps,
                maxnreg=None if gate.weight is None else plan.tiles.walk_registers,
            )  # fmt: skip
            return out, states
        states, sums, _ = local_states(launch, plan, q, k, v, gate)
        scan_states(launch, plan, states, sums, direction=0)
        launch.early(
            output_kernel, plan.grid, (q, k, v, g, norm_weight, sums, states, out),
            (*strides_of(q, k, v, g), plan.T, plan.N, *plan.scan, plan.scale, eps),
            **plan.constants, LEVELS=plan.levels, NORM_GATE=True, num_warps=plan.tiles.output_warps,
            maxnreg=plan.tiles.output_registers,
        )  # fmt: skip
    return out, states if keep else no_states(v)


def run_block_backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: DecayGate,
    g: Tensor,
    norm_weight: Tensor,
    states: Tensor,
    dy: Tensor,
    eps: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dg: Tensor,
    y: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The launches of `gla_block`'s backward pass.

    Args:
        plan: Of the forward pass.
        q: As in the forward pass.
        k: Likewise.
        v: Likewise.
        gate: Likewise.
        g: Logits of the output gate.
        norm_weight: (V,).
        states: Those before each chunk, from the forward pass.
        dy: Gradient of the output.
        eps: As in the forward pass.
        outputs: Take the gradients of q, k, v and of the log decays or logits (B, T, H, K); contiguous over batch and
            tokens, heads packed.
        dg: Takes g's gradient; likewise.
        y: Takes the forward pass's result again (B, T, H, V), contiguous.
        sums: Of the decays, from `decay_sums`, where they have been computed already.

    Returns:
        The gradients of norm_weight (V,) and of the gate's bias (H K,); of no elements without a bias.
    """
    dy = last_contiguous(dy)
    do = empty(v)
    dweight = torch.empty(plan.B * plan.N * plan.H, v.shape[-1], dtype=torch.float32, device=v.device)
    with launching(q.device) as launch:
        sums = decay_sums(launch, plan, q, k, v, gate) if sums is None else sums
        own = torch.empty(plan.B, plan.T, plan.H, dtype=torch.float32, device=v.device)
        state_gradients = empty(states)
        launch.early(
            output_backward_kernel, plan.grid,
            (q, k, v, g, norm_weight, dy, sums, states, state_gradients, own, do, dg, dweight, do if y is None else y),
            (*strides_of(q, k, v, g, dy), dg.stride(1), plan.T, plan.N, *plan.scan, plan.scale, eps),
            **plan.constants, LEVELS=plan.levels, REBUILD=y is not None, num_warps=plan.tiles.output_backward_warps,
            maxnreg=plan.tiles.output_backward_registers,
        )  # fmt: skip
        scan_states(launch, plan, state_gradients, sums, direction=1)
        dbias = gradients_of(launch, plan, q, k, v, gate, do, sums, states, state_gradients, own, outputs)
        with on_side_stream(dweight, dbias):
            dnorm = column_sums(launch, plan.tiles, dweight, norm_weight.dtype)
            return dnorm, dbias if gate.bias is None else column_sums(launch, plan.tiles, dbias, gate.bias.dtype)
