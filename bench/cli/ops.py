"""``python -m bench ops``: single operations, timed alone beside references and peers. torch is imported late."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.ops_compare import compare
from bench.cli.ops_in_steps import chain, prepare, shapes, variants
from bench.cli.options import check_appendable, numbers, some_of
from bench.messages import OneLineGroup, check_count, one_of, refuse
from dig.environment import gpu_present

if TYPE_CHECKING:
    from bench.ops.common import Times


class OpsGroup(OneLineGroup):
    """Commands of operations; an option that stands before its command is told where it belongs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Of which package this exception is, depends on typer's version.
            option = getattr(error, "option_name", None)
            own = [name for name, command in self.commands.items() if any(option in p.opts for p in command.params)]
            if option is not None and own:
                meant = ", ".join(f"ops {name} {option}" for name in own)
                refuse(f"{option} is no option of ops alone, but of a command: {meant}")
            raise


ops = typer.Typer(
    cls=OpsGroup,
    no_args_is_help=True,
    help="Time single operations on a GPU, or whole steps with one thing changed; search tile choices; look at "
    "registers.",
)

DTYPES = ("bf16", "fp32")
Batch = Annotated[int, typer.Option(help="Images a step.")]
Dtype = Annotated[str, typer.Option(help="bf16 or fp32.")]
Implementations = Annotated[str, typer.Option(help="What to time, separated by commas.")]
Samples = Annotated[int, typer.Option(help="Replays a median is taken of.")]
Kernels = Annotated[bool, typer.Option("--kernels", help="Also the time of each kernel, by torch.profiler.")]
Json = Annotated[Path | None, typer.Option("--json", help="Append one JSON line for each measurement to this file.")]
Sweep = Annotated[bool, typer.Option("--sweep", help="Time tile choices instead of implementations.")]
Tried = Annotated[str, typer.Option(help="Tried by --sweep, separated by commas.")]
TriedRegisters = Annotated[str, typer.Option(help="Tried by --sweep; 0 leaves them to the compiler.")]


def ready(json: Path | None) -> None:
    """Refuse a machine without a GPU, and a file that cannot be appended to, before anything is timed; seed torch."""
    check_appendable(json, "--json")
    if not gpu_present():
        refuse("no NVIDIA GPU was found; what this times runs on one")
    import torch

    torch.manual_seed(0)


def begin(json: Path | None, *, sweep: bool, samples: int, kernels: bool) -> Times | None:
    """`ready`, and what times and prints implementations; None where tile choices are timed instead."""
    ready(json)
    from bench.ops.common import Times, copy_rate

    return None if sweep else Times(rate=copy_rate(), samples=samples, kernels=kernels, json=json)


def numbers_tried(**options: str) -> dict[str, list[int]]:
    """What each option of --sweep names, as numbers."""
    return {
        name: numbers(text, f"--{name.replace('_', '-')}", least=0 if name == "registers" else 1)
        for name, text in options.items()
    }


