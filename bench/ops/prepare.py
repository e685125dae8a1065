"""Time a model's step with its weights prepared in different ways beside the products, all ways in one run.

    python -m bench.ops.prepare                                     # DiG-XL/2's forward pass at 1024
    python -m bench.ops.prepare --model DiG-S/2:triton:variant=release --resolution 1792 --mode train

A kernel beside others cannot be judged by itself: what counts is the step. Each choice is a CUDA graph of the whole
step, as the benchmark captures it; the graphs take turns, so that the card's clock is the same for all, and the figure
is the median of their rounds. What is tried: weights cast in the up-projection GEMM (`dig.raster_weights.FusedCast`,
where it takes them), or all of them on the side stream, by so many programs (`dig.raster.programs_beside`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from bench.ops.common import case_for, parse, replaced, require_gpu
from bench.ops.turns import add_turns, append_row, steps_in_turns
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
        stack.enter_context(replaced(raster, "programs_beside", lambda tokens: choice.programs or None))
        if choice.fused:
            own = for_device(torch.device("cuda"))
            share = choice.fused, own.products.share[1]
            shared = replace(own, products=replace(own.products, share=share))
            stack.enter_context(replaced(products, "for_device", lambda _: shared))
        else:
            stack.enter_context(replaced(raster_weights, "fuses_cast", lambda *_: False))
        yield


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiG-XL/2:triton:variant=release", help="model name, options after colons")
    parser.add_argument("--resolution", type=int, default=1024, help="image side in pixels")
    parser.add_argument("--mode", choices=("train", "forward"), default="forward")
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--programs", type=int, nargs="+", default=[0, 16, 32, 64], help="0: all at once")
    parser.add_argument("--fused", type=int, nargs="*", default=[32], help="rows of a share in a GEMM")
    add_turns(parser)
    options = parse(parser, arguments, or_zero=("programs",))
    require_gpu("bench.ops.prepare")
    case = case_for(options.model, resolution=options.resolution, mode=options.mode, batch=options.batch)
    choices = [
        *(Choice(fused=rows, programs=0) for rows in options.fused),
        *(Choice(fused=0, programs=programs) for programs in options.programs),
    ]
    ways = [partial(chosen, choice) for choice in choices]
    found = steps_in_turns(case, ways, rounds=options.rounds, replays=options.replays)
    print(f"{case.describe()} on {torch.cuda.get_device_name()}", flush=True)
    for choice, way in zip(choices, found, strict=True):
        print(f"{choice!s:50} {way.describe()}", flush=True)
        append_row(options.json, case, choice=asdict(choice), ms=way.median, samples_ms=way.ms)


if __name__ == "__main__":
    main()
