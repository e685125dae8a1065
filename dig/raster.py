"""DiG's blocks on this project's kernels: the scan moves, not the tokens.

Everything in a block but the recurrence and the convolution works on each token by itself, so the tokens can stay in
raster order through the whole model: the recurrence walks them in the block's order, and the convolution's 3×3 kernel
is turned instead of the grid. What SREM moves in `dig.model.DiGBlock.forward`, nothing moves here. The algebra is
exact; the parameters are the same.

What is fused crosses the blocks' borders: a pass over the tokens ends with the norm that the next product reads.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dig.ops.adaln import norm_modulate
from dig.ops.aside import aside, mark, runs_beside, side_work, wait
from dig.raster_block import (
    BlockWeights,
    Prepared,
    Rider,
    adaln,
    infer_block,
    modulation_of,
    modulations_of,
    prepare_block,
    train_block,
)

if TYPE_CHECKING:
    from dig.layers import FinalLayer, PatchEmbed
    from dig.model import DiGBlock
    from dig.scan import ScanOrder

_FEW_TOKENS = 1024
_FEW_PROGRAMS = 32
"""How many programs prepare weights beside a block with at most so many tokens: see `programs_beside`."""
_TOGETHER = True
"""Whether all modulations are computed by one launch before the first block, where weights ride."""
_RECOMPUTED = "recomputed"
"""Attribute of a block: whether its activations are computed again in the backward pass."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def embed_patches(embedder: PatchEmbed, x: Tensor, position: Tensor) -> Tensor:
    """Patches projected to the width, plus their position: see `dig.layers.PatchEmbed.forward`.

    Patches don't overlap, so the convolution is one matrix product, whose result needs no transposition.

    Args:
        embedder: The model's.
        x: (B, C, rows·P, columns·P).
        position: (1, T, D).

    Returns:
        (B, T, D) in `compute_dtype`, contiguous.
    """
    dtype = compute_dtype(x)
    weight = embedder.proj.weight
    side = weight.shape[-1]
    patches = x.to(dtype).unflatten(2, (-1, side)).unflatten(4, (-1, side))
    tokens = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    bias = None if embedder.proj.bias is None else embedder.proj.bias.to(dtype)
    return F.linear(tokens, weight.to(dtype).flatten(1), bias) + position.to(dtype)


def _weights(block: DiGBlock) -> BlockWeights:
    rms = block.variant == "paper"
    modulation = cast(nn.Linear, block.adaLN_modulation[1])
    conv = block.dw_conv
    return BlockWeights(
        in_proj=block.attn.in_proj.weight,
        decay_weight=block.attn.decay_proj.weight,
        o_proj=block.attn.o_proj.weight,
        gate_proj=block.mlp.gate_proj.weight,
        down_proj=block.mlp.down_proj.weight,
        decay_bias=block.attn.decay_proj.bias,
        head_norm=block.attn.norm_weight,
        norm1=block.norm1.weight if rms else None,
        norm2=block.norm2.weight if rms else None,
        conv_weight=None if conv is None else conv.weight,
        conv_bias=None if conv is None else conv.bias,
        adaln_weight=modulation.weight,
        adaln_bias=modulation.bias,
    )


def _settings(block: DiGBlock, grid: tuple[int, int], order: ScanOrder) -> dict[str, Any]:
    """What `train_block` and `infer_block` take beside tensors."""
    norm = "rms" if block.variant == "paper" else "layer"
    return {"norm": norm, "heads": block.attn.heads, "grid": grid, "order": order}


def run_blocks(blocks: list[DiGBlock], x: Tensor, c: Tensor, grid: tuple[int, int], orders: list[ScanOrder]) -> Tensor:
    """Run DiG's blocks over tokens that stay in raster order.

    Args:
        blocks: At least one.
        x: (B, T, D) in raster order, contiguous, in `compute_dtype`; overwritten where no gradients are asked for.
        c: (B, D), the condition.
        grid: (rows, columns) of the image's tokens.
        orders: The scan order of each block.

    Returns:
        (B, T, D) in raster order, in x's dtype.
    """
    if torch.is_grad_enabled() and getattr(blocks[0], _RECOMPUTED, False):
        return _run_recomputed(blocks, x, F.silu(c), grid, orders)
    # Gates can act on weights instead of tokens where one condition serves all of them, and no gradient asks for both.
    fold_gates = not torch.is_grad_enabled() and len(x) == 1
    activated = F.silu(c)
    with side_work(x.device):
        ahead = _Ahead([_weights(block) for block in blocks], activated, x, fold_gates)
        for i, (block, order) in enumerate(zip(blocks, orders, strict=True)):
            prepared = ahead.take(i)
            ahead.begin(i + 1)
            settings = _settings(block, grid, order)
            if fold_gates:
                x = infer_block(x, activated, prepared, ahead.weights[i], rider=ahead.rider, **settings)
            else:
                x = train_block(x, activated, prepared, ahead.weights[i], **settings)
    return x