@ops.command()
def gla(
    tokens: Annotated[str, typer.Option(help="T, separated by commas.")] = "12544",
    heads: Annotated[int, typer.Option(help="H.")] = 6,
    key_width: Annotated[int, typer.Option(help="K of a head.")] = 32,
    value_width: Annotated[int, typer.Option(help="V of a head.")] = 64,
    operations: Annotated[str, typer.Option(help="recurrence, block, or both.")] = "recurrence,block",
    implementations: Implementations = "triton,fla",
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    samples: Samples = 50,
    kernels: Kernels = False,
    json: Json = None,
    sweep: Sweep = False,
    chunks: Tried = "32,64",
    warps: Tried = "2,4,8",
    registers: TriedRegisters = "0,128,168",
    scan_warps: Tried = "4,8",
    scan_lanes: Tried = "32,64",
    scan_groups: Tried = "16,32",
    scan_steps: Tried = "8,16",
    short_warps: Tried = "2,4,8",
    short_units: Tried = "64,128,256",
    short_steps: Tried = "4,8,16",
) -> None:
    """Gated linear attention: this project's kernels beside flash-linear-attention's, in the same run.

    Without options: that of DiG-S/2 at 1792 pixels. Shapes: B batch, T tokens, H heads, K key width, V value width.
    --sweep is what dig.ops.tiles.sm90.GLA is made from.
    """
    sizes = numbers(tokens, "--tokens")
    for value, option in ((heads, "--heads"), (key_width, "--key-width"), (value_width, "--value-width")):
        check_count(value, option)
    check_count(batch, "--batch")
    check_count(samples, "--samples")
    one_of(dtype, "--dtype", DTYPES)
    chosen = some_of(operations, "--operations", ("recurrence", "block"))
    ways = some_of(implementations, "--implementations", ("triton", "fla"))
    tried = numbers_tried(
        chunks=chunks,
        warps=warps,
        registers=registers,
        scan_warps=scan_warps,
        scan_lanes=scan_lanes,
        scan_groups=scan_groups,
        scan_steps=scan_steps,
        short_warps=short_warps,
        short_units=short_units,
        short_steps=short_steps,
    )
    times = begin(json, sweep=sweep, samples=samples, kernels=kernels)
    from bench.ops import gla as timed

    for size in sizes:
        shape = timed.Shape(B=batch, T=size, H=heads, K=key_width, V=value_width, dtype=dtype)
        if times is None:
            timed.sweep(shape, timed.Choices(**{name: tuple(values) for name, values in tried.items()}))
        else:
            timed.time_shape(shape, ways, chosen, times)


@ops.command()
def srem(
    sides: Annotated[str, typer.Option(help="Rows, and columns, of a grid, separated by commas.")] = "32,64,112,128",
    width: Annotated[int, typer.Option(help="D.")] = 384,
    implementations: Implementations = "triton,reference,moved",
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    samples: Samples = 50,
    kernels: Kernels = False,
    json: Json = None,
    sweep: Sweep = False,
    channels: Tried = "64,128",
    groups: Tried = "2,4,8",
    widths: Tried = "2,4",
    rows: Tried = "4,8,16,32",
    warps: Tried = "2,4,8",
    registers: TriedRegisters = "0,128",
    best: Annotated[int, typer.Option(help="Tile choices printed of each pass by --sweep.")] = 10,
) -> None:
    """SREM's convolution: the fused kernels beside PyTorch's convolution, in the same run.

    Without options: that of DiG-S/2 at 512, 1024, 1792 and 2048 pixels. moved is a model whose tokens move: gated
    residual, convolution and reordering for the next block. --sweep is what dig.ops.tiles.sm90.SREM is made from.
    """
    grids = numbers(sides, "--sides")
    for value, option in ((width, "--width"), (batch, "--batch"), (samples, "--samples"), (best, "--best")):
        check_count(value, option)
    one_of(dtype, "--dtype", DTYPES)
    ways = some_of(implementations, "--implementations", ("triton", "reference", "moved"))
    tried = numbers_tried(channels=channels, groups=groups, widths=widths, rows=rows, warps=warps, registers=registers)
    times = begin(json, sweep=sweep, samples=samples, kernels=kernels)
    from bench.ops import srem as timed

    for side in grids:
        shape = timed.Shape(B=batch, rows=side, columns=side, D=width, dtype=dtype)
        if times is None:
            lists = {name: tuple(values) for name, values in tried.items()}
            timed.sweep(shape, timed.Choices(**lists, best=best))
        else:
            timed.time_shape(shape, ways, times)


