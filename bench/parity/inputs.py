"""Inputs of every model of a comparison: the same latents, noise, timesteps and labels; no weights of zero."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench.parity.error import ParityError
from dig.layers import Backbone

SEED = 0
MOST_ZEROS = 0.25
LEAST_LOOKED_AT = 64
"""Values; a short bias may be anything."""


def fill_zeros(model: nn.Module, std: float = 0.02) -> None:
    """Give the zeros of every parameter that has many small random values instead.

    adaLN-Zero starts with gates of zero, so half of a fresh model's backward pass multiplies zeros. A GPU does that
    faster and cooler than a trained model's numbers. A convolution that starts as the identity is zero in eight of nine
    values.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            zeros = parameter == 0
            if zeros.float().mean() > MOST_ZEROS:
                parameter.copy_(torch.where(zeros, std * torch.randn_like(parameter), parameter))


def refuse_zeros(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ParityError where weights or latents are mostly zeros, which a GPU multiplies faster than numbers.

    Args:
        named: By name, a model's ``named_parameters()`` say; those of some length are looked at.
    """
    for name, tensor in named:
        if tensor.numel() >= LEAST_LOOKED_AT and (share := (tensor == 0).float().mean().item()) > MOST_ZEROS:
            raise ParityError(
                f"{name} is zero in {share:.0%} of its values, which a GPU multiplies faster than numbers"
            )


def check_output(output: Tensor, x: Tensor) -> Tensor:
    """What a model gives for x (B, C, h, w), or ValueError unless it is (B, 2C, h, w): less would be faster."""
    due, found = (len(x), 2 * x.shape[1], *x.shape[2:]), tuple(getattr(output, "shape", ()))
    if found != due:
        raise ValueError(f"the model gives {found or type(output).__name__} for x {tuple(x.shape)}; {due} is due")
    return output


def make_inputs(model: Backbone, batch: int, *, seed: int = SEED) -> tuple[list[Tensor], str]:
    """Latents x, noise (both (B, C, h, w)), timesteps t and labels y (both (B,)), and their SHA-256; on the CPU.

    A generator of their own draws them, on the CPU, with a fixed seed: every model of a comparison gets the same
    numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
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
