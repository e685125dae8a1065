"""The kernels of a training block on tokens of one shape, all that they are launched with found once.

Outside of a CUDA graph a step of few images waits for the host. What an operation asks before its launches (strides,
tile choices, which kernel, where in the modulation its parts lie) takes the host longer than they do. All of it follows
from shapes and dtypes. So it is asked once a pass for the whole block: `plan_for`. What comes of it holds launches and
numbers alone, no tensor of anybody.

The kernels, their order, their streams and their memory's life are those of `dig.raster_operations.Separate`, which
asks each time: bit for bit the same results. Two things differ in how tensors are handed over. Parts of a modulation
are told to the launches by where they begin, as a view of each takes the host longer than a launch. Scratch tensors of
one dtype that live equally long are one.

Shapes: B batch, T tokens, D width, F inner width of SwiGLU, R rank of the decay gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.config import EPS
from dig.ops.adaln import fused as adaln
from dig.ops.adaln.planned import NormPlan
from dig.ops.gla import launches as gla
from dig.ops.gla.mixer import order_code
from dig.ops.gla.planned import mixer_plan
from dig.ops.launch import ALIGNMENT, Launch, launch_context
from dig.ops.modulation import launches_of, takes
from dig.ops.placed import Place, placed
from dig.ops.side_stream import on_side_stream
from dig.ops.srem import fused as srem
from dig.ops.swiglu import fused as swiglu
from dig.ops.swiglu import products
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import (
    ModulationTiles,
    NormTiles,
    SremPass,
    SremTiles,
    SwigluTiles,
    WeightTiles,
)
from dig.ops.weights import gradient_launch, prepare_launch
from dig.raster_weights import BlockWeights, Products, Settings, adaln_backward

SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(6)
"""Parts of a modulation, D columns each."""
MOST_PLANS = 256
"""On a device; then all are forgotten, and made again."""
_like = torch.empty_like


class _Tiles(NamedTuple):
    """Tile choices of a block, and which of SwiGLU's GEMMs are apart from its passes."""

    norm: NormTiles
    srem: SremTiles
    srem_backward: SremTiles
    swiglu: SwigluTiles
    weights: WeightTiles
    modulation: ModulationTiles
    up_apart: bool
    down_apart: bool


