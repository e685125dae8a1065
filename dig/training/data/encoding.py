"""Images to latent shards, with a VAE: resumable, and shared out among ranks that need not talk to each other.

What a shard holds depends on the encoding alone, not on the rank, the number of ranks, or an interruption. (The VAE's
arithmetic may depend on the batch size and the device in the last bits; with both the same, shards are equal byte for
byte.)

Shapes: n images; C, h, w channels, rows and columns of a latent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from dig.memory import check_disk, check_memory
from dig.training.data.base import DataError
from dig.training.data.checks import check_whole
from dig.training.data.draws import noise_seed
from dig.training.data.files import shown, write_atomically
from dig.training.data.folder import MAX_UNREADABLE_RUN, ImageFolder
from dig.training.data.latents import check_shard
from dig.training.data.loader import MAX_WORKERS
from dig.training.data.ranks import sharing
from dig.training.data.shards import (
    INDEX_NAME,
    LATENT_SCALE,
    STORAGE_DTYPES,
    Encoding,
    ShardRecord,
    Storage,
    join_records,
    read_record,
    record_name,
    shard_name,
    to_json,
)
from dig.training.data.vae import downsampling, load_vae, sample_latents, weights_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `encode` has come to, after each shard of this rank.

    Attributes:
        shards: Shards of this rank, in all.
        done: Those that are whole now.
        skipped: Those of them that were whole before.
        images: Images in the shards that are done.
        unreadable: File name → reason, of the images that are missing from them.
        joined: Whether the index has been written: all shards of all ranks are whole.
    """

    shards: int
    done: int = 0
    skipped: int = 0
    images: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    joined: bool = False


def _noise(seed: int, indices: list[int], mirrored: bool, shape: tuple[int, int, int]) -> Tensor:
    """(n, C, h, w) standard normal, each image's from its own generator."""
    seeds = (noise_seed(seed, index, mirrored) for index in indices)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(one)) for one in seeds])


def _read_ahead(
    images: ImageFolder, indices: range, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
    """Every index with its image, None where unreadable, in order, ``ahead`` of them being decoded."""
    waiting: list[tuple[int, Future[NDArray[np.uint8] | None]]] = []
    remaining = iter(indices)
    for index in itertools.islice(remaining, ahead):
        waiting.append((index, pool.submit(images.read, index)))
    while waiting:
        index, future = waiting.pop(0)
        yield index, future.result()
        for following in itertools.islice(remaining, 1):
            waiting.append((following, pool.submit(images.read, following)))


def _encode_shard(
    vae: Any,
    images: ImageFolder,
    encoding: Encoding,
    indices: range,
    *,
    batch_size: int,
    pool: ThreadPoolExecutor,
    report: Callable[[int], object],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one shard, and its unreadable images; ``report`` is told how many are encoded."""
    side = encoding.image_size // downsampling(vae)
    shape = (int(vae.config.latent_channels), side, side)
    kept: list[int] = []
    unreadable: dict[str, str] = {}
    latents: tuple[list[Tensor], list[Tensor]] = ([], [])
    batch: list[Tensor] = []

    def flush() -> None:
        if batch:
            pixels = torch.stack(batch)
            for mirrored, found in enumerate(latents):
                noise = _noise(encoding.seed, kept[-len(batch) :], bool(mirrored), shape)
                found.append(sample_latents(vae, pixels.flip(-1) if mirrored else pixels, noise, encoding.scale))
            batch.clear()
            report(len(kept))

    in_a_row = 0
    for index, image in _read_ahead(images, indices, pool, 2 * min(batch_size, len(indices))):
        if image is None:
            name, in_a_row = images.file_name(index), in_a_row + 1
            unreadable[name] = images.reason(index)
            logger.warning("cannot read %s (%s); it is left out", shown(name), unreadable[name])
            if in_a_row == MAX_UNREADABLE_RUN:
                raise DataError(
                    f"{in_a_row} images one after the other cannot be read, up to {images.root / shown(name)} "
                    f"({unreadable[name]}); check the disk and the files"
                )
            continue
        in_a_row = 0
        kept.append(index)
        batch.append(torch.from_numpy(image))
        if len(batch) == batch_size:
            flush()
    flush()
    dtype = STORAGE_DTYPES[encoding.dtype]
    plain, mirrored = (torch.cat(part or [torch.empty(0, *shape)]).to(dtype).contiguous() for part in latents)
    if not all(bool(part.isfinite().all()) for part in (plain, mirrored)):
        raise DataError(f"the latents of {images.root} are not finite as {encoding.dtype}; choose another dtype or VAE")
    labels = torch.tensor([images.label(index) for index in kept], dtype=torch.int64)
    sources = torch.tensor(kept, dtype=torch.int64)
    return {"labels": labels, "latents": plain, "mirrored": mirrored, "sources": sources}, unreadable


def _finished(out: Path, number: int, encoding: Encoding) -> ShardRecord | None:
    """The record of a shard that is whole, or None where it has to be made; a damaged one is reported."""
    if not (out / record_name(number)).is_file():
        return None
    try:
        theirs, record = read_record(out, number)
    except DataError as error:
        logger.warning("%s; the shard is made again", error)
        return None
    if theirs != encoding:
        raise DataError(
            f"{out} holds latents of another encoding ({'; '.join(encoding.differences(theirs))}: asked for, there); "
            "choose another folder, or remove this one"
        )
    if wrong := check_shard(out, encoding, number, record):
        logger.warning("%s; the shard is made again", wrong)
        return None
    return record


def _check_out(images: Path, out: Path) -> None:
    """Raise DataError where no shards may lie."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder for the latent shards")
    if out.resolve().is_relative_to(images.resolve()):
        raise DataError(f"{out} lies in the images' own folder, {images}, where it would be a class; choose another")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"cannot make {out}: nothing can be written in {there}; choose another folder")


