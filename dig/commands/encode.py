"""The command ``encode``: images to latent shards."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dig.commands.common import (
    DryRunOption,
    QuietOption,
    check_folder_name,
    choose_device,
    interruptible,
    refusing,
)
from dig.commands.dry_run import NOTHING, tell
from dig.commands.job import shared, working_together
from dig.launched import follows, from_environment
from dig.progress import Follower, following, open_console
from dig.sampling.sharing import Sharing
from dig.training.data.encoding import Progress, encode
from dig.training.data.files import shown


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
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Encode images into latent shards: sampled, scaled, as they are and mirrored.

    Interrupted, it goes on with the same command: finished shards are verified and skipped. Several processes share
    the work with --rank and --world-size (or under torchrun), each writing shards of its own.
    """
    # Ranks that are named by options are strangers, and speak for themselves.
    launched = rank is None and world_size is None
    console = open_console(quiet=quiet or (launched and follows()))
    last = Progress(shards=0)
    with (
        interruptible(lambda: f"{last.done} shards are in {out}; the same command goes on"),
        refusing(),
        working_together(device) if launched else nullcontext() as job,
        following(console, f"encoding into {out}", total=None, unit="image") as progress,
    ):
        sharing = shared(job)
        rank = from_environment("RANK", 0) if rank is None else rank
        world_size = from_environment("WORLD_SIZE", 1) if world_size is None else world_size
        where = choose_device(device)
        check_folder_name("--out", out)
        if dry_run:
            _tell(images, image_size, shard_size, dtype, f"{where}, process {rank} of {world_size}", vae)
            return
        for told in encode(
            images,
            out,
            vae=vae,
            image_size=image_size,
            batch_size=batch,
            shard_size=shard_size,
            dtype=cast(Any, dtype),
            seed=seed,
            # Under torchrun, each process of a machine has a GPU of its own.
            device=f"cuda:{from_environment('LOCAL_RANK', 0)}" if where == "cuda" else where,
            rank=rank,
            world_size=world_size,
            workers=workers,
            report=partial(_tell_progress, progress, sharing),
            meet=sharing.meet,
            agree=sharing.agree,
            sees=sharing.sees,
        ):
            last = told
    if launched and follows():
        return
    if job is not None and not last.joined:
        # All ranks have come to their end.
        with refusing():
            raise ValueError(
                f"{out} has no index: not all of its shards are there; the same command makes what is missing"
            )
    typer.echo(shown(_summary(last, out, world_size or 1)))


def _tell(images: Path, image_size: int, shard_size: int, dtype: str, where: str, vae: str) -> None:
    """Print what would be encoded. The VAE is read where it lies here; it is not fetched.

    Raises:
        ValueError: The images, the VAE or an option can't be used.
    """
    from dig.training.data.checks import check_whole
    from dig.training.data.folder import ImageFolder
    from dig.training.data.vae import downsampling, is_here, load_vae

    check_whole("image_size", image_size, least=1)
    check_whole("shard_size", shard_size, least=1)
    folder = ImageFolder(images, image_size=image_size)
    said = f"{vae}, which is not here yet: it would be fetched from the hub"
    if is_here(vae):
        import torch

        model = load_vae(vae, torch.device("cpu"))
        if image_size % downsampling(model):
            raise ValueError(
                f"image_size must be a multiple of {downsampling(model)}, by the VAE {vae}; got {image_size}"
            )
        size = image_size // downsampling(model)
        said = f"{vae}, {model.config.latent_channels}x{size}x{size} of {image_size}x{image_size} pixels"
    count = len(folder)
    tell(
        images=folder.describe(),
        latents=f"{2 * count:,} in {dtype}, as they are and mirrored, in {-(-count // shard_size):,} shards",
        vae=said,
        device=where,
    )
    typer.echo(NOTHING)


def _tell_progress(progress: Follower, sharing: Sharing, done: int, total: int) -> None:
    """After every batch, to whoever follows and whoever watches."""
    progress.update(done, total=total)
    sharing.begins(f"encoding, {done} of {total} images of its share behind it")


def _summary(last: Progress, out: Path, world_size: int) -> str:
    whose = " of this rank" if world_size > 1 else ""
    text = f"{last.images:,} images in {last.done} shards{whose} in {out}"
    if last.skipped:
        text += f", {last.skipped} of them made before"
    if last.unreadable:
        text += f"; {len(last.unreadable)} images could not be read and are left out (named in the index)"
    if world_size > 1:
        text += "; all ranks' shards are there" if last.joined else "; other ranks may still be at theirs"
    return text