class _Block(NamedTuple):
    """All that a plan follows from."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    settings: Settings
    inner: int
    """F."""
    rank: int
    """R."""
    condition: torch.dtype
    modulation: torch.dtype
    weights: tuple[torch.dtype | None, ...]
    """Those of `BlockWeights`; None where there is none."""
    choosers: tuple[Any, ...]


def plan_for(
    x: Tensor,
    c: Tensor,
    modulation: Tensor,
    w: BlockWeights,
    settings: Settings,
    others: Sequence[Tensor | None] = (),
    *,
    known: BlockPlan | None = None,
) -> BlockPlan | None:
    """The plan of a block's passes, for whoever may call `dig.ops.library.Operation.function` in place of operations.

    Args:
        x: Like the tokens (B, T, D).
        c: (B, D), the condition after its SiLU.
        modulation: (B, 6D).
        w: The block's weights.
        settings: Its settings.
        others: What else its pass reads.
        known: That of its forward pass, in its backward pass.

    Returns:
        None where some tensor isn't contiguous, or parts of the modulation lie at what Triton compiles other kernels
        for: each operation then has to see for itself.
    """
    # A loop, for this is asked of every block in every pass.
    for tensor in (x, c, modulation, *w, *others):
        if tensor is not None and not tensor.is_contiguous():
            return None
    kinds = tuple([None if tensor is None else tensor.dtype for tensor in w])
    if known is not None and known.block.weights == kinds:
        return known
    shape, dtype, device = x.shape, x.dtype, x.device
    D = shape[2]
    if D * modulation.itemsize % ALIGNMENT:
        return None
    inner, rank = w.down_proj.shape[1], w.decay_weight.shape[1]
    plans = for_device(device).plans
    block = _Block(shape, dtype, device, settings, inner, rank, c.dtype, modulation.dtype, kinds, _choosers())
    plan: BlockPlan | None = plans.get(block)
    if plan is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plan = plans[block] = BlockPlan(block, _tiles(x, inner))
    return plan


def _choosers() -> tuple[Any, ...]:
    """What chooses tiles: who puts something else in its place (a test) gets a plan of its own."""
    return (
        adaln.tiles_for, gla.tiles_for, gla.__dict__["for_device"], srem.tiles_for, swiglu.tiles_for,
        products.tiles_for, products.__dict__["for_device"],
    )  # fmt: skip


def _tiles(x: Tensor, inner: int) -> _Tiles:
    """Those of a block for tokens like x."""
    choices = for_device(x.device)
    return _Tiles(
        adaln.tiles_for(x),
        srem.tiles_for("forward", x),
        srem.tiles_for("backward", x),
        swiglu.tiles_for(x),
        choices.weights,
        choices.modulation_tiles(),
        products.tiles_for("up", x, inner) is None,
        products.tiles_for("down", x, inner) is None,
    )


class _Backward(NamedTuple):
    """A backward pass in two launches, and the shape of the partial sums between them."""

    first: Launch
    second: Launch
    sums: tuple[int, ...]


class BlockPlan:
    """What a block's passes launch. Methods take and give tensors as `dig.raster_operations.Separate`'s do."""

    def __init__(self, block: _Block, tiles: _Tiles) -> None:
        self.block, self.tiles, self.settings = block, tiles, block.settings
        self.device, self.dtype = block.device, block.dtype
        B, T, D = block.shape
        self.shape, self.width = (B, T, D), D
        self.strides = (T * D, D, 1)
        self.one_image = B == 1
        self.own: dict[str, Any] = {"dtype": block.dtype, "device": block.device}
        self.fp32: dict[str, Any] = {"dtype": torch.float32, "device": block.device}
        first, second = (
            NormPlan(
                self.tiles.norm, block.shape, block.device, self.settings.norm, EPS, 6 * D,
                shift=shift * D, scale=scale * D, gate=gate,
            )
            for shift, scale, gate in ((SHIFT1, SCALE1, None), (SHIFT2, SCALE2, GATE1 * D))
        )  # fmt: skip
        self.norm1, self.norm1_backward = first.alone, first.alone_backward
        self.norm2, self.norm2_backward = second.residual, second.residual_backward
        mixer = mixer_plan(
            self.shape, block.dtype, block.device, self.settings.heads, block.rank, self.settings.grid,
            order_code(self.settings.order), EPS,
        )  # fmt: skip
        self.mixer, self.mixer_sums, self.mixer_backward = mixer.forward, mixer.sums, mixer.backward

    def _of(self, which: int) -> Place:
        """A part of the modulation, which launches are given as m."""
        return "m", which * self.width

    def _part(self, m: Tensor) -> Tensor:
        """Room for the gradient (B, D) of a part of the modulation."""
        return torch.empty(self.shape[0], self.width, dtype=m.dtype, device=self.device)

    # SwiGLU

    @cached_property
    def _swiglu(self) -> tuple[Launch, Launch]:
        double = 2 * self.block.inner
        shape = torch.Size((*self.shape[:2], double))
        forward = swiglu.forward_launch(self.tiles.swiglu, shape, double)
        backward = swiglu.backward_launch(self.tiles.swiglu, shape, double, self.block.inner, True)
        return forward.settled(), backward.settled()

    def up(self, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden and SwiGLU's input."""
        if not self.tiles.up_apart:
            return products.project_up.function(h, weight, True)
        gate_up = F.linear(h, weight)
        hidden = torch.empty(*self.shape[:2], self.block.inner, **self.own)
        launch_context(self.device).start(self._swiglu[0], gate_up, hidden)
        return hidden, gate_up

    def down_backward(self, d: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of SwiGLU's input, and hidden again."""
        if not self.tiles.down_apart:
            return products.project_down_backward.function(d, weight, gate_up)
        dhidden = torch.matmul(d, weight)
        dgate_up, hidden = _like(gate_up), _like(dhidden)
        launch_context(self.device).start(self._swiglu[1], gate_up, dhidden, dgate_up, hidden)
        return dgate_up, hidden

    # SREM

    def _srem(self, which: SremPass) -> srem.SremPlan:
        settings, step = self.settings, 6 * self.width
        backward = which == "backward"
        tiles = self.tiles.srem_backward if backward else self.tiles.srem
        return srem.plan_of(
            which, tiles, self.block.shape, self.strides, self.strides, step, self.block.dtype == torch.bfloat16,
            settings.grid, settings.order, backward and self.one_image,
        )  # fmt: skip

    @cached_property
    def _end(self) -> Launch:
        made = self._srem("forward").walk
        return placed(made, "x branch m weight bias y", "x", "branch", self._of(GATE2), "weight", "bias", "y")

    @cached_property
    def _end_backward(self) -> _Backward:
        made = self._srem("backward")
        dbranch, dgate = ("dx", "dx") if self.one_image else ("dbranch", "dgate")
        assert made.sums is not None
        walk = placed(
            made.walk, "x branch m weight dy dx sums dbranch",
            "x", "branch", self._of(GATE2), "weight", "dy", "dx", dbranch, "sums",
        )  # fmt: skip
        end = placed(made.sums, "sums dweight dbias dx dgate", "sums", "dweight", "dbias", dgate)
        return _Backward(walk, end, made.sums_shape)

    def end(self, x: Tensor, branch: Tensor, m: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The second half's gated residual and SREM."""
        y = _like(x)
        launch_context(self.device).start(self._end, x, branch, m, weight, bias, y)
        return y

    def end_backward(
        self, x: Tensor, branch: Tensor, m: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
    ) -> tuple[Any, ...]:
        """Gradients of x, branch, gate, weight and bias; of one image, the first is that of the gated sum."""
        walk, end, shape = self._end_backward
        dx, dweight, dbias = _like(x), _like(weight), _like(bias)
        dbranch, dgate = (None, None) if self.one_image else (_like(branch), self._part(m))
        sums = torch.empty(*shape, **self.fp32)
        launch = launch_context(self.device)
        launch.start(walk, x, branch, m, weight, dy, dx, sums, dx if dbranch is None else dbranch)
        with on_side_stream(sums, dweight, dbias, dgate):
            launch.start(end, sums, dweight, dbias, dx, dx if dgate is None else dgate)
        return dx, dbranch, dgate, dweight, dbias

    # Weights, gates and the modulation

    def gate(self, which: int, m: Tensor) -> Tensor:
        """A gate (B, D) of the modulation."""
        return m[:, which * self.width : (which + 1) * self.width]

    @cached_property
    def _cast(self) -> tuple[tuple[int, ...], Launch | None]:
        """Which of `Products` take a launch, and that."""
        D, R, inner = self.width, self.block.rank, self.block.inner
        sizes = (3 * D + R, D), (D // 2, R), (2 * inner, D), (D, D), (D, inner)
        gates = [self._of(GATE1), self._of(GATE2)] if self.one_image else []
        ungated = len(sizes) - len(gates)
        todo = tuple(i for i in range(len(sizes)) if i >= ungated or self.block.weights[i] != self.block.dtype)
        if not todo:
            return (), None
        shapes = tuple(torch.Size(sizes[i]) for i in todo)
        made = prepare_launch(self.tiles.weights.copy_for(None), shapes, len(todo) - len(gates), None)
        weights, copies = ([f"{kind}{i}" for i in todo] for kind in ("weight", "copy"))
        factors: list[str | Place] = [*weights[: len(todo) - len(gates)], *gates]
        return todo, placed(made, " ".join([*weights, "m", *copies]), *weights, *factors, *copies)

    def cast(self, w: BlockWeights, m: Tensor) -> Products:
        """The weights of the products in the tokens' dtype; of one image, gates folded in."""
        todo, made = self._cast
        if made is None:
            return w.products
        found = list(w.products)
        weights = [found[i] for i in todo]
        copies = [_like(weight, dtype=self.dtype) for weight in weights]
        launch_context(self.device).start(made, *weights, m, *copies)
        for i, copy in zip(todo, copies, strict=True):
            found[i] = copy
        return Products._make(found)

    @cached_property
    def _gated(self) -> dict[int, Launch]:
        made = {}
        for which, columns in ((GATE1, self.width), (GATE2, self.block.inner)):
            launch = gradient_launch(self.tiles.weights, torch.Size((self.width, columns)))
            gate, dgate = self._of(which), ("dm", which * self.width)
            made[which] = placed(
                launch, "product weight m dweight dm", "product", "weight", gate, "dweight", dgate
            )  # fmt: skip
        return made

    def gated(
        self, which: int, product: Tensor, weight: Tensor, m: Tensor, dm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and gate of ``gate ⊙ (weight x)`` of one image; the gate's is in dm."""
        dweight = _like(weight)
        assert dm is not None
        launch_context(self.device).start(self._gated[which], product, weight, m, dweight, dm)
        return dweight, None

    @cached_property
    def _adaln(self) -> tuple[Launch, Launch, tuple[int, int, int]]:
        B, _, D = self.shape
        made = launches_of(self.tiles.modulation, B, D, 6 * D)
        return made.weight.settled(), made.condition.settled(), (made.shares, B, D)

    def adaln_backward(
        self, dm: Tensor, c: Tensor, weight: Tensor, dweight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of c, weight and bias of the modulation; the weight's is written into dweight, if given."""
        if not takes(weight) or dm.dtype != weight.dtype:
            return adaln_backward(dm, c, weight, dweight)
        of_weight, of_condition, shape = self._adaln
        dweight = _like(weight) if dweight is None else dweight
        dbias = torch.empty(weight.shape[0], **self.fp32)
        partials = torch.empty(*shape, **self.fp32)
        launch = launch_context(self.device)
        launch.start(of_weight, dm, c, dweight, dbias)
        launch.start(of_condition, dm, weight, partials)
        dc = partials.sum(0)
        return dc if dc.dtype == c.dtype else dc.to(c.dtype), dweight, dbias

    def room(self, m: Tensor) -> Tensor | None:
        """Room for the gradient of one image's modulation, whose parts the operations then write there."""
        return _like(m) if self.one_image else None
