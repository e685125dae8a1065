"""The command ``sample``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from dig.commands.common import (
    Decoder,
    DeviceOption,
    DryRunOption,
    QuietOption,
    choose_precision,
    one_device,
    open_decoder,
    refusing,
)
from dig.commands.dry_run import rehearse_sampling
from dig.memory import peak_memory
from dig.messages import describe, one_line
from dig.progress import following, open_console
from dig.sampling.classes import parse_classes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from dig.sampling.weights import Weights

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
    dtype: Annotated[str | None, typer.Option(help="bf16 (autocast) or fp32. Default: bf16 on a GPU.")] = None,
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

    Interrupted, it goes on with the same command: finished batches are kept beside the file until all are there. The
    same seed gives the same images, bit for bit, whatever --samples, --first and --batch are.
    """
    console = open_console(quiet=quiet)
    with refusing():
        if npz is None and grid is None and not dry_run:
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
        if other_vae and vae is None:
            raise ValueError("--other-vae is about the one that --vae names")
        if latents and grid is not None:
            raise ValueError(
                "a grid is of images, not of latents: give --vae instead of --latents, or leave out --grid"
            )
        if batch < 1:
            raise ValueError(f"batch must be at least 1; got {batch}")
        import torch

        from dig.sampling.files import check_output, first_samples, only_writer, sample_to_npz
        from dig.sampling.images import make_grid
        from dig.sampling.runner import BatchSampler, SamplePlan, default_model_batch
        from dig.sampling.weights import Published, load_weights
        from dig.training.needs import Footprint, check_sampling

        published = None
        if model is not None:
            published = Published(
                model=model,
                image_size=256 if image_size is None else image_size,
                num_classes=1000 if num_classes is None else num_classes,
            )
        found = load_weights(
            checkpoint,
            device=where,
            published=published,
            backend=backend,
            choice=cast(Any, weights),
        )
        adapter_sha256 = None
        if adapter is not None:
            from dig.sampling.adapters import with_adapter

            found, adapter_sha256 = with_adapter(found, adapter)
        labels = parse_classes(classes, found.class_names, found.spec.num_classes, found.spec.num_classes)
        size = Footprint.of(found.spec)
        name: Literal["arr_0", "latents"] = "latents" if latents else "arr_0"
        at_once = model_batch if model_batch is not None else default_model_batch(size.tokens, where)
        plan = SamplePlan(
            classes=labels,
            count=samples if samples is not None else min(100, 8 * len(labels)),
            first=first,
            sampler=cast(Any, sampler or ("euler" if found.loss == "flow-matching" else "ddim")),
            steps=steps,
            eta=eta,
            cfg_scale=cfg,
            cfg_channels=cast(Any, cfg_channels),
            seed=seed,
            model_batch=at_once,
            bf16=bf16,
        )
        if (plan.sampler == "euler") != (found.loss == "flow-matching"):
            raise ValueError(f"{plan.sampler} can't sample a model that was trained with the loss {found.loss}")
        guided = plan.cfg_scale != 1
        for warning in (
            found.check_guidance(guided=guided, null=found.spec.num_classes in labels),
            found.check_average(),
        ):
            if warning is not None:
                typer.echo(f"warning: {one_line(warning)}", err=True)
        check_sampling(size, device=where, at_once=at_once * (2 if guided else 1))
        decoder = _open_vae(found, vae=vae, latents=latents, other=other_vae, device=where)
        if dry_run:
            network = found.build(where)
            runner = BatchSampler(network, plan, torch.device(where))
            parameters = sum(parameter.numel() for parameter in network.parameters())
            rehearse_sampling(runner, model=found.spec.describe(), parameters=parameters, device=where)
            return
        for path, suffix in ((npz, ".npz"), (grid, ".png")):
            if path is not None:
                check_output(path, suffix)
        network = found.build(where)
        about = {
            "model": found.spec.name,
            "options": dict(found.spec.options),
            "checkpoint": found.path.name,
            "sha256": found.sha256,
            **({"adapter_sha256": adapter_sha256} if adapter_sha256 is not None else {}),
            "weights": found.choice,
            "step": found.step,
            "seconds": found.seconds,
            "vae_sha256": decoder.sha256 if decoder is not None else None,
            "device": where,
        }
        at = f", step {found.step}" if found.step is not None else ""
        console.print(f"{found.spec.describe()}{at}, on {where}")
        finish = _finish(decoder, latents=latents)
        runner = BatchSampler(network, plan, torch.device(where), graph=captures, finish=finish)
        memory = partial(peak_memory, where)
        with ExitStack() as stack:
            if grid is not None:
                stack.enter_context(only_writer(grid))
            if npz is not None:
                started = time.perf_counter()
                with following(console, f"sampling into {npz}", total=plan.count, unit="sample", memory=memory) as told:
                    runner.report = told.advance
                    for progress in sample_to_npz(runner, npz, batch=batch, about=about, name=name):
                        told.update(progress.done)
                    runner.report = None
                made, seconds = progress.done - progress.skipped, time.perf_counter() - started
                before = f" ({progress.skipped} made before)" if progress.skipped else ""
                typer.echo(f"{plan.count} samples{before} in {npz}: {made / seconds:.3g} a second")
            if grid is not None:
                shown = range(first, first + min(plan.count, GRID_IMAGES))
                if npz is not None:
                    pixels = first_samples(npz, len(shown))
                else:
                    with following(console, "sampling", total=len(shown), unit="sample", memory=memory) as told:
                        runner.report = told.advance
                        pixels = runner.samples(shown)
                # A class keeps to its column.
                columns = len(labels) * (10 // len(labels)) if 1 < len(labels) <= 10 else None
                _write_grid(grid, make_grid(pixels, columns))
                typer.echo(f"{len(shown)} samples in {grid}")


def _write_grid(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a grid; where its folder takes nothing more, into one for temporary files, which the error then names."""
    from dig.sampling.images import write_png

    try:
        write_png(path, pixels)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="dig-kept-")) / path.name
        write_png(kept, pixels)
        raise ValueError(f"{describe(error)}; the grid is kept as {kept}") from None


def _open_vae(found: Weights, *, vae: str | None, latents: bool, other: bool, device: str) -> Decoder | None:
    """The VAE for a model's latents; None of a model of pixels, and of latents that stay as they are."""
    if latents:
        if found.latent_scale is None:
            raise ValueError("this model works on pixels: it has no --latents")
        if vae is not None:
            raise ValueError("choose --vae (images) or --latents, not both")
        return None
    decoder = open_decoder(
        vae,
        found.latent_scale,
        device,
        channels=found.spec.in_channels,
        made_by=found.vae_sha256,
        other=other,
    )
    if decoder is None and found.latent_scale is not None:
        raise ValueError(
            "this model makes latents: give --vae (diffusers' AutoencoderKL, a folder or a name) to get images, "
            "or --latents to keep them in the npz as they are"
        )
    return decoder


def _finish(decoder: Decoder | None, *, latents: bool) -> Callable[[Tensor], NDArray[Any]]:
    """What becomes of a batch of the model's."""
    from dig.sampling.images import to_pixels

    if latents:
        return lambda x: x.cpu().numpy()
    if decoder is None:
        return to_pixels
    return lambda x: to_pixels(decoder.decode(x))
