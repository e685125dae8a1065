"""What DiG's fused pass does around its blocks, and ahead of them: the scan moves, not the tokens.

All of a block but the recurrence and the convolution works token by token. So tokens stay in raster order through the
whole model: the recurrence walks them in the block's order, and the convolution's 3×3 kernel is turned instead of the
grid. Nothing here moves what SREM moves in `dig.block.DiGBlock`'s reference. The algebra is exact; the parameters are
the same.

The condition, modulations and blocks' weights need no tokens. They are computed beside the tokens' work. Every block is
called (`dig.model.DiG.forward`), with what was computed ahead for it. All of this reads the weights of modules that it
doesn't call, so it is used only where `dig.untouched` says that this skips nothing.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dig import raster_formulas as _raster_formulas  # noqa: F401 - what FlopCounterMode is to know of blocks here
from dig.config import EPS
from dig.layers import FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder, adaln_linear
from dig.ops.adaln import norm_modulate
from dig.ops.condition import condition
from dig.ops.side_stream import Point, mark, on_side_stream, uses_side_stream, wait
from dig.ops.tiles import passes_for
from dig.ops.tiles.passes import PassChoices
from dig.ops.weights import matrix_vector
from dig.raster_block import folds_gates
from dig.raster_gradients import Gathered
from dig.raster_weights import Ahead, BlockWeights, FusedCast, Prepared, adaln, modulations_of, prepare_block
from dig.untouched import untouched, untouched_adaln, untouched_layer_norm, untouched_linear


def compute_dtype(x: Tensor) -> torch.dtype:
    """The GEMMs' dtype: autocast's where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def embed_patches(embedder: PatchEmbed, x: Tensor, position: Tensor) -> Tensor:
    """Patches projected to the width, plus their position: see `dig.layers.PatchEmbed.forward`.

    Patches don't overlap, so the convolution is one GEMM, whose result needs no transposition.

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


def can_embed(embedder: PatchEmbed) -> bool:
    """Whether `embed_patches` skips nothing."""
    if not (untouched(embedder, PatchEmbed) and untouched(embedder.proj, nn.Conv2d)):
        return False
    proj = embedder.proj
    plain = proj.padding == (0, 0) and proj.dilation == (1, 1) and proj.groups == 1
    return plain and proj.stride == proj.kernel_size and proj.kernel_size[0] == proj.kernel_size[1]


def embed(embedder: PatchEmbed, x: Tensor, position: Tensor, fused: bool) -> Tensor:
    """`embed_patches` where it skips nothing (``fused``: `can_embed`), else the module's own call; (B, T, D)."""
    if fused:
        return embed_patches(embedder, x, position)
    return (embedder(x) + position).to(compute_dtype(x)).contiguous()


def untouched_embedders(times: TimestepEmbedder, labels: LabelEmbedder) -> bool:
    """Whether leaving out the calls of both embedders changes nothing that anybody attached."""
    if not (untouched(times, TimestepEmbedder) and untouched(labels, LabelEmbedder)):
        return False
    mlp = times.mlp
    return (
        untouched(labels.embedding_table, nn.Embedding)
        and labels.embedding_table.max_norm is None
        and untouched(mlp, nn.Sequential)
        and len(mlp) == 3
        and untouched_linear(mlp[0], bias=True)
        and untouched(mlp[1], nn.SiLU)
        and untouched_linear(mlp[2], bias=True)
    )


def embed_condition(
    times: TimestepEmbedder, labels: LabelEmbedder, t: Tensor, y: Tensor, unseen: bool
) -> tuple[Tensor, Tensor]:
    """The condition before and after its SiLU, (B, D) both; ``unseen`` is what `untouched_embedders` says."""
    plain = unseen and not (
        torch.is_grad_enabled() or y.is_floating_point() or (labels.training and labels.dropout > 0)
    )
    fits = plain and times.frequencies % 2 == 0 and t.dim() == 1 and y.shape == t.shape
    # How many images there are comes last: a program of torch.compile that was asked is one for few or for many.
    if fits and len(t) <= passes_for(t.device).condition_images:
        first, second = cast(nn.Linear, times.mlp[0]), cast(nn.Linear, times.mlp[2])
        table = labels.embedding_table.weight
        both: tuple[Tensor, Tensor] = condition(t, y, first.weight, first.bias, second.weight, second.bias, table)
        return both
    c = times(t) + labels(y)
    return c, F.silu(c)


def programs_beside(passes: PassChoices, tokens: int, *, casts: bool) -> int | None:
    """How many programs prepare a block's weights beside the block before; None: all at once.

    Args:
        passes: The device's.
        tokens: Of all images.
        casts: Whether weights are cast.
    """
    if tokens > passes.beside_tokens:
        return None
    return passes.beside_programs if casts else passes.beside_programs_gates


