"""Checkpoints of a run: whole or not there, checked, the last few kept, never pickled.

A checkpoint is ``step-00001000.safetensors`` and its record ``step-00001000.json``, written in this order: the file
counts when its record is there. The record holds the file's SHA-256. What the run is lies in the header of the file
too, so that it can be used alone. Files are made in a folder ``.unfinished-*``, because safetensors writes under a
temporary name of its own, which no one else could tell from a file that counts.

What several ranks write together is a folder, ``step-00001000.shards``, with a record of the same kind
(`dig.training.parallel.shards`). Here it is found and read like a file.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dig.training.data.files import replacing, sha256_of, write_atomically

logger = logging.getLogger(__name__)

SCHEMA = 1
HEADER = "dig"
"""The entry of the file's header that holds everything but tensors, as JSON."""
FOLDER = "checkpoints"
UNFINISHED = ".unfinished-"
DAMAGED = ".damaged"
"""What is added to the name of a damaged checkpoint that the run went back behind."""
MAX_RECORD = 2**20
"""Bytes; a record takes about a hundred."""
SHARDS = ".shards"
_NAME = re.compile(r"step-(\d{8,})\.(?:safetensors|shards)")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: Its file, or folder.
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
    """Files in the folder, and folders of several ranks, that are checkpoints with a record, newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return [path for path in sorted(found, key=step_of, reverse=True) if _record_path(path).exists()]


def step_of(path: Path) -> int:
    """How many steps lie behind a checkpoint, by the name of its file."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"{path} is no name of a checkpoint")
    return int(found.group(1))


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder for files that are being made, gone when the block ends; of a kill's, `remove_unfinished`."""
    made = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], about: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones before it so that ``keep`` are left.

    Checkpoints of later steps are not counted and not touched: the run went back behind them (`set_aside`).

    Args:
        folder: Made if it is not there.
        step: How many steps lie behind.
        tensors: What to save, on any device.
        about: What to say beside them, as JSON can.
        keep: How many stay, this one among them.

    Raises:
        CheckpointError: A tensor is not finite: a checkpoint of it would push out those that are good.
        OSError: The disk is full, or the folder can't be written to.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if wrong := not_finite(held):
        raise CheckpointError(f"{wrong} is not finite after step {step}: no checkpoint is made of it")
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    make_way(path)
    digest = write_file(path, held, {"schema": SCHEMA, "step": step, **about})
    write_record(path, {"sha256": digest}, keep)
    return path


def write_file(path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> str:
    """Write a checkpoint's file, whole or not at all; its SHA-256.

    Args:
        path: Where; its folder must be there.
        tensors: On the CPU.
        about: What the header says, with ``schema`` and ``step``.

    Raises:
        OSError: The disk is full, or the folder can't be written to.
    """
    with _unfinished(path.parent) as made:
        try:
            save_file(tensors, made / "file", {HEADER: json.dumps(about)})
        except SafetensorError as error:
            raise _as_os_error(error, path) from None
        digest = sha256_of(made / "file")
        with replacing(path) as temporary:
            os.replace(made / "file", temporary)
    return digest


def make_way(path: Path) -> None:
    """Remove what an earlier attempt at a step left, whose record must not speak for the new checkpoint."""
    _record_path(path).unlink(missing_ok=True)
    for suffix in {".safetensors", SHARDS} - {path.suffix}:
        _remove(path.with_suffix(suffix))


def write_record(path: Path, checksums: Mapping[str, Any], keep: int) -> None:
    """Write the record that makes a file or folder count, then remove the oldest before it so that ``keep`` are left.

    Args:
        path: The checkpoint, whole on the disk.
        checksums: ``sha256`` of a file, or ``files`` of a folder, name by name.
        keep: How many stay, this one among them.
    """
    step = step_of(path)
    record = {"schema": SCHEMA, "step": step, **checksums}
    write_atomically(_record_path(path), (json.dumps(record, indent=1) + "\n").encode())
    for old in [found for found in checkpoint_files(path.parent) if step_of(found) <= step][keep:]:
        _record_path(old).unlink(missing_ok=True)
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint's file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """What safetensors says of a write that failed, which is a text alone, as the error that it was."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor that holds NaN or infinity, or None."""
    wrong = (name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor))
    return next(wrong, None)


def _is_finite(tensor: Tensor) -> bool:
    # The sum first: a pass that makes no tensor of truths. It may overflow where no element is infinite.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill left of a checkpoint that never counted. Only the process that writes there may call this."""
    for path in folder.glob("step-*"):
        if _NAME.fullmatch(path.name) and not _record_path(path).exists():
            _remove(path)
    for path in folder.glob("step-*.json"):
        if not any(path.with_suffix(suffix).exists() for suffix in (".safetensors", SHARDS)):
            path.unlink()
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    # Earlier versions left safetensors' own temporary files, too.
    for path in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:
        if path.is_file() or path.is_symlink():
            path.unlink()


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, which are damaged, so that they neither count nor are lost.

    Returns:
        Their new names.
    """
    renamed = []
    for path in checkpoint_files(folder):
        if step_of(path) > step:
            renamed.append(path.with_name(path.name + DAMAGED))
            # The file goes first: a record without one doesn't count either, and is the smaller loss to a kill.
            record = _record_path(path)
            os.replace(path, renamed[-1])
            os.replace(record, record.with_name(record.name + DAMAGED))
    return renamed


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint that has a record, or None."""
    try:
        with _record_path(path).open("rb") as file:
            record = json.loads(file.read(MAX_RECORD))
        expected = record["files" if path.suffix == SHARDS else "sha256"]
    except OSError as error:
        return f"{_record_path(path)} cannot be read ({error.strerror})"
    # JSON that is nested deeply enough is a RecursionError.
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{_record_path(path)} is damaged"
    if path.suffix == SHARDS:
        from dig.training.parallel.shards import folder_damage

        return folder_damage(path, expected)
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
    """What a checkpoint says of itself; None if it is not one of this project's.

    Raises:
        CheckpointError: It is no safetensors file, or of a later version of the project.
    """
    header: str | None
    try:
        if path.is_dir():
            from dig.training.parallel.shards import read_folder_about

            header = read_folder_about(path)
        else:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(HEADER)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    return None if header is None else _parsed(path, header)


def _parsed(path: Path, header: str) -> dict[str, Any]:
    """The header of a checkpoint, as a dictionary of this schema."""
    about: Any = None
    with suppress(ValueError, RecursionError):
        about = json.loads(header)
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} is damaged: its header is no object of JSON")
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
    tensors: dict[str, Tensor] = {}
    try:
        if path.is_dir():
            from dig.training.parallel.shards import read_folder

            found = read_folder(path, lambda name: name.startswith(prefix))
            tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        else:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    if name.startswith(prefix):
                        tensors[name.removeprefix(prefix)] = file.get_tensor(name)
    # A hostile header names dtypes and sizes that torch doesn't have.
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    if wrong := not_finite(tensors):
        raise CheckpointError(f"{path} holds {prefix}{wrong}, which is not finite; use another checkpoint")
    return Checkpoint(path=path, about=about, tensors=tensors)


def checkpoint_sha256(path: Path) -> str:
    """What tells a checkpoint from every other: of a file its SHA-256, of a folder that of its record of all files."""
    return sha256_of(_record_path(path) if path.is_dir() else path)
