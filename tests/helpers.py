"""What several test files need."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

LARGE = torch.cuda.is_available() and os.environ.get("DIG_SMALL_SHAPES") != "1"
"""Whether shapes are those of a GPU's tests: a sanitizer is too slow for them, and Triton's interpreter."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in fp64; NaN never passes a comparison."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def randomize(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Shake every parameter, so that no adaLN gate hides a branch by being zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model


def example(model: nn.Module, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, t and y on the model's device."""
    device = next(model.parameters()).device
    x = torch.randn(batch, model.in_channels, *model.input_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    return x, t, torch.randint(0, model.num_classes, (batch,), device=device)
