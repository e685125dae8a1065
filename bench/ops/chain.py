"""Time steps with kernels that start while the one before them ends, and without, in turns: see `dig.ops.chain`.

    python -m bench.ops.chain                                            # DiG-S/2 and XL/2 at several resolutions
    python -m bench.ops.chain --models DiG-S/2:triton --resolutions 512 --modes train

Each is a CUDA graph of the whole step, as the benchmark captures it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from bench.ops.common import case_for, in_turns, parse, replaced, require_gpu
from bench.steps import build_step, capture, warm_up
from dig.ops import chain


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
    parser.add_argument("--rounds", type=int, default=10, help="turns a median is taken of")
    parser.add_argument("--replays", type=int, default=8, help="steps a turn")
    parser.add_argument("--json", type=Path, help="append one JSON line for each case to this file")
    options = parse(parser, arguments)
    require_gpu("bench.ops.chain")
    print(torch.cuda.get_device_name(), flush=True)
    for model, resolution, mode in itertools.product(options.models, options.resolutions, options.modes):
        case = case_for(model, resolution=resolution, mode=mode, batch=options.batch)
        step = build_step(case)
        graphs = []
        for able in (True, False):
            with replaced(chain, "supported", lambda device, able=able: able):
                warm_up(step.run, case.device)
                graphs.append(capture(step.run)[0])
        early, late = in_turns(graphs, options.rounds, options.replays)
        medians = statistics.median(early), statistics.median(late)
        print(
            f"{case.describe():75} early {medians[0]:8.3f} ms   in order {medians[1]:8.3f} ms   "
            f"{medians[0] / medians[1] - 1:+.2%}",
            flush=True,
        )
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps({"case": asdict(case), "early_ms": early, "in_order_ms": late}) + "\n")
        del graphs, step


if __name__ == "__main__":
    main()
