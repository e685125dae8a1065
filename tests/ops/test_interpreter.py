"""Triton's interpreter, as `conftest.py` sets it up for these tests, computes right and finds what a GPU would not."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiles where there is a GPU")


@triton.jit
def doubled(x):
    return 2 * x


@triton.jit
def sum_kernel(x, y, N: tl.constexpr):
    """Device functions of this module and of Triton's own."""
    i = tl.program_id(0)
    tl.store(y + i, doubled(tl.sum(tl.load(x + i * N + tl.arange(0, N)), 0)) + tl.cdiv(N, 3) * tl.zeros([], tl.float32))


@triton.jit
def write_kernel(x, N):
    tl.store(x + tl.program_id(0) + N, 1.0)


@triton.jit
def product_kernel(x, N):
    tl.store(x, (tl.load(x) * N).to(tl.int32))


def sums() -> torch.Tensor:
    x, y = torch.arange(12.0).view(3, 4), torch.zeros(3)
    sum_kernel[(3,)](x, y, 4)
    return y


def test_device_functions_are_interpreted_in_every_launch() -> None:
    assert sums().tolist() == sums().tolist() == [12, 44, 76]


def test_a_store_outside_of_its_tensors_is_found_and_ends_that_launch_only() -> None:
    x = torch.zeros(4)
    write_kernel[(4,)](x, 0)
    assert x.tolist() == [1, 1, 1, 1]
    for outside in (1, -1, 10**6):
        with pytest.raises(InterpreterError, match="store outside every tensor"):
            write_kernel[(4,)](x, outside)
    assert sums().tolist() == [12, 44, 76]


@pytest.mark.parametrize(
    ("value", "factor", "fits"), [(2**15, 2**15, True), (2**16, 2**15, False), (-(2**16), 2**16, False)]
)
def test_a_product_beyond_its_integers_is_found(value: int, factor: int, fits: bool) -> None:
    x = torch.tensor([value], dtype=torch.int32)
    if fits:
        product_kernel[(1,)](x, factor)
        assert x.item() == value * factor
        return
    with pytest.raises(InterpreterError, match="overflow detected for operation mul"):
        product_kernel[(1,)](x, factor)
