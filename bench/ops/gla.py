"""Time gated linear attention alone: this project's kernels beside flash-linear-attention's, in the same run.

    python -m bench ops gla                       # DiG-S/2 at 1792: T = 12544, 6 heads of 32/64, bf16
    python -m bench ops gla --tokens 1024,4096,16384 --kernels --json gla.jsonl
    python -m bench ops gla --sweep               # what `dig.ops.tiles.sm90.GLA` is made from

How times are taken, and what cold and hot mean: `bench.ops.common`. Shapes: B batch, T tokens, H heads, K key width, V
value width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.common import (
    DTYPES,
    MODES,
    Step,
    Times,
    kernel_times,
    make_step,
    measure,
    report,
    set_count,
    use_tiles,
)
from dig.ops.tiles import for_device

NORMALIZER = 16.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One case: sizes as in the module's docstring, dtype a key of `DTYPES`."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str

    def least_bytes(self, operation: str, mode: str) -> int:
        """Bytes that must move: each input read once, each output and gradient written once.

        The backward pass reads the inputs and the output's gradient again, for the states have to be there before the
        first gradient is.
        """
        keys, values = 3 * self.K, self.V
        inputs = keys + (2 if operation == "block" else 1) * values
        per_token = inputs + values
        if mode != "forward":
            per_token += 2 * inputs + values
        return self.B * self.T * self.H * per_token * DTYPES[self.dtype].itemsize


def make_inputs(shape: Shape, operation: str, device: str = "cuda") -> tuple[list[Tensor], Tensor]:
    """Leaves for one step and the output's gradient; q, k, v (and g) are slices of one projection, as in the model."""
    B, T, H, K, V = shape.B, shape.T, shape.H, shape.K, shape.V
    dtype = DTYPES[shape.dtype]
    widths = [H * K, H * K, H * V, H * V]
    fused = torch.randn(B, T, sum(widths), device=device, dtype=dtype)
    q, k, v, g = (x.unflatten(-1, (H, -1)).detach() for x in fused.split(widths, -1))
    logits = torch.randn(B, T, H, K, device=device, dtype=dtype)
    if operation == "block":
        leaves = [q, k, v, logits, g, torch.ones(V, device=device)]
    else:
        leaves = [q * K**-0.5, k, v, (F.logsigmoid(logits.float()) / NORMALIZER).to(dtype)]
    return [x.requires_grad_() for x in leaves], torch.randn_like(v)


