"""Samples into an npz file, batch by batch: what is cut off goes on, two never mix, and what fails keeps the rest.

Shapes: N samples, n of a part, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dig.locks import only_process
from dig.memory import check_disk, check_memory
from dig.sampling.runner import BatchSampler
from dig.sampling.sharing import ALONE, Sharing
from dig.training.data.files import replacing, write_atomically

logger = logging.getLogger(__name__)

ABOUT = "about.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far `sample_to_npz` has come: samples that are done, of them made before, and in all."""

    done: int
    skipped: int
    total: int


def check_name(path: Path, suffix: str) -> None:
    """Raise ValueError unless a file's name has the suffix of its content's kind."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} would hold a {suffix.removeprefix('.').upper()} file: give it a name in {suffix}")


def check_output(path: Path, suffix: str) -> None:
    """Make the folder of a file that is to be written, and write there, before there is anything to lose.

    Args:
        path: The file.
        suffix: That its name must have, ``.npz`` say: the content's kind.

    Raises:
        ValueError: The name has another suffix, or is a folder's.
        OSError: The folder can't be made or written to.
    """
    check_name(path, suffix)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=path.parent):
        pass


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other processes away from a file to be written.

    Raises:
        LockedError: Another process is at it.
    """
    message = f"another process is sampling into {path}; wait for it, or choose another file"
    with only_process(path.with_name(f".{path.name}.lock"), message):
        yield