class Lookahead:
    """Prepares a block's modulation and weights while the block before it runs; two blocks' are there at a time.

    In the order of preference: in the earlier block's up-projection GEMM (`FusedCast`; the modulation on the side
    stream), on the side stream, or in the block itself. Blocks that take their weights as they are need modulations
    alone, which all come at once, before the first block.

    Args:
        weights: Of all blocks; None for one that reads its own, because somebody has to see parts of it called.
        c: (B, D), the condition after its SiLU.
        x: Like the tokens (B, T, D); not read.
        in_place: As of `Ahead`, for every block.
        gathers: Whether the blocks' gradients are handed on later than they end (`dig.raster_gradients`); all weights
            are given then.
        prepares: Whether anything is prepared. Not for blocks that are run again in the backward pass: what is handed
            to them is kept until then.
    """

    def __init__(
        self,
        weights: list[BlockWeights | None],
        c: Tensor,
        x: Tensor,
        *,
        in_place: list[bool],
        prepares: bool,
        gathers: bool = False,
    ) -> None:
        self._c, self._dtype, self._in_place = c, x.dtype, in_place
        self._weights: Sequence[BlockWeights | None] = weights
        self._conditions = [c] * len(weights)
        self._gathered: Gathered | None = None
        if gathers:
            self._gathered = Gathered([w for w in weights if w is not None], c)
            self._weights, self._conditions = self._gathered.weights, self._gathered.conditions
        # Compiled, a block's one operation prepares what it needs itself.
        self._prepares = prepares and not torch.compiler.is_compiling()
        self._folds = [w is not None and folds_gates(x, w) for w in self._weights]
        casts = any(product.dtype != x.dtype for w in weights if w is not None for product in w.products)
        self._programs = programs_beside(passes_for(x.device), x.shape[0] * x.shape[1], casts=casts)
        self._upcoming: tuple[Prepared, Point | None] | None = None
        self._fused_cast: FusedCast | None = None
        self._modulations: Sequence[Tensor] | None = None
        known = [w for w in self._weights if w is not None]
        grad = torch.is_grad_enabled()
        whole = len(known) == len(weights) and len(x) == 1 and prepares and not torch.compiler.is_compiling()
        self._fuses = whole and all(self._folds) and all(FusedCast.fits(w.products, x) for w in known)
        # Apart, each of the blocks' products of a vector and a matrix would hold up the block that it runs beside; and
        # in order, where nothing runs beside anything, one launch costs the host less.
        alike = len({w.adaln_weight.dtype for w in known}) == 1
        unfolded = not grad and not any(self._folds)
        if whole and (self._fuses or unfolded or (alike and not uses_side_stream())):
            with on_side_stream(c):
                # At once, for a view of each by itself takes the host several times as long.
                self._modulations = modulations_of(known, c).split(1)

    def begin(self) -> None:
        """Begin with what the first block needs. Work that precedes that block is launched next."""
        self._begin(0)

    def step(self, i: int) -> Ahead | None:
        """Wait for what was prepared for block i, which is launched next; begin with what block i + 1 needs.

        Returns:
            None for a block whose weights are not known here.
        """
        prepared = self._take()
        gathered = self._gathered
        if gathered is not None:
            gathered.step(i)
        self._begin(i + 1)
        weights = self._weights[i]
        if weights is None:
            return None
        if prepared is None and self._prepares:
            prepared = self._prepare(i, None)
        return Ahead(
            weights=weights,
            activated=self._conditions[i],
            prepared=prepared,
            fused_cast=self._fused_cast,
            in_place=self._in_place[i],
            part=None if gathered is None else gathered.parts[i],
        )

    def _begin(self, i: int) -> None:
        self._fused_cast = None
        weights = self._weights[i] if i < len(self._weights) else None
        if weights is None or not self._prepares:
            return
        if i and self._fuses:
            assert self._modulations is not None
            self._fused_cast = FusedCast(weights.products, self._modulations[i])
        elif i and self._modulations is not None and uses_side_stream():
            self._upcoming = self._prepare(i, None), None
        elif uses_side_stream():
            with on_side_stream(self._c, *(self._modulations or ())):
                prepared = self._prepare(i, self._programs if i else None)
            self._upcoming = prepared, mark()

    def _take(self) -> Prepared | None:
        """What was begun last, once it is there."""
        if self._fused_cast is not None:
            return self._fused_cast.prepared
        if self._upcoming is None:
            return None
        prepared, ready = self._upcoming
        self._upcoming = None
        wait(ready)
        return prepared

    def _prepare(self, i: int, programs: int | None) -> Prepared:
        weights = self._weights[i]
        assert weights is not None
        modulation = None if self._modulations is None else self._modulations[i]
        return prepare_block(
            weights, self._c, self._dtype, fold_gates=self._folds[i], programs=programs, modulation=modulation
        )


def can_finish(layer: FinalLayer) -> bool:
    """Whether `run_final_layer` skips nothing; the linear layer is called in any case."""
    return (
        untouched(layer, FinalLayer)
        and untouched_layer_norm(layer.norm_final, EPS)
        and untouched_adaln(layer.adaLN_modulation)
    )


def final_modulation(layer: FinalLayer, c: Tensor) -> Tensor:
    """Shift and scale (B, 2D) of the output head; c after its SiLU."""
    linear = adaln_linear(layer.adaLN_modulation)
    if len(c) == 1 and not torch.is_grad_enabled():
        return matrix_vector(linear.weight, c[0], linear.bias).unsqueeze(0)
    return adaln(c, linear.weight, linear.bias)


def run_final_layer(layer: FinalLayer, x: Tensor, modulation: Tensor) -> Tensor:
    """DiT's output head with its norm and modulation fused: see `dig.layers.FinalLayer.forward`."""
    shift, scale = modulation.chunk(2, dim=1)
    h = norm_modulate(x.contiguous(), shift, scale, None, norm="layer", dtype=compute_dtype(x), implementation="triton")
    output: Tensor = layer.linear(h)
    return output
