"""The command ``export``: weights for others to load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dig.commands.common import check_folder_name, open_decoder, refusing
from dig.launched import place_in_job
from dig.progress import open_console


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="As sample takes it: a run's folder, a checkpoint, a published file, a hub name.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to make. Of safetensors and release also a file, .safetensors or .pt.")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="diffusers (of DiT a folder for DiTPipeline, of the others one for dig.load), safetensors (one file "
            "that says what it is), or release (the authors' names)."
        ),
    ] = "safetensors",
    weights: Annotated[
        str | None,
        typer.Option(help="Of a run's checkpoint: averaged, or raw, those of its last step. Default: averaged."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Goes into a DiT's pipeline: diffusers' AutoencoderKL, a folder or a hub name."),
    ] = None,
    other_vae: Annotated[
        bool, typer.Option("--other-vae", help="Take a VAE that the latents were not made with.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Of a published file: DiG-XL/2:variant=release, DiT-XL/2, ..."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Of a published file, in pixels. Default: 256.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Of a published file. Default: 1000.")] = None,
) -> None:
    """Write weights for others to load: diffusers' folder, one safetensors file, or the authors' names.

    What is written reads back to the same bits, by sample, by dig.load, and by train --init.

    One process does it. Under torchrun that is the first one, and the others end at once.
    """
    open_console()
    with refusing():
        if place_in_job()[0] > 0:
            return
        if model is None and (image_size, num_classes) != (None, None):
            raise ValueError("--image-size and --num-classes describe a published file, together with --model")
        from dig.sampling.exporting import SUFFIXES, export

        if out.suffix.lower() not in SUFFIXES.get(format, ()):
            try:
                check_folder_name("--out", out)
            except ValueError as error:
                files = " or ".join(SUFFIXES.get(format, ()))
                raise ValueError(f"{error}" + (f", or name a file in {files}" if files else "")) from None
        from dig.sampling.weights import Published, load_weights, read_choice

        published = None
        if model is not None:
            published = Published(model=model, image_size=image_size, num_classes=num_classes)
        found = load_weights(checkpoint, device="cpu", published=published, choice=read_choice(weights))
        if warning := found.check_average():
            typer.echo(f"warning: {warning}", err=True)
        decoder = open_decoder(
            vae, found.latent_scale, "cpu", channels=found.spec.in_channels, made_by=found.vae_sha256, other=other_vae
        )
        written = export(found, out, format=cast(Any, format), vae=decoder.model if decoder is not None else None)
        at = f", step {found.step}" if found.step is not None else ""
        typer.echo(f"{found.spec.describe()}{at}, as {format} in {written.path}")
        for note in written.notes:
            typer.echo(f"note: {note}")
