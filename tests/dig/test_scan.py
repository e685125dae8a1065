"""Scan orders: what a block sees, and that the tokens come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.models import create_model
from dig.config import SIZES
from dig.model import DiG, DiGConfig
from dig.scan import RASTER, ScanOrder, reorder, scan_orders

GRIDS = [(3, 3), (2, 5), (4, 1)]


def tokens(grid: tuple[int, int]) -> torch.Tensor:
    return torch.arange(grid[0] * grid[1], dtype=torch.float32).reshape(1, -1, 1)


def seen(grid: tuple[int, int], order: ScanOrder) -> list[int]:
    return reorder(tokens(grid), grid, RASTER, order).flatten().int().tolist()


def test_the_four_orders_of_figure_4() -> None:
    orders = scan_orders(5, "crisscross")
    assert [[token + 1 for token in seen((3, 3), order)] for order in orders] == [
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
        [9, 8, 7, 6, 5, 4, 3, 2, 1],
        [1, 4, 7, 2, 5, 8, 3, 6, 9],
        [9, 6, 3, 8, 5, 2, 7, 4, 1],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]


def test_the_other_scans() -> None:
    assert scan_orders(3, "causal") == [RASTER] * 3
    reverse = ScanOrder(transposed=False, reversed=True)
    assert scan_orders(4, "bidirectional") == [RASTER, reverse] * 2
    with pytest.raises(ValueError, match="scan must be one of"):
        scan_orders(3, "zigzag")


@pytest.mark.parametrize("grid", GRIDS)
def test_orders_follow_algorithm_1(grid: tuple[int, int]) -> None:
    """Flip after every block, transpose the grid after every second: the literal steps, against the closed form."""
    x, shape = tokens(grid), grid
    for block, order in enumerate(scan_orders(9, "crisscross")):
        assert x.flatten().int().tolist() == seen(grid, order), block
        if block % 2 == 1:
            x, shape = x.unflatten(1, shape).transpose(1, 2).flatten(1, 2), shape[::-1]
        x = x.flip(1)


@pytest.mark.parametrize("grid", GRIDS)
def test_reorder_between_any_two_orders_and_back(grid: tuple[int, int]) -> None:
    every = [ScanOrder(transposed=t, reversed=r) for t in (False, True) for r in (False, True)]
    for source in every:
        x = reorder(tokens(grid), grid, RASTER, source)
        for target in every:
            moved = reorder(x, grid, source, target)
            torch.testing.assert_close(moved, reorder(tokens(grid), grid, RASTER, target))
            torch.testing.assert_close(reorder(moved, grid, target, source), x)


@pytest.mark.parametrize("scan", ["crisscross", "bidirectional", "causal"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("input_size", [(8, 8), (4, 10)])
def test_an_identity_network_gives_its_tokens_back(depth: int, input_size: tuple[int, int], scan: str) -> None:
    """Gates zero (adaLN-Zero) and the convolution the identity: blocks only move tokens, and every one must return."""
    config = DiGConfig(input_size=input_size, depth=depth, width=32, heads=2, scan=scan, num_classes=3)
    model = DiG(config)
    entered, left = [], []
    model.x_embedder.register_forward_hook(lambda module, inputs, output: entered.append(output + model.pos_embed))
    model.final_layer.register_forward_pre_hook(lambda module, inputs: left.append(inputs[0]))
    model(torch.randn(2, 4, *input_size), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(left[0], entered[0], rtol=0, atol=0)


def test_a_transposed_block_convolves_its_own_grid() -> None:
    """On a 2×5 image a column-major block must fold its sequence 5×2: one shift of the kernel tells the axes apart."""
    config = DiGConfig(input_size=(4, 10), depth=3, width=32, heads=2, num_classes=3)
    model = DiG(config)
    kernel = model.blocks[2].dw_conv.weight.data.zero_()
    kernel[:, :, 1, 0] = 1  # In column-major order the cell to the left is the one above it in the image.
    entered, left = [], []
    model.x_embedder.register_forward_hook(lambda module, inputs, output: entered.append(output + model.pos_embed))
    model.final_layer.register_forward_pre_hook(lambda module, inputs: left.append(inputs[0]))
    model(torch.randn(2, 4, 4, 10), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    image, moved = (x[0].unflatten(1, (2, 5)) for x in (entered, left))
    torch.testing.assert_close(moved[:, 1], image[:, 0])
    assert not moved[:, 0].any()


@pytest.mark.parametrize("convolution", ["none", "default-init", "identity-init"])
def test_convolution_options(convolution: str) -> None:
    model = create_model("DiG-S/8", image_size=64, convolution=convolution)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert len(layers) == (0 if convolution == "none" else 12)
    for layer in layers:
        identity = torch.zeros(384, 1, 3, 3)
        identity[:, :, 1, 1] = 1
        assert torch.equal(layer.weight, identity) == (convolution == "identity-init")


def test_every_row_of_table_2_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The five DiG rows of Tab. 2 give five different functions of the same weights; with a block for each order."""
    monkeypatch.setitem(SIZES, "S", (4, *SIZES["S"][1:]))
    rows = [
        {"scan": "causal", "convolution": "none"},
        {"scan": "bidirectional", "convolution": "none"},
        {"scan": "bidirectional", "convolution": "default-init"},
        {"scan": "bidirectional", "convolution": "identity-init"},
        {"scan": "crisscross", "convolution": "identity-init"},
    ]
    outputs = []
    x, t, y = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for row in rows:
        torch.manual_seed(1)
        model = create_model("DiG-S/2", image_size=64, **row).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "dw_conv" not in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            outputs.append(model(x, t, y))
    # Rows 3 and 4 are one network before training, but for the initial kernel.
    for i in range(len(rows)):
        for j in range(i):
            assert (i, j) == (3, 1) or not torch.allclose(outputs[i], outputs[j]), (rows[i], rows[j])
    torch.testing.assert_close(outputs[3], outputs[1])
