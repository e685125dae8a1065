"""Time a model's step with its weights prepared in different ways beside the products, all ways in one run.

    python -m bench ops prepare                                     # DiG-XL/2's forward pass at 1024
    python -m bench ops prepare --model DiG-S/2:triton:variant=release --resolution 1792 --mode train

A kernel beside others cannot be judged by itself: what counts is the step. Each choice is a CUDA graph of the whole
step, as the benchmark captures it; the graphs take turns, so that the card's clock is the same for all, and the figure
is the median of their rounds. What is tried: weights cast in the up-projection GEMM (`dig.raster_weights.FusedCast`,
where it takes them), or all of them on the side stream, by so many programs (`dig.raster.programs_beside`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.cases.case import Case
from bench.ops.common import replaced
from bench.ops.turns import append_row, steps_in_turns
from dig import raster, raster_weights
from dig.ops.swiglu import products
from dig.ops.tiles import for_device


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a block's weights are prepared while the one before it runs.

    Attributes:
        fused: Rows of a share of the weights in each step of the up-projection GEMM; 0: none is cast there.
        programs: How many prepare them on the side stream, where that is so; 0: all at once.
    """

    fused: int
    programs: int

    def __str__(self) -> str:
        if self.fused:
            return f"fused, {self.fused} rows"
        return f"side stream, {f'by {self.programs} programs' if self.programs else 'at once'}"


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Let models prepare their weights so."""
    with ExitStack() as stack:
        stack.enter_context(replaced(raster, "programs_beside", lambda passes, tokens, casts: choice.programs or None))
        if choice.fused:
            own = for_device(torch.device("cuda"))
            share = choice.fused, own.products.share[1]
            shared = replace(own, products=replace(own.products, share=share))
            stack.enter_context(replaced(products, "for_device", lambda _: shared))
        else:
            stack.enter_context(replaced(raster_weights, "fuses_cast", lambda *_: False))
        yield


def compare_choices(
    case: Case, choices: Sequence[Choice], *, rounds: int, replays: int, json_file: Path | None
) -> None:
    """Time a case's step with its weights prepared in each of these ways, in turns, and print a line for each.

    Args:
        case: On a GPU, as a CUDA graph.
        choices: The ways.
        rounds, replays: As of `bench.ops.turns.steps_in_turns`.
        json_file: Takes a line for each too, where one is given.
    """
    ways = [partial(chosen, choice) for choice in choices]
    found = steps_in_turns(case, ways, rounds=rounds, replays=replays)
    print(f"{case.describe()} on {torch.cuda.get_device_name()}", flush=True)
    for choice, way in zip(choices, found, strict=True):
        print(f"{choice!s:50} {way.describe()}", flush=True)
        append_row(json_file, case, choice=asdict(choice), ms=way.median, samples_ms=way.ms)
