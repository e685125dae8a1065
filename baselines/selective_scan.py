"""One direction of a Mamba mixer: causal convolution, selective scan, gate, output projection (arXiv 2312.00752).

Shapes: B batch, T tokens, E inner width, N state, R rank of the step size, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.flops import counts_as
from dig.operation import Operation
from dig.packages import require

if TYPE_CHECKING:
    from dig.layers import Backbone

SCAN_FLOPS = 9
"""FLOPs of a selective scan for each channel, token and state value, by mamba-ssm's own count."""
WHOLE_READS = 8
"""Tokens that causal-conv1d reads at once from a row, 16 bytes in bf16, where their number is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class DirectionWeights:
    """The parameters of one direction.

    Attributes:
        conv_weight: (E, 1, 4).
        conv_bias: (E,).
        x_proj: (R + 2N, E): step size, B and C from the convolved input.
        dt_proj: (E, R).
        dt_bias: (E,).
        A: (E, N), negative.
        D: (E,), the skip from input to output.
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` and ``y_t = C_t h_t``, token by token in plain PyTorch.

    Args:
        u: (B, E, T).
        delta: Step sizes (B, E, T), positive.
        A: (E, N).
        B: (B, N, T).
        C: (B, N, T).

    Returns:
        (B, E, T).
    """
    decay = torch.exp(delta.permute(2, 0, 1).unsqueeze(-1) * A)
    inputs = torch.einsum("bet,bnt->tben", delta * u, B)
    state = torch.zeros_like(inputs[0])
    states = []
    # Unbinding first matters: indexing in the loop would make autograd add a gradient of the whole tensor every step.
    for decay_t, input_t in zip(decay.unbind(0), inputs.unbind(0), strict=True):
        state = torch.addcmul(input_t, decay_t, state)
        states.append(state)
    return torch.einsum("tben,bnt->bet", torch.stack(states), C)


def reference_direction(xz: Tensor, weights: DirectionWeights, out_proj: Tensor) -> Tensor:
    """One direction in plain PyTorch; the scan itself in fp32, or in fp64 for fp64 weights.

    Args:
        xz: (B, 2E, T): input and gate.
        weights: Of this direction.
        out_proj: (D, E), shared by both directions.

    Returns:
        (B, T, D).
    """
    dtype = weights.A.dtype
    x, z = xz.chunk(2, dim=1)
    x = F.silu(F.conv1d(x, weights.conv_weight, weights.conv_bias, padding=3, groups=x.shape[1])[..., : x.shape[-1]])
    rank, state = weights.dt_proj.shape[1], weights.A.shape[1]
    step, B, C = F.linear(x.transpose(1, 2), weights.x_proj).split([rank, state, state], dim=-1)
    delta = F.softplus(F.linear(step, weights.dt_proj).to(dtype) + weights.dt_bias).transpose(1, 2)
    with torch.autocast(xz.device.type, enabled=False):
        u = x.to(dtype)
        y = selective_scan(u, delta, weights.A, B.transpose(1, 2).to(dtype), C.transpose(1, 2).to(dtype))
        y = ((y + weights.D.unsqueeze(-1) * u) * F.silu(z.to(dtype))).to(xz.dtype)
    return F.linear(y.transpose(1, 2), out_proj)


def mamba_ssm_direction(xz: Tensor, weights: DirectionWeights, out_proj: Tensor) -> Tensor:
    """The same on mamba-ssm's fused function, which recomputes convolution and step size in its backward pass.

    It includes the output projection. That is linear, so projecting each direction and adding gives what DiS computes
    by adding first; the separate functions would be exact too, but keep more for the backward pass than DiS deserves.

    Tokens of zeros behind the last one, which nothing before them sees, make their number a multiple of 8. With any
    other number causal-conv1d (1.7.0 and before) reads number by number. And where the last of its pieces of 1024
    tokens has fewer than 8, its backward pass (``causal_conv1d_bwd_kernel``, with SiLU) takes inputs before that piece
    for zeros: DiS' 2 tokens more than patches are such a piece at 512, 1024 and 2048 pixels.
    """
    interface = require("mamba_ssm.ops.selective_scan_interface", "backend='mamba-ssm'")
    tokens = xz.shape[-1]
    output: Tensor = interface.mamba_inner_fn(
        F.pad(xz, (0, -tokens % WHOLE_READS)),
        weights.conv_weight,
        weights.conv_bias,
        weights.x_proj,
        weights.dt_proj,
        out_proj,
        None,
        weights.A,
        None,
        None,
        # Its kernels take these in fp32 only, whatever the model was cast to.
        weights.D.float(),
        delta_bias=weights.dt_bias.float(),
        delta_softplus=True,
    )
    return output[:, :tokens]


Direction = Callable[[Tensor, DirectionWeights, Tensor], Tensor]
IMPLEMENTATIONS: dict[str, Direction] = {
    "reference": reference_direction,
    "mamba-ssm": mamba_ssm_direction,
}


def _needed(
    direction: Direction, xz: Tensor, forwards: DirectionWeights, backwards: DirectionWeights, out_proj: Tensor
) -> int:
    """FLOPs of both directions, and of one output projection, of their sum.

    Not of what runs: mamba-ssm's function projects each direction, and the convolutions' outputs past the last token
    are cut off.
    """
    B, E, T = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
    rank, state = forwards.dt_proj.shape[1], forwards.A.shape[1]
    macs = E * forwards.conv_weight.shape[-1] + E * (rank + 2 * state) + rank * E
    return B * T * (2 * (2 * macs + SCAN_FLOPS * E * state) + 2 * out_proj.numel())


def _like(
    direction: Direction, xz: Tensor, forwards: DirectionWeights, backwards: DirectionWeights, out_proj: Tensor
) -> Tensor:
    return xz.new_empty(xz.shape[0], xz.shape[2], out_proj.shape[0])


@counts_as(_needed, _like)
def both_directions(
    direction: Direction, xz: Tensor, forwards: DirectionWeights, backwards: DirectionWeights, out_proj: Tensor
) -> Tensor:
    """The sum of both directions of a Mamba mixer, the tokens in their own order.

    Args:
        direction: What computes one.
        xz: (B, 2E, T): input and gate.
        forwards: Weights of the direction from the first token to the last.
        backwards: Of the other one.
        out_proj: (D, E).

    Returns:
        (B, T, D).
    """
    return direction(xz, forwards, out_proj) + direction(xz.flip(-1), backwards, out_proj).flip(1)


def scan_of(model: Backbone, batch: int, dtype: torch.dtype) -> Operation:
    """One direction of a DiS' first block, with its weights, on its tokens; see `dig.operation`.

    Its inputs are the two halves of the block's projection, (B, T, E) each.
    """
    found: Any = model
    mixer = found.mid_block.mixer
    tokens, width = found.pos_embed.shape[1], mixer.in_proj.out_features // 2
    device = next(model.parameters()).device
    inputs = {name: torch.randn(batch, tokens, width, device=device).to(dtype) for name in ("x", "z")}
    with torch.no_grad():
        weights, out_proj = mixer.weights(""), mixer.out_proj.weight.detach().float()
    wide = DirectionWeights(**{name: tensor.detach().float() for name, tensor in vars(weights).items()})

    def of(direction: Direction) -> Callable[[Mapping[str, Tensor]], Tensor]:
        def run(given: Mapping[str, Tensor]) -> Tensor:
            # Contiguous, as the block's product leaves it.
            xz = torch.cat([given["x"], given["z"]], dim=-1).transpose(1, 2).contiguous()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=xz.dtype == torch.bfloat16):
                return direction(xz, wide, out_proj)

        return run

    return Operation(
        inputs=inputs, run=of(mixer.direction), truth=of(reference_direction), per_token=frozenset(("x", "z"))
    )
