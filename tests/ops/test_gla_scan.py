"""The scan over chunks, both of its forms, against a loop in fp64: awkward sizes, both directions, extreme decays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig.ops.gla import launches
from dig.ops.gla.kernels import scan_kernel, short_scan_kernel
from dig.ops.launch import LaunchContext, launch_context
from dig.ops.tiles import INTERPRETER
from dig.ops.tiles.choices import GlaTiles
from tests.helpers import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TILES = replace(INTERPRETER.gla[32, 64, torch.float32], chunk=16, scan_steps=4, short_steps=2)
LIMIT = TILES.short_chunks


def inputs(entries: int, N: int, K: int, V: int, dtype: torch.dtype, strength: float) -> tuple[Tensor, Tensor]:
    """What chunks add, and sums of their decays that are NaN wherever nobody is to read them."""
    B, H, KP = 1, 2, max(16, 1 << (K - 1).bit_length())
    states = torch.randn(entries, B, H, N, K, V, device=DEVICE, dtype=dtype)
    sums = torch.full((B, H, N, TILES.chunk, KP), float("nan"), device=DEVICE)
    totals = -strength * torch.rand(B, H, N, K, device=DEVICE)
    totals[..., ::3] = 0.0
    totals[..., 1::3] = -900.0
    sums[..., -1, :K] = totals
    return states, sums.flatten(2, 3)


def scanned(tiles: GlaTiles, states: Tensor, sums: Tensor, direction: int) -> Tensor:
    """A copy, scanned."""
    _, B, H, N, K, V = states.shape
    v = torch.empty(B, N * tiles.chunk, H, V, device=DEVICE, dtype=states.dtype)
    q = torch.empty(*v.shape[:3], K, device=DEVICE, dtype=states.dtype)
    plan = launches.plan_of(q, v, 1.0, 1.0)
    copy = states.clone()
    with launch_context(states.device) as launch:
        launches.scan_states(launch, replace(plan, tiles=tiles), copy, sums, direction=direction)
    return copy


def expected(states: Tensor, sums: Tensor, direction: int) -> Tensor:
    """One chunk after the other; the second entry goes the other way."""
    N, K = states.shape[3:5]
    decays = sums.unflatten(2, (N, -1))[..., -1, :K].double().exp2().unsqueeze(-1)
    out = torch.empty_like(states, dtype=torch.float64)
    for entry, added in enumerate(states.double()):
        carry = torch.zeros_like(added[:, :, 0])
        places = range(N) if (direction + entry) % 2 == 0 else reversed(range(N))
        for n in places:
            out[entry, :, :, n] = carry
            carry = decays[:, :, n] * carry + added[:, :, n]
    return out


@pytest.fixture(autouse=True)
def chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "tiles_for", lambda q, v: TILES)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("K", "V", "N", "entries", "direction"),
    [
        (16, 64, 1, 1, 0),
        (36, 72, 2, 1, 1),
        (9, 72, 3, 2, 0),
        (5, 7, 4, 2, 1),
        (9, 36, 8, 1, 0),
        (3, 1, LIMIT - 1, 1, 0),
        (3, 72, LIMIT, 1, 1),
        (2, 72, LIMIT + 1, 2, 0),
    ],
)
def test_every_state_is_what_came_before(
    K: int, V: int, N: int, entries: int, direction: int, dtype: torch.dtype
) -> None:
    states, sums = inputs(entries, N, K, V, dtype, strength=2.0)
    truth = expected(states, sums, direction)
    for tiles in (replace(TILES, short_chunks=0), replace(TILES, short_chunks=N)):
        found = scanned(tiles, states, sums, direction)
        error = max(relative_error(one, other) for one, other in zip(found, truth, strict=True))
        # Before the first chunk there is nothing, and it is all that one chunk leaves.
        assert error < TOLERANCE[dtype] if N > 1 else not found.any()


@pytest.mark.parametrize("strength", [0.0, 1e-3, 140.0])
def test_decays_close_to_one_and_to_zero(strength: float) -> None:
    states, sums = inputs(1, 7, 6, 72, torch.float32, strength)
    for tiles in (TILES, replace(TILES, short_chunks=0)):
        assert relative_error(scanned(tiles, states, sums, 0), expected(states, sums, 0)) < TOLERANCE[torch.float32]


def test_few_chunks_take_the_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(LaunchContext, "start", lambda self, launch, *tensors: taken.append(launch.kernel))
    for N in (1, LIMIT, LIMIT + 1):
        scanned(TILES, *inputs(1, N, 16, 16, torch.float32, 1.0), 0)
    assert taken == [short_scan_kernel, short_scan_kernel, scan_kernel]


def test_two_runs_are_bit_identical() -> None:
    states, sums = inputs(2, 5, 36, 72, torch.bfloat16, 2.0)
    assert torch.equal(scanned(TILES, states, sums, 0), scanned(TILES, states, sums, 0))
