"""Tensors of other dtypes and strides than DiG as a module usually has: read as they are, or refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import example, relative_error
from tests.ops.modules import CONFIG, DEVICE, _whole_fp32, model_of, twin_of  # noqa: F401 - a fixture is among them


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_that_the_kernels_do_not_take_is_refused_by_name(dtype: torch.dtype) -> None:
    model = model_of(replace(CONFIG, depth=1))
    x, t, y = example(model, 1)
    message = rf"backend 'triton' computes in fp32 and bf16, not in {str(dtype)[6:]}"
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(model).to(dtype)(x.to(dtype), t, y)
    if dtype == torch.float16:
        with torch.autocast(DEVICE, dtype=dtype), pytest.raises(ValueError, match=message):
            model(x, t, y)


def test_the_reference_takes_them() -> None:
    model = twin_of(model_of(replace(CONFIG, depth=1)))
    x, t, y = example(model)
    exact = copy.deepcopy(model).double()(x.double(), t, y)
    assert relative_error(model(x, t, y), exact) < 1e-5
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert relative_error(model(x, t, y), exact) < 2e-2
    halves = copy.deepcopy(model).half()(x.half(), t, y)
    assert halves.dtype == torch.float16
    assert relative_error(halves, exact) < 2e-2


@pytest.mark.parametrize("batch", [1, 2])
def test_weights_in_bf16(batch: int) -> None:
    """Without autocast, as for inference; no further from the truth than the reference, by half."""
    model = model_of()
    x, t, y = example(model, batch)
    with torch.no_grad():
        exact = twin_of(model)(x, t, y)
        rounded = twin_of(model).bfloat16()(x.bfloat16(), t, y)
        found = model.bfloat16()(x.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact) < 1.5 * relative_error(rounded, exact)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["blocks.0", "blocks.1.attn", "blocks.1.mlp.gate_proj", "blocks.1.adaLN_modulation"])
def test_results_of_any_strides_are_read_as_they_are(name: str, batch: int) -> None:
    model = model_of()
    inputs = example(model, batch)
    expected = model(*inputs)

    def turn(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        return output.transpose(0, -1).contiguous().transpose(0, -1)

    model.get_submodule(name).register_forward_hook(turn)
    with torch.set_grad_enabled(batch > 1):
        assert relative_error(model(*inputs), expected) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "name",
    ["t_embedder.mlp.2.bias", "blocks.0.dw_conv.bias", "blocks.0.norm1.weight", "blocks.0.attn.norm_weight"],
)
def test_strided_parameters_are_read_as_they_are(name: str, batch: int) -> None:
    model = model_of(replace(CONFIG, depth=1, variant="paper"))
    inputs = example(model, batch)
    with torch.no_grad():
        expected = model(*inputs)
        holder, _, leaf = name.rpartition(".")
        weight = model.get_parameter(name)
        strided = torch.stack([weight, torch.full_like(weight, 9.0)], -1)[..., 0]
        assert not strided.is_contiguous()
        setattr(model.get_submodule(holder), leaf, nn.Parameter(strided))
        assert relative_error(model(*inputs), expected) < 1e-5
