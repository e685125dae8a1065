"""Checkpoints that several ranks write together, through torch.distributed.checkpoint, as safetensors.

A checkpoint is a folder ``step-00001000.shards`` with a file of every rank, ``about.json``, and beside it the record
``step-00001000.json`` with the SHA-256 of each file. It counts when its record is there, as one that a single process
writes (`dig.training.saving`). PyTorch's own format would keep an index as a pickle, ``.metadata``, which reading could
run code of; the storage writer and reader of safetensors keep it in each file's header, as JSON.

What lies on the disk is the same however many ranks wrote it: whole tensors by name, in pieces. So any number of ranks
reads it again, each what it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dig.training.data.files import sha256_of, sync_folder, write_atomically

SUFFIX = ".shards"
ABOUT = "about.json"
_DIGEST = ".sha256"
_ERRORS = (OSError, SafetensorError, RuntimeError, TypeError, ValueError, KeyError, OverflowError, AttributeError)
"""What reading files raises that somebody made up."""


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a checkpoint's folder under another name, and gives it its own once all of it is on the disk.

    Args:
        making: The folder while it is made.
        about: What `ABOUT` says.
        publish: Called by rank 0 with the checksums, file by file, when ``making`` is whole: gives it its name.
    """

    def __init__(self, making: Path, about: Mapping[str, Any], publish: Callable[[dict[str, str]], object]) -> None:
        super().__init__(path=str(making), save_distributed=True)
        self._making = making
        self._about = about
        self._publish = publish

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """By rank 0, before any file is written: what a kill left there goes."""
        shutil.rmtree(self._making, ignore_errors=True)
        self._making.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """By every rank: its files, and their checksums beside them."""
        written: Future[list[WriteResult]] = super().write_data(plan, planner)
        for name in sorted({result.storage_data.relative_path for result in written.wait()}):
            path = self._making / name
            write_atomically(path.with_name(name + _DIGEST), sha256_of(path).encode())
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """By rank 0, once all ranks' files are written.

        Raises:
            ValueError: One of them is elsewhere.
        """
        content = (json.dumps(self._about, indent=1) + "\n").encode()
        write_atomically(self._making / ABOUT, content)
        checksums = {ABOUT: hashlib.sha256(content).hexdigest()}
        written = {result.storage_data.relative_path for rank in results for result in rank}
        there = {path.name.removesuffix(_DIGEST) for path in self._making.glob(f"*{_DIGEST}")}
        if lacking := sorted(written - there):
            raise ValueError(
                f"{lacking[0]}, which another rank wrote, is not in {self._making}: all ranks need one folder, on a "
                "disk that all machines share"
            )
        for path in sorted(self._making.glob(f"*{_DIGEST}")):
            checksums[path.name.removesuffix(_DIGEST)] = path.read_text()
            path.unlink()
        sync_folder(self._making)
        self._publish(checksums)


def give_name(making: Path, path: Path) -> None:
    """Make a whole folder the checkpoint; what a kill left under its name, without a record, goes."""
    shutil.rmtree(path, ignore_errors=True)
    os.replace(making, path)
    sync_folder(path.parent)


def folder_damage(path: Path, files: Any) -> str | None:
    """What is wrong with a checkpoint's folder, or None.

    Args:
        path: The folder.
        files: Names and checksums, as the record has them.
    """
    known = isinstance(files, dict) and all(isinstance(one, str) for pair in files.items() for one in pair)
    if not known or ABOUT not in files or any(Path(name).name != name for name in files):
        return f"the record of {path} is damaged"
    try:
        there = {entry.name for entry in path.iterdir()}
        if missing := sorted(files.keys() - there):
            return f"{path} lacks {missing[0]}"
        # The reader takes all files of tensors that it finds.
        if more := sorted(name for name in there - files.keys() if name.endswith(".safetensors")):
            return f"{path} holds {more[0]}, which is none of its own"
        for name, expected in files.items():
            if sha256_of(path / name) != expected:
                return f"{path / name} is damaged: its checksum is not the recorded one"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def read_folder_about(path: Path) -> str:
    """The text of `ABOUT`. Raises OSError or ValueError where it can't be read."""
    return (path / ABOUT).read_text(encoding="utf-8")


def read_folder(path: Path, names: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Tensors of a checkpoint's folder, whole, on the CPU: those of whose names ``names`` says so.

    Raises:
        ValueError: It can't be read, or lacks a part of one.
    """
    with _reading():
        found = _metadata(path)
        chosen = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found if names(name)}
        _load(path, chosen)
    return chosen


def shapes_of(path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """(dtype, shape) of every tensor of a checkpoint's folder, by name. Raises ValueError as `read_folder`."""
    with _reading():
        return {name: (entry.properties.dtype, entry.size) for name, entry in _metadata(path)}


def load_folder(path: Path, state: Mapping[str, Tensor]) -> None:
    """Overwrite tensors, sharded or not, with those of the same names: of each this process reads its own share.

    Raises:
        ValueError: As `read_folder`.
    """
    with _reading():
        _load(path, dict(state))


def _load(path: Path, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        # No group is needed to read, which PyTorch remarks.
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load.*")
        load(cast(Any, state), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _metadata(path: Path) -> Iterable[tuple[str, TensorStorageMetadata]]:
    """(name, what is there of it) of every tensor; all of it must be."""
    found = []
    for name, entry in HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(f"parts of {name} are missing")
        found.append((name, entry))
    return found


@contextmanager
def _reading() -> Iterator[None]:
    reason: BaseException
    try:
        yield
        return
    except _ERRORS as error:
        reason = error
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
    raise ValueError(" ".join(str(reason).split())[:200] or type(reason).__name__)
