"""Weights' gradients in one launch: against fp64, and in a block's backward pass in place of a GEMM each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig import raster_operations
from dig.ops import weight_gradients as operation
from dig.ops.linear import as_rows, weight_gradient
from dig.ops.tiles import sm90
from dig.ops.tiles.architecture import Architecture
from dig.ops.weight_gradients import groups_gradients, weight_gradients
from tests.helpers import example
from tests.ops.test_raster import BASE, DEVICE, twins

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SMALL = replace(sm90.GRADIENTS, rows=64, columns=32, depth=16, warps=4)
ON: Architecture = replace(sm90.ARCHITECTURE, gradients=replace(sm90.GRADIENTS, least_tokens=64))

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="the kernel is for Hopper")
@pytest.mark.parametrize("M", [16, 40, 129])
def test_every_weights_gradient(M: int) -> None:
    """Of rows that end within a tile, one of them 16 after a whole one, and tokens that end within a step."""
    torch.manual_seed(0)
    sizes = ((64, 96), (80, 32), (16, 64), (152, 32))
    pairs = [
        (torch.randn(M, N, device=DEVICE).bfloat16(), torch.randn(M, K, device=DEVICE).bfloat16()) for N, K in sizes
    ]
    found = weight_gradients(pairs, SMALL)
    for (dy, x), gradient in zip(pairs, found, strict=True):
        assert gradient.dtype == torch.float32
        due = dy.double().T @ x.double()
        torch.testing.assert_close(gradient.double(), due, rtol=1e-5, atol=1e-5 * M**0.5)


@pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="the kernel is for Hopper")
def test_tokens_of_several_images_are_rows() -> None:
    """As a block has them, (B, T, N), without a view of each."""
    sizes = ((64, 96), (80, 32), (16, 64), (152, 32))
    rows = [
        (torch.randn(24, N, device=DEVICE).bfloat16(), torch.randn(24, K, device=DEVICE).bfloat16()) for N, K in sizes
    ]
    images = [(dy.view(2, 12, -1), x.view(2, 12, -1)) for dy, x in rows]
    due = weight_gradients(rows, SMALL)
    assert all(map(torch.equal, weight_gradients(images, SMALL), due))


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("M", [2048, 8192 + 17])
def test_the_tiles_of_dig_s(M: int) -> None:
    sizes = ((384, 1024), (2048, 384), (384, 384), (1168, 384))
    pairs = [
        (torch.randn(M, N, device="cuda").bfloat16(), torch.randn(M, K, device="cuda").bfloat16()) for N, K in sizes
    ]
    once, again = (weight_gradients(pairs, sm90.GRADIENTS) for _ in range(2))
    for (dy, x), gradient, same in zip(pairs, once, again, strict=True):
        assert torch.equal(gradient, same)
        torch.testing.assert_close(gradient.double(), dy.double().T @ x.double(), rtol=1e-4, atol=1e-4 * M**0.5)


def test_what_is_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "for_device", lambda device: ON)

    def asked(tokens: int = 64, D: int = 384, dtype: torch.dtype = torch.bfloat16, **given: Sequence[Tensor]) -> bool:
        sizes = ((D, 1024), (2048, D), (D, D), (3 * D + 16, D))
        weights = given.get("weights", [torch.empty(size, device="meta") for size in sizes])
        return groups_gradients(torch.empty(2, tokens // 2, D, dtype=dtype), weights)

    assert asked()
    assert not asked(tokens=62)
    assert not asked(D=640)
    assert not asked(dtype=torch.float32)
    assert not asked(weights=[torch.empty(384, 384)] * 3)
    assert not asked(weights=[torch.empty(384, 384, dtype=torch.bfloat16)] * 4)
    assert not asked(weights=[torch.empty(384, 400)] * 4)
    assert not asked(weights=[torch.empty(388, 384)] * 4)
    monkeypatch.setattr(operation, "for_device", lambda device: sm90.ARCHITECTURE)
    assert not asked()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_a_block_goes_back_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch, images: int, frozen: bool) -> None:
    """Bit for bit; and where one of the weights is frozen, each of the others by itself."""
    grouped: list[list[tuple[int, ...]]] = []

    def together(pairs: Sequence[tuple[Tensor, Tensor]], places: Sequence[Tensor | None]) -> list[Tensor]:
        assert not any(place is not None for place in places)
        found = [weight_gradient(as_rows(dy), as_rows(x)) for dy, x in pairs]
        grouped.append([tuple(gradient.shape) for gradient in found])
        return found

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        _, model = twins(replace(BASE, depth=2))
        if frozen:
            model.blocks[1].mlp.gate_proj.weight.requires_grad_(False)
        model(*example(model, images)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    due = gradients()
    monkeypatch.setattr(raster_operations, "groups_gradients", lambda x, weights: True)
    monkeypatch.setattr(raster_operations, "weight_gradients", together)
    found = gradients()
    assert len(grouped) == (1 if frozen else 2)
    (D, F), (double, _), *_ = grouped[0]
    assert double == 2 * F
    assert grouped[0][2:] == [(D, D), (3 * D + 16, D)]
    assert found.keys() == due.keys()
    assert [name for name in due if not torch.equal(found[name], due[name])] == []