def _check_room(out: Path, encoding: Encoding, numbers: range, shape: tuple[int, int, int], batch_size: int) -> None:
    """Raise ValueError where a shard does not fit into memory, or those that are missing not on the disk."""
    latent = 2 * math.prod(shape)  # as it is and mirrored
    width = STORAGE_DTYPES[encoding.dtype].itemsize
    largest = len(encoding.sources(0))
    check_memory(
        {
            # In fp32, as they are stored, and as the bytes of the file.
            f"a shard of {largest:,} images": largest * latent * (4 + 2 * width),
            "a batch of images": min(batch_size, largest) * 3 * encoding.image_size**2 * 5,
        },
        device="cpu",
        advice="choose a smaller --shard-size or --batch",
    )
    missing = [number for number in numbers if not (out / shard_name(number)).is_file()]
    check_disk(
        out,
        sum(len(encoding.sources(number)) for number in missing) * latent * width,
        f"{len(missing):,} shards",
        "make room, or choose another folder",
    )


def encode(
    images: str | Path,
    out: str | Path,
    *,
    vae: str,
    image_size: int = 256,
    batch_size: int = 32,
    shard_size: int = 4096,
    dtype: Storage = "fp16",
    seed: int = 0,
    scale: float = LATENT_SCALE,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    report: Callable[[int, int], object] = lambda done, total: None,
    meet: Callable[[], object] = lambda: None,
    agree: Callable[[Mapping[str, Any]], object] = lambda facts: None,
    sees: Callable[[Path], object] = lambda folder: None,
) -> Iterator[Progress]:
    """Encode a folder of class folders. An iterator: it works while it is iterated, and yields after each shard.

    Each image is cropped, encoded as it is and mirrored, and its latents sampled from the posterior with a generator
    of its own. Shards that are whole are skipped after their checksum was compared; others are made again. An image
    that cannot be read is left out and named in the shard's record.

    Args:
        images: A folder that `ImageFolder` reads.
        out: Folder of the shards; made if it is not there.
        vae: See `load_vae`.
        image_size: Side of the cropped images in pixels, a multiple of the VAE's downsampling.
        batch_size: Images that the VAE takes at once.
        shard_size: Images a shard.
        dtype: How latents are stored: ``fp16``, ``bf16`` or ``fp32``. The VAE runs in fp32, with its convolutions in
            TF32 on a GPU that has it.
        seed: Of the sampling.
        scale: What latents are multiplied with.
        device: Where the VAE runs.
        rank: Of this process, which makes the shards ``rank``, ``rank + world_size``, and so on.
        world_size: How many processes share the work.
        workers: Threads that decode images. Default: one for each processor that this process may use, 16 at most.
        report: Called after every batch with this rank's images that lie behind, and all of them.
        meet: Called when this rank's shards are made; may wait for the other ranks, and rank 0 then finds all of them.
        agree: Called before the first shard with what makes them what they are; may refuse what other ranks differ in.
        sees: Called then with ``out``, which is there; may refuse a folder that is not the other ranks'.

    Raises:
        DataError: The images, the VAE or the folder of the shards cannot be used, or no image can be read.
        ValueError: An argument is out of its range, or asks for more memory or disk than there is; or another process
            is encoding into the folder.
        MissingPackageError: diffusers is not installed.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("image_size", image_size)):
        check_whole(name, value, least=1)
    check_whole("world_size", world_size, least=1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below the world size {world_size}; got {rank} of {world_size}")
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be 1 to {MAX_WORKERS}; got {workers}")
    from dig.training.identity import data_sha256  # Here, for it knows all kinds of data.

    out = Path(out)
    _check_out(Path(images), out)
    folder = ImageFolder(images, image_size=image_size)
    # All that can be wrong with it is found before the VAE is fetched.
    encoding = Encoding(
        listing_sha256=data_sha256(folder),
        images=len(folder),
        class_names=folder.class_names,
        image_size=image_size,
        vae=vae,
        vae_sha256="0" * 64,
        scale=scale,
        dtype=dtype,
        seed=seed,
        shard_size=shard_size,
    )
    model = load_vae(vae, torch.device(device))
    if image_size % downsampling(model) or model.config.in_channels != 3:
        raise DataError(
            f"the VAE {vae!r} takes {model.config.in_channels} channels and sides that are multiples of "
            f"{downsampling(model)}; got 3 channels of {image_size}x{image_size}"
        )
    if rank == 0 and model.config.scaling_factor != scale:
        logger.warning("the VAE %r names the scale %g; %g is used", vae, model.config.scaling_factor, scale)
    encoding = dataclasses.replace(encoding, vae_sha256=weights_sha256(model))
    agree({**dataclasses.asdict(encoding), "batch": batch_size})
    numbers = range(rank, encoding.shards, world_size)
    side = image_size // downsampling(model)
    out.mkdir(parents=True, exist_ok=True)
    sees(out)
    skipped = done = count = 0
    unreadable: dict[str, str] = {}
    with (
        sharing(out, rank, world_size),
        ThreadPoolExecutor(workers or min(16, len(os.sched_getaffinity(0)))) as pool,
    ):
        _check_room(out, encoding, numbers, (int(model.config.latent_channels), side, side), batch_size)
        images_in_all = sum(len(encoding.sources(number)) for number in numbers)
        behind = 0
        for number in numbers:
            record = _finished(out, number, encoding)
            if record is not None:
                skipped += 1
            else:
                record = _make_shard(
                    out,
                    number,
                    model,
                    folder,
                    encoding,
                    batch_size=batch_size,
                    pool=pool,
                    whole=done,
                    report=partial(_within, report, behind, images_in_all),
                )
            done += 1
            behind += len(encoding.sources(number))
            report(behind, images_in_all)
            count += record.count
            unreadable |= record.unreadable
            yield Progress(shards=len(numbers), done=done, skipped=skipped, images=count, unreadable=dict(unreadable))
        meet()
        if rank == 0:
            joined = _join(out)
            yield Progress(
                shards=len(numbers), done=done, skipped=skipped, images=count, unreadable=unreadable, joined=joined
            )


def _within(report: Callable[[int, int], object], before: int, total: int, done: int) -> None:
    report(before + done, total)


def _make_shard(
    out: Path,
    number: int,
    vae: Any,
    images: ImageFolder,
    encoding: Encoding,
    *,
    batch_size: int,
    pool: ThreadPoolExecutor,
    whole: int,
    report: Callable[[int], object],
) -> ShardRecord:
    """Encode a shard and write it; ``whole`` is how many lie behind, for the message where the disk is full."""
    # Neither may speak of a shard that is about to change: the index first, then the record.
    (out / INDEX_NAME).unlink(missing_ok=True)
    (out / record_name(number)).unlink(missing_ok=True)
    tensors, bad = _encode_shard(
        vae, images, encoding, encoding.sources(number), batch_size=batch_size, pool=pool, report=report
    )
    try:
        return _write_shard(out, number, encoding, tensors, bad)
    except OSError as error:
        raise DataError(
            f"cannot write {out / shard_name(number)}: {error.strerror or error}; {whole} shards are whole; make room, "
            "and go on with the same command"
        ) from None


def _write_shard(
    out: Path, number: int, encoding: Encoding, tensors: dict[str, Tensor], unreadable: dict[str, str]
) -> ShardRecord:
    _, channels, rows, columns = tensors["latents"].shape
    content = save(tensors)
    record = ShardRecord(
        file=shard_name(number),
        count=len(tensors["labels"]),
        shape=(channels, rows, columns),
        sha256=hashlib.sha256(content).hexdigest(),
        unreadable=unreadable,
    )
    write_atomically(out / record.file, content)
    # Last: a shard counts as made when its record is there.
    write_atomically(out / record_name(number), to_json(encoding, [record]))
    return record


def _join(out: Path) -> bool:
    """Write the index if all records are there; rank 0 alone does this, so that no two processes write one file."""
    try:
        encoding, records = join_records(out)
    except DataError:
        return False
    if not any(record.count for record in records):
        raise DataError(f"none of the {encoding.images:,} images can be read; {out} has the reasons in its records")
    write_atomically(out / INDEX_NAME, to_json(encoding, records))
    return True
