"""SwiGLU on Triton against its PyTorch reference in fp64, under Triton's interpreter where there is no GPU.

Every buffer that the operations allocate is filled with NaN first, so an element that no kernel writes cannot pass.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dig.ops.swiglu import fused, swiglu
from dig.ops.tiles.sm90 import SWIGLU
from tests.helpers import LARGE, relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = (1, 15, 63, 65, 4097) if LARGE else (1, 15, 63, 65)
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
DTYPES = (torch.float32, torch.bfloat16)

# exp of a gate far below 0 overflows, as it should; NumPy, under the interpreter, says so.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*overflow encountered in exp:RuntimeWarning"),
]


triton_swiglu = partial(swiglu, implementation="triton")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def run(function, gate_up: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output and gradient."""
    leaf = gate_up.detach().requires_grad_()
    output = function(leaf)
    return [output.detach(), *torch.autograd.grad(output, leaf, gradient)]


def assert_close(gate_up: Tensor) -> None:
    gradient = random(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype)
    actual = run(triton_swiglu, gate_up, gradient)
    assert all(value.dtype == gate_up.dtype for value in actual)
    expected = run(partial(swiglu, implementation="reference"), gate_up.double().cpu(), gradient.double().cpu())
    # Gates and values have a gradient each, which must not hide each other's errors.
    pairs = [(actual[0], expected[0]), *zip(actual[1].chunk(2, -1), expected[1].chunk(2, -1), strict=True)]
    found = [relative_error(a, e) for a, e in pairs]
    assert all(error < TOLERANCE[gate_up.dtype] for error in found), found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", LENGTHS)
def test_matches_fp64(T: int, B: int, dtype: torch.dtype) -> None:
    assert_close(random(B, T, 2 * 48, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("F", [1, 7, 1024, 2816, 3072])
def test_inner_widths(F: int, dtype: torch.dtype) -> None:
    assert_close(random(1, 9, 2 * F, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("F", [48, 1100, 2816])
def test_tiles_of_the_gpu(F: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "tiles_for", lambda gate_up: SWIGLU[gate_up.dtype])
    assert_close(random(1, 5, 2 * F, dtype=dtype))


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 4, 64)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    assert_close(random(*shape))


def test_slices_of_a_wider_projection_are_read_in_place() -> None:
    wide = random(2, 5, 3 * 64)
    assert_close(wide[..., 64:128])
    assert_close(wide[:, 2:3, 64:128])


def test_gradient_of_any_strides() -> None:
    gate_up = random(2, 5, 64)
    ones = torch.ones(2, 5, 32, device=DEVICE)
    expected = run(triton_swiglu, gate_up, ones)
    for gradient in (ones.transpose(1, 2).contiguous().transpose(1, 2), torch.ones((), device=DEVICE).expand(2, 5, 32)):
        for a, b in zip(run(triton_swiglu, gate_up, gradient), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype: torch.dtype) -> None:
    gate_up = random(1, 9, 2 * 48, dtype=dtype)
    choice = torch.randint(0, 3, gate_up[..., :48].shape, device=DEVICE)
    gate_up[..., :48] += ((choice - 1) * 1000).to(dtype)
    assert_close(gate_up)


def test_two_runs_are_bit_identical() -> None:
    gate_up, gradient = random(3, 65, 96, dtype=torch.bfloat16), random(3, 65, 48, dtype=torch.bfloat16)
    for a, b in zip(run(triton_swiglu, gate_up, gradient), run(triton_swiglu, gate_up, gradient), strict=True):
        assert torch.equal(a, b)


def test_operator_is_registered_soundly() -> None:
    """Schema, fake implementation and autograd registration, also with symbolic shapes."""
    torch.library.opcheck(torch.ops.dig.swiglu.default, (random(2, 5, 64).requires_grad_(),))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_into_one_graph(backend: str) -> None:
    gate_up, gradient = random(2, 5, 64, dtype=torch.bfloat16), random(2, 5, 32, dtype=torch.bfloat16)
    compiled = torch.compile(triton_swiglu, fullgraph=True, backend=backend)
    for a, b in zip(run(compiled, gate_up, gradient), run(triton_swiglu, gate_up, gradient), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_replays_the_same() -> None:
    gate_up, gradient = random(2, 130, 2048, dtype=torch.bfloat16), random(2, 130, 1024, dtype=torch.bfloat16)
    expected = run(triton_swiglu, gate_up, gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(triton_swiglu, gate_up, gradient)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


BAD_ARGUMENTS = {
    "gate_up must be (..., 2F), no dimension 0; got (4, 63)": lambda x: x[..., 1:],
    "gate_up must be (..., 2F), no dimension 0; got (64,)": lambda x: x[0],
    "gate_up must be (..., 2F), no dimension 0; got (0, 64)": lambda x: x[:0],
    "gate_up must be torch.float32 or torch.bfloat16; got torch.float16": lambda x: x.half(),
    "gate_up must be contiguous in its last dimension": lambda x: torch.cat((x, x), -1)[..., ::2],
    "gate_up must have its rows at one distance": lambda x: x.unflatten(0, (2, 2)).transpose(0, 1),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        triton_swiglu(BAD_ARGUMENTS[message](random(4, 64)))


def test_unknown_implementation_and_bad_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^implementation must be one of reference, triton; got 'apex'"):
        swiglu(random(4, 64), implementation="apex")
    with pytest.raises(ValueError, match=r"^columns must be a power of two; got 384"):
        replace(SWIGLU[torch.float32], columns=384)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_pass_rebuilds_hidden(dtype: torch.dtype) -> None:
    """What the next layer's weight gradient is made of is, bit for bit, what that layer read."""
    gate_up, gradient = random(2, 65, 96, dtype=dtype), random(2, 65, 48, dtype=dtype)
    expected = run(triton_swiglu, gate_up, gradient)
    dgate_up, hidden = fused.swiglu_backward(gate_up, gradient, True)
    assert torch.equal(hidden, expected[0])
    assert torch.equal(dgate_up, expected[1])
