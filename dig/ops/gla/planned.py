"""The mixer's launches on tokens of one shape, all that they are launched with found once; see `dig.raster_plan`.

Shapes: B batch, T tokens, D width, H heads, K key width, V value width, N chunks, R rank of the decay gate.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.gla.block_launches import output_backward_launch, output_launch, walk_launch
from dig.ops.gla.launches import (
    Plan,
    column_launch,
    empty_segments,
    gradient_launch,
    local_launch,
    plan_of,
    scan_launch,
    segment_launch,
)
from dig.ops.gla.mixer import Projection, projection_of
from dig.ops.gla.projection import GATE_NORMALIZER
from dig.ops.launch import Launch, launch_context
from dig.ops.linear import weight_gradient, without_autocast
from dig.ops.placed import moved, placed, whole
from dig.ops.side_stream import on_side_stream

_ROWS = "projected decay_weight decay_bias"
_KEPT = f"{_ROWS} gradient dlogits norm dy sums states own scratch partials y"
"""What the kernels of the backward pass are given: inputs, outputs, and what is between them."""
_like = torch.empty_like


class _Backward(NamedTuple):
    """The launches of a backward pass in order, and the sizes of what is between them."""

    output: Launch
    scan: Launch | None
    gradients: Launch
    norm: Launch
    bias: Launch
    scratch: int
    """Elements, in the inputs' dtype: the gradients of the recurrence's output and, after it, of the states."""
    partials: int
    """Elements in fp32: partial sums of the norm's weight and, after them, of the decay gate's bias."""


class MixerPlan:
    """`dig.ops.gla.mixer`'s three passes, of contiguous tensors of one shape, one dtype each, and one device."""

    def __init__(self, projection: Projection, plan: Plan, columns: int, eps: float) -> None:
        self.projection, self.plan, self.columns, self.eps = projection, plan, columns, eps
        outline = projection.q
        self.device = outline.device
        self.own: dict[str, Any] = {"dtype": outline.dtype, "device": outline.device}
        self.fp32: dict[str, Any] = {"dtype": torch.float32, "device": outline.device}
        self.low_shape, self.low_strides = (plan.B * plan.T, columns - projection.low), (columns, 1)

    @cached_property
    def _forward(self) -> tuple[Launch, ...]:
        plan, layout, dtype = self.plan, self.projection.layout, self.projection.q.dtype
        if plan.walks:
            return (walk_launch(plan, layout, self.eps, True).settled(),)
        if plan.segments:
            return (
                segment_launch(plan, layout).settled(),
                scan_launch(plan, dtype, 1, 0, segments=True).settled(),
                walk_launch(plan, layout, self.eps, True).settled(),
            )
        return (
            local_launch(plan, layout, None, False).settled(),
            scan_launch(plan, dtype, 1, 0).settled(),
            output_launch(plan, layout, self.eps).settled(),
        )

    def forward(
        self, projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, norm_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The result (B, T, D), and the states before each chunk (1, B, H, N, K, V)."""
        plan = self.plan
        out = torch.empty(plan.B, plan.T, self.projection.width, **self.own)
        states = torch.empty(1, *plan.state_shape, **self.own)
        rows, launch = (projected, decay_weight, decay_bias), launch_context(self.device)
        if plan.walks:
            launch.start(*self._forward, *rows, norm_weight, states, states, out)
            return out, states
        local, scan, output = self._forward
        if plan.segments:
            starts, decays = empty_segments(plan, projected)
            launch.start(local, *rows, decays, starts)
            launch.start(scan, starts, decays)
            launch.start(output, *rows, norm_weight, states, starts, out)
            return out, states
        sums = torch.empty(*plan.sums_shape, **self.fp32)
        launch.start(local, *rows, sums, states)
        launch.start(scan, states, sums)
        launch.start(output, *rows, norm_weight, sums, states, out)
        return out, states

    @cached_property
    def _sums(self) -> Launch:
        return local_launch(self.plan, self.projection.layout, None, True).settled()

    def sums(self, projected: Tensor, decay_weight: Tensor, decay_bias: Tensor) -> Tensor:
        """The sums of the decays, which the backward pass begins with."""
        sums = torch.empty(*self.plan.sums_shape, **self.fp32)
        launch_context(self.device).start(self._sums, projected, decay_weight, decay_bias, sums)
        return sums

    @cached_property
    def _backward(self) -> _Backward:
        plan, p, dtype = self.plan, self.projection, self.projection.q.dtype
        H, K, V = plan.H, plan.constants["K"], plan.constants["V"]
        # Of tensors that live equally long and have one dtype, one is made.
        states_first = whole(plan.B * plan.T * H * V)
        bias_first = whole(plan.B * plan.N * H * V)
        states = ("scratch", states_first)
        scanned = not plan.scans_in_gradients
        strides = (plan.T * H * V, H * V, V)
        output = moved(
            output_backward_launch(plan, p.layout, p.slots, strides, self.eps, True), _KEPT,
            *_ROWS.split(), "gradient", "dlogits", "norm", "dy", "sums", "states", states, "own", "scratch", "partials",
            "y",
        )  # fmt: skip
        gradients = moved(
            gradient_launch(plan, p.layout, p.slots, strides, scanned), _KEPT,
            *_ROWS.split(), "gradient", "dlogits", "scratch", "sums", "states", states, "own", ("partials", bias_first),
        )  # fmt: skip
        scan = placed(scan_launch(plan, dtype, 1, 1), "scratch sums", states, "sums") if scanned else None
        rows = plan.B * plan.N
        norm = placed(column_launch(plan.tiles, rows * H, V), "partials dnorm", "partials", "dnorm")
        bias = placed(
            column_launch(plan.tiles, rows, H * K), "partials dbias", ("partials", bias_first), "dbias"
        )  # fmt: skip
        elements = plan.B * plan.N * H * K * V
        return _Backward(
            output, scan, gradients, norm, bias, states_first + elements, bias_first + plan.B * plan.N * H * K
        )

    def backward(
        self,
        projected: Tensor,
        decay_weight: Tensor,
        decay_bias: Tensor,
        norm_weight: Tensor,
        states: Tensor,
        sums: Tensor,
        dy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the four tensors, decay_weight's in fp32; and the result again."""
        gradient = _like(projected)
        dlogits = torch.empty(self.low_shape[0], decay_weight.shape[0], **self.own)
        y = _like(dy)
        dnorm, dbias = self._launch(
            (projected, decay_weight, decay_bias, gradient, dlogits, norm_weight, dy, sums, states), y
        )
        factor = decay_weight if decay_weight.dtype == dlogits.dtype else decay_weight.to(dlogits.dtype)
        with without_autocast(self.device):
            torch.mm(dlogits, factor, out=self._low(gradient))
            with on_side_stream(dlogits, projected):
                dweight = weight_gradient(dlogits, self._low(projected))
        return gradient, dweight, dbias, dnorm, y

    def _launch(self, tensors: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor]:
        """All but the products. Gradients of the norm's weight and the decay gate's bias."""
        plan, made = self.plan, self._backward
        scratch = torch.empty(made.scratch, **self.own)
        partials = torch.empty(made.partials, **self.fp32)
        own = torch.empty(plan.B, plan.T, plan.H, **self.fp32)
        launch, sums = launch_context(self.device), tensors[7]
        launch.start(made.output, *tensors, own, scratch, partials, y)
        if made.scan is not None:
            launch.start(made.scan, scratch, sums)
        launch.start(made.gradients, *tensors, own, scratch, partials, y)
        with on_side_stream(partials):
            dnorm, dbias = _like(tensors[5]), _like(tensors[2])
            launch.start(made.norm, partials, dnorm)
            launch.start(made.bias, partials, dbias)
        return dnorm, dbias

    def _low(self, rows: Tensor) -> Tensor:
        """The columns (B T, R) of the decay gate's factor."""
        return rows.as_strided(self.low_shape, self.low_strides, rows.storage_offset() + self.projection.low)


def mixer_plan(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    rank: int,
    grid: tuple[int, int],
    order: int,
    eps: float,
) -> MixerPlan:
    """Of tokens (B, T, D); other arguments as of `dig.ops.gla.mixer.mixer_forward`."""
    B, T, D = shape
    columns = 3 * D + rank
    p = projection_of(torch.Size((B, T, columns)), (T * columns, columns, 1), dtype, device, heads, rank)
    plan = plan_of(p.q, p.v, p.q.shape[-1] ** -0.5, GATE_NORMALIZER, grid, order)
    return MixerPlan(p, plan, columns, eps)
