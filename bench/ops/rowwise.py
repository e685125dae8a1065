"""Time the operations that are bound by memory traffic, adaptive norm and SwiGLU: µs, and GB/s beside a device copy.

    python -m bench.ops.rowwise                     # DiG-S/2 and DiG-XL/2 at 1792 and 2048: widths 384 and 1152, bf16
    python -m bench.ops.rowwise --stream fp32 --norm layer --kernels --json rowwise.jsonl
    python -m bench.ops.rowwise --sweep             # alternatives to `dig.ops.adaln.fused.TILES`

Steps are timed as in `bench.ops.gla`: in CUDA graphs, "cold" ones over input sets that together exceed the L2 cache
several times, "hot" ones over one set, which a small case keeps in the cache. GB/s count the bytes that must move, each
input read once and each output written once. Shapes: B batch, T tokens, D width, F inner width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ops.gla import DTYPES, MODES, capture, copy_rate, kernel_times, replay_times
from dig.ops.adaln import NORMS, norm_modulate, residual_norm_modulate
from dig.ops.swiglu import swiglu

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


def make_inputs(shape: Shape, operation: str) -> Inputs:
    """Leaves for one step and the outputs' gradients; modulations are slices of one tensor, as in the model."""
    stream, dtype = DTYPES[shape.stream], DTYPES[shape.dtype]
    tokens = partial(torch.randn, shape.B, shape.T, device="cuda")
    if operation == "swiglu":
        return [tokens(2 * shape.F, dtype=dtype).requires_grad_()], [tokens(shape.F, dtype=dtype)]
    modulation = torch.randn(shape.B, 6 * shape.D, device="cuda", dtype=dtype).chunk(6, dim=1)
    weight = torch.ones(shape.D, device="cuda") if shape.norm == "rms" else None
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


def make_step(function: Callable[..., Any], mode: str, inputs: Inputs) -> Callable[[], object]:
    """One forward pass, or one with its backward pass, on these inputs."""
    arguments, gradients = inputs
    leaves = [x for x in arguments if x is not None]
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*arguments)

        return forward

    def both() -> object:
        outputs = function(*arguments)
        return torch.autograd.grad([outputs] if isinstance(outputs, Tensor) else outputs, leaves, gradients)

    return both


def make_steps(shape: Shape, operation: str, implementation: str, mode: str) -> list[Callable[[], object]]:
    """Steps on as many input sets as together take four times the L2 cache, within reason."""
    cache = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(32, -(-cache // shape.least_bytes(operation, "forward"))))
    function = function_of(operation, implementation, shape)
    return [make_step(function, mode, make_inputs(shape, operation)) for _ in range(sets)]


def measure(shape: Shape, options: argparse.Namespace, rate: float) -> Iterator[dict[str, Any]]:
    """One row for each operation, mode and implementation; rate is a copy's, in bytes a microsecond."""
    torch.compiler.reset()
    for operation, mode, implementation in itertools.product(options.operations, MODES, options.implementations):
        row = asdict(shape) | {"implementation": implementation, "operation": operation, "mode": mode}
        try:
            steps = make_steps(shape, operation, implementation, mode)
            samples = {
                name: replay_times(capture(chosen), len(chosen), options.samples)
                for name, chosen in (("cold", steps), ("hot", steps[:1] * len(steps)))
            }
            row["kernels"] = kernel_times(steps[0]) if options.kernels else {}
        except (ImportError, torch.OutOfMemoryError) as error:
            yield row | {"status": type(error).__name__, "message": str(error)}
            continue
        row |= {f"{name}_us": statistics.median(times) for name, times in samples.items()}
        size = shape.least_bytes(operation, mode)
        row |= {"bytes": size, "gb_per_s": size / row["cold_us"] / 1e3, "copy_gb_per_s": rate / 1e3}
        row["device"] = torch.cuda.get_device_name()
        yield row | {"status": "ok", "samples_us": samples}


def print_row(row: dict[str, Any]) -> None:
    """A line, and one more for each kernel where they were asked for."""
    start = f"D={row['D']:<5} T={row['T']:<6} {row['operation']:<23} {row['mode']:<17} {row['implementation']:<10}"
    if row["status"] != "ok":
        print(f"{start} {row['status']}: {row['message']}", flush=True)
        return
    share = row["gb_per_s"] / row["copy_gb_per_s"]
    print(
        f"{start} cold {row['cold_us']:7.1f} µs   hot {row['hot_us']:7.1f} µs   "
        f"{row['gb_per_s']:6.0f} GB/s ({share:4.0%} of a copy's)",
        flush=True,
    )
    for name, (microseconds, launches) in sorted(row["kernels"].items(), key=lambda item: -item[1][0] * item[1][1]):
        print(f"    {microseconds:8.1f} µs x {launches:g}  {name[:100]}", flush=True)


@contextmanager
def use_tiles(tiles: Any) -> Iterator[None]:
    """Let every call of adaptive norm take these tile choices."""
    from dig.ops.adaln import fused

    saved = fused.tiles_for
    fused.tiles_for = lambda x: tiles
    try:
        yield
    finally:
        fused.tiles_for = saved


def sweep(shape: Shape, options: argparse.Namespace) -> None:
    """Time residual_norm_modulate's kernels under every tile choice, cold, and print the best of each.

    The forward and the backward kernel have choices of their own, so both are varied together.
    """
    from dig.ops.adaln.fused import Tiles

    steps = make_steps(shape, "residual_norm_modulate", "triton", MODES[1])
    best: dict[str, tuple[float, dict[str, int]]] = {}
    choices = itertools.product(options.rows, options.parts, options.warps, options.programs)
    for rows, part, warps, programs in choices:
        forward = {"rows": rows, "part": part, "warps": warps}
        backward = {f"backward_{name}": value for name, value in forward.items()} | {"programs": programs}
        with use_tiles(Tiles(**forward, **backward)):
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options, checked."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops.rowwise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 1152])
    parser.add_argument("--tokens", type=int, nargs="+", default=[12544, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--norm", choices=NORMS, default="rms")
    parser.add_argument("--stream", choices=DTYPES, default="bf16", help="dtype of x, the residual stream")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of everything else")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--samples", type=int, default=50, help="replays a median is taken of")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel, by torch.profiler")
    parser.add_argument("--json", type=Path, help="append one JSON line for each measurement to this file")
    parser.add_argument("--sweep", action="store_true", help="time tile choices instead of implementations")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--parts", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--warps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--programs", type=int, nargs="+", default=[264, 396, 528, 792])
    options = parser.parse_args(arguments)
    for name in ("widths", "tokens", "batch", "samples", "rows", "parts", "warps", "programs"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.ops.rowwise needs an NVIDIA GPU; none is visible to torch")
    torch.manual_seed(0)
    rate = copy_rate()
    for D, T in itertools.product(options.widths, options.tokens):
        shape = Shape(B=options.batch, T=T, D=D, norm=options.norm, stream=options.stream, dtype=options.dtype)
        if options.sweep:
            sweep(shape, options)
            continue
        for row in measure(shape, options, rate):
            print_row(row)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
