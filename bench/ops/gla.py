"""Time gated linear attention alone: this project's kernels beside flash-linear-attention's, in the same run.

    python -m bench.ops.gla                       # DiG-S/2 at 1792: T = 12544, 6 heads of 32/64, bf16
    python -m bench.ops.gla --tokens 1024 4096 16384 --kernels --json gla.jsonl
    python -m bench.ops.gla --sweep               # what `dig.ops.gla.tiled.TILES` is made from

A step is captured several times in one CUDA graph, so that launches don't count, and a sample is one replay divided by
that number. "cold" steps take turns among input sets that together exceed the L2 cache several times, as in a model,
whose layers touch other memory in between; "hot" steps share one set. Shapes: B batch, T tokens, H heads, K key width,
V value width.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("forward", "forward+backward")
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


def make_inputs(shape: Shape, operation: str) -> tuple[list[Tensor], Tensor]:
    """Leaves for one step and the output's gradient; q, k, v (and g) are slices of one projection, as in the model."""
    B, T, H, K, V = shape.B, shape.T, shape.H, shape.K, shape.V
    dtype = DTYPES[shape.dtype]
    widths = [H * K, H * K, H * V, H * V]
    fused = torch.randn(B, T, sum(widths), device="cuda", dtype=dtype)
    q, k, v, g = (x.unflatten(-1, (H, -1)).detach() for x in fused.split(widths, -1))
    logits = torch.randn(B, T, H, K, device="cuda", dtype=dtype)
    if operation == "block":
        leaves = [q, k, v, logits, g, torch.ones(V, device="cuda")]
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

    require("fla", "--implementations fla")

    def fla_block(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, g: Tensor, norm_weight: Tensor) -> Tensor:
        o = fla_gla(q * scale, k, v, (F.logsigmoid(gate_logits.float()) / NORMALIZER).to(q.dtype))
        return F.rms_norm(o.float(), (o.shape[-1],), norm_weight, 1e-6).to(o.dtype) * F.silu(g)

    return {"recurrence": fla_gla, "block": fla_block}


