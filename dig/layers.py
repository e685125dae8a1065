"""What every backbone here is made of: embeddings, patches, adaptive layer norm, the output head, guidance.

Parameter names follow the published DiT code, so that its checkpoints load as they are.

Shapes: B batch, C input channels, P patch side, T tokens, D width; a grid is (rows, columns) of tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dig.untouched import fusible

CfgChannels = Literal["three", "all"]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part, ``x (1 + scale) + shift``: x (B, T, D), shift and scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of diffusion timesteps: t (B,), whole or fractional, to (B, width), cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float().unsqueeze(1) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, width % 2))


def sincos_position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D sine-cosine embedding of ViT and DiT, (1, T, D) in raster order, computed in fp64.

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for a 2-D sine-cosine embedding; got {width}")
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))

    def axis(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1) * omega
        return torch.cat([angles.sin(), angles.cos()], 1)

    rows, columns = grid
    column = axis(columns).unsqueeze(0).expand(rows, -1, -1)
    row = axis(rows).unsqueeze(1).expand(-1, columns, -1)
    return torch.cat([column, row], 2).reshape(1, rows * columns, width).float()


@fusible
class TimestepEmbedder(nn.Module):
    """Timestep to vector: sinusoids, then a two-layer MLP (paper Eq. 17)."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) timesteps to (B, D)."""
        embedding = timestep_embedding(t, self.frequencies)
        output: Tensor = self.mlp(embedding.to(dtype=next(self.mlp.parameters()).dtype))
        return output


@fusible
class LabelEmbedder(nn.Module):
    """Class label to vector. One row more than classes: the null label, for classifier-free guidance.

    In training, each label is replaced by the null label with probability ``dropout``.
    """

    def __init__(self, num_classes: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) int64 labels, the null label being ``num_classes``, to (B, D)."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout
            y = torch.where(dropped, self.num_classes, y)
        output: Tensor = self.embedding_table(y)
        return output


@fusible
class PatchEmbed(nn.Module):
    """Non-overlapping P×P patches, each projected to the width (paper Eq. 16)."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, rows·P, columns·P) to (B, T, D) in raster order."""
        output: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return output

    def reset_parameters(self) -> None:
        """Xavier-uniform, as if the convolution were the linear layer that it is."""
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)


