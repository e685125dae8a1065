"""The condition of a few images: timestep and label to one vector each, in two launches, for inference.

PyTorch takes 20 kernels, each of which does next to nothing and waits for the one before. Two are the fewest: the
second product needs all of the first one's result. The weights are read as they are, in fp32.

Shapes: B images, D width, E sinusoids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dig.ops.condition.kernels import embed_timestep_kernel, finish_condition_kernel
from dig.ops.launch import launch_context
from dig.ops.library import operation
from dig.ops.tiles import for_device
from dig.ops.whole import ceil_div, power_of_two

MAX_PERIOD = 10_000.0
"""Of the sinusoids."""


@operation("dig::condition")
def condition(
    t: Tensor, y: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """``c = second silu(first e(t) + first_bias) + second_bias + table[y]`` and ``silu(c)``, computed in fp32.

    e is `dig.layers.timestep_embedding`. Weights and table are contiguous.

    Args:
        t: (B,) timesteps, whole or fractional.
        y: (B,) labels; one that the table does not have gives NaN.
        first: (D, E), E even.
        first_bias: (D,).
        second: (D, D).
        second_bias: (D,).
        table: (labels, D).

    Returns:
        c and silu(c), (B, D) both, in the table's dtype.
    """
    first, second, table = first.contiguous(), second.contiguous(), table.contiguous()
    D, E = first.shape
    B = len(t)
    hidden = torch.empty(B, D, dtype=torch.float32, device=t.device)
    c, activated = (torch.empty(B, D, dtype=table.dtype, device=t.device) for _ in range(2))
    tiles = for_device(t.device).condition
    grid = ceil_div(D, tiles.rows), B
    with launch_context(t.device) as launch:
        launch(
            embed_timestep_kernel, grid, (t.contiguous(), first, first_bias, hidden), (),
            D=D, HALF=E // 2, RATE=-math.log(MAX_PERIOD) / (E // 2), ROWS=tiles.rows,
            BLOCK=power_of_two(E // 2), num_warps=tiles.warps,
        )  # fmt: skip
        launch(
            finish_condition_kernel, grid,
            (hidden, second, second_bias, table, y.contiguous(), c, activated), (len(table),),
            D=D, ROWS=tiles.rows, BLOCK=min(tiles.columns, power_of_two(D)), num_warps=tiles.warps,
        )  # fmt: skip
    return c, activated


@condition.register_fake
def _(
    t: Tensor, y: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    c = torch.empty(t.shape[0], first.shape[0], dtype=table.dtype, device=t.device)
    return c, torch.empty_like(c)
