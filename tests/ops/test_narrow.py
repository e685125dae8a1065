"""A product with a few columns against fp64; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from dig import raster_block
from dig.ops.narrow import narrow_product
from tests.helpers import LARGE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(1, 1, 1), (33, 130, 16), (100, 384, 17)] + ([(4096, 1152, 16)] if LARGE else [])

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_writes_its_columns_and_no_others(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, D, N = shape
    x = torch.randn(M, D + 3, device=DEVICE).to(dtype)[:, :D]
    weight = torch.randn(N + 5, D, device=DEVICE).to(dtype)[5:]
    out = torch.full((M + 1, N + 8), float("nan"), dtype=dtype, device=DEVICE)
    narrow_product(x, weight, out[:M, 8:])
    assert relative_error(out[:M, 8:], x.double() @ weight.double().T) < TOLERANCE[dtype]
    assert out[:, :8].isnan().all()
    assert out[M].isnan().all()


@pytest.mark.parametrize("shape", [(2, 33, 48), *([(1, 4096, 1152)] if LARGE else [])], ids=str)
def test_a_projection_in_two_products(shape: tuple[int, int, int]) -> None:
    h = torch.randn(*shape, device=DEVICE).bfloat16()
    weight = torch.randn(3 * shape[-1] + 16, shape[-1], device=DEVICE).bfloat16()
    found = raster_block._project(h, weight, 16)
    assert found.shape == (*shape[:-1], len(weight))
    assert relative_error(found, h.double() @ weight.double().T) < TOLERANCE[torch.bfloat16]


def test_what_does_not_fit_is_named() -> None:
    x, weight, out = (torch.zeros(*shape, device=DEVICE) for shape in ((4, 8), (2, 8), (4, 2)))
    with pytest.raises(ValueError, match=r"weight must be \(N, 8\)"):
        narrow_product(x, weight[:, :7], out)
    with pytest.raises(ValueError, match="N from 1 to 64"):
        narrow_product(x, torch.zeros(65, 8, device=DEVICE), torch.zeros(4, 65, device=DEVICE))
    with pytest.raises(ValueError, match=r"out must be \(4, 2\)"):
        narrow_product(x, weight, out.bfloat16())
    with pytest.raises(ValueError, match="x must be contiguous in its last dimension"):
        narrow_product(torch.zeros(8, 4, device=DEVICE).T, weight, out)


def test_the_operation_is_registered_rightly() -> None:
    arguments = tuple(torch.zeros(*shape, device=DEVICE) for shape in ((4, 8), (2, 8), (4, 2)))
    torch.library.opcheck(narrow_product, arguments, test_utils=("test_schema", "test_faketensor"))