@fusible
class FinalLayer(nn.Module):
    """DiT's output head: adaptive layer norm, then a linear layer to the P·P·2C values of each token."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, T, D) tokens and (B, D) condition to (B, T, P·P·2C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        output: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return output


def adaln_linear(modulation: nn.Sequential) -> nn.Linear:
    """The linear layer of adaLN's ``Sequential(SiLU, Linear)``."""
    return cast(nn.Linear, modulation[1])


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, T, P·P·C) tokens in raster order to (B, C, rows·P, columns·P)."""
    B = x.shape[0]
    rows, columns = grid
    x = x.reshape(B, rows, columns, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch_size, columns * patch_size)


class Backbone(nn.Module, ABC):
    """What every model here offers: ``forward(x, t, y)``, guidance, and the shape it was built for.

    Attributes:
        input_size: (height, width) of the input, in latent cells or pixels.
        in_channels: C of the input; the output has 2C, noise and covariance.
        patch_size: P.
        num_classes: Number of labels; the null label is ``num_classes``.
        implementations: Which implementation of each operation this model runs, by name.
    """

    def __init__(self, *, input_size: tuple[int, int], in_channels: int, patch_size: int, num_classes: int) -> None:
        super().__init__()
        if any(side < 1 or side % patch_size for side in input_size):
            raise ValueError(f"input_size must be positive multiples of the patch size {patch_size}; got {input_size}")
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes and in_channels must be at least 1; got {num_classes} and {in_channels}")
        self.input_size = input_size
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.implementations: dict[str, str] = {}

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and covariance.

        Args:
            x: Noised input (B, C, height, width).
            t: Timesteps (B,).
            y: Labels (B,) int64.

        Returns:
            (B, 2C, height, width): the noise in the first C channels, the covariance in the others.
        """

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, C, height, width) as the model was built for."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            expected = ", ".join(map(str, ("B", self.in_channels, *self.input_size)))
            raise ValueError(f"x must be ({expected}); got {tuple(x.shape)}")

    def guided(self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: CfgChannels = "three") -> Tensor:
        """Classifier-free guidance: the model with the class and without it, in one pass.

        Args:
            x: Noised input (B, C, height, width).
            t: Timesteps (B,).
            y: Labels (B,) int64.
            scale: 1 is no guidance.
            channels: Which noise channels are guided: `forward_with_cfg`.

        Returns:
            (B, 2C, height, width): the guided noise, then the covariance under the class.

        Raises:
            ValueError: x, t and y are not of one length, or the scale is not finite.
        """
        if not (t.shape == y.shape == x.shape[:1]):
            raise ValueError(
                f"t and y must be vectors with a value for each of the {len(x)} inputs; got {tuple(t.shape)} and "
                f"{tuple(y.shape)}"
            )
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        return self.forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), labels, scale, channels)[: len(x)]

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: CfgChannels = "three"
    ) -> Tensor:
        """Classifier-free guidance over a batch that the caller has doubled, under the published models' name.

        For scripts that were written for those: `guided` takes a batch as it is.

        Args:
            x: (2B, C, height, width); only its first half is read, and serves both halves.
            t: (2B,) timesteps.
            y: (2B,) labels: the classes, then as many null labels.
            cfg_scale: 1 is no guidance.
            cfg_channels: ``three`` guides the first three noise channels only, which is what DiT, DiS and DiG publish
                their figures with (of a latent's four channels the last goes unguided); ``all`` guides every noise
                channel.

        Returns:
            (2B, 2C, height, width), the guided noise in both halves.

        Raises:
            ValueError: The batch is odd, x, t and y are not of one length, or the scale is not finite.
        """
        if not math.isfinite(cfg_scale):
            raise ValueError(f"the scale of guidance must be a finite number; got {cfg_scale}")
        if cfg_channels not in ("three", "all"):
            raise ValueError(f"cfg_channels must be 'three' or 'all'; got {cfg_channels!r}")
        if len(x) % 2:
            raise ValueError(
                f"x must hold an even number of inputs, conditioned and unconditioned; got {len(x)} (guided takes a "
                "batch that is not doubled)"
            )
        if not (t.shape == y.shape == x.shape[:1]):
            raise ValueError(
                f"t and y must be vectors as long as x, {len(x)}, the second half of y null labels; got "
                f"{tuple(t.shape)} and {tuple(y.shape)} (guided takes a batch that is not doubled)"
            )
        half = x[: len(x) // 2]
        output: Tensor = self(torch.cat([half, half]), t, y)
        guided = min(3, self.in_channels) if cfg_channels == "three" else self.in_channels
        noise, rest = output[:, :guided], output[:, guided:]
        conditioned, unconditioned = noise.chunk(2)
        noise = unconditioned + cfg_scale * (conditioned - unconditioned)
        return torch.cat([torch.cat([noise, noise]), rest], 1)


def initialize_adaln_zero(model: nn.Module) -> None:
    """DiT's initialisation of what the backbones share: embeddings normal(0.02), adaLN and output layers zero.

    Args:
        model: Has ``x_embedder``, ``t_embedder``, ``y_embedder``, ``blocks`` and ``final_layer``, as DiT and DiG do.
    """
    parts = {name: getattr(model, name) for name in ("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")}
    parts["x_embedder"].reset_parameters()
    nn.init.normal_(parts["y_embedder"].embedding_table.weight, std=0.02)
    nn.init.normal_(parts["t_embedder"].mlp[0].weight, std=0.02)
    nn.init.normal_(parts["t_embedder"].mlp[2].weight, std=0.02)
    zeroed = [block.adaLN_modulation[-1] for block in parts["blocks"]]
    zeroed += [parts["final_layer"].adaLN_modulation[-1], parts["final_layer"].linear]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def initialize_linears(module: nn.Module, gain: float = 1.0) -> None:
    """Xavier-uniform weights and zero biases in every linear layer of ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
