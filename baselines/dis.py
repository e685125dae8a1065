"""DiS (arXiv 2402.05608): diffusion on bidirectional Mamba blocks with long skips.

Parameter names are the published ones, so that its checkpoints load as they are.

Shapes: B batch, T tokens (two more than patches: label and time), D width, E = 2D inner width, N state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.selective_scan import IMPLEMENTATIONS, DirectionWeights, both_directions
from dig.layers import Backbone, FinalLayer, LabelEmbedder, PatchEmbed, timestep_embedding, unpatchify
from dig.packages import require

Backend = Literal["reference", "mamba-ssm"]

STATE = 16
CONVOLUTION = 4
EPS = 1e-5
EXTRA_TOKENS = 2
"""The label token, then the time token, before the patches."""

SIZES = {"S": (24, 368), "B": (24, 768), "M": (48, 768), "L": (48, 1024), "XL": (48, 1152), "H": (48, 1536)}
"""Size → (depth, width). All published but XL: the DiG paper measures a "DiS-XL/2", of which 1152×48 is an assumption
that fits its figure.
"""


@dataclass(frozen=True, kw_only=True)
class DiSConfig:
    """Everything that defines a DiS.

    Attributes:
        input_size: (height, width) of the latent, or of the image in pixel space.
        in_channels: Channels of the input.
        num_classes: Labels.
        patch_size: Side P of a patch.
        depth: The model has 2·(depth // 2) + 1 blocks.
        width: D.
        backend: ``reference`` (a scan in PyTorch) or ``mamba-ssm`` (its fused, recomputing kernels and fused add-norm).
        label_dropout: Share of the labels replaced by the null label in training.
        drop_path: Stochastic depth of the last block; it grows linearly from 0.
    """

    input_size: tuple[int, int]
    in_channels: int = 4
    num_classes: int = 1000
    patch_size: int = 2
    depth: int
    width: int
    backend: Backend = "reference"
    label_dropout: float = 0.1
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no DiS can have."""
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {self.backend!r}")
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2; got {self.depth}")


class BidirectionalMamba(nn.Module):
    """The "v2" mixer: both directions share the input and output projections and have their own everything else."""

    def __init__(self, config: DiSConfig) -> None:
        super().__init__()
        D, E = config.width, 2 * config.width
        rank = math.ceil(D / 16)
        self.direction = IMPLEMENTATIONS[config.backend]
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.out_proj = nn.Linear(E, D, bias=False)
        for suffix in ("", "_b"):
            setattr(self, f"conv1d{suffix}", nn.Conv1d(E, E, CONVOLUTION, groups=E, padding=CONVOLUTION - 1))
            setattr(self, f"x_proj{suffix}", nn.Linear(E, rank + 2 * STATE, bias=False))
            setattr(self, f"dt_proj{suffix}", nn.Linear(rank, E))
            a_log = torch.arange(1, STATE + 1, dtype=torch.float32).log().repeat(E, 1)
            setattr(self, "A_b_log" if suffix else "A_log", nn.Parameter(a_log))
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(E)))

    def reset_parameters(self, depth: int) -> None:
        """Mamba's initialisation: step sizes log-uniform in [0.001, 0.1], the output scaled by 1/sqrt(depth)."""
        for suffix in ("", "_b"):
            projection = getattr(self, f"dt_proj{suffix}")
            bound = projection.in_features**-0.5
            nn.init.uniform_(projection.weight, -bound, bound)
            low, high = math.log(0.001), math.log(0.1)
            dt = torch.exp(low + (high - low) * torch.rand_like(projection.bias)).clamp(min=1e-4)
            projection.bias.data = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.data /= math.sqrt(depth)

    def weights(self, suffix: str) -> DirectionWeights:
        """The forward direction's parameters (suffix ""), or the backward one's ("_b")."""
        conv = getattr(self, f"conv1d{suffix}")
        dt_proj = getattr(self, f"dt_proj{suffix}")
        a_log: Tensor = getattr(self, "A_b_log" if suffix else "A_log")
        return DirectionWeights(
            conv_weight=conv.weight,
            conv_bias=conv.bias,
            x_proj=getattr(self, f"x_proj{suffix}").weight,
            dt_proj=dt_proj.weight,
            dt_bias=dt_proj.bias,
            A=-torch.exp(a_log if a_log.dtype == torch.float64 else a_log.float()),
            D=getattr(self, f"D{suffix}"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        # One product into (B, 2E, T), the layout that the scan reads, with no transposition after it.
        xz = torch.matmul(self.in_proj.weight, x.transpose(1, 2))
        return both_directions(self.direction, xz, self.weights(""), self.weights("_b"), self.out_proj.weight)


class AddNorm(nn.Module):
    """Adds to the fp32 residual stream and normalises the sum (RMSNorm); fused on mamba-ssm's kernel where asked."""

    def __init__(self, width: int, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.fused = backend == "mamba-ssm"

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the residual stream, or None before the first block, to (normalised sum, sum)."""
        if self.fused:
            kernels = require("mamba_ssm.ops.triton.layer_norm", "backend='mamba-ssm'")
            normalised, total = kernels.rms_norm_fn(
                x, self.weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=EPS
            )
            return normalised, total
        wide = x if x.dtype == torch.float64 else x.float()
        total = wide if residual is None else residual + wide
        return F.rms_norm(total, self.weight.shape, self.weight, EPS).to(x.dtype), total


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a sample's branch with a probability and scales the others up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def work_state(self) -> bool:
        """What decides on its work (`dig.flops`): how often it drops a branch does not."""
        return self.training and self.probability > 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to (B, …)."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class DiSBlock(nn.Module):
    """Optional long skip, add-and-norm, bidirectional Mamba."""

    def __init__(self, config: DiSConfig, *, drop_path: float, skip: bool) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba(config)
        self.norm = AddNorm(config.width, config.backend)
        self.drop_path = DropPath(drop_path)
        self.skip_linear = nn.Linear(2 * config.width, config.width) if skip else None

    def forward(self, x: Tensor, residual: Tensor | None, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixer output and residual stream, both (B, T, D), to the same after this block."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x, residual = self.norm(x if residual is None else self.drop_path(x), residual)
        return self.mixer(x), residual


class DiS(Backbone):
    """Diffusion state-space model; see `DiSConfig` and `Backbone.forward`."""

    def __init__(self, config: DiSConfig) -> None:
        super().__init__(
            input_size=config.input_size,
            in_channels=config.in_channels,
            patch_size=config.patch_size,
            num_classes=config.num_classes,
        )
        if config.backend == "mamba-ssm":
            require("mamba_ssm", "backend='mamba-ssm'")
            require("causal_conv1d", "backend='mamba-ssm'")
        self.config = config
        D, half = config.width, config.depth // 2
        self.patch_embed = PatchEmbed(config.in_channels, D, config.patch_size)
        self.time_embed = nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
        self.label_emb = LabelEmbedder(config.num_classes, D, config.label_dropout)
        rows, columns = self.grid
        self.pos_embed = nn.Parameter(torch.zeros(1, EXTRA_TOKENS + rows * columns, D))
        rates = [0.0, *(config.drop_path * i / (config.depth - 1) for i in range(config.depth))]
        self.in_blocks = nn.ModuleList(DiSBlock(config, drop_path=rates[i], skip=False) for i in range(half))
        self.mid_block = DiSBlock(config, drop_path=rates[half], skip=False)
        self.out_blocks = nn.ModuleList(DiSBlock(config, drop_path=rates[half + 1 + i], skip=True) for i in range(half))
        self.drop_path = DropPath(config.drop_path)
        self.norm_f = AddNorm(D, config.backend)
        self.final_layer = FinalLayer(D, config.patch_size, 2 * config.in_channels)
        self.implementations = {"mixer": config.backend, "add_norm": config.backend}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: PyTorch's linear layers with zero biases, Mamba's own inside the mixers."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_emb.embedding_table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, BidirectionalMamba):
                module.reset_parameters(self.config.depth)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and covariance: see `Backbone.forward`."""
        self.check_input(x)
        time = self.time_embed(timestep_embedding(t, self.config.width).to(self.pos_embed.dtype))
        label = self.label_emb(y)
        x = torch.cat([label.unsqueeze(1), time.unsqueeze(1), self.patch_embed(x)], dim=1) + self.pos_embed
        residual: Tensor | None = None
        skips = []
        for block in self.in_blocks:
            x, residual = block(x, residual)
            skips.append(x)
        x, residual = self.mid_block(x, residual)
        for block in self.out_blocks:
            x, residual = block(x, residual, skips.pop())
        x, _ = self.norm_f(self.drop_path(x), residual)
        x = self.final_layer(x[:, EXTRA_TOKENS:], time + label)
        return unpatchify(x, self.grid, self.patch_size)
