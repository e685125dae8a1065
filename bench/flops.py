"""Multiply-adds of one forward pass, counted in full by formula, and the paper's own count for DiG.

Every matrix product, convolution and recurrence counts; norms, activations and other element-wise work does not. One
multiply-add is two FLOPs; a training step is three forward passes.

Letters: T tokens, D width, N depth, P patch, C input channels, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

import math

from baselines.dis import EXTRA_TOKENS, STATE, DiS
from baselines.dit import DiT
from dig.layers import Backbone
from dig.model import DiG
from dig.ops.gla.projection import GATE_RANK

SCAN_FLOPS = 9
"""FLOPs of a selective scan for each channel, token and state value, by mamba-ssm's own count."""


def _frame(model: Backbone, T: int, D: int, time_input: int, time_hidden: int) -> int:
    """Patch embedding, timestep MLP, output head."""
    patch = model.patch_size**2 * model.in_channels
    return T * patch * D + time_input * time_hidden + time_hidden * D + 2 * D * D + T * D * 2 * patch


def _dig(model: DiG) -> int:
    config, T = model.config, model.grid[0] * model.grid[1]
    D, F = config.width, config.ffn_width
    K, V = D // 2 // config.heads, D // config.heads
    projections = D * (D // 2) * 2 + 3 * D * D + D * GATE_RANK + GATE_RANK * D // 2
    recurrence = 2 * config.heads * K * V  # k_t^T v_t into the state, q_t times the state
    ffn = 3 * D * F
    convolution = 0 if config.convolution == "none" else 9 * D
    block = T * (projections + recurrence + ffn + convolution) + 6 * D * D
    return config.depth * block + _frame(model, T, D, model.t_embedder.frequencies, D)


def _dit(model: DiT) -> int:
    config, T = model.config, model.grid[0] * model.grid[1]
    D = config.width
    block = T * (4 * D * D + 2 * T * D + 8 * D * D) + 6 * D * D
    return config.depth * block + _frame(model, T, D, model.t_embedder.frequencies, D)


def _dis(model: DiS) -> int:
    config = model.config
    D, E = config.width, 2 * config.width
    patches = model.grid[0] * model.grid[1]
    T = patches + EXTRA_TOKENS
    rank = math.ceil(D / 16)
    direction = E * 4 + E * (rank + 2 * STATE) + rank * E + SCAN_FLOPS * E * STATE // 2
    mixer = T * (D * 2 * E + 2 * direction + E * D)
    half = config.depth // 2
    return (2 * half + 1) * mixer + half * T * 2 * D * D + _frame(model, patches, D, D, 4 * D)


def forward_macs(model: Backbone) -> int:
    """Multiply-adds of a forward pass for one image."""
    if isinstance(model, DiG):
        return _dig(model)
    if isinstance(model, DiT):
        return _dit(model)
    if isinstance(model, DiS):
        return _dis(model)
    raise TypeError(f"no formula for {type(model).__name__}; add one to bench/flops.py")


def paper_macs(model: DiG) -> int:
    """The count behind the "Gflops" of the DiG paper's Tab. 1.

    It leaves out `down_proj` and the recurrence, and adds 5 operations an element of each LayerNorm. By it DiG takes
    77% of DiT's; counted in full it takes 92 to 102%.
    """
    config, T = model.config, model.grid[0] * model.grid[1]
    D, F = config.width, config.ffn_width
    K, V = D // 2 // config.heads, D // config.heads
    left_out = config.depth * T * (2 * config.heads * K * V + D * F)
    return forward_macs(model) - left_out + 5 * T * D * (2 * config.depth + 1)


def step_flops(model: Backbone, *, batch: int, mode: str) -> int:
    """FLOPs of one benchmark step: a forward pass, or a training step (forward and backward)."""
    return 2 * forward_macs(model) * batch * (3 if mode == "train" else 1)
