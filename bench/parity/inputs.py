"""Inputs of every model of a comparison: the same latents, noise, timesteps and labels; no weights of zero."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from dig.layers import Backbone

SEED = 0


def fill_zeros(model: nn.Module, std: float = 0.02) -> None:
    """Give every parameter that is all zero small random values.

    adaLN-Zero starts with gates of zero, so half of a fresh model's backward pass multiplies zeros. A GPU does that
    faster and cooler than a trained model's numbers.
    """
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


def make_inputs(model: Backbone, batch: int) -> tuple[list[Tensor], str]:
    """Latents x, noise (both (B, C, h, w)), timesteps t and labels y (both (B,)), and their SHA-256; on the CPU.

    A generator of their own draws them, on the CPU, with a fixed seed: every model of a comparison gets the same
    numbers on every device.
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
