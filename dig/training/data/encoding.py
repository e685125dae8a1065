"""Images to latent shards, with a VAE: resumable, and shared out among ranks that need not talk to each other.

What a shard holds depends on the encoding alone, not on the rank, the number of ranks, or an interruption. (The VAE's
arithmetic may depend on the batch size and the device in the last bits; with both the same, shards are equal byte for
byte.)

Shapes: n images; C, h, w channels, rows and columns of a latent.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from dig.packages import require
from dig.training.data.base import DataError, pixels_to_unit
from dig.training.data.draws import noise_seed
from dig.training.data.files import write_atomically
from dig.training.data.folder import MAX_UNREADABLE_RUN, ImageFolder
from dig.training.data.latents import (
    INDEX_NAME,
    LATENT_SCALE,
    STORAGE_DTYPES,
    Encoding,
    ShardRecord,
    Storage,
    check_shard,
    join_records,
    read_json,
    record_name,
    shard_name,
    to_json,
)

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


def load_vae(name: str, device: torch.device) -> Any:
    """diffusers' AutoencoderKL, in fp32, frozen.

    Args:
        name: A folder with the VAE's ``config.json``, one with a whole pipeline (its ``vae`` is taken), or a hub name.
        device: Where it will run.

    Raises:
        MissingPackageError: diffusers is not installed.
        DataError: There is no such VAE.
    """
    diffusers = require("diffusers", "encode")
    # Only safetensors: the other format is a pickle, which can run anything.
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32}
    if (Path(name) / "vae" / "config.json").is_file():
        options["subfolder"] = "vae"
    kind = diffusers.AutoencoderKL
    try:
        vae = kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot load the VAE {name!r}: {' '.join(str(error).split())[:300]}") from None
    if getattr(vae.config, "shift_factor", None):
        raise DataError(
            f"the VAE {name!r} shifts its latents, which is not supported; Stable Diffusion's 1 and 2 do not"
        )
    return vae.to(device).eval().requires_grad_(False)


def weights_sha256(vae: torch.nn.Module) -> str:
    """SHA-256 of a model's names, shapes and weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _downsampling(vae: Any) -> int:
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


def _sample(vae: Any, pixels: Tensor, noise: Tensor, scale: float) -> Tensor:
    """(n, 3, H, W) uint8 to (n, C, h, w) on the CPU: the posterior's mean plus its deviation times noise, scaled."""
    device = next(vae.parameters()).device
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        posterior = vae.encode(pixels_to_unit(pixels.to(device))).latent_dist
        return ((posterior.mean + posterior.std * noise.to(device)) * scale).cpu()


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
    vae: Any, images: ImageFolder, encoding: Encoding, indices: range, *, batch_size: int, pool: ThreadPoolExecutor
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one shard, and its unreadable images."""
    side = encoding.image_size // _downsampling(vae)
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
                found.append(_sample(vae, pixels.flip(-1) if mirrored else pixels, noise, encoding.scale))
            batch.clear()

    in_a_row = 0
    for index, image in _read_ahead(images, indices, pool, 2 * batch_size):
        if image is None:
            name, in_a_row = images.file_name(index), in_a_row + 1
            unreadable[name] = images.reason(index)
            logger.warning("cannot read %s (%s); it is left out", name, unreadable[name])
            if in_a_row == MAX_UNREADABLE_RUN:
                raise DataError(
                    f"{in_a_row} images one after the other cannot be read, up to {images.root / name} "
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
    path = out / record_name(number)
    if not path.is_file():
        return None
    try:
        theirs, (record,) = read_json(path)
    except DataError as error:
        logger.warning("%s; the shard is made again", error)
        return None
    if theirs != encoding:
        raise DataError(
            f"{out} holds latents of another encoding ({'; '.join(encoding.differences(theirs))}: asked for, there); "
            "choose another folder, or remove this one"
        )
    if wrong := check_shard(out, record):
        logger.warning("%s; the shard is made again", wrong)
        return None
    return record


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

    Raises:
        DataError: The images, the VAE or the folder of the shards cannot be used.
        MissingPackageError: diffusers is not installed.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below the world size {world_size}; got {rank} of {world_size}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    folder = ImageFolder(images, image_size=image_size)
    model = load_vae(vae, torch.device(device))
    if image_size % _downsampling(model) or model.config.in_channels != 3:
        raise DataError(
            f"the VAE {vae!r} takes {model.config.in_channels} channels and sides that are multiples of "
            f"{_downsampling(model)}; got 3 channels of {image_size}x{image_size}"
        )
    if rank == 0 and model.config.scaling_factor != scale:
        logger.warning("the VAE %r names the scale %g; %g is used", vae, model.config.scaling_factor, scale)
    encoding = Encoding(
        listing_sha256=folder.listing_sha256(),
        images=len(folder),
        class_names=folder.class_names,
        image_size=image_size,
        vae=vae,
        vae_sha256=weights_sha256(model),
        scale=scale,
        dtype=dtype,
        seed=seed,
        shard_size=shard_size,
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    numbers = range(rank, encoding.shards, world_size)
    skipped = done = count = 0
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(workers or min(16, len(os.sched_getaffinity(0)))) as pool:
        for number in numbers:
            record = _finished(out, number, encoding)
            if record is not None:
                skipped += 1
            else:
                # Neither may speak of a shard that is about to change: the index first, then the record.
                (out / INDEX_NAME).unlink(missing_ok=True)
                (out / record_name(number)).unlink(missing_ok=True)
                indices = range(number * shard_size, min((number + 1) * shard_size, len(folder)))
                tensors, bad = _encode_shard(model, folder, encoding, indices, batch_size=batch_size, pool=pool)
                record = _write_shard(out, number, encoding, tensors, bad)
            done += 1
            count += record.count
            unreadable |= record.unreadable
            yield Progress(shards=len(numbers), done=done, skipped=skipped, images=count, unreadable=dict(unreadable))
    if rank == 0:
        joined = _join(out)
        yield Progress(
            shards=len(numbers), done=done, skipped=skipped, images=count, unreadable=unreadable, joined=joined
        )


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
    write_atomically(out / INDEX_NAME, to_json(encoding, records))
    return True
