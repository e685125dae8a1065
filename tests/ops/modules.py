"""A small DiG on its own kernels, which tests of it as an ordinary module work with, and its twin on the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dig.model import DiG, DiGConfig
from tests.helpers import randomize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = DiGConfig(
    input_size=(4, 6), depth=2, width=64, heads=1, num_classes=3, backend="triton", variant="release", scan="crisscross"
)


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's convolutions in fp32 on a GPU too, where PyTorch takes TF32 for them unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def model_of(config: DiGConfig = CONFIG) -> DiG:
    model: DiG = randomize(DiG(config)).eval().to(DEVICE)
    return model


def twin_of(model: DiG) -> DiG:
    """The same weights on the reference."""
    reference = DiG(replace(model.config, backend="reference")).eval()
    reference.load_state_dict(model.state_dict())
    return reference.to(DEVICE)


def gradients(model: nn.Module, output: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output.float() * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
