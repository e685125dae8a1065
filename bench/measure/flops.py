"""FLOPs of a step, and the paper's own count for DiG. `dig.flops` counts; a training step is three forward passes."""

from __future__ import annotations

from dig.flops import model_macs
from dig.model import DiG
from dig.spec import ModelSpec


def paper_macs(model: DiG, macs: int) -> int:
    """The count behind the "Gflops" of the DiG paper's Tab. 1.

    It leaves out `down_proj` and the recurrence, and adds 5 operations an element of each LayerNorm. By it DiG takes
    77% of DiT's; counted in full it takes 92 to 102%.

    Args:
        model: Its configuration is read.
        macs: Its multiply-adds in full, by `dig.flops.model_macs`.

    Letters: T tokens, D width, F inner width of SwiGLU, K and V key and value width of a head.
    """
    config, T = model.config, model.grid[0] * model.grid[1]
    D, F = config.width, config.ffn_width
    K, V = D // 2 // config.heads, D // config.heads
    left_out = config.depth * T * (2 * config.heads * K * V + D * F)
    return macs - left_out + 5 * T * D * (2 * config.depth + 1)


def step_flops(spec: ModelSpec, *, batch: int, mode: str) -> int:
    """FLOPs of one benchmark step: a forward pass, or a training step (forward and backward)."""
    return 2 * model_macs(spec) * batch * (3 if mode == "train" else 1)
