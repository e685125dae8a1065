"""The adaptive norms' launches on tokens of one shape, all that they are launched with found once.

See `dig.raster_plan`. Shift, scale and gate are parts of one modulation (B, N D) and are read where they lie.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.adaln.fused import backward_launches, forward_launch
from dig.ops.launch import Launch, launch_context
from dig.ops.placed import Place, placed
from dig.ops.side_stream import on_side_stream
from dig.ops.tiles.choices import NormTiles

_like = torch.empty_like


class _Backward(NamedTuple):
    """The launches of a backward pass, and the shape of the partial sums between them."""

    first: Launch
    second: Launch
    sums: tuple[int, ...]


class NormPlan:
    """`dig.ops.adaln.fused`'s passes of contiguous tensors of one shape, one dtype each, and one device.

    Args:
        tiles: The choices.
        shape: (B, T, D).
        device: Theirs.
        norm: ``rms`` or ``layer``.
        eps: As of the operations.
        columns: Of the modulation, N D.
        shift: The first column of shift.
        scale: Of scale.
        gate: Of the gate of a residual before the norm; None without.
    """

    def __init__(
        self,
        tiles: NormTiles,
        shape: torch.Size,
        device: torch.device,
        norm: str,
        eps: float,
        columns: int,
        *,
        shift: int,
        scale: int,
        gate: int | None = None,
    ) -> None:
        B, T, D = shape
        self._tiles, self._shape, self._device, self._norm, self._eps = tiles, shape, device, norm, eps
        self._columns, self._shift, self._scale, self._gate = columns, shift, scale, gate
        self._strides = (T * D, D, 1)
        self._weighs, self._one_image = norm == "rms", B == 1
        self._fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self._stats_shape = (1 if self._weighs else 2, B, T)

    # A pointer that a kernel does not touch can be anything.

    @cached_property
    def _forward(self) -> Launch:
        distance, residual = self._columns, self._gate is not None
        made = forward_launch(
            self._tiles, self._shape, self._strides, self._strides if residual else None, distance, distance, distance,
            self._norm, self._eps,
        )  # fmt: skip
        shift, scale = ("m", self._shift), ("m", self._scale)
        gate: Place = scale if self._gate is None else ("m", self._gate)
        branch, total = ("branch", "total") if residual else ("x", "x")
        weight = "weight" if self._weighs else scale
        return placed(
            made, "x m weight h stats branch total", "x", branch, gate, shift, scale, weight, total, "h", "stats"
        )

    def alone(self, x: Tensor, m: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Without a residual: h and the statistics of x."""
        h, stats = _like(x), torch.empty(*self._stats_shape, **self._fp32)
        launch_context(self._device).start(self._forward, x, m, m if weight is None else weight, h, stats)
        return h, stats

    def residual(self, x: Tensor, branch: Tensor, m: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gated sum of x and branch, h, and the statistics."""
        h, stats, total = _like(x), torch.empty(*self._stats_shape, **self._fp32), _like(x)
        weight = m if weight is None else weight
        launch_context(self._device).start(self._forward, x, m, weight, h, stats, branch, total)
        return total, h, stats

    @cached_property
    def _branches(self) -> bool:
        """Whether the backward pass goes back through the gate too; one image's is in the weight of the branch."""
        return self._gate is not None and not self._one_image

    @cached_property
    def _backward(self) -> _Backward:
        first, last, sums = backward_launches(
            self._tiles, self._shape, (self._strides,) * 4, (self._columns,) * 3, self._norm, True, self._branches, True
        )
        scale = ("m", self._scale)
        weight, dweight = ("weight", "dweight") if self._weighs else (scale, "dx")
        branch, dbranch, dgate = ("branch", "dbranch", "dgate") if self._branches else ("x", "dx", "dx")
        gate: Place = ("m", self._gate) if self._gate is not None and self._branches else scale
        # One image's have room in the gradient of the whole modulation.
        dshift, dscale = ("dshift", self._shift * self._one_image), ("dscale", self._scale * self._one_image)
        walk = placed(
            first, "x m weight stats d dh dx h sums branch dbranch",
            "x", branch, gate, ("m", self._shift), scale, weight, "stats", "d", "dh", "dx", dbranch, "h", "sums",
        )  # fmt: skip
        end = placed(
            last, "sums m weight dshift dscale dx dweight dgate", "sums", scale, weight, dshift, dscale, dgate, dweight
        )
        return _Backward(walk, end, sums)

    def alone_backward(
        self, x: Tensor, m: Tensor, weight: Tensor | None, stats: Tensor, d: Tensor, dh: Tensor, dm: Tensor | None
    ) -> tuple[Any, ...]:
        """Gradients of x, shift, scale and weight, and h again; arguments as of `residual_backward`."""
        dx, _, _, *others = self.residual_backward(x, None, m, weight, stats, d, dh, dm)
        return dx, *others

    def residual_backward(
        self,
        x: Tensor,
        branch: Tensor | None,
        m: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        d: Tensor,
        dh: Tensor,
        dm: Tensor | None,
    ) -> tuple[Any, ...]:
        """Gradients of x, branch, gate, shift, scale and weight, and h again; None for what is not asked for.

        Args:
            x: What was normed, (B, T, D).
            branch: (B, T, D); None without, and with one image.
            m: The modulation.
            weight: (D,), or None.
            stats: Of the forward pass.
            d: Gradient of x from elsewhere, (B, T, D).
            dh: Gradient of h, (B, T, D).
            dm: Of one image, takes the gradients of shift and scale where they lie in the modulation, which are None in
                the result.
        """
        made = self._backward
        dx, h = _like(x), _like(dh)
        dbranch = dgate = dweight = dshift = dscale = None
        if dm is None:
            dshift, dscale = self._part(m), self._part(m)
        if branch is not None:
            dbranch, dgate = _like(branch), self._part(m)
        if weight is not None:
            dweight = _like(weight)
        sums = torch.empty(*made.sums, **self._fp32)
        launch, given = launch_context(self._device), m if weight is None else weight
        launch.start(
            made.first, x, m, given, stats, d, dh, dx, h, sums, x if branch is None else branch,
            dx if dbranch is None else dbranch,
        )  # fmt: skip
        with on_side_stream(sums, m, weight, dshift, dscale, dm, dgate, dweight):
            launch.start(
                made.second, sums, m, given, dm if dshift is None else dshift, dm if dscale is None else dscale, dx,
                dx if dweight is None else dweight, dx if dgate is None else dgate,
            )  # fmt: skip
        return dx, dbranch, dgate, dshift, dscale, dweight, h

    def _part(self, m: Tensor) -> Tensor:
        """Room for the gradient (B, D) of a part of the modulation."""
        return torch.empty(self._shape[0], self._shape[2], dtype=m.dtype, device=self._device)
