"""One door to all data: what a path holds is seen from what lies there."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from dig.training.data.base import DataError, DataSet
from dig.training.data.folder import ImageFolder, is_image_name
from dig.training.data.idx import IdxImages, holds_idx
from dig.training.data.latents import LatentShards
from dig.training.data.shards import holds_latents


def open_dataset(path: str | Path, **options: Any) -> DataSet:
    """Open latent shards, idx files or class folders.

    Args:
        path: A folder.
        options: Passed on to `LatentShards`, `IdxImages` or `ImageFolder`; None stands for the default.

    Raises:
        DataError: The path is none of the three, its content cannot be used, or an option is not for it.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file; name the folder that holds it" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}")
    kind: type[LatentShards] | type[IdxImages] | type[ImageFolder]
    if holds_latents(folder) and holds_idx(folder):
        raise DataError(f"{folder} holds both latent shards and idx files; move one of them into a folder of its own")
    if holds_latents(folder):
        kind, words = LatentShards, "latent shards"
    elif holds_idx(folder):
        kind, words = IdxImages, "idx files"
    elif any(is_image_name(entry.name) or entry.is_dir() for entry in folder.glob("[!.]*")):
        kind, words = ImageFolder, "class folders"
    else:
        raise DataError(
            f"{folder} holds no data that can be read: neither class folders (as in {folder}/cat/1.jpg), nor idx files "
            "(train-images-idx3-ubyte.gz and its labels), nor latent shards (written by python -m dig encode)"
        )
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(kind).parameters.keys())
    if unknown:
        raise DataError(f"{folder} holds {words}, for which {', '.join(unknown)} cannot be chosen")
    return kind(folder, **given)
