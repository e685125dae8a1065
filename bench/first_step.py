"""How long the first step of a model takes on a machine that has compiled nothing yet.

    python -m bench.first_step                                          # DiG-S/2's training step at 1792
    python -m bench.first_step --model DiG-S/2:fla --resolution 256

What torch and Triton keep on the disk is kept in a new, empty folder, so that every kernel is compiled (and tuned,
where it tunes itself) as by whoever runs the model for the first time. Prints the seconds of building model and inputs,
and of the first two steps, each until the device is done. The driver's own cache of compiled code is left alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import pairwise


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiG-S/2:triton:variant=release", help="model name, options after colons")
    parser.add_argument("--resolution", type=int, default=1792, help="image side in pixels")
    parser.add_argument("--mode", choices=("train", "forward"), default="train")
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dig-first-step-") as folder:
        # Before torch and Triton are imported: they read these once.
        os.environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        os.environ["FLA_CACHE_RESULTS"] = "0"
        from bench.choices import one_case

        case = one_case(
            options.model,
            resolution=options.resolution,
            mode=options.mode,
            execution="eager",
            batch=options.batch,
            dtype=None,
            device=options.device,
        )
        import torch

        from bench.steps import build_step

        clock = [time.perf_counter()]

        def tick() -> None:
            if case.device == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

        step = build_step(case)
        tick()
        for _ in range(2):
            step.run()
            tick()
        build, first, second = (after - before for before, after in pairwise(clock))
        where = torch.cuda.get_device_name() if case.device == "cuda" else "cpu"
        print(f"{case.describe()} on {where}, {os.cpu_count()} cores, nothing compiled before:")
        print(f"model and inputs {build:.1f} s, first step {first:.1f} s, second step {second:.3f} s")


if __name__ == "__main__":
    main()
