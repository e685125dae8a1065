"""adaLN's linear layer for a batch of conditions: each fp32 weight is read once, and all products are exact to fp32.

The layer is as large as all of a block's others together and has one row an image: reading it is all the work. cuBLAS
in fp32 takes ten times as long as the reading, for its products run on the CUDA cores. Its kernels also fill the card,
so that what runs beside them waits. autocast's cast to bf16 reads and writes half as much again, and rounds the
modulation. Here three tf32 products make one of fp32.

Registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take it. Sums have one order: two
runs agree in every bit.

Shapes: B images, M width of a condition, N outputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.derivatives import once
from dig.ops.launch import Launch, empty, launch_context
from dig.ops.library import operation
from dig.ops.modulation.kernels import condition_gradient_kernel, modulation_kernel, weight_gradient_kernel
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import ModulationTiles
from dig.ops.whole import ceil_div, power_of_two


def takes(weight: Tensor) -> bool:
    """Whether these kernels are for such a weight: in fp32. In bf16 cuBLAS' products run on the tensor cores."""
    return weight.dtype == torch.float32


def _images(tiles: ModulationTiles, B: int) -> int:
    """Images of a program; at least as many as a product on the tensor cores has rows."""
    return max(16, min(tiles.images, power_of_two(B)))


@operation("dig::modulation")
def modulation(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``c weight^T + bias``, differentiable once.

    Args:
        c: (B, M), fp32 or bf16.
        weight: (N, M), fp32.
        bias: (N,), fp32.

    Returns:
        (B, N) in fp32.
    """
    c, weight, bias = c.contiguous(), weight.contiguous(), bias.contiguous()
    (B, M), N = c.shape, weight.shape[0]
    out = torch.empty(B, N, dtype=weight.dtype, device=c.device)
    launch_context(c.device).start(
        launches_of(for_device(c.device).modulation_tiles(), B, M, N).product, c, weight, bias, out
    )
    return out


class _Launches(NamedTuple):
    """Those of a layer: its product, and the gradients of its weight and of the condition, in so many shares."""

    product: Launch
    weight: Launch
    condition: Launch
    shares: int


@functools.lru_cache(maxsize=1024)
def launches_of(tiles: ModulationTiles, B: int, M: int, N: int) -> _Launches:
    """Those of a layer (N, M) for B images."""
    images = _images(tiles, B)
    inner = min(images, tiles.inner_images)
    steps = ceil_div(N, tiles.shares * tiles.share_rows)
    shares = ceil_div(N, steps * tiles.share_rows)
    options: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    product = Launch(
        modulation_kernel, (ceil_div(N, tiles.rows), ceil_div(B, images)), (B, N),
        M=M, ROWS=tiles.rows, COLS=tiles.columns, IMAGES=images, **options,
    )  # fmt: skip
    weight = Launch(
        weight_gradient_kernel, (ceil_div(N, tiles.gradient_rows), ceil_div(M, tiles.gradient_columns)), (B, N),
        M=M, ROWS=tiles.gradient_rows, COLS=tiles.gradient_columns, IMAGES=inner, STEPS=ceil_div(B, inner), **options,
    )  # fmt: skip
    condition = Launch(
        condition_gradient_kernel, (ceil_div(M, tiles.gradient_columns), shares, ceil_div(B, images)), (B, N),
        M=M, ROWS=tiles.share_rows, COLS=tiles.gradient_columns, IMAGES=images, STEPS=steps, **options,
    )  # fmt: skip
    return _Launches(product, weight, condition, shares)


def modulation_gradients(
    dout: Tensor, c: Tensor, weight: Tensor, dweight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`modulation_backward`, whose second is written into dweight, contiguous, if given."""
    dout, c, weight = dout.contiguous(), c.contiguous(), weight.contiguous()
    (B, M), N = c.shape, weight.shape[0]
    _, of_weight, of_condition, shares = launches_of(for_device(c.device).modulation_tiles(), B, M, N)
    dweight = empty(weight) if dweight is None else dweight
    dbias = torch.empty(N, dtype=weight.dtype, device=c.device)
    partials = torch.empty(shares, B, M, dtype=torch.float32, device=c.device)
    launch = launch_context(c.device)
    launch.start(of_weight, dout, c, dweight, dbias)
    launch.start(of_condition, dout, weight, partials)
    return partials.sum(0).to(c.dtype), dweight, dbias


@operation("dig::modulation_backward")
def modulation_backward(dout: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of c (B, M) in its dtype, weight (N, M) and bias (N,), from dout (B, N)."""
    return modulation_gradients(dout, c, weight)


@modulation.register_fake
def _(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(c.shape[0], weight.shape[0], dtype=weight.dtype, device=c.device)


@modulation_backward.register_fake
def _(dout: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty(c), empty(weight), torch.empty(weight.shape[0], dtype=weight.dtype, device=c.device)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, weight = ctx.saved_tensors
    return modulation_backward(dout, c, weight)


modulation.register_autograd(once(_autograd), setup_context=_save)
