"""Time SwiGLU as its GEMMs' epilogue beside GEMMs and passes of their own, in the same run.

    python -m bench ops products                 # DiG-S/2 at 1024, 1792 and 2048, DiG-XL/2 at 1024 and 2048
    python -m bench ops products --sweep         # alternatives to `dig.ops.tiles.sm90.PRODUCTS`

Passes: ``up`` ends with SwiGLU and keeps gate and up, ``up alone`` doesn't keep them (inference), ``down`` is the
gradient back through the down-projection GEMM and SwiGLU. Implementations: ``fused`` is one kernel, where the tables
have one, ``apart`` cuBLAS' GEMM and this project's pass. How times are taken: `bench.ops.common`; TFLOP/s count the
GEMMs alone. Shapes: T tokens, D width, F inner width.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.ops.common import Step, capture, replaced, replay_times, set_count
from bench.store.files import append_line
from dig.ops.swiglu import products
from dig.ops.swiglu.products import project_down_backward, project_up
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import ProductTiles

IMPLEMENTATIONS = ("fused", "apart")
PASSES = ("up", "up alone", "down")
SHAPES = ((4096, 384), (12544, 384), (16384, 384), (4096, 1152), (16384, 1152))
"""(T, D)."""


def make_steps(T: int, D: int, which: str) -> tuple[list[Step], int, int]:
    """Cold steps, the bytes that one must move, and its floating-point operations."""
    F = -(-8 * D // (3 * 256)) * 256
    tokens = partial(torch.randn, 1, T, device="cuda", dtype=torch.bfloat16)
    weight = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    up = which != "down"
    wide = {"up": 3, "up alone": 1, "down": 5}[which]
    size = 2 * (T * D + T * F * wide + D * F * (2 if up else 1))
    steps: list[Step] = []
    for _ in range(set_count(size, most=16)):
        if up:
            x, projection = tokens(D), weight(2 * F, D) / D**0.5
            steps.append(partial(project_up, x, projection, which == "up"))
        else:
            steps.append(partial(project_down_backward, tokens(D), weight(D, F) / D**0.5, tokens(2 * F)))
    return steps, size, 2 * T * D * F * (2 if up else 1)


def time_of(steps: list[Step], samples: int) -> float:
    """Median microseconds of a step."""
    return statistics.median(replay_times(capture(steps), len(steps), samples))


def choices() -> Iterator[ProductTiles]:
    """What a sweep tries."""
    for rows, columns, depth, warps, stages, registers in (
        (128, 128, 64, 8, 4, None),
        (128, 128, 64, 8, 3, None),
        (128, 128, 32, 8, 5, None),
        (128, 64, 64, 4, 3, None),
        (128, 64, 64, 8, 4, None),
        (128, 64, 64, 8, 3, 128),
        (64, 128, 64, 4, 2, None),
        (64, 128, 64, 8, 3, 128),
        (64, 64, 64, 4, 4, None),
        (256, 64, 64, 8, 3, None),
    ):
        for group in (8,):
            yield ProductTiles(
                rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, registers=registers, group=group
            )


def sweep(T: int, D: int, which: str, samples: int) -> None:
    """Print the time of every choice."""
    for tiles in choices():
        with replaced(products, "tiles_for", lambda *_, tiles=tiles: tiles):
            try:
                us = time_of(make_steps(T, D, which)[0], samples)
            except Exception as error:
                print(f"T={T:<6} D={D:<5} {which:<9} {tiles}: {type(error).__name__}: {str(error)[:80]}", flush=True)
                continue
        print(f"T={T:<6} D={D:<5} {which:<9} {us:8.1f} µs  {tiles}", flush=True)


def time_shape(
    T: int, D: int, passes: Iterable[str], implementations: Iterable[str], *, samples: int, json_file: Path | None
) -> None:
    """Time passes (`PASSES`) of implementations (`IMPLEMENTATIONS`), a line each, also in a file where one is given."""
    for which, implementation in itertools.product(passes, implementations):
        own = for_device(torch.device("cuda"))
        chosen = own if implementation == "fused" else replace(own, products=own.products.apart())
        with replaced(products, "for_device", lambda _, chosen=chosen: chosen):
            steps, size, flops = make_steps(T, D, which)
            us = time_of(steps, samples)
        row = {"T": T, "D": D, "pass": which, "implementation": implementation, "us": us}
        rates = {"tflops": flops / us / 1e6, "gb_per_s": size / us / 1e3}
        print(
            f"T={T:<6} D={D:<5} {which:<9} {implementation:<6} {us:8.1f} µs  {rates['tflops']:5.0f} TFLOP/s  "
            f"{rates['gb_per_s']:5.0f} GB/s",
            flush=True,
        )
        if json_file is not None:
            append_line(json_file, json.dumps(row | rates))
