"""Checkpoints of a run: whole or not there, checked, the last few kept, never pickled.

A checkpoint is ``step-00001000.safetensors`` and its record ``step-00001000.json``, written in this order: the file
counts when its record is there. The record holds the file's SHA-256. What the run is lies in the header of the file
too, so that it can be used alone.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dig.training.data.files import replacing, sha256_of, write_atomically

logger = logging.getLogger(__name__)

SCHEMA = 1
HEADER = "dig"
"""The entry of the file's header that holds everything but tensors, as JSON."""
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: Its file.
        about: What it holds beside tensors: ``step``, ``seconds``, ``config`` and so on.
        tensors: By name, on the CPU.
    """

    path: Path
    about: dict[str, Any]
    tensors: dict[str, Tensor]


def checkpoint_path(folder: Path, step: int) -> Path:
    """File of the checkpoint after so many steps."""
    return folder / f"step-{step:08d}.safetensors"


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def checkpoint_files(folder: Path) -> list[Path]:
    """Files in the folder that are checkpoints with a record, newest first."""
    found = sorted((path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)), reverse=True)
    return [path for path in found if _record_path(path).exists()]


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], about: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones so that ``keep`` are left.

    Args:
        folder: Made if it is not there.
        step: How many steps lie behind.
        tensors: What to save, on any device.
        about: What to say beside them, as JSON can.
        keep: How many stay, this one among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    header = {HEADER: json.dumps({"schema": SCHEMA, "step": step, **about})}
    # A record of an earlier attempt at this step must not speak for the new file.
    _record_path(path).unlink(missing_ok=True)
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)
        digest = sha256_of(temporary)
    record = {"schema": SCHEMA, "step": step, "sha256": digest}
    write_atomically(_record_path(path), (json.dumps(record, indent=1) + "\n").encode())
    for old in checkpoint_files(folder)[keep:]:
        _record_path(old).unlink()
        old.unlink()
    return path


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill left of a checkpoint that never counted. Only the process that writes there may call this."""
    for path in folder.glob("step-*.safetensors"):
        if not _record_path(path).exists():
            path.unlink()
    for path in folder.glob(".step-*.tmp"):
        path.unlink()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint that has a record, or None."""
    try:
        record = json.loads(_record_path(path).read_bytes())
        expected = record["sha256"]
    except OSError as error:
        return f"{_record_path(path)} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{_record_path(path)} is damaged"
    try:
        return None if sha256_of(path) == expected else f"{path} is damaged: its checksum is not the recorded one"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def sound_checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints whose checksum is right, newest first; a damaged one on the way is reported."""
    for path in checkpoint_files(folder):
        wrong = damage(path)
        if wrong is None:
            yield path
        else:
            logger.warning("%s; the checkpoint before it is used", wrong)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there never was one.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    for path in sound_checkpoints(folder):
        return path
    if checkpoint_files(folder):
        raise CheckpointError(f"every checkpoint in {folder} is damaged; restore one, or start anew in another folder")
    return None


def read_about(path: Path) -> dict[str, Any] | None:
    """What a checkpoint file says of itself; None if it is not one of this project's.

    Raises:
        CheckpointError: It is no safetensors file, or of a later version of the project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if header is None:
        return None
    about: dict[str, Any] = {}
    with suppress(ValueError):
        about = json.loads(header)
    if about.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has the schema {about.get('schema')!r}; this version reads {SCHEMA}")
    return about


def read_checkpoint(path: Path, prefix: str = "") -> Checkpoint:
    """Read a checkpoint of this project, or the tensors of it whose names begin with ``prefix``, named without it.

    Raises:
        CheckpointError: It cannot be read, or is something else.
    """
    about = read_about(path)
    if about is None:
        raise CheckpointError(f"{path} is no checkpoint of python -m dig train")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dictionary)
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return Checkpoint(path=path, about=about, tensors=tensors)
