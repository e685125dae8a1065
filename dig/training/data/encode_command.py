"""The command ``encode``: images to latent shards."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dig.packages import MissingPackageError
from dig.training.data.base import DataError
from dig.training.data.encoding import Progress, encode


def encode_command(
    images: Annotated[Path, typer.Argument(help="A folder of class folders, as ImageNet's train.")],
    out: Annotated[Path, typer.Option(help="Folder of the latent shards; with shards in it, goes on from there.")],
    vae: Annotated[str, typer.Option(help="diffusers' AutoencoderKL: a folder, or a name on the hub.")],
    image_size: Annotated[int, typer.Option(help="Side of the cropped images in pixels.")] = 256,
    batch: Annotated[int, typer.Option(help="Images that the VAE takes at once.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Images a shard.")] = 4096,
    dtype: Annotated[str, typer.Option(help="How latents are stored: fp16, bf16 or fp32.")] = "fp16",
    seed: Annotated[int, typer.Option(help="Seed of the sampling of latents.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, or cpu.")] = "auto",
    rank: Annotated[
        int | None, typer.Option(help="Which of the processes that share the work. Default: torchrun's, or 0.")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(help="How many processes share the work. Default: torchrun's, or 1.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode images. Default: a thread a core.")] = None,
) -> None:
    """Encode images into latent shards: sampled, scaled, as they are and mirrored.

    Interrupted, it goes on with the same command: finished shards are verified and skipped. Several processes share
    the work with --rank and --world-size (or under torchrun), each writing shards of its own.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    console = Console(stderr=True, soft_wrap=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    last = Progress(shards=0)
    try:
        with _bar(console) as bar:
            task = bar.add_task(f"encoding into {out}", total=None)
            for last in encode(
                images,
                out,
                vae=vae,
                image_size=image_size,
                batch_size=batch,
                shard_size=shard_size,
                dtype=cast(Any, dtype),
                seed=seed,
                device=_choose_device(device),
                rank=rank,
                world_size=world_size,
                workers=workers,
            ):
                bar.update(task, total=last.shards, completed=last.done)
    except KeyboardInterrupt:
        console.print(f"stopped: {last.done} shards are in {out}; go on with the same command")
        raise typer.Exit(130) from None
    except (ValueError, MissingPackageError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(_summary(last, out, world_size))


def _choose_device(device: str) -> str:
    import torch

    present = torch.cuda.is_available()
    if device == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if present else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        raise DataError(f"unknown device {device!r}: choose auto, cuda or cpu")
    if kind == "cuda" and not present:
        raise DataError("no NVIDIA GPU was found; use --device cpu, or run on a machine with one")
    return device


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _summary(last: Progress, out: Path, world_size: int) -> str:
    text = f"{last.images:,} images in {last.done} shards in {out}"
    if last.skipped:
        text += f", {last.skipped} of them made before"
    if last.unreadable:
        text += f"; {len(last.unreadable)} images could not be read and are left out (named in the index)"
    if world_size > 1:
        text += "; all ranks' shards are there" if last.joined else "; other ranks may still be at theirs"
    return text
