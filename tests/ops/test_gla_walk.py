"""The forward pass in one launch against the recurrence in fp64, and against the three launches that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dig.ops.gla import launches, layouts, mixer
from dig.ops.gla.block_launches import run_block, run_rows, run_rows_backward
from dig.ops.gla.block_reference import block_reference
from dig.ops.gla.kernels_walk import walk_kernel
from dig.ops.gla.mixer import gla_mixer
from dig.ops.gla.tiled import gla_block
from dig.ops.launch import LaunchContext
from dig.ops.tiles import INTERPRETER
from dig.scan import ScanOrder
from tests.helpers import relative_error
from tests.ops.test_gla_mixer import BOUNDS, DEVICE, ORDERS, arguments, expected_output

# NumPy, under the interpreter, says so where an exponent of rows that aren't taken overflows.
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

EPS = 0.1
BASE = INTERPRETER.gla[32, 64, torch.float32]
ALWAYS = {"walk_chunks": 100, "walk_programs": 0}
NEVER = {"walk_chunks": 0}


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets a call's tile choices."""

    def use(chunk: int = 32, **choices: int) -> None:
        found = replace(BASE, chunk=chunk, **choices)
        monkeypatch.setattr(launches, "tiles_for", lambda q, v: found)

    return use


def mixed(inputs: list[Tensor], heads: int, grid: tuple[int, int], order: ScanOrder) -> list[Tensor]:
    """Output without gradients; output with, and every gradient."""
    settings = {"heads": heads, "grid": grid, "order": order, "eps": EPS}
    with torch.no_grad():
        alone = gla_mixer(*inputs, **settings)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = gla_mixer(*leaves, **settings)
    torch.manual_seed(1)
    return [alone, y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def truth(inputs: list[Tensor], heads: int, grid: tuple[int, int], order: ScanOrder) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    y = expected_output(*leaves, heads=heads, grid=grid, order=order, eps=EPS)
    torch.manual_seed(1)
    gradient = torch.randn_like(y, dtype=inputs[0].dtype).double()
    return [y.detach(), y.detach(), *torch.autograd.grad(y, leaves, gradient)]


@pytest.mark.parametrize(
    ("grid", "heads", "key_width", "dtype", "batch", "order", "chunk"),
    [
        ((3, 7), 1, 36, torch.float32, 2, ORDERS[0], 16),
        ((5, 7), 2, 32, torch.bfloat16, 1, ORDERS[3], 32),
        ((1, 1), 1, 32, torch.float32, 1, ORDERS[0], 16),
        ((8, 9), 1, 36, torch.bfloat16, 1, ORDERS[1], 64),
        ((8, 8), 1, 9, torch.float32, 1, ORDERS[2], 32),
    ],
)
def test_output_and_every_gradient(
    grid: tuple[int, int], heads: int, key_width: int, dtype: torch.dtype, batch: int, order: ScanOrder, chunk: int,
    tiles: Callable[..., None],
) -> None:  # fmt: skip
    """Beside fp64; and the three launches come to the same within rounding."""
    inputs = arguments(grid, heads, key_width, dtype, batch)
    tiles(chunk, **ALWAYS)
    found = mixed(inputs, heads, grid, order)
    tiles(chunk, **NEVER)
    other = mixed(inputs, heads, grid, order)
    assert torch.equal(found[0], found[1])
    for actual, expected, apart in zip(found, truth(inputs, heads, grid, order), other, strict=True):
        assert relative_error(actual, expected) < BOUNDS[dtype]
        assert relative_error(actual, apart.double()) < BOUNDS[dtype]


def block_inputs(T: int, K: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    widths = (K, K, V, K, V)
    tensors = [torch.randn(1, T, 1, width, device=DEVICE, dtype=dtype) for width in widths]
    return [*tensors, torch.randn(V, device=DEVICE, dtype=dtype)]


def block_errors(inputs: list[Tensor]) -> float:
    """The worst of output and states' use: output, and gradients, which read the states that were kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = gla_block(*leaves, scale=0.2, eps=EPS), block_reference(*wide, scale=0.2, eps=EPS)
    gradient = torch.randn_like(y)
    pairs = zip(
        (y, *torch.autograd.grad(y, leaves, gradient)),
        (expected, *torch.autograd.grad(expected, wide, gradient.double())),
        strict=True,
    )
    return max(relative_error(a, e) for a, e in pairs)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_strong_decays_mixed_with_none_within_a_chunk(dtype: torch.dtype, tiles: Callable[..., None]) -> None:
    """Chunks that take several steps, some of them cut short in the middle, beside ones that take one."""
    tiles(64, **ALWAYS)
    inputs = block_inputs(150, 20, 24, dtype)
    choice = torch.randint(0, 3, inputs[3].shape, device=DEVICE)
    logits = torch.where(choice == 0, 1000.0, torch.where(choice == 1, -1000.0, inputs[3].float()))
    # The first chunk is strong from end to end, the second in three channels at two places, the third nowhere.
    logits[:, 64:] = inputs[3][:, 64:].float()
    logits[:, 64:70, :, :3] = -1000.0
    logits[:, 100:106, :, :3] = -1000.0
    inputs[3] = logits.to(dtype)
    assert block_errors(inputs) < BOUNDS[dtype]


@pytest.mark.parametrize("logit", [1000.0, -1000.0, -155.0])
def test_all_decays_extreme(logit: float, tiles: Callable[..., None]) -> None:
    """None; the strongest, with factors up to e^80 and operands well above 1; and just below the clamp."""
    tiles(32, **ALWAYS)
    inputs = block_inputs(40, 16, 16, torch.float32)
    inputs[0] *= 10
    inputs[1] *= 10
    inputs[3].fill_(logit)
    leaves = [x.detach().double() for x in inputs]
    with torch.no_grad():
        found = gla_block(*inputs, scale=0.2, eps=EPS)
    assert relative_error(found, block_reference(*leaves, scale=0.2, eps=EPS)) < BOUNDS[torch.float32]


def test_slices_of_fused_projections_and_fp32_decays_are_read_in_place(tiles: Callable[..., None]) -> None:
    tiles(16, **ALWAYS)
    q, k, v, logits, g, weight = block_inputs(20, 16, 16, torch.bfloat16)
    fused = torch.cat((q, k, v, g), 2)
    q, k, v, g = fused.split(1, 2)
    assert not q.is_contiguous()
    assert block_errors([q, k, v, logits.float(), g, weight.float()]) < BOUNDS[torch.bfloat16]


def launched(monkeypatch: pytest.MonkeyPatch, B: int, H: int, T: int) -> int:
    """How many kernels the forward pass launches."""
    kernels = []
    monkeypatch.setattr(LaunchContext, "start", lambda self, launch, *tensors: kernels.append(launch.kernel))
    q, v = (torch.empty(B, T, H, 16, device=DEVICE) for _ in range(2))
    gate = layouts.DecayGate(values=q, logits=True)
    plan = launches.plan_of(q, v, 1.0, 1.0)
    run_block(plan, q, q, v, gate, v, v[0, 0, 0], EPS, False)
    assert (walk_kernel in kernels) == (len(kernels) == 1)
    return len(kernels)


def test_many_heads_of_few_chunks_take_one_launch(monkeypatch: pytest.MonkeyPatch, tiles: Callable[..., None]) -> None:
    tiles(16, walk_chunks=4, walk_programs=3)
    # 4 chunks are walked by 12 programs, not by 11; one chunk by any number; 5 chunks by none.
    taken = [launched(monkeypatch, *sizes) for sizes in ((6, 2, 64), (11, 1, 64), (1, 1, 16), (20, 2, 65))]
    assert taken == [1, 3, 1, 3]
    tiles(16, **NEVER)
    assert launched(monkeypatch, 20, 2, 16) == 3


def test_few_programs_take_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = replace(BASE, chunk=32, few=replace(BASE, chunk=16), few_programs=6)
    monkeypatch.setattr(launches, "for_device", lambda device: SimpleNamespace(gla_tiles=lambda *sizes: chosen))

    def chunk(B: int, T: int, H: int) -> int:
        q, v = (torch.empty(B, T, H, 16, device=DEVICE) for _ in range(2))
        plan = launches.plan_of(q, v, 1.0, 1.0)
        assert -(-T // plan.tiles.chunk) == plan.N == launches.empty_states(q, v).shape[3]
        return plan.tiles.chunk

    assert [chunk(1, 64, 3), chunk(1, 65, 3), chunk(3, 32, 2), chunk(3, 33, 2)] == [16, 32, 16, 32]


def test_a_backward_pass_takes_the_chunks_of_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = replace(BASE, chunk=32, few=replace(BASE, chunk=16), few_programs=100)
    monkeypatch.setattr(launches, "for_device", lambda device: SimpleNamespace(gla_tiles=lambda *sizes: chosen))
    taken: list[int] = []

    def recorder(run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(plan: launches.Plan, *rest: Any) -> Any:
            taken.append(plan.tiles.chunk)
            return run(plan, *rest)

        return recorded

    monkeypatch.setattr(mixer, "run_rows", recorder(run_rows))
    monkeypatch.setattr(mixer, "run_rows_backward", recorder(run_rows_backward))
    tensors = [tensor.requires_grad_() for tensor in arguments((4, 12), 1, 16, torch.float32)]
    y, states = mixer.mixer_forward(*tensors, 1, 4, 12, 0, EPS, True)
    assert states.shape[3] == 3
    y.sum().backward()
    assert taken == [16, 16]


def test_without_gradients_nothing_is_kept(tiles: Callable[..., None]) -> None:
    projected, decay_weight, decay_bias, norm = arguments((3, 5), 1, 16, torch.float32)
    forward = torch.ops.dig.gla_mixer
    for choices in (ALWAYS, NEVER):
        tiles(16, **choices)
        y, states = forward(projected, decay_weight, decay_bias, norm, 1, 3, 5, 0, EPS, False)
        kept, with_states = forward(projected, decay_weight, decay_bias, norm, 1, 3, 5, 0, EPS, True)
        assert torch.equal(y, kept)
        assert (states.numel(), with_states.numel()) == (0, 16 * 32)
        torch.library.opcheck(forward.default, (projected, decay_weight, decay_bias, norm, 1, 3, 5, 0, EPS, False))
    with pytest.raises(ValueError, match=r"^keep must be True where gradients are recorded"):
        forward(projected.requires_grad_(), decay_weight, decay_bias, norm, 1, 3, 5, 0, EPS, False)


def test_two_runs_are_bit_identical(tiles: Callable[..., None]) -> None:
    tiles(16, **ALWAYS)
    inputs = arguments((2, 9), 1, 36, torch.bfloat16)
    for a, b in zip(mixed(inputs, 1, (2, 9), ORDERS[1]), mixed(inputs, 1, (2, 9), ORDERS[1]), strict=True):
        assert torch.equal(a, b)