def programs_beside(tokens: int) -> int | None:
    """How many programs prepare a block's weights beside the block before; None: all at once.

    Found by `bench.ops.prepare`: with few tokens the products leave most multiprocessors idle or short of work, and a
    few of them are enough for the weights; with many, cuBLAS' tiles are as many as there are multiprocessors, so that
    each one taken away costs a product twice its time.

    Args:
        tokens: Of all images.
    """
    return _FEW_PROGRAMS if tokens <= _FEW_TOKENS else None


class _Ahead:
    """Prepares a block's modulation and weights while the block before it runs; two blocks' are there at a time.

    In the order of preference: in the earlier block's product upwards (`Rider`; the modulation aside), aside, or only
    when they are asked for.

    Args:
        weights: Of all blocks.
        c: (B, D), the condition after its SiLU.
        x: (B, T, D), the tokens.
        fold_gates: As of `prepare_block`.
    """

    def __init__(self, weights: list[BlockWeights], c: Tensor, x: Tensor, fold_gates: bool) -> None:
        self.weights = weights
        self.rider: Rider | None = None
        self._c, self._dtype, self._fold_gates = c, x.dtype, fold_gates
        self._programs = programs_beside(x.shape[0] * x.shape[1])
        self._ride = fold_gates and not torch.compiler.is_compiling() and all(Rider.fits(w, x) for w in weights)
        self._upcoming: tuple[Prepared, torch.cuda.Event | None] | None = None
        # Apart, each of the blocks' products of a vector and a matrix would hold up the block that it runs beside.
        self._modulations = modulations_of(weights, c) if self._ride and _TOGETHER else None

    def begin(self, i: int) -> None:
        """Begin with what block i needs, if there is one; the block before it is launched next."""
        self.rider = None
        if i == len(self.weights):
            return
        if self._modulations is not None:
            self.rider = Rider(self.weights[i], self._modulations[i : i + 1], None)
        elif self._ride:
            with aside(self._c):
                modulation = modulation_of(self.weights[i], self._c)
            self.rider = Rider(self.weights[i], modulation, mark())
        elif runs_beside():
            self._prepare(i, self._programs)

    def take(self, i: int) -> Prepared:
        """What block i needs, once it is there."""
        if self.rider is not None and self.rider.prepared is not None:
            return self.rider.prepared
        if self._upcoming is None:
            self._prepare(i, None)
        assert self._upcoming is not None
        prepared, ready = self._upcoming
        self._upcoming = None
        wait(ready)
        return prepared

    def _prepare(self, i: int, programs: int | None) -> None:
        modulation = None if self._modulations is None else self._modulations[i : i + 1]
        with aside(self._c, modulation):
            prepared = prepare_block(
                self.weights[i],
                self._c,
                self._dtype,
                fold_gates=self._fold_gates,
                programs=programs,
                modulation=modulation,
            )
        self._upcoming = prepared, mark()


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Make `run_blocks` keep only these blocks' inputs, and compute the rest again when it goes back."""
    for block in blocks:
        setattr(block, _RECOMPUTED, True)


def _run_recomputed(
    blocks: list[DiGBlock], x: Tensor, c: Tensor, grid: tuple[int, int], orders: list[ScanOrder]
) -> Tensor:
    """`run_blocks` for less memory; c after its SiLU. Bit for bit the same, gradients too."""

    def run(x: Tensor, c: Tensor, block: DiGBlock, order: ScanOrder) -> Tensor:
        weights = _weights(block)
        # In here, and not beside the block before: what is handed in is kept until the backward pass.
        prepared = prepare_block(weights, c, x.dtype, fold_gates=False)
        return train_block(x, c, prepared, weights, **_settings(block, grid, order))

    for block, order in zip(blocks, orders, strict=True):
        # Blocks draw nothing, so there is no random state to keep, which a CUDA graph couldn't restore.
        x = cast(Tensor, checkpoint(run, x, c, block, order, use_reentrant=False, preserve_rng_state=False))
    return x


def run_final_layer(layer: FinalLayer, x: Tensor, c: Tensor) -> Tensor:
    """DiT's output head with its norm and modulation fused: see `dig.layers.FinalLayer.forward`."""
    modulation = cast(nn.Linear, layer.adaLN_modulation[1])
    shift, scale = adaln(F.silu(c), modulation.weight, modulation.bias).chunk(2, dim=1)
    h = norm_modulate(x, shift, scale, None, norm="layer", dtype=compute_dtype(x), implementation="triton")
    output: Tensor = layer.linear(h)
    return output
