"""The command ``sample``."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dig.commands.common import (
    DeviceOption,
    DryRunOption,
    QuietOption,
    check_folder_name,
    interruptible,
    refusing,
)
from dig.commands.drawing import Asked, Drawing, draw_folder, prepare
from dig.commands.dry_run import rehearse_sampling
from dig.commands.job import shared, working_together
from dig.launched import follows
from dig.memory import peak_memory
from dig.messages import describe
from dig.progress import following, open_console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRID_IMAGES = 100
MOST_SCALE = 64


def sample_command(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="A run's folder (its newest whole checkpoint), a checkpoint, an exported or published "
            ".pt/.safetensors, diffusers' DiT as a folder, or a hub name."
        ),
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of PNG files, a sample each: 00000012-3-cat.png.")] = None,
    npz: Annotated[Path | None, typer.Option(help="File of all samples: uint8 (N, H, W, 3) as arr_0.")] = None,
    grid: Annotated[Path | None, typer.Option(help=f"PNG with the first {GRID_IMAGES} samples.")] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Write each sample's class beneath it, in the grid.")
    ] = False,
    scale: Annotated[int, typer.Option(help="Enlarge the grid's samples so many times.")] = 1,
    samples: Annotated[int | None, typer.Option(help="How many. Default: 8 a class, 100 at most.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Indices or names, separated by commas, taken in turn; null is no class. A name with a comma stands "
            "in double quotes; where names are numbers, @3 is the index. Default: all."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddpm, ddim or dpm-solver++; euler for flow matching. Default: ddim, or euler."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. Default: ddpm 250, ddim and euler 50, dpm-solver++ 20.")
    ] = None,
    eta: Annotated[float, typer.Option(help="Share of noise of ddim.")] = 0.0,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    cfg_channels: Annotated[
        str, typer.Option(help="Which noise channels are guided: three (as published) or all.")
    ] = "three",
    seed: Annotated[int, typer.Option(help="Of the noise: same seed, same images.")] = 0,
    first: Annotated[int, typer.Option(help="Index of the first sample.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples that are saved at a time. Changes no image.")] = 500,
    model_batch: Annotated[
        int | None,
        typer.Option(
            help="Images that the model takes at once, part of what decides on their last bits. "
            "Default: by the model's tokens and the device."
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Decodes latents: diffusers' AutoencoderKL, a folder or name.")
    ] = None,
    other_vae: Annotated[
        bool, typer.Option("--other-vae", help="Decode with a VAE that the latents were not made with.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="Of a run's checkpoint: averaged, or raw, those of its last step. Default: averaged."),
    ] = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="Keep the latents of a model of latents, without a VAE.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Of a published file: DiG-XL/2:variant=release, DiT-XL/2, ...")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Of a published file, in pixels. Default: 256.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Of a published file. Default: 1000.")] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "--implementation", help="Which implementation runs: triton, fla, reference, sdpa-cudnn, ..."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16 (weights too), autocast (to bf16, of fp32 weights) or fp32. Default on a GPU: bf16 where the "
            "family takes it, else autocast."
        ),
    ] = None,
    device: DeviceOption = "auto",
    execution: Annotated[
        str | None,
        typer.Option(help="graph (the whole loop as a CUDA graph) or eager. Default: graph on a GPU."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Low-rank adapter for the checkpoint's weights: a run of train --lora, or peft's folder."),
    ] = None,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Sample images from a trained model, with its averaged weights unless told otherwise.

    Interrupted, it goes on with the same command: finished images are kept, and batches beside the npz file until all
    are there. The same seed gives the same images, bit for bit, whatever --samples, --first and --batch are, and
    however many processes share them under torchrun.
    """
    console = open_console(quiet=quiet or follows())
    with (
        interruptible(lambda: _kept(images, npz, samples)),
        refusing(),
        working_together(device) as job,
    ):
        if job is not None and dry_run:
            raise ValueError("--dry-run is of one process: leave out torchrun")
        if npz is None and grid is None and images is None and not dry_run:
            raise ValueError("nothing to write: give --images, --npz or --grid")
        if npz is not None and images is not None:
            raise ValueError("choose --images or --npz: each holds all samples")
        if latents and (grid is not None or images is not None):
            raise ValueError(
                "a grid and PNG files are of images, not of latents: give --vae instead of --latents, or --npz alone"
            )
        if grid is None and (labels or scale != 1):
            raise ValueError("--labels and --scale are of a grid: give --grid")
        if batch < 1 or not 1 <= scale <= MOST_SCALE:
            raise ValueError(
                f"batch must be at least 1; got {batch}"
                if batch < 1
                else f"scale must be 1 to {MOST_SCALE}; got {scale}"
            )
        asked = Asked(
            checkpoint=checkpoint,
            samples=samples,
            classes=classes,
            sampler=sampler,
            steps=steps,
            eta=eta,
            cfg=cfg,
            cfg_channels=cfg_channels,
            seed=seed,
            first=first,
            model_batch=model_batch,
            vae=vae,
            other_vae=other_vae,
            weights=weights,
            latents=latents,
            model=model,
            image_size=image_size,
            num_classes=num_classes,
            backend=backend,
            dtype=dtype,
            device=device,
            execution=execution,
            adapter=adapter,
        )
        from dig.sampling.files import check_name, check_output, first_samples, only_writer, sample_to_npz
        from dig.sampling.folder import first_images, open_folder

        sharing = shared(job)
        outputs = [(path, suffix) for path, suffix in ((npz, ".npz"), (grid, ".png")) if path is not None]
        # Before weights are read, which takes a while.
        for path, suffix in outputs:
            check_name(path, suffix)
        check_folder_name("--images", images)
        drawing = prepare(asked, console)
        plan = drawing.plan
        if dry_run:
            runner = drawing.runner(None)
            parameters = drawing.parameters()
            rehearse_sampling(runner, model=drawing.found.spec.describe(), parameters=parameters, device=drawing.device)
            return
        for path, suffix in outputs:
            check_output(path, suffix)
        if images is not None:
            open_folder(images)
        runner = drawing.runner(console)
        memory = partial(peak_memory, drawing.device)
        with ExitStack() as stack:
            if grid is not None and sharing.leads:
                stack.enter_context(only_writer(grid))
            if npz is not None:
                name: Literal["arr_0", "latents"] = "latents" if latents else "arr_0"
                started = time.perf_counter()
                with following(console, f"sampling into {npz}", total=plan.count, unit="sample", memory=memory) as told:
                    runner.report = told.advance
                    for progress in sample_to_npz(
                        runner, npz, batch=batch, about=drawing.about(), name=name, sharing=sharing
                    ):
                        told.update(progress.done)
                    runner.report = None
                if sharing.leads:
                    made, seconds = progress.done - progress.skipped, time.perf_counter() - started
                    before = f" ({progress.skipped} made before)" if progress.skipped else ""
                    typer.echo(f"{plan.count} samples{before} in {npz}: {made / seconds:.3g} a second")
            if images is not None:
                draw_folder(drawing, runner, images, console, sharing)
            if grid is not None and sharing.leads:
                shown = range(first, first + min(plan.count, GRID_IMAGES))
                if npz is not None:
                    pixels = first_samples(npz, len(shown))
                elif images is not None:
                    pixels = first_images(images, plan, shown, drawing.found)
                else:
                    with following(console, "sampling", total=len(shown), unit="sample", memory=memory) as told:
                        runner.report = told.advance
                        pixels = runner.samples(shown)
                _write_grid(grid, _lay_out(pixels, drawing, shown, labels=labels, scale=scale))
                typer.echo(f"{len(shown)} samples in {grid}")


