"""DiG's blocks on this project's kernels: the scan moves, not the tokens.

Everything in a block but the recurrence and the convolution works on each token by itself, so the tokens can stay in
raster order through the whole model: the recurrence walks them in the block's order, and the convolution's 3×3 kernel
is turned instead of the grid. What SREM moves in `dig.model.DiGBlock.forward`, nothing moves here. The algebra is
exact; the parameters are the same.

What is fused crosses the blocks' borders: a pass over the tokens ends with the norm that the next product reads. What
needs no tokens, the condition, modulations and the first block's weights, is computed while they are embedded.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dig.ops import formulas as _formulas  # noqa: F401 - what FlopCounterMode is to know of the operations here
from dig.ops.adaln import norm_modulate
from dig.ops.aside import aside, mark, runs_beside, side_work, wait
from dig.ops.condition import MOST_IMAGES, condition
from dig.ops.weights import matrix_vector
from dig.raster_block import (
    BlockWeights,
    Prepared,
    Rider,
    adaln,
    infer_block,
    modulations_of,
    prepare_block,
    train_block,
)

if TYPE_CHECKING:
    from dig.layers import FinalLayer, PatchEmbed
    from dig.model import DiG, DiGBlock
    from dig.scan import ScanOrder

_FEW_TOKENS = 1024
_FEW_PROGRAMS = 32
"""How many programs prepare weights beside a block with at most so many tokens: see `programs_beside`."""
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


def run_model(model: DiG, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiG's forward pass but for `dig.layers.unpatchify`, on tokens that stay in raster order.

    Args:
        model: With the backend ``triton``.
        x: As of `dig.layers.Backbone.forward`, as are t and y.
        t: Timesteps.
        y: Labels.

    Returns:
        (B, T, P·P·2C).
    """
    blocks, D = cast("list[DiGBlock]", list(model.blocks)), model.config.width
    training, dtype = torch.is_grad_enabled(), compute_dtype(x)
    position = cast(Tensor, model.pos_embed)
    if training and getattr(blocks[0], _RECOMPUTED, False):
        c = _condition(model, t, y)
        # In the order of below, which is that in which c's gradients are added up.
        last = _final_modulation(model.final_layer, c)
        x = _run_recomputed(blocks, embed_patches(model.x_embedder, x, position), c, model.grid, model.orders)
        return _run_final_layer(model.final_layer, x, last)
    # Gates can act on weights instead of tokens where one condition serves all of them, and no gradient asks for both.
    fold_gates = not training and len(x) == 1
    like = x.new_empty((1, 1, D), dtype=dtype).expand(len(x), position.shape[1], D)
    with side_work(x.device):
        # Neither the condition nor what comes of it and the weights needs the tokens, nor they it.
        with nullcontext() if training else aside(t, y):
            c = _condition(model, t, y)
        ahead = _Ahead([_weights(block) for block in blocks], c, like, fold_gates)
        ahead.begin(0)
        with nullcontext() if training else aside(c):
            last = _final_modulation(model.final_layer, c)
        x = embed_patches(model.x_embedder, x, position)
        for i, (block, order) in enumerate(zip(blocks, model.orders, strict=True)):
            prepared = ahead.take(i)
            ahead.begin(i + 1)
            settings = _settings(block, model.grid, order)
            if fold_gates:
                x = infer_block(x, prepared, ahead.weights[i], rider=ahead.rider, **settings)
            else:
                x = train_block(x, c, prepared, ahead.weights[i], **settings)
    return _run_final_layer(model.final_layer, x, last)


def _condition(model: DiG, t: Tensor, y: Tensor) -> Tensor:
    """The condition after its SiLU, (B, D)."""
    labels, mlp = model.y_embedder, model.t_embedder.mlp
    drops = labels.training and labels.dropout > 0
    first, second = cast(nn.Linear, mlp[0]), cast(nn.Linear, mlp[2])
    few = t.dim() == y.dim() == 1 and len(t) == len(y) <= MOST_IMAGES
    plain = not y.is_floating_point() and first.in_features % 2 == 0 and not drops
    if few and plain and not torch.is_grad_enabled():
        table = labels.embedding_table.weight
        return cast(Tensor, condition(t, y, first.weight, first.bias, second.weight, second.bias, table))
    return F.silu(model.t_embedder(t) + labels(y))


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
        x: Like the tokens (B, T, D); not read.
        fold_gates: As of `prepare_block`.

    Attributes:
        rider: What rides in the block that is launched next, which takes one image with many tokens of a wide model.
    """

    def __init__(self, weights: list[BlockWeights], c: Tensor, x: Tensor, fold_gates: bool) -> None:
        self.weights = weights
        self.rider: Rider | None = None
        self._c, self._dtype, self._fold_gates = c, x.dtype, fold_gates
        self._programs = programs_beside(x.shape[0] * x.shape[1])
        self._rides = fold_gates and not torch.compiler.is_compiling() and all(Rider.fits(w, x) for w in weights)
        self._upcoming: tuple[Prepared, torch.cuda.Event | None] | None = None
        self._modulations: Tensor | None = None
        if self._rides:
            # Apart, each of the blocks' products of a vector and a matrix would hold up the block that it runs beside.
            with aside(c):
                self._modulations = modulations_of(weights, c)

    def begin(self, i: int) -> None:
        """Begin with what block i needs, if there is one; what comes before it is launched next."""
        self.rider = None
        if i == len(self.weights):
            return
        if i and self._modulations is not None:
            self.rider = Rider(self.weights[i], self._modulations[i : i + 1])
        elif runs_beside():
            self._prepare(i, self._programs if i else None)

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


def _final_modulation(layer: FinalLayer, c: Tensor) -> Tensor:
    """Shift and scale (B, 2D) of the output head; c after its SiLU."""
    linear = cast(nn.Linear, layer.adaLN_modulation[1])
    if len(c) == 1 and not torch.is_grad_enabled():
        return matrix_vector(linear.weight, c[0], linear.bias).unsqueeze(0)
    return adaln(c, linear.weight, linear.bias)


def _run_final_layer(layer: FinalLayer, x: Tensor, modulation: Tensor) -> Tensor:
    """DiT's output head with its norm and modulation fused: see `dig.layers.FinalLayer.forward`."""
    shift, scale = modulation.chunk(2, dim=1)
    h = norm_modulate(x, shift, scale, None, norm="layer", dtype=compute_dtype(x), implementation="triton")
    output: Tensor = layer.linear(h)
    return output
