"""The forward pass by segments of chunks against the recurrence in fp64, and against three launches a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dig.ops.gla import block_launches, launches, layouts
from dig.ops.gla.block_launches import run_block
from dig.ops.gla.kernels import local_state_kernel, scan_kernel, short_scan_kernel
from dig.ops.gla.kernels_walk import segment_state_kernel, walk_kernel
from dig.ops.launch import LaunchContext
from dig.scan import ScanOrder
from tests.helpers import relative_error
from tests.ops.test_gla_mixer import BOUNDS, DEVICE, ORDERS, arguments
from tests.ops.test_gla_walk import EPS, NEVER, block_errors, block_inputs, mixed, tiles, truth

# NumPy, under the interpreter, says so where an exponent of rows that aren't taken overflows.
pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

assert tiles  # A fixture.
SEGMENTS = NEVER | {"segment_programs": 1}


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each forward pass by segments, how many there were."""
    taken: list[int] = []

    def starts(launch: LaunchContext, plan: launches.Plan, rows: layouts.Rows) -> torch.Tensor:
        taken.append(plan.segments)
        return launches.segment_starts(launch, plan, rows)

    monkeypatch.setattr(block_launches, "segment_starts", starts)
    return taken


@pytest.mark.parametrize(
    ("grid", "heads", "key_width", "dtype", "batch", "order", "chunk", "segment"),
    [
        # 6 chunks of 16 in segments of 2, 4 and 1, of which the second leaves the last one half empty.
        ((9, 10), 1, 36, torch.float32, 2, ORDERS[0], 16, 2),
        ((9, 10), 2, 32, torch.bfloat16, 1, ORDERS[3], 16, 4),
        ((9, 10), 1, 16, torch.float32, 1, ORDERS[1], 16, 1),
        # 5 chunks of 32: the last segment has one token of one chunk.
        ((3, 43), 1, 9, torch.float32, 1, ORDERS[2], 32, 4),
        ((12, 16), 1, 32, torch.bfloat16, 1, ORDERS[1], 64, 2),
    ],
)
def test_output_and_every_gradient(
    grid: tuple[int, int], heads: int, key_width: int, dtype: torch.dtype, batch: int, order: ScanOrder, chunk: int,
    segment: int, tiles: Callable[..., None], segments: list[int],
) -> None:  # fmt: skip
    inputs = arguments(grid, heads, key_width, dtype, batch)
    tiles(chunk, **SEGMENTS, segment_chunks=segment)
    found = mixed(inputs, heads, grid, order)
    again = mixed(inputs, heads, grid, order)
    assert segments == [-(-grid[0] * grid[1] // (chunk * segment))] * 4
    tiles(chunk, **NEVER)
    other = mixed(inputs, heads, grid, order)
    assert torch.equal(found[0], found[1])
    for actual, same, expected, apart in zip(found, again, truth(inputs, heads, grid, order), other, strict=True):
        assert torch.equal(actual, same)
        assert relative_error(actual, expected) < BOUNDS[dtype]
        assert relative_error(actual, apart.double()) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_strong_decays_beside_weak_ones(dtype: torch.dtype, tiles: Callable[..., None], segments: list[int]) -> None:
    """Chunks that the walk takes in several steps, and totals over a segment that end in zero."""
    tiles(32, **SEGMENTS, segment_chunks=2)
    inputs = block_inputs(150, 20, 24, dtype)
    choice = torch.randint(0, 3, inputs[3].shape, device=DEVICE)
    logits = torch.where(choice == 0, 1000.0, torch.where(choice == 1, -1000.0, inputs[3].float()))
    logits[:, 96:] = inputs[3][:, 96:].float()
    logits[:, 100:106, :, :3] = -1000.0
    inputs[3] = logits.to(dtype)
    assert block_errors(inputs) < BOUNDS[dtype]
    assert segments == [3]


def test_what_is_far_in_the_past_counts(tiles: Callable[..., None], segments: list[int]) -> None:
    """Without decays the first token's value is in every output, whatever segment that is in."""
    tiles(16, **SEGMENTS, segment_chunks=2)
    inputs = block_inputs(16 * 9, 16, 16, torch.float32)
    inputs[3].fill_(1000.0)
    assert block_errors(inputs) < BOUNDS[torch.float32]
    assert segments == [5]


def kernels_of(monkeypatch: pytest.MonkeyPatch, B: int, H: int, T: int) -> list[tuple[Any, tuple[int, ...]]]:
    """What the forward pass launches, each with its programs."""
    found: list[tuple[Any, tuple[int, ...]]] = []
    monkeypatch.setattr(
        LaunchContext, "start", lambda self, launch, *tensors: found.append((launch.kernel, launch.grid))
    )
    q, v = (torch.empty(B, T, H, 16, device=DEVICE) for _ in range(2))
    plan = launches.plan_of(q, v, 1.0, 1.0)
    run_block(plan, q, q, v, layouts.DecayGate(values=q, logits=True), v, v[0, 0, 0], EPS, False)
    return found


def test_segments_are_taken_where_they_are_enough(monkeypatch: pytest.MonkeyPatch, tiles: Callable[..., None]) -> None:
    tiles(16, walk_chunks=2, walk_programs=1, segment_chunks=2, segment_programs=12)
    # 5 chunks are 3 segments, and 4 heads of those 12 programs.
    (states, _, (walk, programs)) = kernels_of(monkeypatch, 2, 2, 65)
    assert states == (segment_state_kernel, (2, 3, 2))
    assert (walk, programs) == (walk_kernel, (2, 3, 2))
    for few in ((1, 3, 65), (2, 1, 40)):
        assert kernels_of(monkeypatch, *few)[0][0] is local_state_kernel
    # Up to two chunks a head is walked in one launch.
    assert [kernel for kernel, _ in kernels_of(monkeypatch, 2, 2, 32)] == [walk_kernel]


def test_few_segments_take_the_short_scan(monkeypatch: pytest.MonkeyPatch, tiles: Callable[..., None]) -> None:
    tiles(16, **SEGMENTS, short_chunks=3, segment_chunks=2)
    scans = [kernels_of(monkeypatch, 1, 1, T)[1][0] for T in (96, 97)]
    assert scans == [short_scan_kernel, scan_kernel]
