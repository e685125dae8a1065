"""adaLN's linear layer for a batch, against fp64; under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dig.ops.modulation import modulation, modulation_backward
from tests.helpers import LARGE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5, 7), (2, 96, 70), (17, 130, 33), (33, 40, 300), (70, 24, 40)] + ([(64, 1152, 6912)] if LARGE else [])
FP32 = 2e-6
"""Relative error of a sum of fp32 products: three tf32 ones stand for each."""

pytestmark = pytest.mark.usefixtures("poison")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, M, N = shape
    c, weight, bias = random(B, M, dtype=dtype), random(N, M), random(N)
    found = modulation(c, weight, bias)
    assert found.dtype == torch.float32
    assert relative_error(found, c.double() @ weight.double().T + bias.double()) < FP32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_fp64(shape: tuple[int, int, int]) -> None:
    B, M, N = shape
    inputs = [each.requires_grad_() for each in (random(B, M), random(N, M), random(N))]
    dout = random(B, N)
    modulation(*inputs).backward(dout)
    truth = [each.detach().double().requires_grad_() for each in inputs]
    (truth[0] @ truth[1].T + truth[2]).backward(dout.double())
    for each, expected in zip(inputs, truth, strict=True):
        assert each.grad is not None
        assert expected.grad is not None
        assert each.grad.dtype == torch.float32
        assert relative_error(each.grad, expected.grad) < FP32


def test_a_bf16_condition_has_a_bf16_gradient() -> None:
    c, weight, dout = random(3, 20, dtype=torch.bfloat16), random(30, 20), random(3, 30)
    dc, dweight, dbias = modulation_backward(dout, c, weight)
    assert dc.dtype == torch.bfloat16
    assert dweight.dtype == dbias.dtype == torch.float32
    assert relative_error(dc, dout.double() @ weight.double()) < 1e-2
    assert relative_error(dweight, dout.double().T @ c.double()) < FP32


def test_an_image_has_the_same_bits_in_batches_of_one_tile() -> None:
    c, weight, bias = random(16, 48), random(40, 48), random(40)
    whole = modulation(c, weight, bias)
    assert torch.equal(modulation(c[3:10], weight, bias), whole[3:10])


def test_strides_do_not_matter() -> None:
    c, weight, bias = random(20, 3).T, random(20, 30).T, random(30, 2)[:, 0]
    assert torch.equal(modulation(c, weight, bias), modulation(*(each.contiguous() for each in (c, weight, bias))))
    dout = random(30, 3).T
    for found, expected in zip(
        modulation_backward(dout, c, weight),
        modulation_backward(dout.contiguous(), c.contiguous(), weight.contiguous()),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_is_registered_rightly() -> None:
    inputs = random(3, 6).requires_grad_(), random(5, 6).requires_grad_(), random(5).requires_grad_()
    torch.library.opcheck(torch.ops.dig.modulation.default, inputs)
    torch.library.opcheck(
        torch.ops.dig.modulation_backward.default,
        (random(3, 5), random(3, 6), random(5, 6)),
        test_utils=("test_schema", "test_faketensor"),
    )
