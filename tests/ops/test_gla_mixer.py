"""The whole mixer from the fused projection, in every scan order, against the model's own reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dig.ops.gla.block_reference import block_reference
from dig.ops.gla.mixer import gla_mixer
from dig.ops.gla.projection import split_projection
from dig.scan import RASTER, ScanOrder, reorder
from tests.helpers import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
ORDERS = [ScanOrder(transposed=t, reversed=r) for t in (False, True) for r in (False, True)]
RANK = 16


def arguments(grid: tuple[int, int], heads: int, key_width: int, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    T, D = grid[0] * grid[1], 2 * heads * key_width
    projected = torch.randn(batch, T, 3 * D + RANK, device=DEVICE)
    decay_weight = torch.randn(D // 2, RANK, device=DEVICE) / 4
    decay_bias = torch.randn(D // 2, device=DEVICE)
    norm_weight = 1 + 0.2 * torch.randn(2 * key_width, device=DEVICE)
    return [x.to(dtype) for x in (projected, decay_weight, decay_bias)] + [norm_weight]


def expected_output(
    projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, norm_weight: Tensor, *, heads: int,
    grid: tuple[int, int], order: ScanOrder, eps: float,
) -> Tensor:  # fmt: skip
    """Tokens moved into the scan order, mixed one after the other, moved back."""
    moved = reorder(projected, grid, RASTER, order)
    q, k, v, gate, low = split_projection(moved, heads, RANK)
    logits = torch.nn.functional.linear(low, decay_weight, decay_bias).unflatten(-1, (heads, -1))
    y = block_reference(q, k, v, logits, gate, norm_weight, scale=q.shape[-1] ** -0.5, eps=eps)
    return reorder(y.flatten(2), grid, order, RASTER)


CASES = [
    ((8, 9), 2, 32, torch.float32, 1, ORDERS[0]),
    ((8, 9), 2, 32, torch.float32, 1, ORDERS[1]),
    ((5, 14), 1, 32, torch.float32, 2, ORDERS[2]),
    ((5, 14), 1, 32, torch.float32, 2, ORDERS[3]),
    ((11, 7), 1, 36, torch.float32, 1, ORDERS[3]),
    ((1, 3), 1, 32, torch.float32, 1, ORDERS[3]),
    ((7, 10), 2, 32, torch.bfloat16, 1, ORDERS[3]),
]


@pytest.mark.usefixtures("backward_form")
@pytest.mark.parametrize(("grid", "heads", "key_width", "dtype", "batch", "order"), CASES)
def test_output_and_every_gradient(
    grid: tuple[int, int], heads: int, key_width: int, dtype: torch.dtype, batch: int, order: ScanOrder
) -> None:
    check_output_and_gradients(arguments(grid, heads, key_width, dtype, batch), heads, grid, order)


@pytest.mark.usefixtures("backward_form")
def test_gates_that_forget_within_a_chunk() -> None:
    """No chunk is mild: its parts' shares of the bias' gradient add up."""
    projected, decay_weight, decay_bias, norm_weight = arguments((8, 9), 1, 32, torch.float32)
    check_output_and_gradients([projected, decay_weight, decay_bias - 15, norm_weight], 1, (8, 9), ORDERS[0])


def check_output_and_gradients(given: list[Tensor], heads: int, grid: tuple[int, int], order: ScanOrder) -> None:
    dtype = given[0].dtype
    inputs = [x.requires_grad_() for x in given]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    # A large eps: with 1e-6 the gradients of the first tokens' q and k are 0 but for rounding.
    settings = {"heads": heads, "grid": grid, "order": order, "eps": 0.1}
    actual = gla_mixer(*inputs, **settings)
    expected = expected_output(*wide, **settings)
    weight = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    truths = torch.autograd.grad((expected * weight.double()).sum(), wide)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < BOUNDS[dtype]
    names = ("projected", "decay_weight", "decay_bias", "norm_weight")
    errors = {name: relative_error(a, e) for name, a, e in zip(names, gradients, truths, strict=True)}
    assert max(errors.values()) < BOUNDS[dtype], errors


def test_orders_differ() -> None:
    inputs = arguments((5, 6), 1, 32, torch.float32)
    outputs = [gla_mixer(*inputs, heads=1, grid=(5, 6), order=order) for order in ORDERS]
    for i in range(4):
        for j in range(i):
            assert relative_error(outputs[i], outputs[j]) > 0.1


def test_it_is_registered_as_torch_asks() -> None:
    inputs = [x.requires_grad_() for x in arguments((3, 5), 1, 32, torch.float32)]
    torch.library.opcheck(torch.ops.dig.gla_mixer.default, (*inputs, 1, 3, 5, 3, 1e-6, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 4)}, r"projected must be \(B, 4·4, 3D \+ R\)"),
        ({"heads": 3}, "projected must have 3D"),
        ({"decay_weight": torch.randn(32, 15)}, "decay_weight must have shape"),
        ({"decay_bias": torch.randn(32).double()}, "decay_bias must be fp32"),
        ({"norm_weight": torch.ones(64).double()}, "norm_weight must be fp32"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    names = ("projected", "decay_weight", "decay_bias", "norm_weight")
    good = dict(zip(names, arguments((3, 5), 1, 32, torch.float32), strict=True))
    settings = {"heads": 1, "grid": (3, 5), "order": RASTER, **good}
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        gla_mixer(**{**settings, **moved})
