"""SREM's convolution in raster order: against the model's own form, and its Triton kernels against fp64.

On a GPU at larger grids; elsewhere under Triton's interpreter. Every buffer that the operations allocate is filled with
NaN first, so an element that no kernel writes cannot pass.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dig.ops.srem import fused, srem
from dig.ops.tiles.choices import SremTiles
from dig.ops.tiles.sm90 import SREM
from dig.scan import RASTER, ScanOrder, reorder
from tests.helpers import LARGE, relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
DTYPES = (torch.float32, torch.bfloat16)
ORDERS = [ScanOrder(transposed, reversed) for transposed in (False, True) for reversed in (False, True)]
GRIDS = [(1, 1), (3, 5), (7, 2), (1, 9), (16, 16)] + ([(37, 1), (33, 63), (112, 112)] if LARGE else [])
BASE = SREM["forward", torch.bfloat16]
NAMES = ("x", "branch", "gate", "weight", "bias")

pytestmark = pytest.mark.usefixtures("poison")


def make_inputs(grid: tuple[int, int], D: int = 32, *, B: int = 1, dtype=torch.float32) -> list[Tensor]:
    """x, branch, gate, weight and bias; gate is a slice of a wider tensor, as in the model."""
    T = grid[0] * grid[1]
    x, branch = (torch.randn(B, T, D, device=DEVICE, dtype=dtype) for _ in range(2))
    gate = torch.randn(B, 6 * D, device=DEVICE, dtype=dtype).chunk(6, dim=1)[5]
    return [x, branch, gate, torch.randn(D, 1, 3, 3, device=DEVICE), torch.randn(D, device=DEVICE)]


def run(inputs: list[Tensor | None], gradient: Tensor, *, implementation: str = "triton", **options) -> list[Tensor]:
    """Output and the gradient of every input that isn't None."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    output = srem(*leaves, implementation=implementation, **options)
    return [output.detach(), *torch.autograd.grad(output, [x for x in leaves if x is not None], gradient)]


