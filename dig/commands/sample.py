"""The command ``sample``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from dig.commands.common import (
    DeviceOption,
    choose_precision,
    one_device,
    open_console,
    open_decoder,
    progress_bar,
    refusing,
)
from dig.sampling.classes import parse_classes

if TYPE_CHECKING:
    from torch import Tensor

GRID_IMAGES = 100


def sample_command(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="A run's folder (its newest whole checkpoint), a checkpoint, or a published .pt/.safetensors."
        ),
    ],
    npz: Annotated[Path | None, typer.Option(help="File of all samples: uint8 (N, H, W, 3) as arr_0.")] = None,
    grid: Annotated[Path | None, typer.Option(help=f"PNG with the first {GRID_IMAGES} samples.")] = None,
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
    dtype: Annotated[str | None, typer.Option(help="bf16 (autocast) or fp32. Default: bf16 on a GPU.")] = None,
    device: DeviceOption = "auto",
    execution: Annotated[
        str | None,
        typer.Option(help="graph (the whole loop as a CUDA graph) or eager. Default: graph on a GPU."),
    ] = None,
) -> None:
    """Sample images from a trained model, with its averaged weights.

    Interrupted, it goes on with the same command: finished batches are kept beside the file until all are there. The
    same seed gives the same images, bit for bit, whatever --samples, --first and --batch are.
    """
    console = open_console()
    with refusing():
        if npz is None and grid is None:
            raise ValueError("nothing to write: give --npz, --grid or both")
        where = one_device(device)
        bf16 = choose_precision(dtype, where) == "bf16"
        captures = (execution or ("graph" if where == "cuda" else "eager")) == "graph"
        if execution not in (None, "graph", "eager"):
            raise ValueError(f"execution must be graph or eager; got {execution!r}")
        if captures and where != "cuda":
            raise ValueError("execution graph is a CUDA graph and needs an NVIDIA GPU; use eager")
        if model is None and (image_size, num_classes) != (None, None):
            raise ValueError("--image-size and --num-classes describe a published file, together with --model")
        import torch

        from dig.sampling.images import make_grid, write_png
        from dig.sampling.runner import BatchSampler, SamplePlan, default_model_batch, sample_to_npz
        from dig.sampling.weights import Published, load_weights

        published = None
        if model is not None:
            published = Published(model=model, image_size=image_size or 256, num_classes=num_classes or 1000)
        weights = load_weights(checkpoint, device=where, published=published, backend=backend)
        finish, name = _finish(weights.latent_scale, vae=vae, latents=latents, device=where)
        if latents and grid is not None:
            raise ValueError(
                "a grid is of images, not of latents: give --vae instead of --latents, or leave out --grid"
            )
        network = weights.build(where)
        labels = parse_classes(classes, weights.class_names, network.num_classes, network.null_label)
        plan = SamplePlan(
            classes=labels,
            count=samples if samples is not None else min(100, 8 * len(labels)),
            first=first,
            sampler=cast(Any, sampler or ("euler" if weights.loss == "flow-matching" else "ddim")),
            steps=steps,
            eta=eta,
            cfg_scale=cfg,
            cfg_channels=cast(Any, cfg_channels),
            seed=seed,
            model_batch=model_batch if model_batch is not None else default_model_batch(network, where),
            bf16=bf16,
        )
        if (plan.sampler == "euler") != (weights.loss == "flow-matching"):
            raise ValueError(f"{plan.sampler} can't sample a model that was trained with the loss {weights.loss}")
        if cfg_channels not in ("three", "all"):
            raise ValueError(f"cfg-channels must be three or all; got {cfg_channels!r}")
        about = {
            "model": weights.spec.name,
            "options": dict(weights.spec.options),
            "checkpoint": weights.path.name,
            "sha256": weights.sha256,
            "step": weights.step,
            "seconds": weights.seconds,
        }
        at = f", step {weights.step}" if weights.step is not None else ""
        console.print(f"{weights.spec.describe()}{at}, on {where}", highlight=False)
        runner = BatchSampler(network, plan, torch.device(where), graph=captures, finish=finish)
        if npz is not None:
            started = time.perf_counter()
            with progress_bar(console) as bar:
                task = bar.add_task(f"sampling into {npz}", total=plan.count)
                for progress in sample_to_npz(runner, npz, batch=batch, about=about, name=name):
                    bar.update(task, completed=progress.done)
            made, seconds = progress.done - progress.skipped, time.perf_counter() - started
            before = f" ({progress.skipped} made before)" if progress.skipped else ""
            typer.echo(f"{plan.count} samples{before} in {npz}: {made / seconds:.3g} a second")
        if grid is not None:
            shown = range(first, first + min(plan.count, GRID_IMAGES))
            grid.parent.mkdir(parents=True, exist_ok=True)
            pixels = _first_images(npz, len(shown)) if npz is not None else runner.samples(shown)
            # A class keeps to its column.
            columns = len(labels) * (10 // len(labels)) if 1 < len(labels) <= 10 else None
            write_png(grid, make_grid(pixels, columns))
            typer.echo(f"{len(shown)} samples in {grid}")


def _first_images(npz: Path, count: int) -> Any:
    from dig.evaluation.samples import read_samples

    return read_samples(npz)[0][:count]


def _finish(
    scale: float | None, *, vae: str | None, latents: bool, device: str
) -> tuple[Callable[[Tensor], Any], Literal["arr_0", "latents"]]:
    """What becomes of a batch of the model's, and the name that it gets in the file."""
    from dig.sampling.images import to_pixels

    if latents:
        if scale is None:
            raise ValueError("this model works on pixels: it has no --latents")
        if vae is not None:
            raise ValueError("choose --vae (images) or --latents, not both")
        return (lambda x: x.cpu().numpy()), "latents"
    decode = open_decoder(vae, scale, device)
    if decode is None:
        if scale is not None:
            raise ValueError(
                "this model makes latents: give --vae (diffusers' AutoencoderKL, a folder or a name) to get images, "
                "or --latents to keep them in the npz as they are"
            )
        return to_pixels, "arr_0"
    return (lambda x: to_pixels(decode(x))), "arr_0"
