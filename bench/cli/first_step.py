"""``python -m bench first-step``: what compiling costs whoever runs a model first. torch is imported late."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import pairwise
from typing import Annotated

import typer

from bench.cases.choices import choose_device, default_resolution, one_case
from bench.cli.fitting import fitting
from bench.run.lifeline import scratch_folder

ON_GPU, ON_CPU = "DiG-S/2:triton:variant=release", "DiG-S/2"


def first_step(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Model name, options after colons: DiG-S/2:fla. Default: {ON_GPU} on a GPU, {ON_CPU} on a CPU."
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels. Default: 1792 on a GPU, 128 on a CPU.")
    ] = None,
    mode: Annotated[str, typer.Option(help="train or forward.")] = "train",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default as for run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Time the first step of a model on a machine that has compiled nothing yet.

    What torch and Triton keep on the disk is kept in a new, empty folder, so that every kernel is compiled, and tuned
    where it tunes itself. Prints the seconds of building model and inputs, and of the first two steps, launched
    eagerly, each until the device is done. The driver's own cache of compiled code is left alone.
    """
    where = choose_device(device)
    model = (ON_GPU if where == "cuda" else ON_CPU) if model is None else model
    resolution = default_resolution(where, on_gpu=1792) if resolution is None else resolution
    case = one_case(model, resolution=resolution, mode=mode, execution="eager", batch=batch, dtype=dtype, device=device)
    with fitting(case), tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        # Before torch and Triton are imported: they read these once.
        os.environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        os.environ["FLA_CACHE_RESULTS"] = "0"
        import torch

        from bench.measure.steps import build_step

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
        card = f" ({torch.cuda.get_device_name()})" if case.device == "cuda" else ""
        typer.echo(f"{case.describe()}{card}, {os.cpu_count()} cores, nothing compiled before:")
        typer.echo(f"model and inputs {build:.1f} s, first step {first:.1f} s, second step {second:.3f} s")