def sample_to_npz(
    sampler: BatchSampler,
    path: Path,
    *,
    batch: int,
    about: dict[str, Any],
    name: Literal["arr_0", "latents"] = "arr_0",
    sharing: Sharing = ALONE,
) -> Iterator[Progress]:
    """Sample the plan into an npz file. An iterator: works while it is iterated, and yields after each batch.

    The file holds the samples, as they are finished: images as ``arr_0``, (N, H, W, 3) uint8, which is what ADM's
    evaluator reads. Beside them ``arr_1``, (N,) int64 labels, and ``about``, JSON text. Batches lie in the folder
    ``path`` + ``.parts`` until all are there; a run that finds them goes on from there.

    Args:
        sampler: Samples by index.
        path: The npz file.
        batch: Samples that are saved at a time.
        about: What the samples are of; samples of something else are never mixed in.
        name: Under which the samples lie in the file.
        sharing: Of several processes that call this alike, each makes some of the batches, and the first one the file.

    Raises:
        ValueError: The folder of the batches is of other samples, or of something else.
        LockedError: Another process samples into the same file.
        TooLargeError: The batches need more memory, or the file more room on the disk, than there is.
        NotFiniteError: What was sampled is not finite.
        OSError: A file can't be written; the batches before are kept.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    with only_writer(path) if sharing.leads else nullcontext():
        try:
            yield from _sample_to_npz(sampler, path, batch=batch, about=about, name=name, sharing=sharing)
        finally:
            if sharing.leads:
                _tidy(path.with_name(path.name + ".parts"))


def _sample_to_npz(
    sampler: BatchSampler, path: Path, *, batch: int, about: dict[str, Any], name: str, sharing: Sharing
) -> Iterator[Progress]:
    plan = sampler.plan
    about = {**about, "plan": dataclasses.asdict(plan)}
    parts = path.with_name(path.name + ".parts")
    stop = plan.first + plan.count
    starts = range(plan.first, stop, batch)

    def cut(start: int) -> range:
        return range(start, min(start + batch, stop))

    def begin() -> list[int]:
        """Open the folder of the parts; where those start that are missing."""
        # The same samples cut otherwise are other files.
        _open_parts(parts, (json.dumps({**about, "batch": batch, "name": name}, indent=1) + "\n").encode())
        start = plan.first
        if not (parts / _part(start)).exists():
            # One of each size shows what all need; the model's batch that it is of is kept for the first part.
            size = sampler.samples(range(start, start + 1)).nbytes
            check_memory({"a part": 2 * size * min(batch, plan.count)}, device="cpu", advice="try a smaller --batch")
            # Parts and the file that they are joined in.
            check_disk(parts, 2 * size * plan.count, f"{plan.count:,} samples", "try fewer --samples")
        return [start for start in starts if not _holds(parts / _part(start), len(cut(start)))]

    sharing.agree({**about["plan"], **about, "plan": None, "batch": batch, "name": name})
    missing = sharing.from_leader(begin)
    sharing.sees(parts)
    done = skipped = plan.count - sum(len(cut(start)) for start in missing)
    for start in sharing.mine(missing):
        indices = cut(start)
        sharing.begins(f"sampling {indices[0]} to {indices[-1]}")
        with replacing(parts / _part(start)) as temporary, temporary.open("wb") as stream:
            np.save(stream, sampler.samples(indices))
        done += len(indices)
        yield Progress(done=done, skipped=skipped, total=plan.count)
    sharing.meet()
    if not sharing.leads:
        return
    labels = np.array(plan.labels(range(plan.first, stop)), dtype=np.int64)
    files = [parts / _part(start) for start in starts]
    _join(path, files, name, {"arr_1": labels, "about": np.array(json.dumps(about))})
    for file in files:
        file.unlink(missing_ok=True)
    yield Progress(done=plan.count, skipped=skipped, total=plan.count)


def _tidy(parts: Path) -> None:
    """Remove a folder without parts: what was refused or failed before the first should not block the next command."""
    if parts.is_symlink() or not (parts / ABOUT).is_file() or any(parts.glob("part-*.npy")):
        return
    with suppress(OSError):  # What else lies there is someone's.
        for file in [parts / ABOUT, *parts.glob(".*.tmp")]:
            file.unlink()
        parts.rmdir()


def _part(start: int) -> str:
    return f"part-{start:08d}.npy"


def count_parts(path: Path) -> int:
    """How many samples lie beside an npz file that is not whole yet."""
    count = 0
    for file in path.with_name(path.name + ".parts").glob("part-*.npy"):
        with suppress(OSError, EOFError, ValueError, TypeError, SyntaxError):
            count += len(np.load(file, mmap_mode="r"))
    return count


def _open_parts(parts: Path, manifest: bytes) -> None:
    """Begin a folder of parts, or find the one that was begun for the same."""
    if parts.is_symlink() or (parts.exists() and not parts.is_dir()):
        raise ValueError(f"{parts} is in the way of the batches; remove it, or choose another file")
    parts.mkdir(parents=True, exist_ok=True)
    if not (parts / ABOUT).exists():
        if any(not entry.name.startswith(".") for entry in parts.iterdir()):
            raise ValueError(f"{parts} holds something else than batches of samples; choose another file")
        write_atomically(parts / ABOUT, manifest)
    elif (parts / ABOUT).read_bytes() != manifest and not any(parts.glob("part-*.npy")):
        write_atomically(parts / ABOUT, manifest)  # a kill before the first part
    elif (parts / ABOUT).read_bytes() != manifest:
        raise ValueError(
            f"{parts} holds the beginning of other samples; repeat their options to go on with them, remove the "
            "folder, or choose another file"
        )


def _holds(file: Path, count: int) -> bool:
    """Whether a part is there and whole; one that isn't is made again."""
    if not file.exists():
        return False
    try:
        return len(np.load(file, mmap_mode="r")) == count
    except (OSError, EOFError, ValueError, TypeError, SyntaxError):
        logger.warning("%s is damaged, and is made again", file)
        return False


def _join(path: Path, files: list[Path], name: str, others: dict[str, NDArray[Any]]) -> None:
    """Lay the parts end to end in one array of an npz file, without holding them all."""
    shapes = [np.load(file, mmap_mode="r").shape for file in files]
    first = np.load(files[0], mmap_mode="r")
    for file in files:
        part = np.load(file, mmap_mode="r")
        if (part.dtype, part.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ValueError(f"{file} holds samples of another kind than {files[0]}; remove it and sample again")
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (sum(shape[0] for shape in shapes), *shapes[0][1:]),
    }
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # A fixed date: equal samples, equal files.
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for file in files:
                entry.write(np.load(file).tobytes())
        for other, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{other}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def first_samples(path: Path, count: int) -> NDArray[Any]:
    """The first ``count`` images of a file that `sample_to_npz` wrote, (count, H, W, 3), without reading the others."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
        np.lib.format.read_magic(entry)
        shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
        each = dtype.itemsize * int(np.prod(shape[1:]))
        return np.frombuffer(entry.read(count * each), dtype=dtype).reshape(count, *shape[1:])
