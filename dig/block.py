"""A block of DiG (paper Alg. 1) and the modules that it is made of.

Every module here is called as one, or `dig.untouched` says that nobody would see the difference. So on this project's
kernels a block has two forms: fused from end to end (`dig.raster_block`) while all of its parts are what they were
built as, and else part by part, with the same kernels between the parts.

Shapes: B batch, T tokens, D width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dig.config import EPS, Convolution, DiGConfig
from dig.layers import adaln_linear, initialize_linears, modulate
from dig.ops.adaln import norm_modulate, residual_norm_modulate
from dig.ops.gla import gated_linear_attention
from dig.ops.gla.projection import GATE_NORMALIZER, GATE_RANK, projection_splits, split_projection
from dig.ops.srem import srem
from dig.ops.swiglu import swiglu
from dig.packages import require
from dig.scan import RASTER, Route, reorder
from dig.untouched import (
    fusible,
    parameter,
    untouched,
    untouched_adaln,
    untouched_convolution,
    untouched_layer_norm,
    untouched_linear,
)

if TYPE_CHECKING:
    from dig.raster_weights import Ahead, BlockWeights

GLA_GAIN = 2**-2.5
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""What this project's kernels compute in."""


def refused_dtype(dtype: torch.dtype) -> str:
    """Why a model on this project's kernels doesn't run in this dtype, and what to do."""
    return (
        f"backend 'triton' computes in fp32 and bf16, not in {str(dtype).removeprefix('torch.')}: take one of them "
        "(float16 overflows in the recurrence's states, sums over thousands of tokens), or backend 'reference'"
    )


@fusible
class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a weight, computed in fp32 (fp64 stays fp64)."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D) in fp32, as LayerNorm under autocast; in the weight's dtype where that is narrower."""
        x = x if x.dtype == torch.float64 else x.float()
        normed = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        # A model that was cast has GEMMs that take no other dtype, and no autocast around them.
        return normed.to(self.weight.dtype) if self.weight.dtype.itemsize == 2 else normed