def assert_close(inputs: list[Tensor | None], grid: tuple[int, int], order: ScanOrder) -> None:
    gradient = torch.randn_like(inputs[0])
    actual = run(inputs, gradient, grid=grid, order=order)
    # The reference gets the same numbers, rounded to bf16 where the inputs are, and computes in fp64.
    wide = [x if x is None else x.double().cpu() for x in inputs]
    expected = run(wide, gradient.double().cpu(), implementation="reference", grid=grid, order=order)
    for x, value in zip((inputs[0], *(x for x in inputs if x is not None)), actual, strict=True):
        assert value.dtype == x.dtype
        assert value.shape == x.shape
    found = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert all(error < TOLERANCE[inputs[0].dtype] for error in found), found


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2), (1, 9), (9, 1)])
def test_turned_taps_replace_the_reordering_of_tokens(grid: tuple[int, int], order: ScanOrder) -> None:
    """The model's form: tokens in scan order, folded, convolved with the parameter as it is, and put back."""
    x, _, _, weight, bias = (tensor.double().cpu() for tensor in make_inputs(grid, 8, B=2))
    scanned = reorder(x, grid, RASTER, order).transpose(1, 2).unflatten(2, order.grid(grid))
    convolved = F.conv2d(scanned, weight, bias, padding=1, groups=8).flatten(2).transpose(1, 2)
    expected = reorder(convolved, grid, order, RASTER)
    actual = srem(x, None, None, weight, bias, grid=grid, order=order, implementation="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "B"), [(32, 1), (32, 3), (48, 1), (48, 3)] if LARGE else [(32, 3), (48, 1)])
@pytest.mark.parametrize("grid", GRIDS)
def test_matches_fp64(grid: tuple[int, int], D: int, B: int, dtype: torch.dtype) -> None:
    assert_close(make_inputs(grid, D, B=B, dtype=dtype), grid, ORDERS[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_order(order: ScanOrder, dtype: torch.dtype) -> None:
    assert_close(make_inputs((5, 3), dtype=dtype), (5, 3), order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_width_of_a_model(dtype: torch.dtype) -> None:
    grid = (64, 64) if LARGE else (6, 5)
    assert_close(make_inputs(grid, 384, B=2, dtype=dtype), grid, ORDERS[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[3]], ids=str)
def test_convolution_alone(order: ScanOrder, dtype: torch.dtype) -> None:
    x, _, _, weight, bias = make_inputs((5, 4), B=2, dtype=dtype)
    assert_close([x, None, None, weight, bias], (5, 4), order)


@pytest.mark.parametrize(
    "tiles",
    [
        replace(BASE, channels=16, groups=4, width=1, rows=3, programs=1, warps=1),
        replace(BASE, channels=64, groups=1, width=4, rows=2, programs=1, warps=1),
        replace(BASE, channels=32, groups=2, width=2, rows=8, programs=20, warps=1),
        *(
            [replace(BASE, width=2), replace(BASE, rows=1), replace(BASE, channels=128, groups=8, warps=8)]
            if LARGE
            else []
        ),
    ],
    ids=str,
)
def test_patches_meet_without_a_seam(tiles: SremTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips of channels, and several patches of rows and of columns, the last of each cut off."""
    monkeypatch.setattr(fused, "tiles_for", lambda which, x: tiles)
    assert_close(make_inputs((7, 5), 24, B=2), (7, 5), ORDERS[2])


def test_mixed_dtypes() -> None:
    """Any of the arguments in fp32 or bf16: an fp32 residual stream beside bf16 branches, as autocast may leave it."""
    inputs = make_inputs((4, 3), B=2)
    for lowered in ((1, 2), (0,), (0, 1), (0, 2, 3, 4)):
        assert_close([x.bfloat16() if i in lowered else x for i, x in enumerate(inputs)], (4, 3), ORDERS[2])


def test_sum_is_rounded_once_before_the_convolution() -> None:
    """What the model would have stored is what is convolved: equal in every bit to the convolution of the sum."""
    inputs = make_inputs((5, 4), B=2, dtype=torch.bfloat16)
    # Sixteenths of integers: the sum is exact in fp32, so there is one way to round it to bf16.
    x, branch, gate = (torch.randint_like(tensor, -128, 128) / 16 for tensor in inputs[:3])
    weight, bias = inputs[3:]
    total = (x.float() + gate.float().unsqueeze(1) * branch.float()).bfloat16()
    options = {"grid": (5, 4), "order": ORDERS[1], "implementation": "triton"}
    assert torch.equal(srem(x, branch, gate, weight, bias, **options), srem(total, None, None, weight, bias, **options))


def test_slices_are_read_in_place() -> None:
    _, _, gate, weight, bias = make_inputs((4, 5), B=2)
    x, branch = torch.randn(2, 20, 96, device=DEVICE).split([64, 32], dim=2)
    assert not branch.is_contiguous()
    assert_close([x[..., :32], branch, gate, weight, bias], (4, 5), ORDERS[2])
    assert_close([branch, x[..., 32:], gate.expand(2, -1), weight, bias], (4, 5), ORDERS[1])


def test_gradient_of_any_strides() -> None:
    inputs = make_inputs((3, 5), B=2)
    gradient = torch.randn(2, 32, 15, device=DEVICE).transpose(1, 2)
    options = {"grid": (3, 5), "order": ORDERS[3]}
    for a, b in zip(run(inputs, gradient, **options), run(inputs, gradient.contiguous(), **options), strict=True):
        assert torch.equal(a, b)


def test_two_runs_are_bit_identical() -> None:
    inputs = make_inputs((16, 16), 48, B=3, dtype=torch.bfloat16)
    gradient = torch.randn_like(inputs[0])
    first, second = (run(inputs, gradient, grid=(16, 16), order=ORDERS[2]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_operator_is_registered_soundly() -> None:
    """Schema, fake implementation and autograd registration, also with symbolic shapes."""
    inputs = [x.detach().requires_grad_() for x in make_inputs((3, 5), B=2)]
    torch.library.opcheck(torch.ops.dig.srem.default, (*inputs, 3, 5, True, False))
    x, _, _, weight, bias = inputs
    torch.library.opcheck(torch.ops.dig.srem.default, (x, None, None, weight, bias, 3, 5, False, True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_into_one_graph(backend: str) -> None:
    inputs = make_inputs((5, 4), dtype=torch.bfloat16)
    gradient = torch.randn_like(inputs[0])
    options = {"grid": (5, 4), "order": ORDERS[3]}

    def twice(*leaves: Tensor | None) -> Tensor:
        x = srem(*leaves, implementation="triton", **options)
        return srem(x, None, None, *leaves[3:], implementation="triton", **options)

    def gradients(function) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled), gradients(twice), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_replays_the_same() -> None:
    inputs = make_inputs((32, 32), 384, dtype=torch.bfloat16)
    gradient = torch.randn_like(inputs[0])
    expected = run(inputs, gradient, grid=(32, 32), order=ORDERS[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, gradient, grid=(32, 32), order=ORDERS[1])
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


BAD_ARGUMENTS = {
    "x must be (B, T, D)": {"x": lambda x: x[0]},
    "x must be (B, T, D), none of them 0": {"x": lambda x: x[:0]},
    "x must be torch.float32 or torch.bfloat16": {"x": lambda x: x.half()},
    "x must be contiguous in its last dimension": {"x": lambda x: torch.cat((x, x), 2)[..., ::2]},
    "grid must be (rows, columns) with rows·columns = 12": {"grid": lambda grid: (4, 4)},
    "grid must be (rows, columns) with rows·columns = 12, x's": {"grid": lambda grid: (-4, -3)},
    "branch must have shape": {"branch": lambda x: x[:, 1:]},
    "branch must be torch.float32 or torch.bfloat16; got torch.float64": {"branch": lambda x: x.double()},
    "branch must be on x's device": {"branch": lambda x: x.to("meta")},
    "gate must be given with branch": {"gate": lambda x: None},
    "gate must have shape": {"gate": lambda x: x[:, 1:]},
    "gate must be contiguous in its last dimension": {"gate": lambda x: torch.cat((x, x), 1)[:, ::2]},
    "weight must have shape": {"weight": lambda x: x[:, 0]},
    "weight must be contiguous": {"weight": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
    "bias must have shape": {"bias": lambda x: x[1:]},
    "implementation must be one of reference, triton": {"implementation": lambda x: "cuda"},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message: str) -> None:
    arguments = dict(zip(NAMES, make_inputs((4, 3)), strict=True))
    arguments |= {"grid": (4, 3), "order": RASTER, "implementation": "triton"}
    for name, change in BAD_ARGUMENTS[message].items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        srem(**arguments)


def test_bad_tiles_are_named() -> None:
    with pytest.raises(ValueError, match=r"^channels must be a power of two"):
        replace(BASE, channels=48)
    with pytest.raises(ValueError, match=r"^rows must be at least 1"):
        replace(BASE, rows=0)
    with pytest.raises(ValueError, match=r"^warps must be at most"):
        replace(BASE, channels=32, groups=4)
