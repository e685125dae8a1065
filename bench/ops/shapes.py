"""Whether a model's step takes at every shape what its neighbours let expect: no choice that fits one shape alone.

    python -m bench ops shapes                                                # DiG-S/2, both variants, both modes
    python -m bench ops shapes --models DiG-XL/2:triton --modes forward --batches 1,4,5

Three comparisons for each model and mode. Batches of one image size; grids of about as many tokens, square or not, even
or odd; patch sides at equal tokens. All steps of a comparison are CUDA graphs that take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.cases.case import Case
from bench.ops.turns import append_row, in_turns
from dig.spec import VAE_FACTOR

Comparison = Literal["batch", "grid", "patch"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One step.

    Attributes:
        case: Model, options, patch, batch and mode; its resolution is the grid's larger side.
        grid: Rows and columns of tokens.
    """

    case: Case
    grid: tuple[int, int]

    @property
    def work(self) -> int:
        """Tokens of all images."""
        return self.case.batch * self.grid[0] * self.grid[1]

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.grid[0] * self.case.patch, self.grid[1] * self.case.patch

    def name(self, comparison: Comparison) -> str:
        """What it has of its own in a comparison: ``33 images``, ``15 x 17``, ``patch 4``."""
        rows, columns = self.grid
        return {
            "batch": f"{self.case.batch} images",
            "grid": f"{rows} x {columns}",
            "patch": f"patch {self.case.patch}",
        }[comparison]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A shape's time beside what its neighbours let expect.

    Attributes:
        shape: It.
        comparison: Within which.
        ms: Milliseconds a step.
        expected_ms: By `expected`, of the others of the comparison.
    """

    shape: Shape
    comparison: Comparison
    ms: float
    expected_ms: float

    @property
    def ratio(self) -> float:
        """Times as long as expected."""
        return self.ms / self.expected_ms


def with_patch(case: Case, patch: int, grid: tuple[int, int]) -> Shape:
    """A case's step with another patch side, on this grid of tokens."""
    stem = case.model.rpartition("/")[0]
    side = max(grid) * patch * VAE_FACTOR
    return Shape(case=replace(case, model=f"{stem}/{patch}", resolution=side), grid=grid)


def shapes_of(
    case: Case, *, batches: Sequence[int], grids: Iterable[tuple[int, int]], patches: Sequence[int]
) -> dict[Comparison, list[Shape]]:
    """The comparisons of a case, whose resolution gives a square of n tokens a side.

    Args:
        case: One image, as a CUDA graph.
        batches: Images a step, three or more.
        grids: Rows and columns of tokens, beside the squares of n - 1, n and n + 1 a side.
        patches: Sides, two or more; each with a square of n tokens a side.
    """
    n = case.resolution // (VAE_FACTOR * case.patch)
    squares = [(side, side) for side in (n - 1, n, n + 1) if side]
    wanted = dict.fromkeys([*squares, *grids])
    return {
        "batch": [Shape(case=replace(case, batch=batch), grid=(n, n)) for batch in batches],
        "grid": [with_patch(case, case.patch, grid) for grid in wanted],
        "patch": [with_patch(case, patch, (n, n)) for patch in patches],
    }


def expected(work: float, others: Iterable[tuple[float, float]]) -> float:
    """Milliseconds at some work by other steps' (work, ms).

    Those of the same work, if there are any, by their mean. Else a line: through the nearest on either side, or beyond
    all of them through the nearest two. Beyond them it stays between the nearest step's time and that time in
    proportion to the work: two steps of almost the same work give a line whose slope is noise (on an H100, 255 and 256
    tokens, 2.5% apart, made it expect 0.73 ms of 289 tokens that take 2.15).

    Raises:
        ValueError: There are fewer than two other amounts of work, and none is the same.
    """
    times: dict[float, list[float]] = {}
    for x, ms in others:
        times.setdefault(x, []).append(ms)
    means = {x: statistics.mean(ms) for x, ms in times.items()}
    if work in means:
        return means[work]
    if len(means) < 2:
        raise ValueError("a step is expected from two others at least, or from one of the same work")
    below, above = sorted(x for x in means if x < work), sorted(x for x in means if x > work)
    low, high = (below[-1], above[0]) if below and above else (above[:2] if above else below[-2:])
    line = means[low] + (work - low) / (high - low) * (means[high] - means[low])
    if low < work < high:
        return line
    nearest = low if work < low else high
    constant, proportional = means[nearest], work / nearest * means[nearest]
    return min(max(line, min(constant, proportional)), max(constant, proportional))


def judged(comparison: Comparison, timed: Sequence[tuple[Shape, float]]) -> list[Finding]:
    """Each shape of a comparison, expected from all others of it."""
    return [
        Finding(
            shape=shape,
            comparison=comparison,
            ms=ms,
            expected_ms=expected(shape.work, [(other.work, there) for other, there in timed if other is not shape]),
        )
        for shape, ms in timed
    ]


def capture_shape(shape: Shape) -> Callable[[], object]:
    """A shape's step as a CUDA graph: its replay, which keeps the model."""
    from bench.measure.steps import build_model, capture, step_of, warm_up

    step = step_of(build_model(shape.case, input_size=shape.input_size), shape.case)
    warm_up(step.run, shape.case.device)
    replay, _ = capture(step.run)

    def run(kept: Any = step) -> None:
        replay()

    return run


def compare_shapes(
    shapes: dict[Comparison, list[Shape]],
    *,
    rounds: int,
    replays: int,
    json_file: Path | None,
    captured: Callable[[Shape], Callable[[], object]] = capture_shape,
    timed: Callable[[Sequence[Callable[[], object]], int, int], list[list[float]]] = in_turns,
) -> list[Finding]:
    """Time the comparisons of a case, and print a line for each shape.

    Args:
        shapes: By `shapes_of`.
        rounds, replays: As of `bench.ops.turns.in_turns`.
        json_file: Takes a line each too, where one is given.
        captured: Makes a shape's step.
        timed: Times steps.
    """
    found: list[Finding] = []
    for comparison, several in shapes.items():
        runs = [captured(shape) for shape in several]
        times = [statistics.median(ms) for ms in timed(runs, rounds, replays)]
        del runs
        found += judged(comparison, list(zip(several, times, strict=True)))
    for finding in found:
        case = finding.shape.case
        options = ", ".join(value for _, value in case.options)
        print(
            f"{f'{case.model} ({options}) {case.mode}':45} {finding.shape.name(finding.comparison):12} "
            f"{finding.ms:9.3f} ms   expected {finding.expected_ms:9.3f}   {finding.ratio:5.2f} times",
            flush=True,
        )
        append_row(
            json_file,
            case,
            comparison=finding.comparison,
            grid=finding.shape.grid,
            ms=finding.ms,
            expected_ms=finding.expected_ms,
        )
    return found
