"""Gated linear attention on Triton: two differentiable operations over one set of kernels.

`tiled_gla` is the recurrence alone; `gla_block` takes in the gate's activation before it and the normalized, gated
output after it. Both are registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take them.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks.

What is kept for the backward pass is the inputs, and of `gla_block` the states between chunks; the rest is computed
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dig.ops.arithmetic import INTERPRETED
from dig.ops.derivatives import once
from dig.ops.gla.block_launches import output_launch, run_block, run_rows_backward
from dig.ops.gla.launches import (
    check_kept,
    empty_states,
    gradients_of,
    local_gradients,
    local_states,
    no_states,
    plan_of,
    scan_states,
)
from dig.ops.gla.layouts import DecayGate, rows_of, slots_apart, strides_of
from dig.ops.launch import empty, last_contiguous, launch_context
from dig.ops.library import operation

DTYPES = (torch.float32, torch.bfloat16)
MAX_WIDTH = {"K": 64, "V": 128}
"""Widest heads: a program holds whole rows of K and V, and wider ones in fp32 do not fit into shared memory."""


def _check(name: str, tensor: Tensor, *, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}; got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on q's device {like.device}; got {tensor.device}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension; its strides are {tensor.stride()}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError, naming the argument, unless the kernels take these queries, keys and values."""
    for name, tensor in (("q", q), ("v", v)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be (B, T, H, width), none of them 0; got {tuple(tensor.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be {' or '.join(map(str, DTYPES))}; got {q.dtype}")
    if not q.is_cuda and not INTERPRETED:
        raise ValueError(
            f"q must be on a CUDA device (or TRITON_INTERPRET=1 set before the import); it is on {q.device}"
        )
    for name, letter, tensor in (("q", "K", q), ("v", "V", v)):
        if tensor.shape[-1] > MAX_WIDTH[letter]:
            raise ValueError(f"{name} must have heads of at most {MAX_WIDTH[letter]}; got {tensor.shape[-1]}")
    _check("q", q, shape=tuple(q.shape), dtypes=DTYPES, like=q)
    _check("k", k, shape=tuple(q.shape), dtypes=(q.dtype,), like=q)
    _check("v", v, shape=(*q.shape[:3], v.shape[-1]), dtypes=(q.dtype,), like=q)


@operation("dig::gla")
def _gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    plan = plan_of(q, v, 1.0, 1.0)
    rows = rows_of(q, k, v, DecayGate(values=log_decay, logits=False))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with launch_context(q.device) as launch:
        states, sums = local_states(launch, plan, rows)
        scan_states(launch, plan, states, sums, direction=0)
        # v stands for the norm's weight, which isn't read.
        launch.start(output_launch(plan, rows.layout, 0.0, norm_gate=False), *rows.tensors, v, sums, states, out)
    return out


@operation("dig::gla_backward")
def _gla_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = plan_of(q, v, 1.0, 1.0)
    rows = rows_of(q, k, v, DecayGate(values=log_decay, logits=False))
    do = last_contiguous(do)
    outputs = dq, dk, dv, dlog = empty(q), empty(k), empty(v), empty(log_decay)
    slots = slots_apart(*(each.stride(1) for each in (*outputs, dlog)))
    with launch_context(q.device) as launch:
        states, sums, own = local_gradients(launch, plan, rows, do)
        scan_states(launch, plan, states, sums, direction=0)
        gradients_of(launch, plan, rows, slots, (*outputs, dlog), do, sums, states[0], states[1], own, bias=False)
    return dq, dk, dv, dlog


@_gla.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return empty(v)


@_gla_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(q), empty(k), empty(v), empty(log_decay)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.numbers = [x for x in inputs if not isinstance(x, Tensor)]


def _gla_autograd(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:
    q, k, v, log_decay = ctx.saved_tensors
    return _gla_backward(q, k, v, log_decay, do)


_gla.register_autograd(once(_gla_autograd), setup_context=_save_inputs)


def tiled_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The gated linear recurrence of `dig.ops.gla.gated_linear_attention`, on Triton.

    Args:
        q: Queries (B, T, H, K), already scaled, fp32 or bf16. Any strides but the last, which must be 1: slices of a
            fused projection are read where they are. The same holds for the others.
        k: Keys (B, T, H, K), q's dtype.
        v: Values (B, T, H, V), q's dtype.
        log_decay: Natural logarithm of the gates, (B, T, H, K), fp32 or q's dtype, each at most 0. Below -10 it counts
            as -10, and its gradient is 0: a gate is never less than e^-10 = 4.5e-5.

    Returns:
        (B, T, H, V), contiguous, in v's dtype.

    Raises:
        ValueError: A shape, dtype, device or stride that the kernels do not take; the message names the argument.
    """
    check_qkv(q, k, v)
    _check("log_decay", log_decay, shape=tuple(q.shape), dtypes=(torch.float32, q.dtype), like=q)
    output: Tensor = _gla(q, k, v, log_decay)
    return output


@operation("dig::gla_block")
def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    g: Tensor,
    norm_weight: Tensor,
    scale: float,
    gate_normalizer: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    gate = DecayGate(values=gate_logits, logits=True)
    return run_block(plan_of(q, v, scale, gate_normalizer), q, k, v, gate, g, norm_weight, eps, keep)


@operation("dig::gla_block_backward")
def _block_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    g: Tensor,
    norm_weight: Tensor,
    states: Tensor,
    dy: Tensor,
    scale: float,
    gate_normalizer: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = DecayGate(values=gate_logits, logits=True)
    outputs = dq, dk, dv, dlogits, dg = empty(q), empty(k), empty(v), empty(gate_logits), empty(g)
    plan, dy = plan_of(q, v, scale, gate_normalizer), last_contiguous(dy)
    slots = slots_apart(*(each.stride(1) for each in outputs))
    rows = rows_of(q, k, v, gate, g)
    dweight, _ = run_rows_backward(plan, rows, slots, outputs, norm_weight, None, states, dy, strides_of(dy), eps)
    return dq, dk, dv, dlogits, dg, dweight


@_block.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    g: Tensor,
    norm_weight: Tensor,
    scale: float,
    gate_normalizer: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return empty(v), empty_states(q, v) if keep else no_states(v)


@_block_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    g: Tensor,
    norm_weight: Tensor,
    states: Tensor,
    dy: Tensor,
    scale: float,
    gate_normalizer: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty(q), empty(k), empty(v), empty(gate_logits), empty(g), empty(norm_weight)


def _save_block(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    check_kept(inputs[-1])
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.numbers = inputs[6:-1]


def _block_autograd(ctx: Any, dy: Tensor, dstates: None) -> tuple[Tensor | None, ...]:
    q, k, v, logits, g, norm_weight, states = ctx.saved_tensors
    return *_block_backward(q, k, v, logits, g, norm_weight, states, dy, *ctx.numbers), None, None, None, None


_block.register_autograd(once(_block_autograd), setup_context=_save_block)


def gla_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    g: Tensor,
    norm_weight: Tensor,
    *,
    scale: float,
    gate_normalizer: float = 16.0,
    eps: float = 1e-6,
) -> Tensor:
    """``RMSNorm(GLA(scale * q, k, v, logsigmoid(gate_logits) / gate_normalizer)) * norm_weight * swish(g)``.

    The readable form is `dig.ops.gla.block_reference.block_reference`.

    Args:
        q: Queries (B, T, H, K), fp32 or bf16, not yet scaled. As to strides, see `tiled_gla`.
        k: Keys (B, T, H, K), q's dtype.
        v: Values (B, T, H, V), q's dtype.
        gate_logits: (B, T, H, K), fp32 or q's dtype, any value. A log decay below -10 counts as -10 with gradient 0,
            which with the normalizer 16 takes a logit below -160.
        g: Logits of the output gate, (B, T, H, V), q's dtype.
        norm_weight: (V,), fp32 or q's dtype, shared by the heads.
        scale: What q is multiplied with.
        gate_normalizer: What the log decays are divided by; more than 0.
        eps: Added to the mean square of a head's output.

    Returns:
        (B, T, H, V), contiguous, in v's dtype.

    Raises:
        ValueError: An argument that the kernels do not take; the message names it.
    """
    check_qkv(q, k, v)
    either = (torch.float32, q.dtype)
    _check("gate_logits", gate_logits, shape=tuple(q.shape), dtypes=either, like=q)
    _check("g", g, shape=tuple(v.shape), dtypes=(q.dtype,), like=q)
    _check("norm_weight", norm_weight, shape=(v.shape[-1],), dtypes=either, like=q)
    if gate_normalizer <= 0:
        raise ValueError(f"gate_normalizer must be more than 0; got {gate_normalizer}")
    keep = torch.is_grad_enabled()
    output: Tensor = _block(q, k, v, gate_logits, g, norm_weight, scale, gate_normalizer, eps, keep)[0]
    return output
