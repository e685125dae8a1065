"""Products around the kernels."""

from __future__ import annotations

import pytest
import torch

from dig.ops.linear import weight_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_has_the_dtype_of_the_weight(dtype: torch.dtype, given: torch.dtype) -> None:
    dy, x = (torch.randn(64, width, device=DEVICE).to(given) for width in (24, 40))
    found = weight_gradient(dy, x, dtype)
    assert (found.dtype, found.shape) == (dtype, (24, 40))
    torch.testing.assert_close(found.double(), dy.double().T @ x.double(), rtol=2e-2, atol=2e-2)
    assert weight_gradient(dy, x).dtype == torch.float32
