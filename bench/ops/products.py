"""Time SwiGLU as its GEMMs' epilogue, and weights' gradients in one launch, beside GEMMs and passes of their own.

    python -m bench ops products                 # DiG-S/2 at 1024, 1792, 2048, 32 images at 256; DiG-XL/2 at 1024, 2048
    python -m bench ops products --sweep         # alternatives to `dig.ops.tiles.sm90.PRODUCTS`

Passes: ``up`` ends with SwiGLU and keeps gate and up, ``up alone`` doesn't keep them (inference), ``down`` is the
gradient back through the down-projection GEMM and SwiGLU, ``gradients`` those of a block's four large weights.
Implementations: ``fused`` is one kernel, where the tables have one, ``apart`` cuBLAS' GEMM and this project's pass, or
its four GEMMs. How times are taken: `bench.ops.common`; TFLOP/s count the
GEMMs alone. Shapes: T tokens, D width, F inner width.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.ops.common import Step, capture, replaced, replay_times, set_count
from bench.store.files import append_line
from dig.ops.gla.projection import GATE_RANK
from dig.ops.linear import weight_gradient
from dig.ops.swiglu import products
from dig.ops.swiglu.products import project_down_backward, project_up
from dig.ops.tiles import for_device
from dig.ops.tiles.products import GradientTiles, ProductTiles
from dig.ops.weight_gradients import weight_gradients

IMPLEMENTATIONS = ("fused", "apart")
PASSES = ("up", "up alone", "down", "gradients")
SHAPES = ((4096, 384), (8192, 384), (12544, 384), (16384, 384), (4096, 1152), (16384, 1152))
"""(T, D)."""


def make_steps(T: int, D: int, which: str) -> tuple[list[Step], int, int]:
    """Cold steps, the bytes that one must move, and its floating-point operations."""
    F = -(-8 * D // (3 * 256)) * 256
    if which == "gradients":
        return gradient_steps(T, D, F)
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


def gradient_steps(T: int, D: int, F: int) -> tuple[list[Step], int, int]:
    """`make_steps` of the gradients of down-projection, gate and up, output projection, and q, k, v and gates."""
    sizes = ((D, F), (2 * F, D), (D, D), (3 * D + GATE_RANK, D))
    size = sum(2 * T * (N + K) + 4 * N * K for N, K in sizes)
    tokens = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    steps: list[Step] = [
        partial(gradients, [(tokens(T, N), tokens(T, K)) for N, K in sizes])
        for _ in range(set_count(size, most=16))
    ]  # fmt: skip
    return steps, size, sum(2 * T * N * K for N, K in sizes)


def gradients(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """``dy^T x`` of each pair: in one launch where there are tile choices for that, else a GEMM each."""
    tiles = gradient_tiles(pairs[0][0].device)
    if tiles is None:
        return [weight_gradient(dy, x) for dy, x in pairs]
    return weight_gradients(pairs, tiles)


def gradient_tiles(device: torch.device) -> GradientTiles | None:
    """What `gradients` takes; whether the models take it too, another field says."""
    return for_device(device).gradients


def time_of(steps: list[Step], samples: int) -> float:
    """Median microseconds of a step."""
    return statistics.median(replay_times(capture(steps), len(steps), samples))


def gradient_choices() -> Iterator[GradientTiles]:
    """What a sweep tries of ``gradients``."""
    for rows, columns, depth, warps, stages in (
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 2),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 64, 64, 8, 4),
    ):
        yield GradientTiles(
            rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, most_width=512, least_tokens=1
        )


def choices() -> Iterator[ProductTiles]:
    """What a sweep tries of the other passes."""
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
        for group in (8, 16):
            yield ProductTiles(
                rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, registers=registers, group=group
            )


def sweep(T: int, D: int, which: str, samples: int) -> None:
    """Print the time of every choice."""
    own = which == "gradients"
    for tiles in gradient_choices() if own else choices():
        chosen = lambda *_, tiles=tiles: tiles  # noqa: E731
        with (
            replaced(sys.modules[__name__], "gradient_tiles", chosen)
            if own
            else replaced(products, "tiles_for", chosen)
        ):
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
        chosen = own if implementation == "fused" else replace(own, products=own.products.apart(), gradients=None)
        here = sys.modules[__name__]
        with (
            replaced(products, "for_device", lambda _, chosen=chosen: chosen),
            replaced(here, "for_device", lambda _, chosen=chosen: chosen),
        ):
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
