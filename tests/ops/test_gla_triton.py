"""The Triton kernels of gated linear attention against the step-by-step recurrence in fp64.

On a GPU at the full list of lengths; elsewhere under Triton's interpreter at short ones. Every buffer that the
operations allocate is filled with NaN first, so an element that no kernel writes cannot pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dig.ops.gla import gated_linear_attention, launches, recurrent_gla
from dig.ops.gla.block_reference import block_reference
from dig.ops.gla.tiled import gla_block, tiled_gla
from dig.ops.tiles import INTERPRETER
from tests.helpers import LARGE, relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = (1, 15, 63, 64, 65, 1000, 4096) if LARGE else (1, 15, 63, 64, 65, 130)
HEADS = 3 if LARGE else 1
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = ((32, 64), (36, 72))
BASE = INTERPRETER.gla[32, 64, torch.float32]


# Pairs of tokens that a kernel masks afterwards may overflow first; NumPy, under the interpreter, says so.
pytestmark = [
    pytest.mark.usefixtures("poison", "backward_form"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, backward_form: dict[str, Any]) -> int:
    tiles = replace(BASE, chunk=request.param, scan_groups=4, scan_steps=2, short_units=128, **backward_form)
    monkeypatch.setattr(launches, "tiles_for", lambda q, v: tiles)
    return request.param


def qkv(T: int, K: int = 32, V: int = 64, *, B: int = 1, H: int = HEADS, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(B, T, H, width, device=DEVICE, dtype=dtype) for width in (K, K, V)]


def decays(T: int, K: int = 32, *, B: int = 1, H: int = HEADS, dtype=torch.float32) -> Tensor:
    return (F.logsigmoid(torch.randn(B, T, H, K, device=DEVICE)) / 4).to(dtype)


def block_inputs(T: int, K: int = 32, V: int = 64, *, B: int = 1, H: int = HEADS, dtype=torch.float32) -> list[Tensor]:
    logits, g = (torch.randn(B, T, H, width, device=DEVICE, dtype=dtype) for width in (K, V))
    q, k, v = qkv(T, K, V, B=B, H=H, dtype=dtype)
    if T == 1:
        # One token has one score. Where its products cancel, as one draw in five has them, the rounding of q to bf16
        # is what is left of it.
        q, k = q.abs(), k.abs()
    return [q, k, v, logits, g, torch.randn(V, device=DEVICE, dtype=dtype)]


def run(function, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and every input's gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def errors(function, reference, inputs: list[Tensor]) -> list[float]:
    gradient = torch.randn_like(inputs[2])
    actual = run(function, inputs, gradient)
    for x, value in zip((inputs[2], *inputs), actual, strict=True):
        assert value.dtype == x.dtype
    # The reference gets the same numbers, rounded to bf16 where the inputs are, and computes in fp64.
    expected = run(reference, [x.double().cpu() for x in inputs], gradient.double().cpu())
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


def assert_close(function, reference, inputs: list[Tensor]) -> None:
    found = errors(function, reference, inputs)
    assert all(error < TOLERANCE[inputs[0].dtype] for error in found), found


def block(*inputs: Tensor) -> Tensor:
    return gla_block(*inputs, scale=0.2, eps=BLOCK_EPS)


def block_truth(*inputs: Tensor) -> Tensor:
    return block_reference(*inputs, scale=0.2, eps=BLOCK_EPS)


# With a small eps, the norm hides how large o is, so for T = 1 the gradients of q and k are 0 but for rounding.
BLOCK_EPS = 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", LENGTHS)
def test_recurrence_matches_fp64(T: int, dtype: torch.dtype) -> None:
    assert_close(tiled_gla, recurrent_gla, [*qkv(T, dtype=dtype), decays(T, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", LENGTHS)
def test_block_matches_fp64(T: int, dtype: torch.dtype) -> None:
    assert_close(block, block_truth, block_inputs(T, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", (65,) if not GPU else (63, 1000))
def test_heads_of_the_paper_variant(T: int, dtype: torch.dtype) -> None:
    assert_close(block, block_truth, block_inputs(T, 36, 72, dtype=dtype))
    assert_close(tiled_gla, recurrent_gla, [*qkv(T, 36, 72, dtype=dtype), decays(T, 36, dtype=dtype)])


# Compiled, chunks of 128 keep registers in memory beside asynchronous products: bench.ops.registers refuses that.
@pytest.mark.parametrize("chunk", [16, 32] if GPU else [16, 32, 128], indirect=True)
def test_other_chunk_lengths(chunk: int) -> None:
    T = 2 * chunk + 1
    assert_close(block, block_truth, block_inputs(T))
    assert_close(tiled_gla, recurrent_gla, [*qkv(T), decays(T)])


@pytest.mark.parametrize("chunk", [16], indirect=True)
def test_scan_longer_than_its_block(chunk: int) -> None:
    """More chunks than the scan takes in a round, which is 8 here: two whole rounds, and one in part."""
    T = 18 * chunk + 5
    inputs = [*qkv(T, 16, 16, H=1), decays(T, 16, H=1) / 64]
    assert_close(tiled_gla, recurrent_gla, inputs)


def test_mixed_dtypes() -> None:
    """Decays in fp32 beside bf16 operands, as autocast leaves them, and an fp32 norm weight."""
    T = 65
    assert_close(tiled_gla, recurrent_gla, [*qkv(T, dtype=torch.bfloat16), decays(T)])
    inputs = block_inputs(T, dtype=torch.bfloat16)
    inputs[3], inputs[5] = inputs[3].float(), inputs[5].float()
    assert_close(block, block_truth, inputs)


def test_slices_of_a_fused_projection_are_read_in_place() -> None:
    B, T, H, K, V = 2, 65, 2, 32, 64
    fused = torch.randn(B, T, H * (2 * K + 2 * V), device=DEVICE)
    inputs = [x.unflatten(-1, (H, -1)) for x in fused.split([H * K, H * K, H * V, H * V], -1)]
    q, k, v, g = inputs
    assert not q.is_contiguous()
    logits, weight = torch.randn(B, T, H, K, device=DEVICE), torch.randn(V, device=DEVICE)
    assert_close(block, block_truth, [q, k, v, logits, g, weight])
    assert_close(tiled_gla, recurrent_gla, [q, k, v, F.logsigmoid(logits)])


def test_gradient_of_any_strides() -> None:
    inputs = [*qkv(17), decays(17)]
    leaves = [x.requires_grad_() for x in inputs]
    expanded = torch.autograd.grad(tiled_gla(*leaves).sum(), leaves)
    gradient = torch.ones_like(inputs[2])
    for a, b in zip(expanded, run(tiled_gla, inputs, gradient)[1:], strict=True):
        assert torch.equal(a, b)
    transposed = torch.ones_like(inputs[2]).transpose(1, 3).contiguous().transpose(1, 3)
    for a, b in zip(run(tiled_gla, inputs, transposed), run(tiled_gla, inputs, gradient), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gate_logits_mixed_within_a_chunk(dtype: torch.dtype) -> None:
    T = 80
    inputs = block_inputs(T, dtype=dtype)
    choice = torch.randint(0, 3, inputs[3].shape, device=DEVICE)
    inputs[3] = torch.where(choice == 0, 1000.0, torch.where(choice == 1, -1000.0, inputs[3].float())).to(dtype)
    assert_close(block, block_truth, inputs)


@pytest.mark.parametrize("logit", [1000.0, -1000.0])
def test_all_gate_logits_extreme(logit: float) -> None:
    inputs = block_inputs(80)
    inputs[3].fill_(logit)
    output, dq, dk, dv, _, *rest = errors(block, block_truth, inputs)
    assert max(output, dq, dk, dv, *rest) < TOLERANCE[torch.float32]
    # Nothing can flow through gates that are all open or all shut, and nothing does.
    assert not run(block, inputs, torch.randn_like(inputs[2]))[4].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strongest_decay_that_is_not_clamped(dtype: torch.dtype) -> None:
    """Every token at -9.99: factors up to e^80 inside a group of 16, with operands well above 1."""
    q, k, v = qkv(70, dtype=dtype)
    inputs = [10 * q, 10 * k, v, torch.full_like(q, -9.99)]
    output, dq, dk, dv, _ = errors(tiled_gla, recurrent_gla, inputs)
    assert max(output, dq, dk, dv) < TOLERANCE[dtype]


def test_decay_below_the_least_counts_as_the_least() -> None:
    q, k, v = qkv(70)
    log_decay = -20 * torch.rand_like(q)
    clamped = lambda q, k, v, d: recurrent_gla(q, k, v, d.clamp_min(-10))  # noqa: E731
    assert_close(tiled_gla, clamped, [q, k, v, log_decay])


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_memory(dtype: torch.dtype) -> None:
    """Gates near 1: a token is still there at the end of the sequence, and roundings do not add up."""
    T = 16384 if LARGE else 520
    inputs = [*qkv(T, 16, 16, H=1, dtype=dtype), torch.full((1, T, 1, 16), -1.0 / T, device=DEVICE)]
    assert_close(tiled_gla, recurrent_gla, inputs)


def test_two_runs_are_bit_identical() -> None:
    inputs = block_inputs(130, dtype=torch.bfloat16)
    gradient = torch.randn_like(inputs[2])
    for a, b in zip(run(block, inputs, gradient), run(block, inputs, gradient), strict=True):
        assert torch.equal(a, b)


def test_is_an_implementation_of_gated_linear_attention() -> None:
    inputs = [*qkv(20), decays(20)]
    output = gated_linear_attention(*inputs, implementation="triton")
    assert relative_error(output, recurrent_gla(*inputs)) < 1e-5


def test_operators_are_registered_soundly() -> None:
    """Schema, fake implementation and autograd registration, also with symbolic shapes."""
    recurrence = [x.requires_grad_() for x in (*qkv(20, 16, 16, H=1), decays(20, 16, H=1))]
    torch.library.opcheck(torch.ops.dig.gla.default, recurrence)
    whole = [x.requires_grad_() for x in block_inputs(20, 16, 16, H=1)]
    torch.library.opcheck(torch.ops.dig.gla_block.default, (*whole, 0.2, 16.0, 0.1, True))


BAD_ARGUMENTS = {
    "q must be (B, T, H, width)": {"q": lambda x: x[0]},
    "q must be torch.float32 or torch.bfloat16": {"q": lambda x: x.half()},
    "q must have heads of at most 64": {
        name: lambda x: F.pad(x, (0, 200 - x.shape[-1])) for name in ("q", "k", "log_decay")
    },
    "k must have shape": {"k": lambda x: x[:, 1:]},
    "k must be torch.float32; got torch.bfloat16": {"k": lambda x: x.bfloat16()},
    "k must be contiguous in its last dimension": {"k": lambda x: torch.cat((x, x), -1)[..., ::2]},
    "k must be on q's device": {"k": lambda x: x.to("meta")},
    "v must be (B, T, H, width)": {"v": lambda x: x[..., :0]},
    "v must have shape": {"v": lambda x: x[:, :, :0]} | {"v": lambda x: torch.cat((x, x), 2)},
    "log_decay must have shape": {"log_decay": lambda x: x[..., 1:]},
    "log_decay must be torch.float32; got torch.float64": {"log_decay": lambda x: x.double()},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message: str) -> None:
    arguments = dict(zip(("q", "k", "v", "log_decay"), (*qkv(4), decays(4)), strict=True))
    for name, change in BAD_ARGUMENTS[message].items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        tiled_gla(**arguments)


def test_bad_block_arguments_are_named() -> None:
    names = ("q", "k", "v", "gate_logits", "g", "norm_weight")
    good = dict(zip(names, block_inputs(4), strict=True))
    for name in ("gate_logits", "g", "norm_weight"):
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            gla_block(**good | {name: good[name][..., 1:]}, scale=1.0)
        with pytest.raises(ValueError, match=f"^{name} must be torch"):
            gla_block(**good | {name: good[name].double()}, scale=1.0)
    with pytest.raises(ValueError, match=r"^gate_normalizer must be more than 0"):
        gla_block(**good, scale=1.0, gate_normalizer=0.0)
    with pytest.raises(ValueError, match=r"^chunk must be 16 times a power of two"):
        replace(BASE, chunk=48)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_into_one_graph(backend: str) -> None:
    inputs = block_inputs(20, dtype=torch.bfloat16)
    gradient = torch.randn_like(inputs[2])
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for a, b in zip(run(compiled, inputs, gradient), run(block, inputs, gradient), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_replays_the_same() -> None:
    inputs = block_inputs(130, dtype=torch.bfloat16)
    gradient = torch.randn_like(inputs[2])
    expected = run(block, inputs, gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(block, inputs, gradient)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