@fusible
class GatedLinearAttention(nn.Module):
    """Gated linear attention with its projections (paper Eq. 4-10); the gate acts on the keys only, through rank 16.

    The five projections that read the input (q, k, v, the output gate and the first factor of the decay gate) are one
    matrix here; `dig.checkpoints` splits it into the published names.
    """

    def __init__(self, config: DiGConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.backend = config.backend
        self.splits = projection_splits(D)
        self.in_proj = nn.Linear(D, sum(self.splits), bias=False)
        self.decay_proj = nn.Linear(GATE_RANK, D // 2)
        self.norm_weight = nn.Parameter(torch.ones(D // config.heads))
        self.o_proj = nn.Linear(D, D, bias=False)

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-2.5, each projection by its own shape although they share a matrix."""
        initialize_linears(self, GLA_GAIN)
        for part in self.in_proj.weight.data.split(self.splits):
            nn.init.xavier_uniform_(part, GLA_GAIN)
        nn.init.ones_(self.norm_weight)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """Mix the tokens (B, T, D) along the block's scan; the result is in the order in which they came.

        Args:
            x: In ``route.source`` order.
            route: Of the block; None for tokens that are in scan order.
        """
        output: Tensor = self.o_proj(self.mix(self.in_proj(x), route))
        return output

    def mix(self, projected: Tensor, route: Route | None) -> Tensor:
        """Everything between the projections (Eq. 4-10): (B, T, 3D + R) to (B, T, D), both in source order."""
        if self.backend == "triton" and route is not None and route.source == RASTER and self._decays_in_the_kernel():
            from dig.ops.gla.mixer import gla_mixer

            return gla_mixer(
                projected.contiguous(),
                self.decay_proj.weight,
                self.decay_proj.bias,
                self.norm_weight.contiguous(),
                heads=self.heads,
                grid=route.grid,
                order=route.order,
                eps=EPS,
            )
        if route is None:
            return self._recur(projected)
        y = self._recur(reorder(projected, route.grid, route.source, route.order))
        return reorder(y, route.grid, route.order, route.source)

    def _decays_in_the_kernel(self) -> bool:
        """Whether a kernel may multiply with the decay gate's second factor: it then calls no module."""
        return untouched_linear(self.decay_proj, bias=True)

    def _recur(self, projected: Tensor) -> Tensor:
        """`mix` for tokens in scan order."""
        q, k, v, gate, low_rank = split_projection(projected.contiguous(), self.heads)
        logits = self.decay_proj(low_rank)
        if self.backend == "triton":
            from dig.ops.gla.tiled import gla_block

            logits = logits.to(torch.promote_types(logits.dtype, q.dtype)).unflatten(-1, (self.heads, -1))
            scale = q.shape[-1] ** -0.5
            y = gla_block(
                q,
                k,
                v,
                logits.contiguous(),
                gate,
                self.norm_weight.contiguous(),
                scale=scale,
                gate_normalizer=GATE_NORMALIZER,
                eps=EPS,
            )
            return y.flatten(2)
        # A bf16 gate would lose the decay: 1 - alpha is often below bf16's resolution next to 1.
        log_decay = F.logsigmoid(logits if logits.dtype == torch.float64 else logits.float()) / GATE_NORMALIZER
        log_decay = log_decay.unflatten(-1, (self.heads, -1))
        q = q * q.shape[-1] ** -0.5
        y = gated_linear_attention(q, k, v, log_decay, implementation=self.backend)
        return self._norm_gate(y, gate).flatten(2)

    def _norm_gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm over each head, times swish of the gate (Eq. 9, 10)."""
        if self.backend == "fla":
            fla = require("fla.modules.norm.fused_norm_gate", "backend='fla'")
            fused: Tensor = fla.rms_norm_gated(y, gate, self.norm_weight, None, "swish", eps=EPS)
            return fused
        wide = y if y.dtype == torch.float64 else y.float()
        return F.rms_norm(wide, self.norm_weight.shape, self.norm_weight, EPS).to(gate.dtype) * F.silu(gate)


@fusible
class SwiGLU(nn.Module):
    """The feed-forward half of a block: ``down(silu(gate(x)) · up(x))``, gate and up in one matrix, gate first."""

    def __init__(self, config: DiGConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)
        self.backend = config.backend

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        gate_up = self.gate_proj(x)
        if self.backend == "triton":
            hidden = swiglu(gate_up.contiguous(), implementation="triton")
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            if self.backend == "fla":
                hidden = require("fla.modules.activations", "backend='fla'").swiglu(gate, up)
            else:
                hidden = F.silu(gate) * up
        output: Tensor = self.down_proj(hidden)
        return output


@fusible
class DepthwiseConv(nn.Conv2d):
    """SREM's 3×3 depth-wise convolution (§3.3): starts as the identity, or as PyTorch starts any convolution."""

    def __init__(self, width: int, convolution: Convolution) -> None:
        self.convolution = convolution
        super().__init__(width, width, 3, padding=1, groups=width)

    def reset_parameters(self) -> None:
        """Initialise as configured; called by `nn.Conv2d` itself."""
        super().reset_parameters()
        if self.convolution == "identity-init":
            nn.init.dirac_(self.weight, groups=self.groups)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


@fusible
class DiGBlock(nn.Module):
    """One block (Alg. 1): GLA and FFN, each with adaptive norm and gated residual, then SREM.

    Attributes:
        recomputed: Whether `dig.model.DiG` keeps only the block's inputs and runs it again in the backward pass; None,
            or whether random states are kept for that.
    """

    def __init__(self, config: DiGConfig, *, has_skip: bool = False) -> None:
        super().__init__()
        D = config.width
        self.backend = config.backend
        self.variant = config.variant
        self.recomputed: bool | None = None
        self.norm1, self.norm2 = (
            RMSNorm(D) if config.variant == "paper" else nn.LayerNorm(D, elementwise_affine=False, eps=EPS)
            for _ in range(2)
        )
        self.attn = GatedLinearAttention(config)
        self.mlp = SwiGLU(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.dw_conv = None if config.convolution == "none" else DepthwiseConv(D, config.convolution)
        self.skip_linear = nn.Linear(2 * D, D) if has_skip else None

    def forward(
        self, x: Tensor, c: Tensor, route: Route, skip: Tensor | None = None, ahead: Ahead | None = None
    ) -> Tensor:
        """Run the block on tokens in ``route.source`` order and hand them on in ``route.target`` order.

        Args:
            x: (B, T, D).
            c: (B, D), the condition.
            route: The orders; on this project's kernels source and target are raster order.
            skip: (B, T, D) kept tokens, in the order that they are joined in, of a block that has a skip.
            ahead: What the model computed for the block already; with it, c is not read.
        """
        if self.skip_linear is not None:
            if skip is None:
                raise ValueError("the block has a skip_linear and needs the tokens of its skip")
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if self.backend == "triton":
            return self._run_on_kernels(x, c, route, ahead)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = reorder(x, route.grid, route.source, route.order)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return reorder(self._convolve(x, route), route.grid, route.order, route.target)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.nn.Module.compile`, where it gains anything: a block that is fused already is left as it is.

        Its passes are written out, so the compiler finds nothing to fuse between them; to be called through it costs
        the host as much as many launches, and the model could compute nothing ahead for the block.
        """
        if self.backend == "triton" and self.weights() is not None:
            return
        super().compile(*args, **kwargs)

    def _convolve(self, x: Tensor, route: Route) -> Tensor:
        """SREM's convolution of tokens in scan order: it sees the grid as the scan folds it, and replaces x."""
        if self.dw_conv is None:
            return x
        convolved: Tensor = self.dw_conv(x.transpose(1, 2).unflatten(2, route.order.grid(route.grid)))
        return convolved.flatten(2).transpose(1, 2)

    def _run_on_kernels(self, x: Tensor, c: Tensor, route: Route, ahead: Ahead | None) -> Tensor:
        from dig.ops.derivatives import refuse_transforms
        from dig.raster import compute_dtype
        from dig.raster_block import run_block
        from dig.raster_weights import settings_of

        refuse_transforms()
        given = x.dtype
        # The model hands on tokens in the dtype of the products; whoever calls a block may leave that to autocast.
        dtype = given if ahead is not None else compute_dtype(x)
        for used in (given, dtype):
            if used not in KERNEL_DTYPES:
                raise ValueError(refused_dtype(used))
        if x.dim() != 3 or x.shape[1] != route.grid[0] * route.grid[1] or c.shape != (len(x), x.shape[2]):
            raise ValueError(
                f"a block takes tokens (B, {route.grid[0] * route.grid[1]}, D) and a condition (B, D); got "
                f"{tuple(x.shape)} and {tuple(c.shape)}"
            )
        # Asked for first, where it changes nothing: each call of PyTorch's takes the host as long as a launch.
        x = reorder(x if given == dtype else x.to(dtype), route.grid, route.source, RASTER).contiguous()
        weights = self.weights() if ahead is None else ahead.weights
        if weights is None:
            x = self._run_part_by_part(x, c, Route(grid=route.grid, source=RASTER, order=route.order, target=RASTER))
        else:
            norm = "rms" if self.variant == "paper" else "layer"
            settings = settings_of(norm, self.attn.heads, route.grid, route.order)
            x = run_block(x, c, weights, settings, ahead)
        x = reorder(x, route.grid, RASTER, route.target)
        return x if given == dtype else x.to(given)

    def weights(self) -> BlockWeights | None:
        """Its parameters, for whoever computes what it does without calling its parts; None if that skips anything.

        The skip's are not among them: its layer is always called. Nor is the block itself asked about.
        """
        from dig.raster_weights import BlockWeights

        # Looked up where a module keeps them, once each: by attribute it takes several times as long, in every step.
        own: Any = self._modules
        attn, mlp, conv, norm1, norm2 = own["attn"], own["mlp"], self.dw_conv, own["norm1"], own["norm2"]
        in_attn, in_mlp = attn._modules, mlp._modules
        plain = (
            untouched(attn, GatedLinearAttention)
            and untouched_linear(in_proj := in_attn["in_proj"], bias=False)
            and untouched_linear(decay_proj := in_attn["decay_proj"], bias=True)
            and untouched_linear(o_proj := in_attn["o_proj"], bias=False)
            and untouched(mlp, SwiGLU)
            and untouched_linear(gate_proj := in_mlp["gate_proj"], bias=False)
            and untouched_linear(down_proj := in_mlp["down_proj"], bias=False)
            and untouched_adaln(own["adaLN_modulation"])
            and self._norm_is_plain(norm1)
            and self._norm_is_plain(norm2)
            and (conv is None or untouched_convolution(conv, DepthwiseConv))
        )
        if not plain:
            return None
        rms, modulation = self.variant == "paper", adaln_linear(own["adaLN_modulation"])
        return BlockWeights(
            in_proj=parameter(in_proj, "weight"),
            decay_weight=parameter(decay_proj, "weight"),
            gate_proj=parameter(gate_proj, "weight"),
            o_proj=parameter(o_proj, "weight"),
            down_proj=parameter(down_proj, "weight"),
            decay_bias=parameter(decay_proj, "bias"),
            head_norm=parameter(attn, "norm_weight"),
            norm1=parameter(norm1, "weight") if rms else None,
            norm2=parameter(norm2, "weight") if rms else None,
            conv_weight=None if conv is None else parameter(conv, "weight"),
            conv_bias=None if conv is None else parameter(conv, "bias"),
            adaln_weight=parameter(modulation, "weight"),
            adaln_bias=parameter(modulation, "bias"),
        )

    def _norm_is_plain(self, norm: nn.Module) -> bool:
        if self.variant == "paper":
            return untouched(norm, RMSNorm) and norm.eps == EPS
        return untouched_layer_norm(norm, EPS)

    def _run_part_by_part(self, x: Tensor, c: Tensor, route: Route) -> Tensor:
        """The block in raster order with every part called that somebody has changed, and kernels between the parts."""
        kind = "rms" if self.variant == "paper" else "layer"
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c).contiguous().chunk(6, dim=1)
        if self._norm_is_plain(self.norm1):
            h = norm_modulate(
                x, shift1, scale1, self.norm1.weight, norm=kind, eps=EPS, dtype=x.dtype, implementation="triton"
            )
        else:
            h = modulate(self.norm1(x), shift1, scale1).to(x.dtype).contiguous()
        branch = self.attn(h, route).to(x.dtype).contiguous()
        if self._norm_is_plain(self.norm2):
            x, h = residual_norm_modulate(
                x, branch, gate1, shift2, scale2, self.norm2.weight,
                norm=kind, eps=EPS, dtype=x.dtype, implementation="triton",
            )  # fmt: skip
        else:
            x = torch.addcmul(x, gate1.unsqueeze(1).to(x.dtype), branch)
            h = modulate(self.norm2(x), shift2, scale2).to(x.dtype).contiguous()
        branch = self.mlp(h).to(x.dtype).contiguous()
        conv = self.dw_conv
        if conv is not None and untouched_convolution(conv, DepthwiseConv) and conv.bias is not None:
            return srem(
                x, branch, gate2, conv.weight, conv.bias,
                grid=route.grid, order=route.order, implementation="triton",
            )  # fmt: skip
        x = torch.addcmul(x, gate2.unsqueeze(1).to(x.dtype), branch)
        x = self._convolve(reorder(x, route.grid, RASTER, route.order), route)
        return reorder(x, route.grid, route.order, RASTER).contiguous()

    def _modulation(self, c: Tensor) -> Tensor:
        if untouched_adaln(self.adaLN_modulation):
            from dig.raster_weights import adaln

            linear = adaln_linear(self.adaLN_modulation)
            return adaln(F.silu(c), linear.weight, linear.bias)
        output: Tensor = self.adaLN_modulation(c)
        return output