def operations(implementation: str, shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """The recurrence, and the whole block, of one implementation.

    Raises:
        MissingPackageError: Its package is not installed.
    """
    scale = shape.K**-0.5
    if implementation == "triton":
        from dig.ops.gla.tiled import gla_block, tiled_gla

        return {"recurrence": tiled_gla, "block": lambda *x: gla_block(*x, scale=scale, gate_normalizer=NORMALIZER)}
    from dig.ops.gla.peer import fla_gla
    from dig.packages import require

    require("fla", "implementation fla")

    def fla_block(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, g: Tensor, norm_weight: Tensor) -> Tensor:
        o = fla_gla(q * scale, k, v, (F.logsigmoid(gate_logits.float()) / NORMALIZER).to(q.dtype))
        return F.rms_norm(o.float(), (o.shape[-1],), norm_weight, 1e-6).to(o.dtype) * F.silu(g)

    return {"recurrence": fla_gla, "block": fla_block}


def make_steps(shape: Shape, operation: str, implementation: str, mode: str) -> list[Step]:
    """Cold steps, each on inputs of its own."""
    function = operations(implementation, shape)[operation]
    sets = [make_inputs(shape, operation) for _ in range(set_count(shape.least_bytes(operation, "forward")))]
    return [make_step(function, mode, leaves, [gradient]) for leaves, gradient in sets]


KERNELS = ("local_state_kernel", "output_kernel", "output_backward_kernel", "gradient_kernel")
OTHER_FORMS = {"output_backward_kernel": "output_backward_parts_kernel", "gradient_kernel": "gradient_rounds_kernel"}
"""What runs in a kernel's place where tile choices say so."""
WARPS = ("local_warps", "output_warps", "output_backward_warps", "gradient_warps")
REGISTERS = ("output_registers", "output_backward_registers", "gradient_registers")
"""Fields of `dig.ops.tiles.choices.GlaTiles` that are the kernels' own."""


def mixer_step(shape: Shape, mode: str = MODES[1], device: str = "cuda") -> Step:
    """The mixer as the model runs it, from one projection's output; with its backward pass unless told otherwise."""
    from dig.ops.gla.mixer import gla_mixer
    from dig.ops.gla.projection import GATE_RANK, projection_splits
    from dig.scan import RASTER

    D, dtype = shape.H * shape.V, DTYPES[shape.dtype]
    random = partial(torch.randn, device=device, dtype=dtype)
    leaves = [
        random(shape.B, shape.T, sum(projection_splits(D))),
        random(D // 2, GATE_RANK),
        random(D // 2),
        torch.ones(shape.V, device=device),
    ]
    mixer = partial(gla_mixer, heads=shape.H, grid=(1, shape.T), order=RASTER)
    gradient = random(shape.B, shape.T, D)
    return make_step(mixer, mode, [x.requires_grad_() for x in leaves], [gradient])


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a sweep tries; fields of `dig.ops.tiles.choices.GlaTiles`, 0 registers being what the compiler takes."""

    chunks: tuple[int, ...]
    warps: tuple[int, ...]
    registers: tuple[int, ...]
    scan_warps: tuple[int, ...]
    scan_lanes: tuple[int, ...]
    scan_groups: tuple[int, ...]
    scan_steps: tuple[int, ...]
    short_warps: tuple[int, ...]
    short_units: tuple[int, ...]
    short_steps: tuple[int, ...]


SCANS = {
    "scan_kernel": ("scan_warps", "scan_lanes", "scan_groups", "scan_steps"),
    "short_scan_kernel": ("short_warps", "short_units", "short_steps"),
}
"""The scan's two forms, and their own fields."""
MOST_SHORT = 64
"""Chunks up to which a sweep tries the second of them too, and the forward pass in one launch."""
WALKS = "walk_kernel"
WALK: dict[bool, dict[str, Any]] = {False: {"walk_chunks": 0}, True: {"walk_chunks": MOST_SHORT, "walk_programs": 0}}
"""Tile choices with which the forward pass is never, or always, one launch."""


def sweep(shape: Shape, choices: Choices) -> None:
    """Time each kernel of the mixer's forward and backward pass under every tile choice; print the best of each.

    A kernel's time depends on the chunk length and its own choices alone, so all warps and registers are varied
    together, then the scan's choices, and the best is put together kernel by kernel for each chunk length.
    """
    from triton.runtime.errors import OutOfResources

    from dig.ops.gla import launches

    step = mixer_step(shape)
    base = replace(for_device(torch.device("cuda")).gla_tiles(shape.K, shape.V, DTYPES[shape.dtype]), few=None)
    best: dict[str, tuple[float, dict[str, Any]]] = {}

    def time(names: Collection[str], **choice: Any) -> None:
        try:
            with use_tiles(launches, replace(base, **WALK[names == [WALKS]], **choice)):
                kernels = kernel_times(step)
        except OutOfResources as error:
            print(f"{choice}: {error}", flush=True)
            return
        for name in names:
            microseconds, calls = kernels[name if name in kernels else OTHER_FORMS[name]]
            print(f"{microseconds:7.1f} µs x {calls:g} {name:24} {choice}", flush=True)
            if microseconds < best.get(name, (float("inf"), {}))[0]:
                best[name] = (microseconds, choice)

    for chunk in choices.chunks:
        best.clear()
        for warps, registers in itertools.product(choices.warps, choices.registers):
            time(KERNELS, chunk=chunk, **dict.fromkeys(WARPS, warps), **dict.fromkeys(REGISTERS, registers or None))
        if -(-shape.T // chunk) <= MOST_SHORT:
            for warps, registers in itertools.product(choices.warps, choices.registers):
                time([WALKS], chunk=chunk, walk_warps=warps, walk_registers=registers or None)
        for kernel, names in SCANS.items():
            short = MOST_SHORT if kernel == "short_scan_kernel" else 0
            if short and short * chunk < shape.T:
                continue
            for choice in itertools.product(*(getattr(choices, name) for name in names)):
                time([kernel], chunk=chunk, short_chunks=short, **dict(zip(names, choice, strict=True)))
        for name, (microseconds, taken) in best.items():
            print(f"chunk {chunk}, best: {microseconds:7.1f} µs {name:24} {taken}", flush=True)


def time_shape(shape: Shape, implementations: Iterable[str], chosen: Iterable[str], times: Times) -> None:
    """Time operations (``recurrence``, ``block``) of implementations (``triton``, ``fla``), a line each."""
    for implementation, operation, mode in itertools.product(implementations, chosen, MODES):
        row = measure(
            asdict(shape) | {"implementation": implementation, "operation": operation, "mode": mode},
            partial(make_steps, shape, operation, implementation, mode),
            size=shape.least_bytes(operation, mode),
            times=times,
        )
        report(row, f"T={shape.T:<6} {operation:<10} {mode:<17} {implementation:<7}", times.json)
