"""Time the operations that are bound by memory traffic, adaptive norm and SwiGLU: µs, and GB/s beside a device copy.

    python -m bench ops rowwise                     # DiG-S/2 and DiG-XL/2 at 1792 and 2048: widths 384 and 1152, bf16
    python -m bench ops rowwise --stream fp32 --norm layer --kernels --json rowwise.jsonl
    python -m bench ops rowwise --sweep             # alternatives to `dig.ops.tiles.sm90.ADALN`

How times are taken, and what cold and hot mean: `bench.ops.common`. GB/s count the bytes that must move, each input
read once and each output written once. Shapes: B batch, T tokens, D width, F inner width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
from dig.ops.adaln import norm_modulate, residual_norm_modulate
from dig.ops.swiglu import swiglu
from dig.ops.tiles import for_device

OPERATIONS = ("norm_modulate", "residual_norm_modulate", "swiglu")
IMPLEMENTATIONS = ("triton", "reference", "compiled")
"""``compiled`` is the reference under torch.compile."""
Inputs = tuple[list[Tensor | None], list[Tensor]]
"""Arguments of an operation, and the gradients of its outputs."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One case: sizes as in the module's docstring, dtypes keys of `DTYPES`."""

    B: int
    T: int
    D: int
    norm: str
    stream: str
    dtype: str

    @property
    def F(self) -> int:  # noqa: N802
        """SwiGLU's inner width in a DiG of this width."""
        return -(-8 * self.D // (3 * 256)) * 256

    def least_bytes(self, operation: str, mode: str) -> int:
        """Bytes that must move: each input read once, each output and gradient written once."""
        stream, other = DTYPES[self.stream].itemsize, DTYPES[self.dtype].itemsize
        forward, backward, width = {
            "norm_modulate": (stream + other, 2 * stream + other, self.D),
            "residual_norm_modulate": (2 * stream + 2 * other, 3 * stream + 3 * other, self.D),
            "swiglu": (3 * other, 5 * other, self.F),
        }[operation]
        return self.B * self.T * width * (forward if mode == "forward" else forward + backward)


def make_inputs(shape: Shape, operation: str, device: str = "cuda") -> Inputs:
    """Leaves for one step and the outputs' gradients; modulations are slices of one tensor, as in the model."""
    stream, dtype = DTYPES[shape.stream], DTYPES[shape.dtype]
    tokens = partial(torch.randn, shape.B, shape.T, device=device)
    if operation == "swiglu":
        return [tokens(2 * shape.F, dtype=dtype).requires_grad_()], [tokens(shape.F, dtype=dtype)]
    modulation = torch.randn(shape.B, 6 * shape.D, device=device, dtype=dtype).chunk(6, dim=1)
    weight = torch.ones(shape.D, device=device) if shape.norm == "rms" else None
    x, dh = tokens(shape.D, dtype=stream), tokens(shape.D, dtype=dtype)
    if operation == "norm_modulate":
        leaves, gradients = [x, *modulation[:2], weight], [dh]
    else:
        leaves = [x, tokens(shape.D, dtype=dtype), *modulation[2:5], weight]
        gradients = [tokens(shape.D, dtype=stream), dh]
    return [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves], gradients


def function_of(operation: str, implementation: str, shape: Shape) -> Callable[..., Any]:
    """The operation, of its tensors alone."""
    name = "reference" if implementation == "compiled" else implementation
    function: Callable[..., Any] = partial(swiglu, implementation=name)
    if operation != "swiglu":
        chosen: Callable[..., Any] = norm_modulate if operation == "norm_modulate" else residual_norm_modulate
        function = partial(chosen, norm=shape.norm, dtype=DTYPES[shape.dtype], implementation=name)
    return torch.compile(function, fullgraph=True, dynamic=False) if implementation == "compiled" else function


def make_steps(shape: Shape, operation: str, implementation: str, mode: str) -> list[Step]:
    """Cold steps, each on inputs of its own."""
    function = function_of(operation, implementation, shape)
    sets = set_count(shape.least_bytes(operation, "forward"), most=32)
    return [make_step(function, mode, *make_inputs(shape, operation)) for _ in range(sets)]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a sweep tries; fields of `dig.ops.tiles.choices.NormTiles`."""

    rows: tuple[int, ...]
    parts: tuple[int, ...]
    warps: tuple[int, ...]
    programs: tuple[int, ...]


def sweep(shape: Shape, choices: Choices) -> None:
    """Time residual_norm_modulate's kernels under every tile choice, cold, and print the best of each.

    The backward pass is that of a model's block with one image: it also writes h again, and leaves the branch's
    gradients to the weight's. The forward and the backward kernel have choices of their own, so both are varied
    together.
    """
    from dig.ops.adaln import fused

    count = set_count(shape.least_bytes("residual_norm_modulate", "forward"), most=32)
    sets = [make_inputs(shape, "residual_norm_modulate") for _ in range(count)]
    dtype = DTYPES[shape.dtype]

    def step_of(leaves: list[Any], gradients: list[Tensor]) -> Step:
        x, branch, gate, shift, scale, weight = leaves

        def step() -> None:
            with torch.no_grad():
                x_new, _, stats = fused.residual_norm_modulate_forward(
                    x, branch, gate, shift, scale, weight, shape.norm, 1e-6, dtype
                )
                dx_new, dh = gradients
                fused.norm_modulate_backward(x_new, None, None, shift, scale, weight, stats, dx_new, dh, shape.norm)

        return step

    steps = [step_of(leaves, gradients) for leaves, gradients in sets]
    base = for_device(torch.device("cuda")).adaln_tiles(shape.D, DTYPES[shape.stream])
    best: dict[str, tuple[float, dict[str, int]]] = {}
    grid = itertools.product(choices.rows, choices.parts, choices.warps, choices.programs)
    for rows, part, warps, programs in grid:
        forward = {"rows": rows, "part": part, "warps": warps}
        backward = {f"backward_{name}": value for name, value in forward.items()} | {"programs": programs}
        with use_tiles(fused, replace(base, **forward, **backward)):
            kernels = kernel_times(lambda: [step() for step in steps], repeats=5)
        for name, taken in (("norm_modulate_kernel", forward), ("norm_modulate_backward_kernel", backward)):
            microseconds = kernels[name][0]
            if name == "norm_modulate_backward_kernel":
                # More programs leave more for the last kernel to add up.
                microseconds += kernels["norm_modulate_finish_kernel"][0]
            print(f"D={shape.D} T={shape.T} {microseconds:7.1f} µs {name} {taken}", flush=True)
            if microseconds < best.get(name, (float("inf"), {}))[0]:
                best[name] = (microseconds, taken)
    for name, (microseconds, taken) in best.items():
        print(f"best: D={shape.D} T={shape.T} {microseconds:7.1f} µs {name} {taken}", flush=True)


def time_shape(shape: Shape, implementations: Iterable[str], operations: Iterable[str], times: Times) -> None:
    """Time operations (`OPERATIONS`) of implementations (`IMPLEMENTATIONS`), a line each."""
    torch.compiler.reset()
    for operation, mode, implementation in itertools.product(operations, MODES, implementations):
        row = measure(
            asdict(shape) | {"implementation": implementation, "operation": operation, "mode": mode},
            partial(make_steps, shape, operation, implementation, mode),
            size=shape.least_bytes(operation, mode),
            times=times,
        )
        report(row, f"D={shape.D:<5} T={shape.T:<6} {operation:<23} {mode:<17} {implementation:<10}", times.json)
