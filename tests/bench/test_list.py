"""``python -m bench list``: every model at once, and figures of those that are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench.cli import list as listing
from bench.cli.main import app
from dig import flops, registry
from dig.flops import forward_macs
from dig.spec import create_model

runner = CliRunner()


def test_all_models_are_listed_without_building_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr(listing, "_figures", refuse)
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0, result.output
    assert set(registry.list_models()) <= set(result.output.split())
    assert "DiS-XL/2 DiS-XL/4 DiS-XL/8 (assumed)" in result.output
    assert "--count" in result.output


def test_named_models_and_all_that_are_counted_have_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    named = runner.invoke(app, ["list", "DiG-S/8", "Flash-DiT-S/8"])
    assert named.exit_code == 0, named.output
    for name in ("DiG-S/8", "Flash-DiT-S/8"):
        with torch.device("meta"):
            model = create_model(name, image_size=256)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = next(line for line in named.output.splitlines() if f" {name} " in line)
        assert f"{parameters:,}" in row
    # In the registry's order, which is that of the imports.
    two = [name for name in registry.list_models() if name in ("DiG-S/8", "Flash-DiT-S/8")]
    monkeypatch.setattr(registry, "list_models", lambda: two)
    counted = runner.invoke(app, ["list", "--count"])
    assert counted.stdout == named.stdout


@pytest.mark.parametrize("name", ["DiG-S/8", "DiS-S/8"])
def test_equal_blocks_are_counted_once_to_the_same_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that differ in nothing but their weights, their place, or how often they are dropped, cost one count."""
    with torch.device("meta"):
        model = create_model(name, image_size=256)
    ran: list[nn.Module] = []
    block = type(next(part for part in model.modules() if isinstance(part, nn.ModuleList))[0])
    forward = block.forward

    def counted(self: nn.Module, *arguments: object, **named: object) -> object:
        ran.append(self)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(block, "forward", counted)
    once = forward_macs(model)
    assert len(ran) < model.config.depth / 2, len(ran)
    monkeypatch.setattr(flops.EqualBlocks, "_forward", lambda self, run, state, *a, **k: run(*a, **k))
    assert forward_macs(model) == once
    assert len(ran) > model.config.depth
