"""What every model of a comparison is given: the same latents, noise, timesteps and labels; no zeros in its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from dig.layers import Backbone

SEED = 0


def fill_zeros(model: nn.Module, std: float = 0.02) -> None:
    """Give every parameter that is zero throughout small random values.

    adaLN-Zero starts with gates of zero, so that half of a fresh model's backward pass multiplies zeros, which a GPU
    does faster and cooler than the numbers of a model in training.
    """
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


def make_inputs(model: Backbone, batch: int) -> tuple[list[Tensor], str]:
    """Latents x, noise (both (B, C, h, w)), timesteps t and labels y (both (B,)), and their SHA-256; on the CPU.

    They are drawn by a generator of their own, on the CPU, from a fixed seed: every model of a comparison gets the same
    numbers on every device, whatever building it drew before.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, model.in_channels, *model.input_size)
    inputs = [
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randint(0, 1000, (batch,), generator=generator),
        torch.randint(0, model.num_classes, (batch,), generator=generator),
    ]
    digest = hashlib.sha256()
    for tensor in inputs:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return inputs, digest.hexdigest()
