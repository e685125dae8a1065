"""Time steps with kernels that start while the one before them ends, and without, in turns: see `dig.ops.early_launch`.

    python -m bench.ops.chain                                            # DiG-S/2 and XL/2 at several resolutions
    python -m bench.ops.chain --models DiG-S/2:triton --resolutions 512 --modes train

Each is a CUDA graph of the whole step, as the benchmark captures it.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch

from bench.ops.common import case_for, parse, replaced, require_gpu
from bench.ops.turns import add_turns, append_row, steps_in_turns
from dig.ops import launch


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops.chain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [f"DiG-{size}/2:triton:variant=release" for size in ("S", "XL")]
    parser.add_argument("--models", nargs="+", default=models, help="model names, options after colons")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024, 1792], help="in pixels")
    parser.add_argument("--modes", nargs="+", choices=("train", "forward"), default=["train", "forward"])
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    add_turns(parser)
    options = parse(parser, arguments)
    require_gpu("bench.ops.chain")
    print(torch.cuda.get_device_name(), flush=True)
    for model, resolution, mode in itertools.product(options.models, options.resolutions, options.modes):
        case = case_for(model, resolution=resolution, mode=mode, batch=options.batch)
        ways = [partial(replaced, launch, "launches_early", lambda device, able=able: able) for able in (True, False)]
        early, late = steps_in_turns(case, ways, rounds=options.rounds, replays=options.replays)
        print(
            f"{case.describe():75} early {early.median:8.3f} ms   in order {late.median:8.3f} ms   "
            f"{early.median / late.median - 1:+.2%}",
            flush=True,
        )
        append_row(options.json, case, early_ms=early.ms, in_order_ms=late.ms)


if __name__ == "__main__":
    main()
