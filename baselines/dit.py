"""DiT (arXiv 2212.09748), and Flash-DiT: the same model on a fused attention kernel.

Parameter names are Meta's, so that published checkpoints load as they are.

Shapes: B batch, T tokens, D width, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.attention import Backend, attend, require_backend, split_heads
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

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Size → (depth, width, heads), DiT's Tab. 1."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Everything that defines a DiT.

    Attributes:
        input_size: (height, width) of the latent, or of the image in pixel space.
        in_channels: Channels of the input.
        num_classes: Labels.
        patch_size: Side P of a patch.
        depth: Blocks.
        width: D.
        heads: H.
        backend: ``materialized`` forms the T×T matrix, as the paper's DiT; ``sdpa-flash`` and ``sdpa-cudnn`` are
            PyTorch's kernels; ``flash-attn``, ``flash-attn-3`` and ``flash-attn-4`` the packages' of these names,
            ``flash-attn-4-padded`` the last with heads padded to 96. Each runs or raises: nothing falls back.
        label_dropout: Share of the labels replaced by the null label in training.
    """

    input_size: tuple[int, int]
    in_channels: int = 4
    num_classes: int = 1000
    patch_size: int = 2
    depth: int
    width: int
    heads: int
    backend: Backend = "materialized"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no DiT can have."""
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {self.backend!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of the heads; got {self.width} and {self.heads}")


class SelfAttention(nn.Module):
    """Multi-head softmax attention over all tokens, by the kernel that the configuration names."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.backend = config.backend
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        output: Tensor = self.proj(attend(self.backend, q, k, v).flatten(2))
        return output


class MLP(nn.Module):
    """DiT's feed-forward half: four times the width, tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        output: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return output


class DiTBlock(nn.Module):
    """One block with adaLN-Zero conditioning."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, T, D) tokens and (B, D) condition to (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(Backbone):
    """Diffusion transformer; Flash-DiT is this with a fused attention. See `DiTConfig` and `Backbone.forward`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(
            input_size=config.input_size,
            in_channels=config.in_channels,
            patch_size=config.patch_size,
            num_classes=config.num_classes,
        )
        require_backend(config.backend)
        self.config = config
        D = config.width
        self.x_embedder = PatchEmbed(config.in_channels, D, config.patch_size)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D, config.label_dropout)
        self.register_buffer("pos_embed", sincos_position_embedding(D, self.grid))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(D, config.patch_size, 2 * config.in_channels)
        self.implementations = {"attention": config.backend}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Meta's initialisation."""
        initialize_linears(self)
        initialize_adaln_zero(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and covariance: see `Backbone.forward`."""
        self.check_input(x)
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.grid, self.patch_size)
