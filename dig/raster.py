"""DiG's blocks on this project's kernels: the scan moves, not the tokens.

Everything in a block but the recurrence and the convolution works on each token by itself, so the tokens can stay in
raster order through the whole model: the recurrence walks them in the block's order, and the convolution's 3×3 kernel
is turned instead of the grid. What SREM moves in `dig.model.DiGBlock.forward`, nothing moves here. The algebra is
exact; the parameters are the same.

What is fused crosses the blocks' borders: a pass over the tokens ends with the norm that the next product reads.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dig.ops.adaln import norm_modulate, residual_norm_modulate
from dig.ops.gla.mixer import gla_mixer
from dig.ops.srem import srem
from dig.ops.swiglu import swiglu_linear

if TYPE_CHECKING:
    from dig.layers import FinalLayer
    from dig.model import DiGBlock
    from dig.scan import ScanOrder


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _norm(block: DiGBlock, index: int) -> dict[str, Any]:
    """The norm before a block's first (1) or second (2) half, as the fused operations take it."""
    if block.variant == "release":
        return {"norm": "layer", "weight": None}
    return {"norm": "rms", "weight": getattr(block, f"norm{index}").weight}


def run_blocks(blocks: list[DiGBlock], x: Tensor, c: Tensor, grid: tuple[int, int], orders: list[ScanOrder]) -> Tensor:
    """Run DiG's blocks over tokens that stay in raster order.

    Args:
        blocks: At least one.
        x: (B, T, D) in raster order.
        c: (B, D), the condition.
        grid: (rows, columns) of the image's tokens.
        orders: The scan order of each block.

    Returns:
        (B, T, D) in raster order, in `compute_dtype`.
    """
    dtype = compute_dtype(x)
    fused: dict[str, Any] = {"dtype": dtype, "implementation": "triton"}
    x = x.to(dtype).contiguous()  # The patch embedding leaves channels apart.
    modulations = [block.adaLN_modulation(c).chunk(6, dim=1) for block in blocks]
    for block, order, modulation in zip(blocks, orders, modulations, strict=True):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = norm_modulate(x, shift1, scale1, **_norm(block, 1), **fused)
        mixer = block.attn
        y = gla_mixer(
            mixer.in_proj(h),
            mixer.decay_proj.weight.to(dtype),
            cast(Tensor, mixer.decay_proj.bias).to(dtype),
            mixer.norm_weight,
            heads=mixer.heads,
            grid=grid,
            order=order,
        )
        x, h = residual_norm_modulate(x, mixer.o_proj(y), gate1, shift2, scale2, **_norm(block, 2), **fused)
        down = block.mlp.down_proj.weight.to(dtype)
        y = swiglu_linear(block.mlp.gate_proj(h), down, implementation="triton")
        if block.dw_conv is None:
            x = x + gate2.unsqueeze(1) * y
        else:
            weight, bias = block.dw_conv.weight, cast(Tensor, block.dw_conv.bias)
            x = srem(x, y, gate2, weight, bias, grid=grid, order=order, implementation="triton")
    return x


def run_final_layer(layer: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
    """DiT's output head with its norm and modulation fused: see `dig.layers.FinalLayer.forward`."""
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=1)
    h = norm_modulate(x, shift, scale, None, norm="layer", dtype=compute_dtype(x), implementation="triton")
    output: Tensor = layer.linear(h)
    return output
