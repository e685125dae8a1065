"""DiG, the diffusion backbone with gated linear attention (paper §3).

Shapes: B batch, T tokens, D width, H heads, K and V key and value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dig.layers import (
    Backbone,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    initialize_adaln_zero,
    initialize_linears,
    modulate,
    sincos_position_embedding,
    unpatchify,
)
from dig.ops.gla import gated_linear_attention
from dig.ops.gla.projection import GATE_NORMALIZER, GATE_RANK, projection_splits, split_projection
from dig.packages import require
from dig.scan import RASTER, Scan, ScanOrder, reorder, scan_orders

Variant = Literal["paper", "release"]
Convolution = Literal["none", "default-init", "identity-init"]
Backend = Literal["reference", "fla", "triton"]

EPS = 1e-6
GLA_GAIN = 2**-2.5

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Size → (depth N, width D, heads), Tab. 1 of the paper."""
RELEASE_XL_HEADS = 18
"""The authors' code gives XL 18 heads (K 32, V 64) where Tab. 1 says 16 (K 36, V 72)."""


@dataclass(frozen=True, kw_only=True)
class DiGConfig:
    """Everything that defines a DiG.

    Attributes:
        input_size: (height, width) of the latent, or of the image in pixel space.
        in_channels: Channels of the input; 4 for the latents of the Stable Diffusion VAE.
        num_classes: Labels.
        patch_size: Side P of a patch.
        depth: Blocks N.
        width: D.
        heads: H; keys have D/2/H values a head, values D/H.
        variant: ``paper`` (RMSNorm with weight before each half of a block) or ``release`` (LayerNorm without).
        scan: Orders of the blocks; every one but ``crisscross`` is an ablation of Tab. 2.
        convolution: SREM's 3×3 convolution: none, PyTorch's default initialisation, or the identity (Tab. 2).
        backend: Which implementation runs the linear attention. ``fla`` also takes fla's fused norm·gate and
            SwiGLU, which is what the published model runs on. ``triton`` is this project's kernels, for everything
            between the matrix products (`dig.raster`).
        label_dropout: Share of the labels replaced by the null label in training.
    """

    input_size: tuple[int, int]
    in_channels: int = 4
    num_classes: int = 1000
    patch_size: int = 2
    depth: int
    width: int
    heads: int
    variant: Variant = "paper"
    scan: Scan = "crisscross"
    convolution: Convolution = "identity-init"
    backend: Backend = "reference"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no DiG can have."""
        for name, kind in (
            ("variant", Variant),
            ("scan", Scan),
            ("convolution", Convolution),
            ("backend", Backend),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1; got {self.depth}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads; got {self.width} and {self.heads}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1); got {self.label_dropout}")

    @property
    def ffn_width(self) -> int:
        """Inner width of SwiGLU: 8D/3, rounded up to a multiple of 256."""
        return -(-8 * self.width // (3 * 256)) * 256


def heads_of(size: str, variant: Variant) -> int:
    """Heads of a published size, which differ between the variants at XL."""
    return RELEASE_XL_HEADS if size == "XL" and variant == "release" else SIZES[size][2]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a weight, computed in fp32 (fp64 stays fp64)."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D) in fp32, as LayerNorm under autocast."""
        x = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) in the block's scan order to (B, T, D)."""
        q, k, v, gate, low_rank = split_projection(self.in_proj(x), self.heads)
        logits = self.decay_proj(low_rank)
        # A bf16 gate would lose the decay: 1 - alpha is often below bf16's resolution next to 1.
        log_decay = F.logsigmoid(logits if logits.dtype == torch.float64 else logits.float()) / GATE_NORMALIZER
        log_decay = log_decay.unflatten(-1, (self.heads, -1))
        q = q * q.shape[-1] ** -0.5
        y = gated_linear_attention(q, k, v, log_decay, implementation=self.backend)
        output: Tensor = self.o_proj(self._norm_gate(y, gate).flatten(2))
        return output

    def _norm_gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm over each head, times swish of the gate (Eq. 9, 10)."""
        if self.backend == "fla":
            fla = require("fla.modules.norm.fused_norm_gate", "backend='fla'")
            fused: Tensor = fla.rms_norm_gated(y, gate, self.norm_weight, None, "swish", eps=EPS)
            return fused
        wide = y if y.dtype == torch.float64 else y.float()
        return F.rms_norm(wide, self.norm_weight.shape, self.norm_weight, EPS).to(gate.dtype) * F.silu(gate)


class SwiGLU(nn.Module):
    """The feed-forward half of a block: ``down(silu(gate(x)) · up(x))``, gate and up in one matrix, gate first."""

    def __init__(self, config: DiGConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)
        self.fused = config.backend == "fla"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        gate, up = self.gate_proj(x).chunk(2, dim=-1)
        if self.fused:
            hidden = require("fla.modules.activations", "backend='fla'").swiglu(gate, up)
        else:
            hidden = F.silu(gate) * up
        output: Tensor = self.down_proj(hidden)
        return output


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


class DiGBlock(nn.Module):
    """One block (Alg. 1): GLA and FFN, each with adaptive norm and gated residual, then SREM."""

    def __init__(self, config: DiGConfig) -> None:
        super().__init__()
        D = config.width
        self.variant = config.variant
        self.norm1, self.norm2 = (
            RMSNorm(D) if config.variant == "paper" else nn.LayerNorm(D, elementwise_affine=False, eps=EPS)
            for _ in range(2)
        )
        self.attn = GatedLinearAttention(config)
        self.mlp = SwiGLU(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.dw_conv = None if config.convolution == "none" else DepthwiseConv(D, config.convolution)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int], source: ScanOrder, target: ScanOrder) -> Tensor:
        """Run the block on tokens in ``source`` order and hand them on in ``target`` order.

        Args:
            x: (B, T, D).
            c: (B, D), the condition.
            grid: (rows, columns) of the image's tokens.
            source: Order of x.
            target: Order of the result.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        if self.dw_conv is not None:
            # The convolution sees the grid in the block's own scan order, as the authors' code does; it replaces x.
            x = self.dw_conv(x.transpose(1, 2).unflatten(2, source.grid(grid))).flatten(2).transpose(1, 2)
        return reorder(x, grid, source, target)


class DiG(Backbone):
    """Diffusion GLA model: patches, N blocks, output head; see `DiGConfig` and `Backbone.forward`."""

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
        self.blocks = nn.ModuleList(DiGBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, config.patch_size, 2 * config.in_channels)
        self.orders = scan_orders(config.depth, config.scan)
        in_raster_order = "triton" if config.backend == "triton" else "reference"
        self.implementations = {
            "recurrence": config.backend,
            "norm_gate": config.backend,
            "swiglu": config.backend,
            "srem": in_raster_order,
            "adaln": in_raster_order,
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: adaLN and output layers zero, GLA small."""
        initialize_linears(self)
        initialize_adaln_zero(self)
        for module in self.modules():
            if isinstance(module, GatedLinearAttention):
                module.reset_parameters()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and covariance: see `Backbone.forward`."""
        self.check_input(x)
        if self.config.backend == "triton":
            from dig.raster import run_model

            return unpatchify(run_model(self, x, t, y), self.grid, self.patch_size)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        # The last block hands its tokens over in raster order, whatever the depth and the shape of the grid.
        for block, source, target in zip(self.blocks, self.orders, [*self.orders[1:], RASTER], strict=True):
            x = block(x, c, self.grid, source, target)
        return unpatchify(self.final_layer(x, c), self.grid, self.patch_size)
