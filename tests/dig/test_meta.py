"""Models without memory: nothing is drawn for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dig.meta import on_meta
from dig.spec import ModelSpec


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_random_fills_do_nothing() -> None:
    before = torch.get_rng_state()
    with Seen() as seen, on_meta():
        layers = [nn.Linear(2, 3), nn.Embedding(2, 3), nn.Conv2d(1, 2, 3)]
        nn.init.normal_(layers[0].weight, std=0.02)
        model = ModelSpec(name="DiG-S/8", input_size=(16, 16), in_channels=3, num_classes=2).build()
    assert {parameter.device.type for layer in (*layers, model) for parameter in layer.parameters()} == {"meta"}
    assert "empty" in seen.names
    assert not [name for name in seen.names if "normal" in name or "uniform" in name or "rand" in name]
    assert torch.equal(torch.get_rng_state(), before)


def test_other_functions_do_what_they_do() -> None:
    with on_meta():
        assert (torch.zeros(2, 3) + torch.ones(3)).shape == (2, 3)
    assert torch.zeros(1).device.type == "cpu"
    assert nn.Linear(64, 64).weight.std() > 0