def make_step(
    function: Callable[..., Tensor], mode: str, inputs: list[Tensor], gradient: Tensor
) -> Callable[[], object]:
    """One forward pass, or one with its backward pass, on these inputs."""
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return forward
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def capture(steps: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All steps in one graph, after enough runs outside it to have compiled everything."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, steps: int, samples: int) -> list[float]:
    """Microseconds a step, one number a replay."""
    times = []
    for index in range(samples + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 5:
            times.append(start.elapsed_time(end) * 1e3 / steps)
    return times


def kernel_times(step: Callable[[], object], repeats: int = 20) -> dict[str, tuple[float, float]]:
    """Name of each kernel → (mean microseconds of a launch, launches a step), from torch.profiler."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / event.count, event.count / repeats)
        for event in profile.key_averages()
        if str(event.device_type).endswith("CUDA") and event.self_device_time_total > 0
    }


def copy_rate() -> float:
    """Bytes a microsecond, read plus written, of a large copy on this card."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    graph = capture([lambda: target.copy_(source)])
    return 2 * source.nbytes / statistics.median(replay_times(graph, 1, 20))


def set_count(shape: Shape, operation: str) -> int:
    """Input sets that together take four times the L2 cache, within reason."""
    size = shape.least_bytes(operation, "forward")
    return max(2, min(64, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size)))


def measure(shape: Shape, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each operation, mode and implementation."""
    rate = copy_rate()
    for implementation, operation, mode in itertools.product(options.implementations, options.operations, MODES):
        row = asdict(shape) | {"implementation": implementation, "operation": operation, "mode": mode}
        try:
            function = operations(implementation, shape)[operation]
            sets = [make_inputs(shape, operation) for _ in range(set_count(shape, operation))]
            steps = [make_step(function, mode, *one) for one in sets]
            samples = {
                name: replay_times(capture(chosen), len(chosen), options.samples)
                for name, chosen in (("cold", steps), ("hot", steps[:1] * len(steps)))
            }
            row["kernels"] = kernel_times(steps[0]) if options.kernels else {}
        except (ImportError, torch.OutOfMemoryError) as error:
            yield row | {"status": type(error).__name__, "message": str(error)}
            continue
        row["floor_us"] = shape.least_bytes(operation, mode) / rate
        row["device"] = torch.cuda.get_device_name()
        row |= {f"{name}_us": statistics.median(times) for name, times in samples.items()}
        yield row | {"status": "ok", "samples_us": samples}


def print_row(row: dict[str, Any]) -> None:
    """A line, and one more for each kernel where they were asked for."""
    start = f"T={row['T']:<6} {row['operation']:<10} {row['mode']:<17} {row['implementation']:<7}"
    if row["status"] != "ok":
        print(f"{start} {row['status']}: {row['message']}", flush=True)
        return
    share = row["floor_us"] / row["cold_us"]
    print(
        f"{start} cold {row['cold_us']:8.1f} µs   hot {row['hot_us']:8.1f} µs   "
        f"memory floor {row['floor_us']:7.1f} µs ({share:4.0%})",
        flush=True,
    )
    for name, (microseconds, launches) in sorted(row["kernels"].items(), key=lambda item: -item[1][0] * item[1][1]):
        print(f"    {microseconds:8.1f} µs x {launches:g}  {name[:100]}", flush=True)


@contextmanager
def use_tiles(tiles: Any) -> Iterator[None]:
    """Let every call take these tile choices."""
    from dig.ops.gla import tiled

    saved = tiled.tiles_for
    tiled.tiles_for = lambda q, v: tiles
    try:
        yield
    finally:
        tiled.tiles_for = saved


def sweep(shape: Shape, options: argparse.Namespace) -> None:
    """Time each kernel of the block's forward and backward pass under every tile choice; print the best of each.

    A kernel's time depends on the chunk length and its own warps alone, so all warps are varied together, and the best
    is put together kernel by kernel for each chunk length. Registers are those of the two backward kernels.
    """
    from triton.runtime.errors import OutOfResources

    from dig.ops.gla.tiled import Tiles, gla_block

    inputs, gradient = make_inputs(shape, "block")
    step = make_step(lambda *x: gla_block(*x, scale=shape.K**-0.5), MODES[1], inputs, gradient)
    fields = {
        "local_state_kernel": "local_warps",
        "output_kernel": "output_warps",
        "output_backward_kernel": "output_backward_warps",
        "gradient_kernel": "gradient_warps",
    }
    for chunk in options.chunks:
        best: dict[str, tuple[float, dict[str, int]]] = {}
        for warps, columns, registers in itertools.product(options.warps, options.scan_columns, options.registers):
            scan = {"scan_warps": warps, "scan_columns": columns}
            choice = dict.fromkeys(fields.values(), warps)
            tiles = Tiles(chunk=chunk, backward_registers=registers or None, **scan, **choice)
            try:
                with use_tiles(tiles):
                    kernels = kernel_times(step)
            except OutOfResources as error:
                print(f"{tiles}: {error}", flush=True)
                continue
            for name, (microseconds, launches) in kernels.items():
                if name not in (*fields, "scan_kernel"):
                    continue
                setting = f"warps {warps:2} scan columns {columns:4} registers {registers:4}"
                print(f"chunk {chunk:4} {setting} {name:24} {microseconds:7.1f} µs", flush=True)
                taken = scan if name not in fields else {fields[name]: warps, "registers": registers}
                if microseconds * launches < best.get(name, (float("inf"), {}))[0]:
                    best[name] = (microseconds * launches, taken)
        if best:
            print(f"chunk {chunk}, best: {sum(time for time, _ in best.values()):.1f} µs with", flush=True)
            for name, (microseconds, taken) in best.items():
                print(f"    {name:24} {microseconds:7.1f} µs  {taken}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options, checked."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops.gla", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[12544])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--key-width", type=int, default=32)
    parser.add_argument("--value-width", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--implementations", nargs="+", choices=("triton", "fla"), default=["triton", "fla"])
    parser.add_argument("--operations", nargs="+", choices=("recurrence", "block"), default=["recurrence", "block"])
    parser.add_argument("--samples", type=int, default=50, help="replays a median is taken of")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel, by torch.profiler")
    parser.add_argument("--json", type=Path, help="append one JSON line for each measurement to this file")
    parser.add_argument("--sweep", action="store_true", help="time tile choices instead of implementations")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--scan-columns", type=int, nargs="+", default=[32])
    parser.add_argument("--registers", type=int, nargs="+", default=[0, 128], help="0 leaves them to the compiler")
    options = parser.parse_args(arguments)
    for name in ("tokens", "heads", "batch", "key_width", "value_width", "samples", "chunks", "warps", "scan_columns"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.ops.gla needs an NVIDIA GPU; none is visible to torch")
    torch.manual_seed(0)
    for T in options.tokens:
        shape = Shape(
            B=options.batch, T=T, H=options.heads, K=options.key_width, V=options.value_width, dtype=options.dtype
        )
        if options.sweep:
            sweep(shape, options)
            continue
        for row in measure(shape, options):
            print_row(row)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