@ops.command()
def rowwise(
    widths: Annotated[str, typer.Option(help="D, separated by commas.")] = "384,1152",
    tokens: Annotated[str, typer.Option(help="T, separated by commas.")] = "12544,16384",
    norm: Annotated[str, typer.Option(help="rms or layer.")] = "rms",
    stream: Annotated[str, typer.Option(help="Dtype of x, the residual stream: bf16 or fp32.")] = "bf16",
    operations: Annotated[
        str, typer.Option(help="What to time, separated by commas.")
    ] = "norm_modulate,residual_norm_modulate,swiglu",
    implementations: Implementations = "triton,reference,compiled",
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    samples: Samples = 50,
    kernels: Kernels = False,
    json: Json = None,
    sweep: Sweep = False,
    rows: Tried = "1,2,4,8",
    parts: Tried = "128,256,512,1024",
    warps: Tried = "2,4,8",
    programs: Tried = "264,396,528,792",
) -> None:
    """Adaptive norm and SwiGLU, which are bound by memory traffic: microseconds, and GB/s beside a device copy.

    Without options: those of DiG-S/2 and DiG-XL/2 at 1792 and 2048 pixels. compiled is the reference under
    torch.compile. --sweep times alternatives to dig.ops.tiles.sm90.ADALN.
    """
    columns, sizes = numbers(widths, "--widths"), numbers(tokens, "--tokens")
    check_count(batch, "--batch")
    check_count(samples, "--samples")
    one_of(norm, "--norm", ("rms", "layer"))
    one_of(stream, "--stream", DTYPES)
    one_of(dtype, "--dtype", DTYPES)
    chosen = some_of(operations, "--operations", ("norm_modulate", "residual_norm_modulate", "swiglu"))
    ways = some_of(implementations, "--implementations", ("triton", "reference", "compiled"))
    tried = numbers_tried(rows=rows, parts=parts, warps=warps, programs=programs)
    times = begin(json, sweep=sweep, samples=samples, kernels=kernels)
    from bench.ops import rowwise as timed

    for D, T in itertools.product(columns, sizes):
        shape = timed.Shape(B=batch, T=T, D=D, norm=norm, stream=stream, dtype=dtype)
        if times is None:
            timed.sweep(shape, timed.Choices(**{name: tuple(values) for name, values in tried.items()}))
        else:
            timed.time_shape(shape, ways, chosen, times)


@ops.command()
def products(
    tokens: Annotated[str, typer.Option(help="T, of the shapes that are timed; all without.")] = "",
    passes: Annotated[
        str, typer.Option(help="up, up alone, down and gradients, separated by commas.")
    ] = "up,up alone,down,gradients",
    implementations: Implementations = "fused,apart",
    samples: Samples = 50,
    json: Json = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Time tile choices too.")] = False,
) -> None:
    """SwiGLU in its matrix products and weights' gradients in one launch, beside products and passes of their own.

    Without options: those of DiG-S/2 at 1024, 1792 and 2048 pixels and with 32 images at 256, and of DiG-XL/2 at 1024
    and 2048. --sweep times alternatives to dig.ops.tiles.sm90.PRODUCTS and GRADIENTS.
    """
    sizes = numbers(tokens, "--tokens", empty=True)
    check_count(samples, "--samples")
    chosen = some_of(passes, "--passes", ("up", "up alone", "down", "gradients"))
    ways = some_of(implementations, "--implementations", ("fused", "apart"))
    ready(json)
    from bench.ops import products as timed

    for T, D in timed.SHAPES:
        if sizes and T not in sizes:
            continue
        for which in chosen:
            if sweep:
                timed.sweep(T, D, which, samples)
            timed.time_shape(T, D, [which], ways, samples=samples, json_file=json)


@ops.command()
def registers(
    capabilities: Annotated[
        str, typer.Option(help="Compute capabilities to compile for, as 9.0, separated by commas; all without.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Only the first variant of each kernel.")] = False,
    kernels: Annotated[str, typer.Option(help="Names of kernels, separated by commas; all without.")] = "",
) -> None:
    """What the compiler makes of every kernel: registers, spills, shared memory, products. Needs no GPU.

    About a minute for each architecture. Exit status 1: a kernel must not run; its line says why.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        refuse("TRITON_INTERPRET=1 replaces the compiler; unset it")
    from bench.ops.registers import by_capability, kernel_names, report

    try:
        known = list(by_capability())
    except ValueError as error:
        refuse(str(error))
    chosen = some_of(capabilities, "--capabilities", known) if capabilities else known
    names = kernel_names(chosen)
    if not report(chosen, some_of(kernels, "--kernels", names) if kernels else names, quick=quick):
        raise typer.Exit(1)


for command in (compare, prepare, chain, variants, shapes):
    ops.command()(command)
