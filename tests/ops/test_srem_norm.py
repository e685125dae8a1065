"""SREM and the norm after it in one launch, against both apart in fp64; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dig.ops.adaln.reference import reference_norm_modulate
from dig.ops.srem import reference_srem
from dig.ops.srem.normed import channels_of, srem_norm_forward
from dig.scan import ScanOrder
from tests.helpers import LARGE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ORDERS = [ScanOrder(transposed, reverse) for transposed in (False, True) for reverse in (False, True)]

pytestmark = pytest.mark.usefixtures("poison")


def arguments(B: int, grid: tuple[int, int], D: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, shift, scale and the norm's weight; x far from zero, as a norm must bear."""
    x = torch.randn(B, grid[0] * grid[1], D, device=DEVICE) + 3
    shapes = (D, 1, 3, 3), (D,), (B, 2 * D), (D,)
    weight, bias, modulation, norm_weight = (torch.randn(*shape, device=DEVICE) for shape in shapes)
    return [x.to(dtype), weight, bias, *modulation.chunk(2, dim=1), norm_weight]


def check(B: int, grid: tuple[int, int], D: int, dtype: torch.dtype, order: ScanOrder, norm: str) -> None:
    x, weight, bias, shift, scale, norm_weight = arguments(B, grid, D, dtype)
    y, h = srem_norm_forward(
        x, weight, bias, *grid, *order, shift, scale, norm_weight if norm == "rms" else None, norm, 1e-6
    )
    exact = reference_srem(x.double(), None, None, weight.double(), bias.double(), grid=grid, order=order)
    assert y.dtype == h.dtype == dtype
    assert relative_error(y, exact) < TOLERANCE[dtype]
    # The norm is that of the convolution as it was stored.
    doubled = [tensor.double() for tensor in (y, shift, scale)]
    weights = norm_weight.double() if norm == "rms" else None
    normed = reference_norm_modulate(*doubled, weights, norm=norm, eps=1e-6, dtype=torch.float64)
    assert relative_error(h, normed) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("D", [64, 72, 96, 144])
def test_both_results(D: int, norm: str, dtype: torch.dtype) -> None:
    check(2, (5, 9), D, dtype, ScanOrder(False, False), norm)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_order_of_the_scan(order: ScanOrder) -> None:
    check(1, (3, 10), 96, torch.float32, order, "layer")


@pytest.mark.parametrize("grid", [(1, 1), (1, 17), (9, 1), (4, 8)], ids=str)
def test_any_grid(grid: tuple[int, int]) -> None:
    check(1, grid, 64, torch.bfloat16, ScanOrder(True, False), "rms")


@pytest.mark.skipif(not LARGE, reason="needs a GPU")
@pytest.mark.parametrize("D", [384, 768, 1024, 1152])
@pytest.mark.parametrize("grid", [(64, 64), (50, 131)], ids=str)
def test_sizes_of_models(grid: tuple[int, int], D: int) -> None:
    check(1, grid, D, torch.bfloat16, ScanOrder(True, True), "layer")


def test_widths_are_cut_in_two() -> None:
    assert channels_of(1152) == (1024, 128)
    assert channels_of(384) == (256, 128)
    assert channels_of(1024) == (1024, 0)
    assert [channels_of(D) for D in (32, 72, 80, 1216, 2048)] == [None, (64, 8), (64, 16), None, None]
