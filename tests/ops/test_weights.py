"""What is done to weights before their products, against fp64; under Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig.ops.tiles import INTERPRETER
from dig.ops.tiles.choices import CopyTiles
from dig.ops.weights import gated_weight_gradient, matrix_vector, matrix_vectors, prepare_weights
from tests.helpers import LARGE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (7, 5), (16, 513), (101, 384)] + ([(6912, 1152)] if LARGE else [])
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.usefixtures("poison")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_times_vector(shape: tuple[int, int], dtype: torch.dtype) -> None:
    N, M = shape
    weight, vector, bias = random(N, M, dtype=dtype), random(M, dtype=torch.bfloat16), random(N, dtype=dtype)
    found = matrix_vector(weight, vector, bias)
    assert found.dtype == dtype
    assert relative_error(found, weight.double() @ vector.double() + bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_with_and_without_gates(shape: tuple[int, int]) -> None:
    N, M = shape
    weights, gate = [random(M, 3), random(N, M), random(N, M)], random(N)
    plain, also_plain, gated = prepare_weights(weights, [gate], torch.bfloat16)
    assert torch.equal(plain, weights[0].bfloat16())
    assert torch.equal(also_plain, weights[1].bfloat16())
    assert torch.equal(gated, (gate[:, None] * weights[2]).bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_a_gated_weight(shape: tuple[int, int]) -> None:
    N, M = shape
    product, weight, gate = random(N, M), random(N, M), random(N)
    dweight, dgate = gated_weight_gradient(product, weight, gate)
    assert relative_error(dweight, gate.double()[:, None] * product.double()) < 1e-6
    assert relative_error(dgate, (weight.double() * product.double()).sum(1)) < 1e-4


def test_layers_together_give_the_bits_of_each_alone() -> None:
    weights, vector, biases = [random(70, 300) for _ in range(5)], random(300), [random(70) for _ in range(5)]
    for found, weight, bias in zip(matrix_vectors(weights, vector, biases), weights, biases, strict=True):
        assert torch.equal(found, matrix_vector(weight, vector, bias))
    with pytest.raises(ValueError, match="of one shape and dtype"):
        matrix_vectors([*weights, random(3, 300)], vector, biases)


def test_strides_do_not_matter() -> None:
    def apart(tensor: Tensor) -> Tensor:
        return tensor.T.contiguous().T if tensor.dim() == 2 else torch.stack([tensor, tensor], 1)[:, 0]

    weight, product, vector, gate = random(7, 5), random(7, 5), random(5), random(7)
    for operation, arguments in (
        (matrix_vector, (weight, vector, gate)),
        (gated_weight_gradient, (product, weight, gate)),
    ):
        for found, expected in zip(operation(*map(apart, arguments)), operation(*arguments), strict=True):
            assert torch.equal(found, expected)
    (copy,) = prepare_weights([apart(weight)], [apart(gate)], torch.bfloat16)
    assert torch.equal(copy, (gate[:, None] * weight).bfloat16())


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_the_number_of_programs_does_not_matter(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gate, vector, bias = [random(40, 8), random(70, 300), random(9, 300)], random(9), random(300), random(70)
    few = replace(INTERPRETER.weights, copy_few=CopyTiles(elements=1024, warps=4))
    monkeypatch.setattr("dig.ops.weights.for_device", lambda device: replace(INTERPRETER, weights=few))
    for found, expected in zip(
        prepare_weights(weights, [gate], torch.bfloat16, programs),
        prepare_weights(weights, [gate], torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(found, expected)
    found = matrix_vector(weights[1], vector, bias, programs)
    assert torch.equal(found, matrix_vector(weights[1], vector, bias))


def test_operations_are_registered_rightly() -> None:
    checks = ("test_schema", "test_faketensor")
    layers = [random(5, 3), random(5, 3)], random(3), [random(5), random(5)]
    torch.library.opcheck(matrix_vectors.registered, layers, test_utils=checks)
    torch.library.opcheck(prepare_weights.registered, ([random(5, 3)], [random(5)], torch.bfloat16), test_utils=checks)
    torch.library.opcheck(gated_weight_gradient.registered, (random(5, 3), random(5, 3), random(5)), test_utils=checks)