def _kept(images: Path | None, npz: Path | None, samples: int | None) -> str:
    """What lies there after an interruption, and how it goes on."""
    from dig.sampling.files import count_parts
    from dig.sampling.folder import count_images

    of = f" of {samples:,}" if samples is not None else ""
    if images is not None and (count := count_images(images)):
        return f"{count:,}{of} images are in {images}; the same command goes on"
    if npz is not None and (count := count_parts(npz)):
        return f"{count:,}{of} samples are in {npz}.parts; the same command goes on"
    if npz is not None and npz.exists():
        return f"the samples are in {npz}, as they were before"
    return "nothing was saved yet; the same command begins again"


def _lay_out(
    pixels: NDArray[np.uint8], drawing: Drawing, shown: range, *, labels: bool, scale: int
) -> NDArray[np.uint8]:
    """A grid of samples, enlarged and labelled where that was asked for; of up to ten classes each has its column."""
    from dig.sampling.images import enlarge, make_grid, with_labels

    pixels = enlarge(pixels, scale)
    if labels:
        pixels = with_labels(pixels, [drawing.found.class_name(label) for label in drawing.plan.labels(shown)])
    classes = len(drawing.plan.classes)
    return make_grid(pixels, classes * (10 // classes) if 1 < classes <= 10 else None)


def _write_grid(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a grid; where its folder takes nothing more, into one for temporary files, which the error then names."""
    from dig.sampling.images import write_png

    try:
        write_png(path, pixels)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="dig-kept-")) / path.name
        write_png(kept, pixels)
        raise ValueError(f"{describe(error)}; the grid is kept as {kept}") from None
