"""DiG, the diffusion backbone with gated linear attention (paper §3).

Shapes: B batch, T tokens, D width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dig.block import (
    KERNEL_DTYPES,
    DepthwiseConv,
    DiGBlock,
    GatedLinearAttention,
    RMSNorm,
    SwiGLU,
    refused_dtype,
)
from dig.config import EPS, RELEASE_XL_HEADS, SIZES, DiGConfig, heads_of
from dig.layers import (
    Backbone,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    initialize_adaln_zero,
    initialize_linears,
    sincos_position_embedding,
    unpatchify,
)
from dig.packages import require
from dig.scan import RASTER, Route, reorder, scan_orders
from dig.untouched import untouched

if TYPE_CHECKING:
    from dig.raster import Lookahead

__all__ = [
    "EPS",
    "RELEASE_XL_HEADS",
    "SIZES",
    "DepthwiseConv",
    "DiG",
    "DiGBlock",
    "DiGConfig",
    "GatedLinearAttention",
    "RMSNorm",
    "SwiGLU",
    "heads_of",
]


class DiG(Backbone):
    """Diffusion GLA model: patches, N blocks, output head; see `DiGConfig` and `Backbone.forward`.

    Attributes:
        routes: In which order each block gets its tokens, walks them, and hands them on.
    """

    def __init__(self, config: DiGConfig) -> None:
        super().__init__(
            input_size=config.input_size,
            in_channels=config.in_channels,
            patch_size=config.patch_size,
            num_classes=config.num_classes,
        )
        if config.backend == "fla":
            require("fla.ops.gla", "backend='fla'")
        if config.backend == "triton":
            require("triton", "backend='triton'")
        self.config = config
        D = config.width
        self.x_embedder = PatchEmbed(config.in_channels, D, config.patch_size)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D, config.label_dropout)
        self.register_buffer("pos_embed", sincos_position_embedding(D, self.grid))
        self.blocks = nn.ModuleList(
            DiGBlock(config, has_skip=config.skip_source(i) is not None) for i in range(config.depth)
        )
        self.final_layer = FinalLayer(D, config.patch_size, 2 * config.in_channels)
        self.orders = scan_orders(config.depth, config.scan)
        kernels = config.backend == "triton"
        # The last block hands its tokens over in raster order, whatever the depth and the shape of the grid.
        following = [*self.orders[1:], RASTER]
        self.routes = [
            Route(grid=self.grid, source=RASTER, order=order, target=RASTER)
            if kernels
            else Route(grid=self.grid, source=order, order=order, target=target)
            for order, target in zip(self.orders, following, strict=True)
        ]
        in_raster_order = "triton" if kernels else "reference"
        self.implementations = {
            "recurrence": config.backend,
            "norm_gate": config.backend,
            "swiglu": config.backend,
            "srem": in_raster_order,
            "adaln": in_raster_order,
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: adaLN and output layers zero, GLA small, skips as configured."""
        initialize_linears(self)
        initialize_adaln_zero(self)
        for module in self.modules():
            if isinstance(module, GatedLinearAttention):
                module.reset_parameters()
            if isinstance(module, DiGBlock) and module.skip_linear is not None and self.config.skip == "identity-init":
                nn.init.eye_(module.skip_linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and covariance: see `Backbone.forward`."""
        self.check_input(x)
        if self.config.backend == "triton":
            return unpatchify(self._run_on_kernels(x, t, y), self.grid, self.patch_size)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        return unpatchify(self.final_layer(self._run_blocks(x, c), c), self.grid, self.patch_size)

    def recompute_blocks(self, *, preserve_rng_state: bool) -> None:
        """Make the model keep only the blocks' inputs, and compute the rest again when it goes back.

        Args:
            preserve_rng_state: Whether blocks draw random numbers, which must be the same the second time. DiG's own
                draw none.
        """
        for block in self.blocks:
            if isinstance(block, DiGBlock):
                block.recomputed = preserve_rng_state

    def _run_blocks(self, x: Tensor, c: Tensor, lookahead: Lookahead | None = None) -> Tensor:
        """Call block after block: tokens (B, T, D) in the first one's source order to those in raster order.

        Raises:
            ValueError: There are more blocks or fewer than the model was built with, or one hands on what is no tokens.
        """
        if len(self.blocks) != self.config.depth:
            raise ValueError(
                f"the model has {len(self.blocks)} blocks, and was built for {self.config.depth}, each with an order "
                f"of its own: build one with depth={len(self.blocks)} and load their weights"
            )
        sources = [self.config.skip_source(i) for i in range(len(self.blocks))]
        kept: dict[int, Tensor] = {}
        shape, dtype = x.shape, x.dtype
        for i, (block, route) in enumerate(zip(self.blocks, self.routes, strict=True)):
            # A block that somebody wrapped is called with what every block takes, and no more.
            arguments: tuple[Any, ...] = (x, c, route)
            source = sources[i]
            if source is not None:
                arguments += (self._join(kept.pop(source), source, i),)
            ahead = None if lookahead is None else lookahead.step(i)
            run = block if ahead is None else partial(block, ahead=ahead)
            preserve = _recomputed(block)
            if preserve is None or not torch.is_grad_enabled():
                x = run(*arguments)
            else:
                x = cast(Tensor, checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=preserve))
            x = self._check_tokens(x, f"blocks.{i}", shape, dtype)
            if i in sources:
                kept[i] = x
        return x

    def _check_tokens(self, found: object, block: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What a block handed on, which hooks and whoever wraps it may have changed.

        Args:
            found: That.
            block: Its name.
            shape: (B, T, D), of the first block's tokens.
            dtype: Theirs.
        """
        kernels = self.config.backend == "triton"
        takes = KERNEL_DTYPES if kernels else (dtype,)
        if isinstance(found, Tensor) and found.shape == shape:
            # On kernels, tokens stay in one dtype. Elsewhere what is narrower is promoted, and autocast casts.
            if kernels and found.dtype in takes:
                return found if found.dtype == dtype else found.to(dtype)
            floats = not kernels and found.is_floating_point()
            if floats and (torch.promote_types(found.dtype, dtype) == dtype or _autocasts(found.device.type)):
                return found
        what = f"{tuple(found.shape)} in {_word(found.dtype)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{block} (or a hook on it) handed on {what}; the model takes tokens {tuple(shape)} in "
            f"{' or '.join(map(_word, takes))}"
        )

    def _join(self, kept: Tensor, source: int, block: int) -> Tensor:
        """What a block left, (B, T, D), in the order in which it meets the tokens of the block that reads it."""
        left, reads = self.routes[source].target, self.routes[block].source
        # As released, both sequences meet as they lie in the authors' code: each in the order of its own block.
        as_left, as_read = self.orders[source + 1], self.orders[block]
        if self.config.skip_order == "aligned" or as_left == as_read:
            return reorder(kept, self.grid, left, reads)
        return reorder(reorder(kept, self.grid, left, as_left), self.grid, as_read, reads)

    def _run_on_kernels(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The forward pass but for `dig.layers.unpatchify`, (B, T, P·P·2C), on tokens that stay in raster order."""
        from dig import raster
        from dig.ops.derivatives import refuse_transforms
        from dig.ops.side_stream import on_side_stream, side_work
        from dig.raster_gradients import gathers

        refuse_transforms()
        embeds = raster.can_embed(self.x_embedder)
        dtype = raster.compute_dtype(x)
        for used in (dtype, self.x_embedder.proj.weight.dtype if embeds else dtype):
            if used not in KERNEL_DTYPES:
                raise ValueError(refused_dtype(used))
        times, labels, final = self.t_embedder, self.y_embedder, self.final_layer
        weights = [block.weights() if untouched(block, DiGBlock) else None for block in self.blocks]
        finishes = raster.can_finish(final)
        embedders = raster.untouched_embedders(times, labels)
        # Nobody sees any part of the model, and what runs in which order.
        unseen = embeds and finishes and embedders and None not in weights and not torch.is_grad_enabled()
        beside = on_side_stream if unseen else _in_order
        like = x.new_empty((1, 1, self.config.width), dtype=dtype).expand(len(x), self.grid[0] * self.grid[1], -1)
        with side_work(x.device):
            # Neither the condition nor what comes of it and the weights needs the tokens, nor they it.
            with beside(t, y):
                c, activated = raster.embed_condition(times, labels, t, y, embedders)
            if c.shape != (len(x), self.config.width):
                raise ValueError(f"t and y must have x's {len(x)} entries; got {tuple(t.shape)} and {tuple(y.shape)}")
            # Tokens may be overwritten that nobody keeps: no skip, and nobody who saw a block's result.
            kept = {self.config.skip_source(i) for i in range(len(self.blocks))}
            again = torch.is_grad_enabled() and any(_recomputed(block) is not None for block in self.blocks)
            lookahead = raster.Lookahead(
                weights,
                activated,
                like,
                in_place=[unseen and i - 1 not in kept for i in range(len(self.blocks))],
                prepares=not again,
                gathers=None not in weights and not again and gathers(),
            )
            lookahead.begin()
            with beside(activated):
                # Before the blocks, so that what the condition's gradient is added up of comes in one order.
                last = raster.final_modulation(final, activated) if finishes else None
            # In one expression: under a name, the first block's tokens would be held to the end of the pass.
            x = self._run_blocks(raster.embed(self.x_embedder, x, cast(Tensor, self.pos_embed), embeds), c, lookahead)
        if last is None:
            output: Tensor = final(x, c)
            return output
        return raster.run_final_layer(final, x, last)


def _recomputed(block: nn.Module) -> bool | None:
    """`DiGBlock.recomputed`, of whatever stands in its place."""
    return cast("bool | None", getattr(block, "recomputed", None))


def _autocasts(device: str) -> bool:
    """Whether autocast is on; it may not know the device: tensors on "meta" have no values to cast.

    PyTorch 2.11's compiler can't trace this, so it is asked where the answer is needed alone.
    """
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_order(*reads: Tensor) -> AbstractContextManager[None]:
    """What `dig.ops.side_stream.on_side_stream` is where everything runs in order."""
    return nullcontext()
