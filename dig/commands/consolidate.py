"""The command ``consolidate``: what several ranks saved together as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dig.commands.common import refusing
from dig.launched import place_in_job


def consolidate_command(
    run: Annotated[Path, typer.Argument(help="A run's folder (its newest whole checkpoint), or a checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="The file. Default: in the run's folder, step-00001000.safetensors.")
    ] = None,
) -> None:
    """Make one safetensors file of a checkpoint that several processes saved, each its part.

    The file holds all that the checkpoint does: weights, averages, optimizer. Every command that takes a checkpoint
    takes it, alone and anywhere. (They read the run's folder as it is, too.)

    One process does it. Under torchrun that is the first one, and the others end at once.
    """
    with refusing():
        if place_in_job()[0] > 0:
            return
        from dig.training.data.files import prepare_output
        from dig.training.saving import (
            FOLDER,
            CheckpointError,
            checkpoint_files,
            damage,
            newest_checkpoint,
            read_checkpoint,
            step_of,
            write_file,
        )

        named = run in checkpoint_files(run.parent)
        path = run if named else newest_checkpoint(run / FOLDER)
        if path is None:
            raise CheckpointError(f"{run} holds no checkpoint; python -m dig train --out {run} writes them")
        if named and (wrong := damage(path)):
            raise CheckpointError(f"{wrong}; name another checkpoint, or the run's folder for the newest whole one")
        file = out or (run.parent.parent if named else run) / f"step-{step_of(path):08d}.safetensors"
        if file.suffix != ".safetensors":
            raise ValueError(f"{file} would hold safetensors: give it a name in .safetensors")
        if file.absolute().parent.name == FOLDER:
            raise ValueError(f"{file} would count among the checkpoints of a run: choose another folder for it")
        prepare_output(file)
        checkpoint = read_checkpoint(path)
        write_file(file, checkpoint.tensors, checkpoint.about)
    typer.echo(f"{path} in one file: {file}")
